from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xdistil_fast import _core
from xdistil_fast.model_io import load_folder
from xdistil_fast.scoring import score
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import distillation as module
from xdistil_fast.train import runs
from xdistil_fast.train.cache import Cache
from xdistil_fast.train.commands import distill as command
from xdistil_fast.train.config import DistillConfig, parse_size
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.learning_rate import rate_factor
from xdistil_fast.train.trainer import Trainer

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def make_config(inputs: dict[str, Any], out: Path, **more: Any) -> DistillConfig:
    settings = {
        "student": "8x12", "schedule": "d1", "epochs": 3, "batch_size": 16, "lr": 0.02,
        "progress": False, **more,
    }  # fmt: skip
    return DistillConfig(**{**inputs, **settings}, output=str(out))


def model_bytes(folder: Path) -> dict[str, bytes]:
    """What must not hang on how often a run was stopped: all but times."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "history.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "student"
    distill(make_config(inputs, out))
    return out


def test_a_student_learns_and_is_a_model_folder(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "student"
    record = distill(
        make_config(inputs, out, epochs=10, soft_weight=0.02), command=["xdistil", "distill"]
    )
    folder = load_folder(out)
    assert list(folder.config.labels) == LABELS
    assert (folder.config.embedding_size, folder.config.hidden_size) == (8, 12)
    dev = read_labelled(inputs["dev"][0])
    tagger = Tagger.from_pretrained(out)
    found = tagger.tag_words([list(s.words or ()) for s in dev.sentences])
    f1 = score([s.tags or () for s in dev.sentences], found).f1
    assert f1 > 90
    assert f1 == record["metrics"]["dev"]["f1"] == folder.config.metrics["dev"]["f1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]


def test_what_is_written_beside_the_model(inputs: dict[str, Any], unbroken: Path) -> None:
    record = json.loads((unbroken / "run.json").read_text("utf-8"))
    assert record["kind"] == "student"
    assert [entry["role"] for entry in record["data"]] == ["train", "dev", "transfer"]
    assert record["settings"]["lr"] == 0.02
    assert record["digest"] == load_folder(unbroken).digest
    history = json.loads((unbroken / "history.json").read_text("utf-8"))["epochs"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert max(entry["dev_f1"] for entry in history) == record["metrics"]["dev"]["f1"]
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["hard"] + entry["soft"])
    card = (unbroken / "README.md").read_text("utf-8")
    assert f"{record['metrics']['dev']['per_type']['PER']['f1']:.2f}" in card
    for needed in (record["digest"], "raw.txt", "12 in each direction", "seed 0"):
        assert needed in card
    lineage = json.loads((unbroken / "config.json").read_text("utf-8"))["lineage"]
    assert lineage["teacher"]["name"] == "teacher"
    assert lineage["settings"]["student"] == "8x12"


def test_same_seed_same_bytes(inputs: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    distill(make_config(inputs, tmp_path / "again"))
    assert model_bytes(tmp_path / "again") == model_bytes(unbroken)
    distill(make_config(inputs, tmp_path / "other", seed=1))
    other = model_bytes(tmp_path / "other")
    assert other["model.safetensors"] != model_bytes(unbroken)["model.safetensors"]
    assert other["tokenizer.json"] == model_bytes(unbroken)["tokenizer.json"]


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.mark.parametrize("head", ["softmax", "crf"])
def test_killed_run_ends_with_the_same_bytes(
    inputs: dict[str, Any],
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
) -> None:
    real = Cache.batch
    whole = unbroken
    if head == "crf":
        whole = tmp_path / "whole"
        distill(make_config(inputs, whole, head="crf"))
    # A checkpoint after every step; killed in the first, second and third epoch.
    config = make_config(inputs, tmp_path / "student", head=head, checkpoint_minutes=1e-9)
    for steps in (3, 9, 0, 14):
        left = steps

        def batch(self: Cache, chosen: np.ndarray) -> Any:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return real(self, chosen)

        monkeypatch.setattr(Cache, "batch", batch)
        with pytest.raises(Killed):
            distill(config)
        assert not (tmp_path / "student").exists()
    monkeypatch.setattr(Cache, "batch", real)
    distill(config)
    assert model_bytes(tmp_path / "student") == model_bytes(whole)
    assert not (tmp_path / "student.part").exists()


def test_signal_saves_and_stops(
    inputs: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = Cache.batch, 0

    def batch(self: Cache, chosen: np.ndarray) -> Any:
        nonlocal steps
        steps += 1
        if steps == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, chosen)

    monkeypatch.setattr(Cache, "batch", batch)
    config = make_config(inputs, tmp_path / "student")
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    assert steps == 15
    distill(config)
    total = 3 * -(
        -json.loads((unbroken / "run.json").read_text())["metrics"]["training_sentences"] // 16
    )
    assert steps == total  # nothing was done twice
    assert model_bytes(tmp_path / "student") == model_bytes(unbroken)


def test_killed_process_goes_on(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "student"
    args = ["--teacher", inputs["teacher"], "--train", *inputs["train"], "--dev", *inputs["dev"]]
    args += ["--transfer", *inputs["transfer"], "--student", "8x12", "--epochs", "400"]
    args += ["--checkpoint-minutes", "0.001", "--quiet", "-o", str(out)]
    line = [sys.executable, "-m", "xdistil_fast.train.commands.distill", *args]
    process = subprocess.Popen(line, stderr=subprocess.PIPE)
    checkpoint = tmp_path / "student.part" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.exists()
    assert not out.exists()
    # The same settings are taken up, others are not.
    config = dict(student="8x12", epochs=400, progress=False, output=str(out), **inputs)
    with pytest.raises(ValueError, match=r"unfinished run that differs \(seed: 0 there, 9 here\)"):
        distill(DistillConfig(**config, seed=9))
    assert checkpoint.exists()


def test_finished_run_is_not_run_again(
    inputs: dict[str, Any], unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in unbroken.iterdir()}
    monkeypatch.setattr(Cache, "batch", None)
    record = distill(make_config(inputs, unbroken))
    assert record == json.loads(before["run.json"])
    assert {p.name: p.read_bytes() for p in unbroken.iterdir()} == before
    with pytest.raises(ValueError, match=r"another run \(lr: 0\.02 there, 0\.5 here\)"):
        distill(make_config(inputs, unbroken, lr=0.5))


def test_changed_text_is_another_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "student"
    copy = tmp_path / "raw.txt"
    shutil.copy(inputs["transfer"][0], copy)
    files = {**inputs, "transfer": [str(copy)]}
    distill(make_config(files, out, epochs=1))
    copy.write_text("Something else .\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"another run \(data\)"):
        distill(make_config(files, out, epochs=1))


def test_moved_input_is_the_same_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    record = distill(make_config(inputs, tmp_path / "student", epochs=1))
    moved: dict[str, Any] = {}
    for role in ("train", "dev", "transfer"):
        moved[role] = [shutil.copy(path, tmp_path) for path in inputs[role]]
    moved["teacher"] = str(shutil.copytree(inputs["teacher"], tmp_path / "teacher"))
    assert distill(make_config(moved, tmp_path / "student", epochs=1)) == record


def test_kept_cache_serves_further_runs(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    distill(make_config(inputs, tmp_path / "one", cache=cache, epochs=1))
    monkeypatch.setattr(module.Teacher, "logits", None)
    distill(make_config(inputs, tmp_path / "two", cache=cache, epochs=1, seed=4))
    distill(make_config(inputs, tmp_path / "third", cache=cache, epochs=1, head="crf"))


def test_labels_alone_need_no_logits(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Teacher, "logits", None)
    files = {**inputs, "transfer": []}
    record = distill(make_config(files, tmp_path / "s", schedule="d0-s", epochs=12))
    assert record["metrics"]["dev"]["f1"] > 90
    assert {entry["soft"] for entry in record["history"]} == {0.0}
    assert "labels alone" in (tmp_path / "s" / "README.md").read_text("utf-8")


def test_soft_loss_alone_follows_the_teacher(inputs: dict[str, Any], tmp_path: Path) -> None:
    record = distill(make_config(inputs, tmp_path / "s", hard_weight=0.0, epochs=14))
    assert record["history"][-1]["soft"] < 0.6 * record["history"][0]["soft"]
    assert {entry["hard"] for entry in record["history"]} == {0.0}


@pytest.mark.parametrize(
    "more",
    [
        {"embedding_dtype": "float16"},
        {"min_piece_count": 8},
        {"embeddings": "random", "decay": "linear", "clip": 0.0, "dropout": 0.0},
        {"max_length": 8, "head": "crf"},
    ],
)
def test_choices_train_and_score(
    inputs: dict[str, Any], tmp_path: Path, more: dict[str, Any]
) -> None:
    settings = {"epochs": 8, "soft_weight": 0.02, **more}
    record = distill(make_config(inputs, tmp_path / "s", **settings))
    assert record["metrics"]["dev"]["f1"] > 75
    tagger = Tagger.from_pretrained(tmp_path / "s")
    dev = read_labelled(inputs["dev"][0])
    found = tagger.tag_words([list(s.words or ()) for s in dev.sentences])
    assert score([s.tags or () for s in dev.sentences], found).f1 == record["metrics"]["dev"]["f1"]


def test_a_crf_learns_the_best_labels_of_respelled_pieces(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    """It learns whole sentences: none may be lost for a piece that is spelled with several."""
    more = {"head": "crf", "logit_loss": "hard", "epochs": 2, "hard_weight": 0.0}
    every, none = (
        distill(make_config(inputs, tmp_path / str(count), min_piece_count=count, **more))
        for count in (1_000_000, 1)
    )
    assert every["metrics"]["vocabulary"] < none["metrics"]["vocabulary"]
    for record in (every, none):
        first, last = (entry["soft"] for entry in record["history"])
        assert 0 < last < first
    assert every["history"][0]["soft"] > 0.5 * none["history"][0]["soft"]


@pytest.mark.parametrize("schedule", ["d1", "d4.1"])
def test_a_projected_student_learns(inputs: dict[str, Any], tmp_path: Path, schedule: str) -> None:
    more = {"projected": True, "soft_weight": 0.02}
    more |= {"representation_size": 6} if schedule == "d4.1" else {}
    record = distill(make_config(inputs, tmp_path / "s", schedule=schedule, epochs=8, **more))
    assert record["metrics"]["dev"]["f1"] > 75
    folder = load_folder(tmp_path / "s")
    # As wide as the states that are kept, where any are.
    width = 6 if schedule == "d4.1" else 128
    assert folder.config.projection_size == width
    assert folder.tensors["projection.weight"].shape == (width, 24)
    assert folder.tensors["output.weight"].shape == (len(LABELS), width)
    tagger = Tagger.from_pretrained(tmp_path / "s")
    dev = read_labelled(inputs["dev"][0])
    found = tagger.tag_words([list(s.words or ()) for s in dev.sentences])
    assert score([s.tags or () for s in dev.sentences], found).f1 == record["metrics"]["dev"]["f1"]


@pytest.mark.skipif(
    not _core.multiplies_bfloat16(), reason=f"{_core.active_isa()} does not multiply bfloat16"
)
def test_training_in_bfloat16(inputs: dict[str, Any], tmp_path: Path) -> None:
    records = {}
    for precision in ("float32", "bfloat16"):
        more = {"epochs": 8, "soft_weight": 0.02, "precision": precision}
        records[precision] = distill(make_config(inputs, tmp_path / precision, **more))
    assert {name: r["settings"]["precision"] for name, r in records.items()} == {
        name: name for name in records
    }
    assert records["bfloat16"]["metrics"]["dev"]["f1"] > 75
    last = {name: record["history"][-1]["loss"] for name, record in records.items()}
    assert last["bfloat16"] != last["float32"]
    assert last["bfloat16"] < 1.1 * last["float32"]
    # Weights stay float32: rounded ones would have no lower bits.
    weights = load_folder(tmp_path / "bfloat16").tensors["bilstm.weight_hh_l0"]
    assert weights.dtype == np.float32
    assert (weights.view(np.uint32) & 0xFFFF).any()


def test_bfloat16_is_the_default_where_it_is_multiplied(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "bfloat16" if _core.multiplies_bfloat16() else "float32"
    record = distill(make_config(inputs, tmp_path / "s", epochs=1))
    assert record["settings"]["precision"] == own
    # Said or found out, it is the same run.
    assert distill(make_config(inputs, tmp_path / "s", epochs=1, precision=own)) == record
    monkeypatch.setattr(_core, "multiplies_bfloat16", lambda: False)
    record = distill(make_config(inputs, tmp_path / "t", epochs=1))
    assert record["settings"]["precision"] == "float32"


def test_bfloat16_is_refused_on_a_gpu(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(module, "student_device", lambda device: torch.device("cuda", 0))
    with pytest.raises(ValueError, match="precision is 'bfloat16' and device is 'cuda'"):
        distill(make_config(inputs, tmp_path / "s", precision="bfloat16"))
    assert not list(tmp_path.glob("s*"))


def test_bfloat16_is_refused_where_nothing_multiplies_it(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=r"precision is 'bfloat16', which .*allowed: 'auto', "):
        make_config(inputs, tmp_path / "s", precision="bfloat16")


def test_rare_pieces_make_a_smaller_student(inputs: dict[str, Any], tmp_path: Path) -> None:
    sizes = []
    for count in (1, 60):
        out = tmp_path / str(count)
        distill(make_config(inputs, out, epochs=1, min_piece_count=count))
        folder = load_folder(out)
        sizes.append(folder.config.vocab_size)
        assert "unused" not in folder.tokenizer.get_vocab()
    assert sizes[1] < sizes[0]


def test_start_values_from_a_file_belong_to_the_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "start.npy"
    config = make_config(inputs, tmp_path / "s", embeddings=str(path), epochs=1)
    with pytest.raises(OSError, match=r"start\.npy"):
        distill(config)
    assert not (tmp_path / "s.part").exists()
    table = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    np.save(path, table)
    distill(config)
    assert distill(config)["settings"]["embeddings"] == runs.portable(str(path))
    np.save(path, 2 * table)
    with pytest.raises(ValueError, match=r"another run \(embeddings_file: "):
        distill(config)


def test_label_map_is_applied(inputs: dict[str, Any], tmp_path: Path) -> None:
    renamed = Path(inputs["train"][0]).read_text("utf-8").replace("-PER", "-person")
    (tmp_path / "t.conll").write_text(renamed, encoding="utf-8")
    files = {**inputs, "train": [str(tmp_path / "t.conll")]}
    with pytest.raises(ValueError, match=r"t\.conll: entity types \['person'\].*'LOC', 'PER'"):
        distill(make_config(files, tmp_path / "s"))
    assert not (tmp_path / "s.part").exists()
    distill(make_config(files, tmp_path / "s", label_map={"person": "PER"}, epochs=1))


Change = Callable[[Path], dict[str, Any]]


def written(content: str, name: str = "x.conll", key: str = "train") -> Change:
    def change(folder: Path) -> dict[str, Any]:
        (folder / name).write_text(content, encoding="utf-8")
        return {key: [str(folder / name)]}

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: {"teacher": str(p / "none")}, "no such folder"),
        (lambda p: {"teacher": str(p)}, "no config.json"),
        (lambda p: {"train": [str(p / "none.conll")]}, "none.conll"),
        (lambda p: {"transfer": [str(p / "none.txt")]}, "none.txt"),
        (written("", key="transfer", name="empty.txt"), "empty.txt: no sentence"),
        (written("\n\n", key="dev"), "x.conll: no sentence"),
        (written("a\tO\n\n"), "x.conll: no entity"),
        (written("a\tB-ORG\n\n", key="dev"), r"x.conll: entity types \['ORG'\]"),
        (written("a\n\n"), "one column"),
        (written("a\tQ-X\n\n"), "no IOB tag"),
        (written("text", key="transfer", name="x.dat"), "cannot tell the format"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    inputs: dict[str, Any], tmp_path: Path, change: Change, what: str
) -> None:
    with pytest.raises((ValueError, OSError), match=what):
        distill(make_config({**inputs, **change(tmp_path)}, tmp_path / "s"))
    assert not list(tmp_path.glob("s*"))


def test_foreign_output_is_left_alone(inputs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        distill(make_config(inputs, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_loss_that_is_not_finite_is_reported(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss became inf at step 0 of epoch 1"):
        distill(make_config(inputs, tmp_path / "s", hard_weight=1e39))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"student": "100"}, r"student is '100'; allowed: ExH"),
        ({"student": "0x10"}, "student is '0x10'"),
        ({"student": "99999x10"}, "1 to 16384"),
        ({"student": "100X200"}, "student is '100X200'"),
        ({"head": "tree"}, "head is 'tree'; allowed: 'softmax', 'crf'"),
        ({"epochs": 0}, "epochs is 0; allowed: a whole number from 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"lr": 0.0}, "lr is 0.0; allowed: a number above 0 to 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"hard_weight": -1.0}, "hard_weight is -1.0"),
        ({"hard_weight": 0.0, "soft_weight": 0.0}, "nothing to train on"),
        ({"schedule": "d0-s"}, "takes no transfer text"),
        (
            {"schedule": "joint-labels", "hard_weight": 0.0},
            "stage 'labels': nothing to train on",
        ),
        ({"train": []}, "train is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"embedding_dtype": "int8"}, "embedding_dtype is 'int8'"),
    ],
)
def test_bad_settings_are_refused(
    inputs: dict[str, Any], tmp_path: Path, more: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        make_config(inputs, tmp_path / "s", **more)


def test_one_path_is_not_a_list_of_paths(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"train is 'a\.conll'; it must be a list of paths"):
        make_config({**inputs, "train": "a.conll"}, tmp_path / "s")


def test_sizes() -> None:
    assert parse_size("100x200") == (100, 200)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_learning_rate_rises_and_falls(decay: str) -> None:
    rates = [rate_factor(step, 100, 0.1, decay) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.03
    assert rates[55] == pytest.approx(0.5)
    assert rate_factor(0, 5, 0.0, decay) == 1.0


def test_command_line(
    inputs: dict[str, Any],
    unbroken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = ["distill", "--teacher", inputs["teacher"], "--train", *inputs["train"]]
    args += ["--dev", *inputs["dev"], "--transfer", *inputs["transfer"], "--student", "8x12"]
    args += ["--schedule", "d1", "--epochs", "3", "--batch-size", "16", "--lr", "0.02", "--quiet"]
    args += ["-o", str(tmp_path / "student")]
    parsed = parser.parse_args(args)
    parsed.argv = args
    assert parsed.run(parsed) == 0
    weights = "model.safetensors"
    assert (tmp_path / "student" / weights).read_bytes() == (unbroken / weights).read_bytes()
    record = json.loads((tmp_path / "student" / "run.json").read_text("utf-8"))
    assert record["command"] == runs.command_line(parsed)
    assert re.search(r"dev F1 \d+\.\d\d after epoch \d", capsys.readouterr().out)


def test_every_setting_has_its_flag() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = {action.dest for action in parser._actions}
    settings = {field.name for field in dataclasses.fields(DistillConfig)} - {"progress"}
    assert settings <= flags


def test_two_at_once(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(inputs, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "go", lambda self: distill(config))
        with pytest.raises(BlockingIOError, match="another process is at work in it"):
            distill(config)
    assert distill(config)["kind"] == "student"


def test_swapped_copies_leave_the_labels_of_transfer_text(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    """Only sentences with labels are changed by it: what the teacher said of others stays good."""
    more = {"cache": str(tmp_path / "cache"), "epochs": 1}
    distill(make_config(inputs, tmp_path / "a", **more))
    before = set((tmp_path / "cache").iterdir())
    for count, augment in enumerate(("swap=1", "swap=1,dropout=1")):
        distill(make_config(inputs, tmp_path / str(count), augment=augment, **more))
        added = [json.loads((p / "manifest.json").read_text("utf-8"))["about"]["role"]
                 for p in set((tmp_path / "cache").iterdir()) - before if p.is_dir()]  # fmt: skip
        assert sorted(added) == [["train"], ["train", "transfer"]][count]
        before = set((tmp_path / "cache").iterdir())
