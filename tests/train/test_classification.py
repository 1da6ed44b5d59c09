"""Text classification from labelled texts to a model folder, with models of a few thousand weights.

A text's class is which of two kinds of words is in it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

from xdistil_fast import Classifier
from xdistil_fast.class_scoring import score_classes
from xdistil_fast.cli import main
from xdistil_fast.model_io import load_folder
from xdistil_fast.train import runs
from xdistil_fast.train.alignment import IGNORED
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.document_cache import DocumentCache, LabelledTexts, build_document_cache
from xdistil_fast.train.document_teacher import DocumentTeacher, fine_tune_classifier
from xdistil_fast.train.documents import read_documents
from xdistil_fast.train.finetune import TeacherSettings

GOOD, BAD = ["fine", "lovely", "bright"], ["dull", "awful", "grey"]
REST = ["the", "film", "was", "and", "a", "so", "long", "."]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *REST, "unused"]
SETTINGS = TeacherSettings(epochs=4, learning_rate=5e-3, batch_size=8, max_length=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_texts(path: Path, count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = ["negative", "positive"][rng.integers(2)]
        words = rng.choice(REST, rng.integers(2, 9)).tolist()
        kind = GOOD if label == "positive" else BAD
        words.insert(int(rng.integers(len(words) + 1)), kind[rng.integers(3)])
        rows.append({"text": " ".join(words), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    raw = read_documents(write_texts(folder / "raw.jsonl", 60, 3)).texts
    (folder / "raw.txt").write_text("\n".join(raw) + "\n", "utf-8")
    return {
        "train": write_texts(folder / "train.jsonl", 96, 1),
        "dev": write_texts(folder / "dev.jsonl", 40, 2),
        "transfer": str(folder / "raw.txt"),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "base"
    backend = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20, initializer_range=0.1,
    )  # fmt: skip
    # Without a pooler, as encoders trained on masked words have none.
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(base: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    arguments = [
        "teacher", "--task", "classification", "--model", str(base), "--train", files["train"],
        "--dev", files["dev"], "-o", str(out), "--epochs", "8", "--lr", "1e-2", "--batch-size", "8",
    ]  # fmt: skip
    assert main(arguments) == 0
    return out


def make_config(files: dict[str, str], teacher: Path, out: Path, **more: Any) -> DistillConfig:
    settings = {
        "task": "classification", "student": "8x6", "epochs": 6, "batch_size": 8, "lr": 0.02,
        "schedule": "d1", "progress": False, **more,
    }  # fmt: skip
    return DistillConfig(
        teacher=str(teacher), train=(files["train"],), dev=(files["dev"],), output=str(out),
        transfer=(files["transfer"],), **settings,
    )  # fmt: skip


def test_teacher(teacher: Path, files: dict[str, str]) -> None:
    record = json.loads((teacher / "run.json").read_text("utf-8"))
    assert record["labels"] == ["negative", "positive"]
    best = record["metrics"]["dev"]
    assert best["accuracy"] > 95
    assert [entry["epoch"] for entry in record["metrics"]["epochs"]] == list(range(1, 9))
    dev = read_documents(files["dev"])
    loaded = DocumentTeacher.from_pretrained(teacher)
    assert score_classes(dev.labels, loaded.classify(dev.texts)).to_dict() == best
    assert loaded.digest() == record["digest"]


def test_teacher_outputs(teacher: Path) -> None:
    """As transformers gives them; of a long text the mean over windows, by their cores."""
    loaded = DocumentTeacher.from_pretrained(teacher)
    model = loaded.model
    texts = ["the film was fine .", "", "awful", " ".join(REST * 5 + ["fine"])]
    ids = [loaded.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    logits, states = loaded.document_outputs(ids, 40, layer=1)
    assert loaded.max_pieces == 18

    def ask(pieces: list[int]) -> tuple[Any, Any]:
        with torch.inference_mode():
            found = model(torch.tensor([[2, *pieces, 3]]), output_hidden_states=True)
        return found.logits[0].numpy(), found.hidden_states[1][0, 0].numpy()

    for row in range(3):
        expected = ask(ids[row])
        np.testing.assert_allclose(logits[row], expected[0], atol=1e-5)
        np.testing.assert_allclose(states[row], expected[1], atol=1e-5)
    length = len(ids[3])  # 41: windows of 18 that share 4 or more
    starts = [0, 14, length - 18]
    cuts = [0, (14 + 18) // 2, (length - 18 + 32) // 2, length]
    shares = np.diff(cuts) / length
    mean = sum(s * ask(ids[3][a : a + 18])[0] for s, a in zip(shares, starts, strict=True))
    np.testing.assert_allclose(logits[3], mean, atol=1e-5)
    alone, none = loaded.document_outputs(ids[:1])
    np.testing.assert_allclose(alone[0], logits[0], atol=1e-5)
    assert none.shape == (1, 0)


class Killed(BaseException):
    """Stands for a process that is gone."""


def test_killed_teacher_ends_with_the_same_bytes(
    base: Path, files: dict[str, str], tmp_path: Path
) -> None:
    train, dev = [read_documents(files["train"])], [read_documents(files["dev"])]

    def stop(epoch: int, _: Any) -> None:
        if epoch == 2:
            raise Killed

    arguments = (base, train, dev)
    fine_tune_classifier(*arguments, tmp_path / "whole", SETTINGS, progress=False)
    with pytest.raises(Killed):
        fine_tune_classifier(*arguments, tmp_path / "cut", SETTINGS, progress=False, on_epoch=stop)
    fine_tune_classifier(*arguments, tmp_path / "cut", SETTINGS, progress=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_cache(teacher: Path, files: dict[str, str], tmp_path: Path) -> None:
    loaded = DocumentTeacher.from_pretrained(teacher)
    train, dev = read_documents(files["train"]), read_documents(files["dev"])
    long = tmp_path / "long.txt"
    long.write_text(" ".join(REST * 4) + "\n" + dev.texts[0] + "\n" + train.texts[0] + "\n")
    texts = LabelledTexts((train,), (dev,), (files["transfer"], str(long)))
    every = [text for stream in texts.streams()[1:] for text, _ in stream()]
    assert {dev.texts[0], train.texts[0]} <= {*every}
    unlabelled = {*every} - {*train.texts, *dev.texts}
    data = [train.describe("train"), *texts.describe()]
    cache, key = build_document_cache(
        tmp_path / "cache", loaded, texts, data, max_length=12, layer=1, progress=False
    )
    rows = len(train.texts) + len(unlabelled) + 2  # the long one's 32 pieces are three texts
    assert (cache.sentences, cache.width) == (rows, 16)
    labelled = cache.labelled
    assert labelled[: len(train.texts)].all()
    assert not labelled[len(train.texts) :].any()
    batch = cache.batch(np.array([5, 0, rows - 1]))
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([
        len(train.texts[5].split()), len(train.texts[0].split()), 32 - 24
    ])]  # fmt: skip
    own = loaded.labels.index(train.labels[5])
    assert batch.targets[0] == own
    assert batch.targets[2] == IGNORED
    ids = batch.ids[: batch.cu_seqlens[1]]
    logits, states = loaded.document_outputs([ids], layer=1)
    np.testing.assert_allclose(batch.logits[0], logits[0], atol=2e-3)
    np.testing.assert_allclose(batch.representation[0], states[0], atol=4e-3)
    again, same = build_document_cache(
        tmp_path / "cache", loaded, texts, data, max_length=12, layer=1, progress=False
    )
    assert (same, again.sentences) == (key, rows)
    again.reduce(3)
    assert again.batch(np.array([1, 2])).representation.shape == (2, 3)
    assert again.width == 3


@pytest.mark.parametrize(
    ("pooling", "projected"), [("max", False), ("mean", False), ("last", False), ("max", True)]
)
def test_a_student_learns(
    files: dict[str, str], teacher: Path, tmp_path: Path, pooling: str, projected: bool
) -> None:
    out = tmp_path / "student"
    more = {"pooling": pooling, "projected": projected}
    config = make_config(files, teacher, out, soft_weight=0.1, **more)
    record = distill(config, command=["xdistil", "distill"])
    folder = load_folder(out)
    assert folder.config.projection_size == (128 if projected else 0)
    assert (folder.config.task, folder.config.pooling) == ("text-classification", pooling)
    assert folder.config.labels == ("negative", "positive")
    dev = read_documents(files["dev"])
    found = [row["label"] for row in Classifier.from_pretrained(out)(list(dev.texts))]
    scores = score_classes(dev.labels, found)
    assert scores.accuracy > 85
    assert scores.to_dict() == record["metrics"]["dev"] == folder.config.metrics["dev"]
    history = record["history"]
    assert max(entry["dev_accuracy"] for entry in history) == scores.accuracy
    card = (out / "README.md").read_text("utf-8")
    for needed in ("text-classification", "Classifier", f"**{scores.accuracy:.2f}**", "positive"):
        assert needed in card


def test_killed_student_ends_with_the_same_bytes(
    files: dict[str, str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"schedule": "d2", "representation_size": 4, "epochs": 2, "min_piece_count": 2}
    distill(make_config(files, teacher, tmp_path / "whole", **more))
    config = make_config(files, teacher, tmp_path / "cut", checkpoint_minutes=1e-9, **more)
    real = DocumentCache.batch
    for steps in (3, 0, 25):
        left = steps

        def batch(self: DocumentCache, chosen: np.ndarray[Any, Any]) -> Any:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return real(self, chosen)

        monkeypatch.setattr(DocumentCache, "batch", batch)
        with pytest.raises(Killed):
            distill(config)
    monkeypatch.setattr(DocumentCache, "batch", real)
    distill(config)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "history.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    history = json.loads((tmp_path / "cut" / "history.json").read_text("utf-8"))["epochs"]
    assert all(entry["representation"] > 0 for entry in history)


def test_two_processes_are_one(
    files: dict[str, str],
    teacher: Path,
    torchrun: Callable[[list[str], Path], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """Loss by loss, dropout of pieces and of texts included."""
    more = {"dropout": 0.3, "epochs": 2, "precision": "float32"}
    alone = distill(make_config(files, teacher, tmp_path / "one", **more))
    process = torchrun(
        [
            "distill", "--task", "classification", "--teacher", str(teacher), "--train",
            files["train"], "--dev", files["dev"], "--transfer", files["transfer"], "--student",
            "8x6", "--batch-size", "8", "--lr", "0.02", "--schedule", "d1", "--epochs", "2",
            "--dropout", "0.3", "--precision", "float32", "--quiet", "-o", str(tmp_path / "two"),
        ],
        tmp_path,
    )  # fmt: skip
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    together = runs.read_run(tmp_path / "two")
    for before, after in zip(alone["history"], together["history"], strict=True):
        for name in ("loss", "hard", "soft"):
            assert after[name] == pytest.approx(before[name], rel=1e-4)


def test_commands(
    files: dict[str, str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    arguments = [
        "distill", "--task", "classification", "--teacher", str(teacher), "--train", files["train"],
        "--dev", files["dev"], "--student", "4x4", "--epochs", "2", "--schedule", "d0-s",
        "--quiet", "--pooling", "mean", "-o", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "dev accuracy" in capsys.readouterr().out
    for model, kind in ((out, "student"), (teacher, "teacher")):
        assert main(["eval", str(model), "--data", files["dev"], "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["model"]["kind"] == kind
        assert record["metrics"]["texts"] == 40
    digest = json.loads((teacher / "run.json").read_text("utf-8"))["digest"]
    assert (record["model"]["digest"], record["model"]["precision"]) == (digest, "float32")
    narrow = ["eval", str(teacher), "--data", files["dev"], "--json", "--precision", "bfloat16"]
    assert main(narrow) == 0
    assert json.loads(capsys.readouterr().out)["model"]["precision"] == "bfloat16"
    test = write_texts(tmp_path / "test.jsonl", 40, 7)
    assert main(["eval", str(out), "--data", test, "--json", str(tmp_path / "e.json")]) == 0
    runs = [str(tmp_path / "e.json"), str(out), str(teacher)]
    page = tmp_path / "r.md"
    assert main(["report", *runs, "--card", str(out), "-o", str(page)]) == 0
    accuracy = json.loads((tmp_path / "e.json").read_text("utf-8"))["metrics"]["accuracy"]
    assert f"{accuracy:.2f}" in page.read_text("utf-8")
    card = (out / "README.md").read_text("utf-8")
    assert f"| 40 | **{accuracy:.2f}** |" in card.partition("Scores on test data")[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"head": "crf"}, "head is 'crf'"),
        ({"pooling": "sum"}, "pooling is 'sum'"),
        ({"task": "regression"}, "task is 'regression'"),
    ],
)
def test_settings_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = {"train": "a", "dev": "b", "transfer": "c"}
    with pytest.raises(ValueError, match=message):
        make_config(files, tmp_path, tmp_path / "out", **more)


def test_files_refused(files: dict[str, str], teacher: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a", "label": "mixed"}\n')
    with pytest.raises(ValueError, match=r"classes \['mixed'\] are not among the teacher's"):
        distill(make_config({**files, "dev": str(strange)}, teacher, tmp_path / "out"))
    with pytest.raises(ValueError, match="only one class"):
        fine_tune_classifier(
            teacher, [read_documents(strange)], [read_documents(strange)], tmp_path / "out"
        )
    with pytest.raises(ValueError, match=r"classes \['mixed'\] do not occur in train"):
        fine_tune_classifier(
            teacher, [read_documents(files["train"])], [read_documents(strange)], tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
