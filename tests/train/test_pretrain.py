from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from xdistil_fast.train import checkpoint, runs
from xdistil_fast.train import pretrain as module
from xdistil_fast.train.commands import pretrain as command
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.finetune import TeacherSettings, fine_tune
from xdistil_fast.train.pretrain import PretrainSettings, choose_masks, load_masked_model, pretrain

PAIRS = ["mara left", "tom slept", "oslo rains", "lin ##den"]  # the second follows the first
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(PAIRS).split()]
SETTINGS = PretrainSettings(
    epochs=2, learning_rate=0.02, batch_size=8, length=10, seed=3, device="cpu"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_base(folder: Path, kind: type, *, mask: bool = True) -> Path:
    torch.manual_seed(2)
    backend = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", **({"mask_token": "[MASK]"} if mask else {}),
    ).save_pretrained(folder)  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", transformers.BertModel)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sentences of pairs of pieces: the one tells the other, where it is not masked too."""
    rng = np.random.default_rng(0)
    pairs = [pair.replace(" ##", "") for pair in PAIRS]
    lines = [" ".join(rng.choice(pairs, size=rng.integers(2, 5))) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "raw.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def unbroken(base: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    pretrain(base, [text], out, SETTINGS, progress=False)
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_learns_and_says_so(unbroken: Path) -> None:
    record = runs.read_run(unbroken)
    metrics = record["metrics"]
    assert metrics["new_head"] is True
    # Before, all pieces are about equally likely.
    assert metrics["perplexity_before"] == pytest.approx(len(PIECES), rel=0.3)
    assert metrics["perplexity"] < 0.7 * metrics["perplexity_before"]
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2]
    assert metrics["epochs"][-1]["perplexity"] == metrics["perplexity"]
    assert record["data"][0]["sentences"] == 300
    assert metrics["held_out_sequences"] == metrics["sequences"] // 19


def test_head_is_tied_and_kept(unbroken: Path) -> None:
    model, new = load_masked_model(str(unbroken))
    assert not new
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("steps", [1, 7])
def test_stopped_and_gone_on_with(
    base: Path,
    text: str,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    real = module._Run._train
    calls = 0

    def train(self: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), 15)
        return real(self, batch)

    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_train", train)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {steps}"):
            pretrain(base, [text], out, SETTINGS, progress=False)
    assert not out.exists()
    torch.manual_seed(9)
    pretrain(base, [text], out, SETTINGS, progress=False)
    assert weights(out) == weights(unbroken)
    assert runs.read_run(out)["metrics"] == runs.read_run(unbroken)["metrics"]
    assert os.listdir(tmp_path) == ["model"]
    record = pretrain(base, [text], out, SETTINGS, progress=False)
    assert record == runs.read_run(out)
    with pytest.raises(ValueError, match="another run"):
        pretrain(base, [text], out, PretrainSettings(seed=1), progress=False)


def test_stopped_with_a_frozen_table(base: Path, text: str, tmp_path: Path) -> None:
    """RoFormer's sinusoids are a parameter without gradient, so without state of the optimiser."""
    config = transformers.RoFormerConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.RoFormerForMaskedLM(config)
    assert not all(parameter.requires_grad for parameter in model.parameters())
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    model.save_pretrained(folder)

    def stop(self: Any) -> None:
        save(self)
        raise KeyboardInterrupt

    save = module._Run._save
    for name in ("unbroken", "stopped"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "stopped":
                patch.setattr(module._Run, "_save", stop)
                with pytest.raises(KeyboardInterrupt):
                    pretrain(folder, [text], tmp_path / name, SETTINGS, progress=False)
        pretrain(folder, [text], tmp_path / name, SETTINGS, progress=False)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "unbroken")


def test_becomes_a_teacher(unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("mara\tB-PER\nleft\tO\n\noslo\tB-LOC\nrains\tO\n")
    corpus = [read_labelled(tmp_path / "a.conll")]
    settings = TeacherSettings(epochs=1, device="cpu")
    record = fine_tune(unbroken, corpus, corpus, tmp_path / "teacher", settings, progress=False)
    assert record["settings"]["base"] == "model"


def test_refuses(base: Path, text: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("mara\n")
    with pytest.raises(ValueError, match="the text makes 1 sequences of 10 tokens"):
        pretrain(base, [str(short)], tmp_path / "m", SETTINGS, progress=False)
    bare = make_base(tmp_path / "bare", transformers.BertModel, mask=False)
    with pytest.raises(ValueError, match="no mask piece"):
        pretrain(bare, [text], tmp_path / "n", SETTINGS, progress=False)
    for changes, message in (
        ({"mask": 0.0}, "mask is 0.0; allowed: above 0 to 1"),
        ({"epochs": 0}, "epochs is 0; allowed: whole numbers from 1"),
        ({"clip": 0.0}, "clip is 0.0; allowed: above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PretrainSettings(**changes)


@given(st.lists(st.booleans(), min_size=1, max_size=150), st.integers(0, 9))
def test_whole_words_are_chosen(first: list[bool], seed: int) -> None:
    starts = np.array(first)
    chosen = choose_masks(starts, 0.15, np.random.default_rng(seed))
    starts[0] = True
    words = np.split(chosen, np.flatnonzero(starts)[1:])
    assert all(word.all() or not word.any() for word in words)
    assert sum(bool(word.any()) for word in words) >= 1
    if sum(bool(word.any()) for word in words) > 1:
        assert chosen.sum() <= max(1, round(0.15 * len(first)))


def test_fates_of_masked_pieces(base: Path, text: str, tmp_path: Path) -> None:
    hf_tokenizer = module.load_tokenizer(str(base))
    model, _ = load_masked_model(str(base))
    encoder = module.Teacher(model, hf_tokenizer, [])
    settings = PretrainSettings(length=16, mask=1.0, device="cpu")
    part = tmp_path / "m.part"
    part.mkdir()
    sequences = module._Sequences(part, encoder, [text], settings, 0, False)
    run = module._Run(encoder, settings, part, sequences, False)
    seen: dict[str, Any] = {}

    def spy(**inputs: torch.Tensor) -> Any:
        seen.update(inputs)
        return model(**inputs)

    encoder.model = run.model = spy  # type: ignore[assignment]
    rows = sequences.train[:100]
    run._loss(rows, np.random.default_rng(1))
    right, _ = encoder.collate([sequences.get(n)[0] for n in rows.tolist()])
    inside = np.isin(right, run.ordinary)
    shown = seen["input_ids"].numpy()[inside]
    share = float((shown == PIECES.index("[MASK]")).mean())
    same = float((shown == right[inside]).mean())
    count = inside.sum()
    assert abs(share - 0.8) < 4 * math.sqrt(0.16 / count)
    expected = 0.1 + 0.1 / len(run.ordinary)
    assert abs(same - expected) < 4 * math.sqrt(0.1 / count)


def test_command(base: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    out = tmp_path / "model"
    argv = ["pretrain", "--model", str(base), "--text", text, "-o", str(out), "--lr", "0.01",
            "--length", "12", "--batch-size", "16", "--device", "cpu"]  # fmt: skip
    args = parser.parse_args(argv)
    args.argv = argv
    assert args.run(args) == 0
    captured = capsys.readouterr()
    assert "held-out perplexity" in captured.out
    assert "is new, tied to the embeddings" in captured.out
    assert "a new one is made, tied to the embeddings" in captured.err
    assert runs.read_run(out)["settings"]["learning_rate"] == 0.01
    assert checkpoint.key_of(tmp_path / "model.part") is None


def test_two_at_once(
    base: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: Any) -> None:
        pretrain(base, [text], tmp_path / "m", SETTINGS, progress=False)

    monkeypatch.setattr(module._Run, "go", again)
    with pytest.raises(BlockingIOError, match="another process is at work in it"):
        again()
