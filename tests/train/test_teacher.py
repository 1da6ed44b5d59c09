from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from xdistil_fast.cli import main
from xdistil_fast.train.alignment import windows_of
from xdistil_fast.train.devices import fast_bf16
from xdistil_fast.train.teacher import Teacher, backend_of, load_base, load_tokenizer

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "mara", "lin", "##den", "left", "oslo", "in", "."]
POSITIONS = 18


def make_model(folder: Path, *, labels: list[str] | None = None, **config: Any) -> Path:
    """A random tiny BERT with its tokeniser, for token classification where it has labels."""
    torch.manual_seed(5)
    backend = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(4)  # as sentence encoders ship it; must not cut anything here
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    names = dict(enumerate(labels or []))
    settings = transformers.BertConfig(
        **{
            "vocab_size": len(PIECES) + 3,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.5,
            **config,
        }
    )
    if labels:
        settings.id2label, settings.label2id = names, {v: k for k, v in names.items()}
        transformers.BertForTokenClassification(settings).save_pretrained(folder)
    else:
        transformers.BertModel(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher", labels=LABELS)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher.from_pretrained(folder, device="cpu")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def direct(teacher: Teacher, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of one sequence by a plain call of the model."""
    with torch.no_grad():
        output = teacher.model(input_ids=torch.tensor([[2, *ids, 3]])).logits
    return np.asarray(output[0, 1:-1].numpy())


def test_attributes(teacher: Teacher) -> None:
    assert teacher.labels == LABELS
    assert teacher.hidden_size == 16
    assert teacher.max_pieces == POSITIONS - 2
    assert (teacher.prefix_ids, teacher.suffix_ids) == ([2], [3])
    untruncated = teacher.tokenizer.encode("Mara left Oslo in Mara left").tokens
    assert untruncated == ["[CLS]", "mara", "left", "oslo", "in", "mara", "left", "[SEP]"]
    assert teacher.parameters == sum(p.numel() for p in teacher.model.parameters())
    assert not teacher.model.training


@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_logits_are_those_of_each_sequence_alone(teacher: Teacher, batch_tokens: int) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(4, 14, size=n).tolist() for n in (3, 0, POSITIONS - 2, 1, 7, 7, 2)]
    finished: list[int] = []
    result = teacher.logits(sequences, batch_tokens=batch_tokens, progress=finished.append)
    assert sum(finished) == len(sequences)
    for ids, logits in zip(sequences, result, strict=True):
        assert logits.shape == (len(ids), len(LABELS))
        assert logits.dtype == np.float32
        if ids:
            np.testing.assert_allclose(logits, direct(teacher, ids), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_and_leaves_the_weights(folder: Path, teacher: Teacher) -> None:
    narrow = Teacher.from_pretrained(folder, "cpu", "bfloat16")
    assert (narrow.precision, narrow.digest()) == ("bfloat16", teacher.digest())
    auto = "bfloat16" if fast_bf16(narrow.device) else "float32"
    assert Teacher.from_pretrained(folder, "cpu", "auto").precision == auto
    ids = [[5, 6, 7], [8]]
    found, wide = narrow.outputs(ids, layer=1), teacher.outputs(ids, layer=1)
    for kind in range(2):
        for ours, theirs in zip(found[kind], wide[kind], strict=True):
            assert ours.dtype == np.float32
            assert not np.array_equal(ours, theirs)
            np.testing.assert_allclose(ours, theirs, atol=0.02 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_eval_asks_in_a_precision(
    folder: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "test.conll"
    data.write_text("mara B-PER\nleft O\noslo B-LOC\n\n", "utf-8")
    asked: list[str] = []
    real = Teacher.logits

    def logits(self: Teacher, *args: Any, **options: Any) -> Any:
        asked.append(self.precision)
        return real(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "logits", logits)
        arguments = ["eval", str(folder), "--data", str(data), "--json", "--precision", precision]
        assert main(arguments) == 0
    assert set(asked) == {precision}
    assert json.loads(capsys.readouterr().out)["model"]["precision"] == precision


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--precision", "int8"], "a teacher runs in float32 or bfloat16"),
        (["--threads", "2"], "--threads is for students"),
    ],
)
def test_eval_refuses_what_a_teacher_lacks(
    folder: Path,
    tmp_path: Path,
    option: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "test.conll"
    data.write_text("mara B-PER\n\n", "utf-8")
    assert main(["eval", str(folder), "--data", str(data), *option]) == 2
    assert message in capsys.readouterr().err


def test_long_sequences_are_read_in_windows(teacher: Teacher) -> None:
    size = teacher.max_pieces
    ids = np.random.default_rng(1).integers(4, 14, size=3 * size + 5)
    (logits,) = teacher.logits([ids])
    assert logits.shape == (len(ids), len(LABELS))
    expected = np.empty_like(logits)
    for start, stop, keep, end in windows_of(len(ids), size):
        expected[keep:end] = direct(teacher, ids[start:stop].tolist())[keep - start : end - start]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_outputs_are_logits_and_states_of_a_layer(teacher: Teacher, layer: int) -> None:
    rng = np.random.default_rng(0)
    size = teacher.max_pieces
    sequences = [rng.integers(4, 14, size=n).tolist() for n in (3, 0, size, 3 * size + 5, 1)]
    logits, states = teacher.outputs(sequences, layer=layer)
    for ids, found, plain in zip(sequences, logits, teacher.logits(sequences), strict=True):
        np.testing.assert_array_equal(found, plain, err_msg=str(ids))
    for ids, found in zip(sequences, states, strict=True):
        assert (found.shape, found.dtype) == ((len(ids), 16), np.float32)
        for start, stop, keep, end in windows_of(len(ids), size):
            with torch.no_grad():
                whole = teacher.model(
                    input_ids=torch.tensor([[2, *ids[start:stop], 3]]), output_hidden_states=True
                ).hidden_states[layer]
            expected = whole[0, 1:-1].numpy()[keep - start : end - start]
            np.testing.assert_allclose(found[keep:end], expected, rtol=1e-4, atol=1e-5)
    _, reduced = teacher.outputs(sequences, layer=layer, reduce=lambda rows: rows[:, :3] + 1)
    for found, kept in zip(states, reduced, strict=True):
        np.testing.assert_allclose(kept, found[:, :3] + 1, rtol=1e-6)


def test_layers_are_counted_from_both_ends(teacher: Teacher) -> None:
    assert [teacher.resolve_layer(n) for n in (1, 2, -1, -2)] == [1, 2, 2, 1]
    for wrong in (0, 3, -3):
        with pytest.raises(ValueError, match=f"teacher_layer is {wrong}; the teacher has 2 layers"):
            teacher.resolve_layer(wrong)


@pytest.mark.parametrize(("depth", "layer"), [(1, 1), (2, 2), (6, 4), (12, 7), (24, 14)])
def test_the_papers_layer(teacher: Teacher, depth: int, layer: int) -> None:
    real = teacher.model.config.num_hidden_layers
    try:
        teacher.model.config.num_hidden_layers = depth
        assert teacher.resolve_layer(None) == layer
    finally:
        teacher.model.config.num_hidden_layers = real


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 28, 29, 100])
def test_windows_cover_everything_once(length: int) -> None:
    windows = windows_of(length, 16)
    kept = [i for _, _, keep, end in windows for i in range(keep, end)]
    assert kept == list(range(length))
    for start, stop, keep, end in windows:
        assert 0 <= start <= keep < end <= stop <= length
        assert stop - start <= 16
        # Context of at least half the overlap, but at the ends of the text.
        assert keep == 0 or keep - start >= 2
        assert end == length or stop - end >= 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_windows(size: int) -> None:
    assert [w[2:] for w in windows_of(4, size)][-1][1] == 4


def test_training_mode_comes_back(folder: Path) -> None:
    teacher = Teacher.from_pretrained(folder, device="cpu")
    teacher.model.train()
    first = teacher.logits([[4, 5]])[0]
    assert teacher.model.training
    assert np.array_equal(first, teacher.logits([[4, 5]])[0])  # no dropout was at work


def test_tag_words(teacher: Teacher) -> None:
    sentences = [["Mara", "Linden"], [], ["\u0007", "Oslo", "."]]
    tags = teacher.tag_words(sentences)
    assert [len(row) for row in tags] == [2, 0, 3]
    assert tags[2][0] == "O"
    best = direct(teacher, [4, 5, 6]).argmax(axis=1)
    assert tags[0] == [LABELS[best[0]], LABELS[best[1]]]
    assert teacher.tag_words([]) == []
    assert teacher.tag_words([[]]) == [[]]


def test_word_piece_embeddings(teacher: Teacher) -> None:
    table = teacher.word_piece_embeddings()
    assert table.shape == (len(PIECES) + 3, 16)
    assert table.dtype == np.float32
    before = teacher.model.get_input_embeddings().weight[4, 0].item()
    table[4, 0] += 1
    assert teacher.model.get_input_embeddings().weight[4, 0].item() == before


def test_digest_follows_weights_tokeniser_and_config(folder: Path, copy: Path) -> None:
    digest = Teacher.from_pretrained(folder, device="cpu").digest()
    assert digest == Teacher.from_pretrained(copy, device="cpu").digest()
    config = json.loads((copy / "config.json").read_text())

    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "1.0"}))
    assert Teacher.from_pretrained(copy, device="cpu").digest() == digest
    (copy / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    assert Teacher.from_pretrained(copy, device="cpu").digest() != digest
    (copy / "config.json").write_text(json.dumps(config))

    weights = load_file(copy / "model.safetensors")
    weights["classifier.bias"][0] += 1e-6
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert Teacher.from_pretrained(copy, device="cpu").digest() != digest
    shutil.copy(folder / "model.safetensors", copy)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("oslo", "rome"))
    assert Teacher.from_pretrained(copy, device="cpu").digest() != digest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.logits([[4]], batch_tokens=0), "batch_tokens is 0"),
        (lambda t: t.logits([[4], [14]]), r"sequences\[1\] holds piece id 14; allowed: 0 to 13"),
        (lambda t: t.logits([[-1]]), "piece id -1"),
        (lambda t: t.logits([[[4]]]), "2 dimensions"),
    ],
)
def test_refuses_calls(teacher: Teacher, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(teacher)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def labels_config(labels: list[str]) -> dict[str, object]:
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


DAMAGE: dict[str, tuple[Any, str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad_config": (lambda f: (f / "config.json").write_text("{"), "configuration"),
    "unknown_kind": (lambda f: edit_config(f, model_type="nope"), "configuration"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "cannot load the weights"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "cannot load the weights",
    ),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"xyz"), "cannot load the weights"),
    "no_tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "cannot load a tokeniser|not a fast",
    ),
    "bad_tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokeniser"),
    "shape": (lambda f: edit_config(f, intermediate_size=32), "cannot load the weights"),
    "labels_count": (
        lambda f: edit_config(f, **labels_config(["O", "B-X", "I-X"])),
        "cannot load the weights",
    ),
    "no_head": (
        lambda f: edit_weights(f, lambda w: w.pop("classifier.weight")),
        "'classifier.weight'.*must be fine-tuned",
    ),
    "no_layer": (
        lambda f: edit_weights(f, lambda w: w.pop("bert.encoder.layer.0.output.dense.bias")),
        "weights lack 'bert.encoder.layer.0.output.dense.bias'",
    ),
    "nan": (
        lambda f: edit_weights(f, lambda w: w["classifier.bias"].fill_(float("nan"))),
        "'classifier.bias' holds NaN",
    ),
    "default_labels": (
        lambda f: edit_config(f, **labels_config([f"LABEL_{i}" for i in range(5)])),
        "labels are not IOB2.*LABEL_0",
    ),
    "no_begin": (
        lambda f: edit_config(f, **labels_config(["O", "I-LOC", "I-PER", "B-PER", "I-ORG"])),
        "labels are not IOB2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_damaged_folders(copy: Path, damage: str) -> None:
    act, message = DAMAGE[damage]
    act(copy)
    with pytest.raises(ValueError, match=message) as caught:
        Teacher.from_pretrained(copy, device="cpu")
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_more_pieces_than_embeddings(tmp_path: Path) -> None:
    small = make_model(tmp_path / "m", labels=LABELS, vocab_size=len(PIECES) - 2)
    with pytest.raises(ValueError, match="11 pieces but the model only 9 embeddings"):
        Teacher.from_pretrained(small)


def test_refuses_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Teacher.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no such folder, and not a Hub id"):
        Teacher.from_pretrained("none/of/these/")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        Teacher.from_pretrained(file)
    with pytest.raises(ValueError, match="device is 'gpu9'"):
        Teacher.from_pretrained(make_model(tmp_path / "m", labels=LABELS), device="gpu9")


def test_a_model_cannot_run_code(copy: Path) -> None:
    edit_config(
        copy,
        model_type="strange",
        auto_map={"AutoConfig": "code.Config", "AutoModelForTokenClassification": "code.Model"},
    )
    witness = copy / "witness"
    (copy / "code.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="configuration"):
        Teacher.from_pretrained(copy)
    assert not witness.exists()


def test_a_pickle_cannot_run_code(copy: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(copy / "witness"), "w")

    (copy / "model.safetensors").unlink()
    torch.save({"classifier.bias": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the weights"):
        Teacher.from_pretrained(copy)
    assert not (copy / "witness").exists()


def test_base_gets_a_new_head_unless_labels_are_the_same(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_base(str(folder), LABELS).classifier.weight, stored)
    other = [*LABELS[:3], "B-ORG", "I-ORG"]
    model = load_base(str(folder), other)
    assert not torch.equal(model.classifier.weight, stored)
    assert model.config.id2label == dict(enumerate(other))
    assert load_base(str(folder), LABELS[:3]).classifier.weight.shape == (3, 16)
    plain = make_model(tmp_path / "plain")
    assert load_base(str(plain), LABELS).classifier.weight.shape == (5, 16)


def test_base_with_a_damaged_encoder(copy: Path) -> None:
    edit_weights(copy, lambda w: w.pop("bert.embeddings.LayerNorm.bias"))
    with pytest.raises(ValueError, match=r"encoder are missing.*LayerNorm"):
        load_base(str(copy), LABELS)


@pytest.mark.parametrize("kind", [None, "RobertaTokenizer"])
def test_byte_level_pieces_and_offset_positions(tmp_path: Path, kind: str | None) -> None:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    letters = {c: i for i, c in enumerate("\u0120abcdelmnorst", start=len(special))}
    backend = tokenizers.Tokenizer(models.BPE({**special, **letters}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    names |= {"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(
        tmp_path
    )
    if kind is not None:
        stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**stored, "tokenizer_class": kind})
        )
    config = transformers.RobertaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    transformers.RobertaForTokenClassification(config).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path, device="cpu")
    assert teacher.max_pieces == POSITIONS - 2 - 2  # rows behind the padding index; <s> and </s>
    assert (teacher.prefix_ids, teacher.suffix_ids, teacher.pad_id) == ([0], [2], 1)
    pieces = teacher.tokenizer.encode(["rom", "a"], is_pretokenized=True, add_special_tokens=False)
    assert pieces.tokens == ["\u0120", "r", "o", "m", "\u0120", "a"]
    assert pieces.word_ids == [0, 0, 0, 0, 1, 1]
    (logits,) = teacher.logits([[5] * 50])
    assert logits.shape == (50, len(LABELS))


def test_tokeniser_is_saved_without_truncation(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None
    assert backend_of(tokenizer).get_vocab_size() == len(PIECES)
