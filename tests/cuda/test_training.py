"""A whole distillation on a GPU, where there is one, against the same on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from xdistil_fast.model_io import load_folder

pytest.importorskip("transformers", reason="the teacher is one of transformers")

CHOICES: list[dict[str, Any]] = [
    {},
    {"head": "crf", "logit_loss": "marginals"},
    {"schedule": "d3.2", "representation_size": 4, "student": "6x9"},
]


pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny teacher and texts of the tests of training."""
    path = Path(__file__).parents[1] / "train" / "conftest.py"
    spec = importlib.util.spec_from_file_location("train_inputs", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": module.make_teacher(folder / "teacher"),
        "train": [module.write_conll(folder / "train.conll", module.sentences(120, 1))],
        "dev": [module.write_conll(folder / "dev.conll", module.sentences(40, 2))],
    }


def run(inputs: dict[str, Any], out: Path, device: str, **more: Any) -> dict[str, Any]:
    from xdistil_fast.train import DistillConfig, distill

    settings = {"student": "8x12", "epochs": 2, "lr": 0.01, "progress": False, **more}
    config = DistillConfig(**inputs, **settings, output=str(out), device=device)
    return distill(config)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_losses_are_those_of_the_cpu(
    inputs: dict[str, Any], choice: dict[str, Any], tmp_path: Path
) -> None:
    # The teacher's labels from one device, so that the students' differ alone.
    cache = str(tmp_path / "cache")
    here = run(inputs, tmp_path / "cpu", "cpu", cache=cache, **choice)
    there = run(inputs, tmp_path / "cuda", "cuda", cache=cache, **choice)
    assert here["device"] == "cpu"
    assert there["device"].startswith("cuda (")
    losses = [[epoch["loss"] for epoch in record["history"]] for record in (here, there)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    stored = [load_folder(tmp_path / name).tensors for name in ("cpu", "cuda")]
    assert {name: value.shape for name, value in stored[0].items()} == {
        name: value.shape for name, value in stored[1].items()
    }


def test_a_stopped_run_goes_on(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xdistil_fast.train.trainer import Trainer

    unbroken = run(inputs, tmp_path / "whole", "cuda", head="crf")
    original = Trainer._end_epoch

    def dies(self: Trainer) -> None:
        original(self)
        if len(self.history) == 1:
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_end_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "parts", "cuda", head="crf")
    monkeypatch.undo()
    again = run(inputs, tmp_path / "parts", "cuda", head="crf")
    losses = [[epoch["loss"] for epoch in record["history"]] for record in (unbroken, again)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
