from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
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

from xdistil_fast.scoring import Scores
from xdistil_fast.train import finetune, runs
from xdistil_fast.train.commands import teacher as command
from xdistil_fast.train.corpora import Corpus, read_labelled
from xdistil_fast.train.finetune import TeacherSettings, TrainingRun, epoch_batches, fine_tune
from xdistil_fast.train.learning_rate import rate_factor
from xdistil_fast.train.teacher import Teacher

TRAIN = """Mara B-PER
Linden I-PER
left O
Oslo B-LOC
. O

Tom B-PER
left O
Bergen B-LOC
. O

In O
Oslo B-LOC
Tom B-PER
Linden I-PER
slept O
. O

In O
Bergen B-LOC
nobody O
slept O
. O
"""
DEV = """In O
Bergen B-LOC
Mara B-PER
Linden I-PER
left O
. O

Tom B-PER
slept O
. O
"""
WORDS = "mara linden left oslo . tom bergen in slept nobody".split()  # noqa: SIM905
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
SETTINGS = TeacherSettings(epochs=3, learning_rate=3e-3, batch_size=2, seed=7)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.conll").write_text(TRAIN)
    (folder / "dev.conll").write_text(DEV)
    return folder / "train.conll", folder / "dev.conll"


@pytest.fixture(scope="module")
def corpora(files: tuple[Path, Path]) -> tuple[list[Corpus], list[Corpus]]:
    return [read_labelled(files[0])], [read_labelled(files[1])]


@pytest.fixture(scope="module")
def unbroken(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The result of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken") / "teacher"
    fine_tune(base, *corpora, out, SETTINGS, progress=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def lasting(folder: Path) -> dict[str, Any]:
    """What of ``run.json`` must not depend on interruptions."""
    record = runs.read_run(folder)
    record.pop("seconds")
    for epoch in record["metrics"]["epochs"]:
        epoch.pop("seconds")
    return record


def test_learns_and_keeps_the_best_epoch(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path: Path
) -> None:
    settings = TeacherSettings(epochs=12, learning_rate=1e-2, batch_size=2)
    out = tmp_path / "teacher"
    seen: list[float] = []

    def note(epoch: int, scores: Scores) -> None:
        assert len(seen) == epoch - 1
        seen.append(scores.f1)

    record = fine_tune(
        base, *corpora, out, settings, command=["xdistil", "x"], progress=False, on_epoch=note
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher"]
    assert record == runs.read_run(out)
    assert record["metrics"]["dev"]["f1"] == max(seen) == 100.0, seen
    assert record["metrics"]["best_epoch"] == seen.index(100.0) + 1
    assert [e["dev_f1"] for e in record["metrics"]["epochs"]] == seen
    assert record["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert record["command"] == ["xdistil", "x"]
    assert [d["role"] for d in record["data"]] == ["train", "dev"]
    assert record["settings"]["max_length"] == 10  # what the model takes

    teacher = Teacher.from_pretrained(out, device="cpu")
    assert teacher.digest() == record["digest"]
    assert teacher.labels == record["labels"]
    assert teacher.parameters == record["metrics"]["parameters"]
    gold = corpora[1][0].sentences
    assert teacher.tag_words([s.words or () for s in gold]) == [list(s.tags or ()) for s in gold]


def test_best_epoch_is_what_is_saved(
    base: Path,
    corpora: tuple[list[Corpus], list[Corpus]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshots: list[dict[str, torch.Tensor]] = []
    scores = iter([10.0, 30.0, 30.0])
    real = finetune.TrainingRun._evaluate

    def evaluate(self: finetune.TrainingRun) -> Any:
        snapshots.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return next(scores), *real(self)[1:]

    monkeypatch.setattr(finetune.TrainingRun, "_evaluate", evaluate)
    record = fine_tune(base, *corpora, tmp_path / "t", SETTINGS, progress=False)
    assert record["metrics"]["best_epoch"] == 2  # the earlier of two equals
    saved = Teacher.from_pretrained(tmp_path / "t", device="cpu").model.state_dict()
    assert all(torch.equal(saved[k], snapshots[1][k]) for k in saved)
    assert not all(torch.equal(saved[k], snapshots[2][k]) for k in saved)


def test_same_seed_same_bytes(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], unbroken: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # what happened before must not matter
    fine_tune(base, *corpora, tmp_path / "a", SETTINGS, progress=False)
    assert contents(tmp_path / "a") == contents(unbroken)
    other = TeacherSettings(epochs=3, learning_rate=3e-3, batch_size=2, seed=8)
    fine_tune(base, *corpora, tmp_path / "b", other, progress=False)
    assert contents(tmp_path / "b")["model.safetensors"] != contents(unbroken)["model.safetensors"]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_interrupted_after_an_epoch(
    base: Path,
    corpora: tuple[list[Corpus], list[Corpus]],
    unbroken: Path,
    tmp_path: Path,
    last: int,
) -> None:
    out = tmp_path / "teacher"

    def stop(epoch: int, _: Scores) -> None:
        if epoch == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(base, *corpora, out, SETTINGS, progress=False, on_epoch=stop)
    assert not out.exists()
    assert sorted(p.name for p in (tmp_path / "teacher.part").iterdir()) == [
        f"epoch-{last}",
        "run_key.json",
    ]
    torch.manual_seed(1)
    again: list[int] = []
    fine_tune(
        base,
        *corpora,
        out,
        SETTINGS,
        progress=False,
        on_epoch=lambda epoch, _: again.append(epoch),
    )
    assert again == list(range(last + 1, 4))
    assert contents(out) == contents(unbroken)
    assert lasting(out) == lasting(unbroken)
    assert os.listdir(tmp_path) == ["teacher"]


@pytest.mark.parametrize("call", [1, 5])
def test_full_disk(
    base: Path,
    corpora: tuple[list[Corpus], list[Corpus]],
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    real = finetune.safetensors.torch.save_file
    calls = 0

    def save(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(finetune.safetensors.torch, "save_file", save)
    out = tmp_path / "teacher"
    with pytest.raises(OSError, match="No space left"):
        fine_tune(base, *corpora, out, SETTINGS, progress=False)
    assert not out.exists()
    assert not list((tmp_path / "teacher.part").glob("*.tmp"))
    fine_tune(base, *corpora, out, SETTINGS, progress=False)
    assert contents(out) == contents(unbroken)


KILLER = """
import os, pathlib, signal, sys
import safetensors.torch
import torch
import transformers
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.finetune import TeacherSettings, fine_tune

torch.set_num_threads(1)
base, train, dev, out, where = sys.argv[1:]
calls = 0
real = safetensors.torch.save_file

def save(*args):
    global calls
    calls += 1
    if calls == 5:  # in the middle of the second checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)

def save_model(self, folder):
    (pathlib.Path(folder) / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)

if where == "checkpoint":
    safetensors.torch.save_file = save
else:
    transformers.PreTrainedModel.save_pretrained = save_model
settings = TeacherSettings(epochs=3, learning_rate=3e-3, batch_size=2, seed=7)
fine_tune(base, [read_labelled(train)], [read_labelled(dev)], out, settings, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("checkpoint", ["epoch-1", "epoch-2.tmp", "run_key.json"]),
        ("finish", ["epoch-3", "finished", "run_key.json"]),
    ],
)
def test_killed(
    base: Path,
    files: tuple[Path, Path],
    corpora: tuple[list[Corpus], list[Corpus]],
    unbroken: Path,
    tmp_path: Path,
    where: str,
    left: list[str],
) -> None:
    out = tmp_path / "teacher"
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(base), *map(str, files), str(out), where],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert sorted(os.listdir(tmp_path / "teacher.part")) == left
    assert not out.exists()
    fine_tune(base, *corpora, out, SETTINGS, progress=False)
    assert contents(out) == contents(unbroken)
    assert lasting(out) == lasting(unbroken)


def test_finished_run_is_left_alone(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], unbroken: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in unbroken.iterdir()}
    part = unbroken.with_name("teacher.part")
    part.mkdir()  # as if killed before this was removed
    runs.write_json(part / "run_key.json", runs.read_run(unbroken)["key"])
    record = fine_tune(base, *corpora, unbroken, SETTINGS, progress=False)
    assert record == runs.read_run(unbroken)
    assert not part.exists()
    assert {p: p.stat().st_mtime_ns for p in unbroken.iterdir()} == before


def test_other_runs_are_not_touched(
    base: Path,
    files: tuple[Path, Path],
    corpora: tuple[list[Corpus], list[Corpus]],
    unbroken: Path,
    tmp_path: Path,
) -> None:
    other = TeacherSettings(epochs=2, learning_rate=3e-3, batch_size=2, seed=7)
    with pytest.raises(ValueError, match=r"another run \(epochs: 3 there, 2 here\)"):
        fine_tune(base, *corpora, unbroken, other, progress=False)
    mapped = [read_labelled(files[0], {"LOC": "PLACE"})], [read_labelled(files[1], {"LOC": None})]
    with pytest.raises(ValueError, match=r"another run \(dev; labels; train\)"):
        fine_tune(base, *mapped, unbroken, SETTINGS, progress=False)

    def stop(epoch: int, _: Scores) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "t"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(base, *corpora, out, SETTINGS, progress=False, on_epoch=stop)
    with pytest.raises(ValueError, match=r"t\.part holds an unfinished run.*epochs: 3 there"):
        fine_tune(base, *corpora, out, other, progress=False)
    checkpoint = tmp_path / "t.part" / "epoch-1" / "optimizer.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        fine_tune(base, *corpora, out, SETTINGS, progress=False)


def test_refuses_output(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "t.part").mkdir()
    (tmp_path / "t.part" / "mine").write_text("x")
    for name, message in {
        "file": "is a file",
        "full": r"holds no run\.json",
        "none/t": "does not exist",
        "t": r"t\.part exists and is no unfinished run",
    }.items():
        with pytest.raises(ValueError, match=message):
            fine_tune(base, *corpora, tmp_path / name, SETTINGS, progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "file", "full", "mine", "mine", "t.part",
    ]  # fmt: skip


def test_an_empty_output_folder_will_do(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], unbroken: Path, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    fine_tune(base, *corpora, tmp_path / "t", SETTINGS, progress=False)
    assert contents(tmp_path / "t") == contents(unbroken)


def corpus(folder: Path, name: str, content: str) -> list[Corpus]:
    (folder / name).write_text(content)
    return [read_labelled(folder / name)]


def test_refuses_data(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path: Path
) -> None:
    train, dev = corpora
    out = tmp_path / "t"
    with pytest.raises(ValueError, match=r"entity types \['ORG'\] do not occur in train"):
        fine_tune(base, train, corpus(tmp_path, "d.conll", "Tom B-ORG\n"), out, progress=False)
    with pytest.raises(ValueError, match="no entity in the training"):
        fine_tune(base, corpus(tmp_path, "e.conll", "Tom O\n"), dev, out, progress=False)
    with pytest.raises(ValueError, match="at least one corpus"):
        fine_tune(base, train, [], out, progress=False)
    with pytest.raises(ValueError, match="no piece of any"):
        fine_tune(
            base, corpus(tmp_path, "f.conll", "\u0007 B-PER\n\u0007 B-LOC\n"), dev, out,
            progress=False,
        )  # fmt: skip
    assert not list(tmp_path.glob("t*"))


def test_infinite_loss_is_an_error(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path: Path
) -> None:
    wild = TeacherSettings(epochs=60, learning_rate=1.0, batch_size=1, clip=1e9, weight_decay=1.0)
    cross_entropy = torch.nn.functional.cross_entropy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "cross_entropy",
            lambda *a, **k: cross_entropy(*a, **k) * float("nan"),
        )
        with pytest.raises(ValueError, match="loss became nan; a lower learning rate than 1"):
            fine_tune(base, *corpora, tmp_path / "t", wild, progress=False)


def test_long_sentences_are_split_not_cut(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path: Path
) -> None:
    long = corpus(tmp_path, "long.conll", TRAIN.replace("\n\n", "\n") * 3)
    run = finetune.TrainingRun(
        Teacher(
            transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5),
            transformers.AutoTokenizer.from_pretrained(base),
            ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"],
        ),
        SETTINGS,
        tmp_path,
        long,
        corpora[1],
        False,
    )
    assert run.max_length == 10
    assert [i for start, stop in run.runs for i in range(start, stop)] == list(range(60))
    assert run.lengths.max() == 10


@given(st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 9))
def test_batches_hold_every_sequence_once(lengths: list[int], size: int) -> None:
    array = np.array(lengths)
    batches = epoch_batches(array, size, seed=1, epoch=2)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    again = epoch_batches(array, size, seed=1, epoch=2)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_are_of_like_lengths_and_new_every_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=3200)
    batches = epoch_batches(lengths, 32, seed=0, epoch=1)
    padded = sum(len(b) * int(lengths[b].max()) for b in batches)
    assert padded < 1.05 * lengths.sum()
    other = epoch_batches(lengths, 32, seed=0, epoch=2)
    assert {tuple(b) for b in batches} != {tuple(b) for b in other}
    assert np.any(np.diff([lengths[b].max() for b in batches]) < 0)  # not sorted any more


def test_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(1 / 90)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert rate_factor(0, 5, 0.0) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0; allowed: whole numbers from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"max_length": 1}, "max_length is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: above 0 to 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 1.5}, "warmup is 1.5; allowed: 0 to 1"),
        ({"pieces": "last"}, "pieces is 'last'"),
    ],
)
def test_refuses_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSettings(**changes)


def test_command(
    base: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    (tmp_path / "map.json").write_text('{"LOC": null}')
    out = tmp_path / "teacher"
    argv = [
        "teacher", "--model", str(base), "--train", str(files[0]), "--train", str(files[0]),
        str(files[0]), "--dev", str(files[1]), "--label-map", str(tmp_path / "map.json"),
        "-o", str(out), "--epochs", "1", "--lr", "1e-3", "--batch-size", "3", "--seed", "4",
        "--max-length", "8", "--pieces", "first", "--device", "cpu",
    ]  # fmt: skip
    args = parser.parse_args(argv)
    args.argv = argv
    assert args.run(args) == 0
    captured = capsys.readouterr()
    assert "dev F1" in captured.out
    assert "epoch 1/1: loss" in captured.err
    record = runs.read_run(out)
    assert record["command"] == ["xdistil", *map(runs.portable, argv)]
    assert record["labels"] == ["O", "B-PER", "I-PER"]
    assert len(record["data"]) == 4
    assert record["data"][0]["label_map"] == {"LOC": None}
    assert record["settings"] == {
        "base": "base",
        "batch_size": 3,
        "clip": 1.0,
        "device": "cpu",
        "epochs": 1,
        "learning_rate": 1e-3,
        "max_length": 8,
        "pieces": "first",
        "seed": 4,
        "warmup": 0.1,
        "weight_decay": 0.01,
    }


def test_two_at_once(
    base: Path, corpora: tuple[list[Corpus], list[Corpus]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def again(*_: Any) -> None:
        fine_tune(base, *corpora, tmp_path / "t", SETTINGS, progress=False)

    monkeypatch.setattr(TrainingRun, "go", again)
    with pytest.raises(BlockingIOError, match="another process is at work in it"):
        again()
