from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from xdistil_fast.model_io import load_folder
from xdistil_fast.train import config as config_module
from xdistil_fast.train.cache import Batch, Cache
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.schedules import GROUPS, SCHEDULES, Stage, fits_of, layers_of
from xdistil_fast.train.tagging import Tagging
from xdistil_fast.train.trainer import Trainer

LABELS_ALONE = ("d0", "d0-s")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def make_config(inputs: dict[str, Any], out: Path, **more: Any) -> DistillConfig:
    settings = {
        "student": "8x12", "epochs": 1, "batch_size": 16, "lr": 0.02, "progress": False,
        "representation_size": 8, "schedule": "d1", **more,
    }  # fmt: skip
    files = dict(inputs)
    if settings.get("schedule") in LABELS_ALONE:
        files["transfer"] = []
    return DistillConfig(**{**files, **settings}, output=str(out))


def model_bytes(folder: Path) -> dict[str, bytes]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "history.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_fits_of_a_stage() -> None:
    whole = Stage("s", {"soft": 1.0})
    (fit,) = fits_of(whole, {"output", "bilstm", "embedding"})
    assert (fit.name, fit.groups) == ("all", ("output", "bilstm", "embedding"))
    gradual = Stage("s", {"soft": 1.0}, unfreeze=GROUPS)
    fits = fits_of(gradual, {"output", "bilstm", "embedding"})
    assert [(fit.name, fit.groups) for fit in fits] == [
        ("output", ("output",)),
        ("bilstm", ("output", "bilstm")),
        ("embedding", ("output", "bilstm", "embedding")),
    ]
    assert len(fits_of(gradual, GROUPS)) == 4
    assert len(fits_of(gradual, layers_of(gradual.losses))) == 3
    assert len(fits_of(gradual, layers_of(gradual.losses, projected=True))) == 4


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"losses": {"logits": 1.0}}, r"losses has \['logits'\]"),
        ({"losses": {}}, "no loss"),
        ({"losses": {"hard": 1.0}, "unfreeze": ("head",)}, r"unfreeze has \['head'\]"),
    ],
)
def test_impossible_stages_are_refused(more: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Stage("s", **more)


EXPECTED = {
    "joint-labels": ["joint/all", "labels/all"],
    "logits-labels": ["logits/all", "labels/all"],
    "d0": ["labels/all"],
    "d0-s": ["labels/all"],
    "d1": ["joint/all"],
    "d2": ["joint/all"],
    "d3.1": ["representation/all", "joint/all"],
    "d3.2": ["representation/all", "joint/output", "joint/bilstm", "joint/embedding"],
    "d4.1": ["representation/all", "logits/all", "labels/all"],
    "d4.2": [
        "representation/all", "logits/output", "logits/bilstm", "logits/embedding",
        "labels/output", "labels/bilstm", "labels/embedding",
    ],
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_makes_a_student(
    inputs: dict[str, Any], cache: str, tmp_path: Path, schedule: str
) -> None:
    record = distill(make_config(inputs, tmp_path / "s", schedule=schedule, cache=cache))
    history = record["history"]
    assert [f"{entry['stage']}/{entry['fit']}" for entry in history] == EXPECTED[schedule]
    assert [entry["epoch"] for entry in history] == list(range(1, len(history) + 1))
    for entry in history:
        assert ("dev_f1" in entry) == (entry["stage"] != "representation")
        assert ("heldout_loss" in entry) == (entry["stage"] == "representation")
        assert (entry["representation"] > 0) == (
            entry["stage"] == "representation" or schedule == "d2"
        )
    scores = [entry.get("dev_f1", -1) for entry in history]
    assert record["metrics"]["dev"]["f1"] == max(scores)
    assert scores[record["metrics"]["best_epoch"] - 1] == max(scores)
    assert load_folder(tmp_path / "s").config.hidden_size == 12
    assert not [n for n in load_file(tmp_path / "s" / "model.safetensors") if "projection" in n]


def test_frozen_layers_stay_to_the_bit(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end = Trainer._begin_fit, Trainer._end_fit
    before: dict[str, np.ndarray] = {}
    seen = []

    def begin_fit(self: Trainer) -> None:
        begin(self)
        before.update(self.student.tensors())

    def end_fit(self: Trainer) -> None:
        fit = self.fits[self.fit]
        after = self.student.tensors()
        moved = {name for name in after if not np.array_equal(after[name], before[name])}
        groups = self.student.groups()
        seen.append(fit.name)
        assert moved == {name for group in fit.groups for name in groups[group]}
        end(self)

    monkeypatch.setattr(Trainer, "_begin_fit", begin_fit)
    monkeypatch.setattr(Trainer, "_end_fit", end_fit)
    distill(make_config(inputs, tmp_path / "s", schedule="d4.2", cache=cache))
    assert seen == [name.partition("/")[2] for name in EXPECTED["d4.2"]]


def test_logits_do_not_move_transition_scores(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = []
    end = Trainer._end_fit

    def end_fit(self: Trainer) -> None:
        scores.append(self.student.tensors()["crf.transitions"])
        end(self)

    monkeypatch.setattr(Trainer, "_end_fit", end_fit)
    distill(make_config(inputs, tmp_path / "s", schedule="d4.1", head="crf", cache=cache))
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[1], scores[2])


def scripted(monkeypatch: pytest.MonkeyPatch, f1: list[float]) -> None:
    """Have dev scores come from a list, as if measured."""
    real, left = Tagging.evaluate, iter(f1)

    def evaluate(self: Tagging, tensors: Any) -> dict[str, Any]:
        value = next(left, None)
        return real(self, tensors) if value is None else {"f1": value}

    monkeypatch.setattr(Tagging, "evaluate", evaluate)


def test_patience_ends_a_fit(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [10.0, 30.0, 20.0, 29.0])
    config = make_config(inputs, tmp_path / "s", epochs=9, patience=2, cache=cache)
    record = distill(config)
    assert [entry["dev_f1"] for entry in record["history"]] == [10.0, 30.0, 20.0, 29.0]
    assert record["metrics"]["best_epoch"] == 2
    # The weights are those of the second of nine epochs.
    monkeypatch.undo()
    scripted(monkeypatch, [10.0, 30.0, *[0.0] * 7])
    distill(make_config(inputs, tmp_path / "long", epochs=9, cache=cache))
    weights = "model.safetensors"
    assert (tmp_path / "s" / weights).read_bytes() == (tmp_path / "long" / weights).read_bytes()


def test_best_weights_go_to_the_next_fit(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fits of d3.2 that are scored: output, bilstm, embedding, of two epochs each.
    scripted(monkeypatch, [30.0, 20.0, 10.0, 10.0, 40.0, 0.0])
    states: dict[str, list[dict[str, np.ndarray]]] = {"epoch": [], "begin": []}
    begin, end_epoch = Trainer._begin_fit, Trainer._end_epoch

    def begin_fit(self: Trainer) -> None:
        begin(self)
        states["begin"].append(self.student.tensors())

    def after(self: Trainer) -> None:
        states["epoch"].append(self.student.tensors())
        end_epoch(self)

    monkeypatch.setattr(Trainer, "_begin_fit", begin_fit)
    monkeypatch.setattr(Trainer, "_end_epoch", after)
    config = make_config(inputs, tmp_path / "s", schedule="d3.2", epochs=2, cache=cache)
    record = distill(config)
    assert record["metrics"]["best_epoch"] == 7

    def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
        return all(np.array_equal(left[name], right[name]) for name in left)

    held_out = [entry["heldout_loss"] for entry in record["history"][:2]]
    assert same(states["begin"][1], states["epoch"][int(np.argmin(held_out))])
    assert same(states["begin"][2], states["epoch"][2])
    assert same(states["begin"][3], states["epoch"][2])  # the fit before had made it worse
    stored = load_file(tmp_path / "s" / "model.safetensors")
    assert same(stored, states["epoch"][6])


def test_loss_tells_epochs_of_equal_score_apart(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.0] * 4)
    config = make_config(
        inputs, tmp_path / "s", schedule="d3.1", epochs=4, patience=1, soft_weight=0.02, cache=cache
    )
    record = distill(config)
    joint = [entry["loss"] for entry in record["history"] if entry["stage"] == "joint"]
    assert len(joint) == 4
    assert joint == sorted(joint, reverse=True)
    assert record["metrics"]["best_epoch"] == len(record["history"])


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": "d4.2"},
        {"schedule": "d3.2", "head": "crf", "logit_loss": "marginals", "labelled_share": 0.5},
    ],
)
def test_killed_run_ends_with_the_same_bytes(
    inputs: dict[str, Any],
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    real = Cache.batch
    distill(make_config(inputs, tmp_path / "whole", cache=cache, **more))
    config = make_config(inputs, tmp_path / "s", checkpoint_minutes=1e-9, cache=cache, **more)
    kills = 0
    for steps in (2, 7, 0, 5, 8, 3, 9, 4):
        left = steps

        def batch(self: Cache, chosen: np.ndarray) -> Batch:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return real(self, chosen)

        monkeypatch.setattr(Cache, "batch", batch)
        try:
            distill(config)
            break
        except Killed:
            kills += 1
    assert kills > 3
    monkeypatch.setattr(Cache, "batch", real)
    distill(config)
    assert model_bytes(tmp_path / "s") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_a_representation_alone_is_learned(
    inputs: dict[str, Any], cache: str, tmp_path: Path, loss: str
) -> None:
    record = distill(
        make_config(
            inputs, tmp_path / "s", schedule="d2", hard_weight=0.0, soft_weight=0.0, epochs=20,
            student="16x32", dropout=0.0, representation_loss=loss, cache=cache,
        )
    )  # fmt: skip
    losses = [entry["representation"] for entry in record["history"]]
    assert losses[-1] < 0.5 * losses[0]
    held_out = [entry["heldout_loss"] for entry in record["history"]]
    assert record["metrics"]["best_epoch"] == 1 + int(np.argmin(held_out))


def test_the_papers_divergence_trains(inputs: dict[str, Any], tmp_path: Path) -> None:
    record = distill(
        make_config(
            inputs, tmp_path / "s", schedule="d2", representation_loss="kld",
            representation_size=0, representation_weight=0.1, epochs=3,
        )
    )  # fmt: skip
    losses = [entry["representation"] for entry in record["history"]]
    assert losses[-1] < 0.8 * losses[0]


def test_other_logit_losses_train(inputs: dict[str, Any], cache: str, tmp_path: Path) -> None:
    for number, more in enumerate(
        (
            {"logit_loss": "kl", "temperature": 2.0},
            {"logit_loss": "marginals", "head": "crf"},
            {"logit_loss": "hard"},
            {"logit_loss": "hard", "head": "crf"},
        )
    ):
        out = tmp_path / str(number)
        config = make_config(inputs, out, hard_weight=0.0, epochs=4, cache=cache, **more)
        soft = [entry["soft"] for entry in distill(config)["history"]]
        assert soft[-1] < 0.8 * soft[0]


def test_labelled_share_of_each_batch(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = []
    real = Trainer._order

    def order(self: Trainer) -> np.ndarray:
        orders.append((real(self), self.labelled))
        return orders[-1][0]

    monkeypatch.setattr(Trainer, "_order", order)
    config = make_config(inputs, tmp_path / "s", labelled_share=0.75, epochs=2, cache=cache)
    distill(config)
    for sentences, labelled in orders:
        others = np.flatnonzero(~labelled)
        batches = [sentences[start : start + 16] for start in range(0, len(sentences), 16)]
        assert [int(labelled[batch].sum()) for batch in batches] == [12] * len(batches)
        assert len(batches) == math.ceil(len(others) / 4)
        np.testing.assert_array_equal(np.sort(sentences[~labelled[sentences]]), others)
        counts = np.bincount(sentences, minlength=len(labelled))[labelled]
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(orders[0][0], orders[1][0])


def test_stages_on_part_of_the_text(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (Stage("logits", {"soft": 1.0}, data="transfer", epochs=2, lr=0.01),)
    monkeypatch.setattr(config_module, "SCHEDULES", MappingProxyType({**SCHEDULES, "d1": stages}))
    real, labels = Cache.batch, []

    def batch(self: Cache, chosen: np.ndarray) -> Batch:
        found = real(self, chosen)
        labels.append(found.targets)
        return found

    monkeypatch.setattr(Cache, "batch", batch)
    record = distill(make_config(inputs, tmp_path / "s", cache=cache))
    assert len(record["history"]) == 2
    assert set(np.concatenate(labels).tolist()) == {-100}
    with pytest.raises(ValueError, match=r"stage logits: there is no transfer text to train on"):
        distill(make_config({**inputs, "transfer": []}, tmp_path / "t"))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"schedule": "d5"}, "schedule is 'd5'; allowed: 'joint-labels', 'logits-labels'"),
        ({"schedule": "d4.2", "representation_weight": 0.0}, "stage 'representation': nothing"),
        ({"schedule": "d4.1", "soft_weight": 0.0}, "stage 'logits': nothing to train on"),
        ({"patience": -1}, "patience is -1"),
        ({"decay": "step"}, "decay is 'step'; allowed: 'cosine', 'linear'"),
        ({"precision": "int8"}, "precision is 'int8'; allowed: 'auto', 'float32', 'bfloat16'"),
        ({"logit_loss": "l1"}, "logit_loss is 'l1'"),
        ({"logit_loss": "marginals"}, "only a CRF has them"),
        ({"temperature": 2.0}, "logit_loss is 'mse', which has none"),
        ({"temperature": 2.0, "logit_loss": "hard"}, "logit_loss is 'hard', which has none"),
        ({"temperature": 0.0, "logit_loss": "kl"}, r"temperature is 0\.0"),
        ({"representation_loss": "l1"}, "representation_loss is 'l1'"),
        ({"representation_loss": "kld"}, "representation_size is 8; allowed: 0"),
        ({"representation_size": -1}, "representation_size is -1"),
        ({"teacher_layer": 1.5}, r"teacher_layer is 1\.5"),
        ({"labelled_share": 1.0}, r"labelled_share is 1\.0"),
        ({"labelled_share": 0.5, "batch_size": 1}, "a batch_size of 2 or more"),
    ],
)
def test_bad_settings_are_refused(
    inputs: dict[str, Any], tmp_path: Path, more: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        make_config(inputs, tmp_path / "s", **more)


def test_labels_alone_take_no_transfer(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"schedule 'd0-s' trains on labels alone"):
        DistillConfig(**inputs, output=str(tmp_path / "s"), schedule="d0-s")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"teacher_layer": 2}, "teacher_layer is 2; the teacher has 1 layers"),
        ({"representation_size": 17}, "representation_size is 17; the teacher's hidden size is 16"),
    ],
)
def test_what_the_teacher_lacks_is_refused_before_any_work(
    inputs: dict[str, Any], tmp_path: Path, more: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        distill(make_config(inputs, tmp_path / "s", schedule="d2", **more))
    assert not list(tmp_path.iterdir())


def test_caches_with_and_without_representation(inputs: dict[str, Any], tmp_path: Path) -> None:
    keys = {}
    for schedule in ("d1", "d2", "d4.2"):
        out = tmp_path / schedule
        config = make_config(inputs, out, schedule=schedule, cache=str(tmp_path / "c"))
        keys[schedule] = distill(config)["cache"]
    assert keys["d2"] == keys["d4.2"] != keys["d1"]
    shards = [load_file(path) for path in (tmp_path / "c").rglob("shard-*")]
    states = [shard["representation"] for shard in shards if "representation" in shard]
    assert len(shards) == 2 * len(states) == 4
    assert {part.shape[1] for part in states} == {8}
    (components,) = (tmp_path / "c").glob("components-*.safetensors")
    assert load_file(components)["directions"].shape == (16, 8)


def test_default_start_values_do_not_hang_on_the_projection(
    inputs: dict[str, Any], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    build = Tagging.build

    def spy(self: Tagging, embeddings: np.ndarray) -> torch.nn.Module:
        student = build(self, embeddings)
        starts.append(student.tensors())
        return student

    monkeypatch.setattr(Tagging, "build", spy)
    for schedule in ("d1", "d2"):
        distill(make_config(inputs, tmp_path / schedule, schedule=schedule, cache=cache))
    plain, projected = starts
    assert set(projected) - set(plain) == {"projection.weight", "projection.bias"}
    assert all(np.array_equal(plain[name], projected[name]) for name in plain)
