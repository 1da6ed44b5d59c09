from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from xdistil_fast import cli
from xdistil_fast.model_io import embedded_models, load_folder, resolve_model, save_folder
from xdistil_fast.quantization import as_floats
from xdistil_fast.train import sweep as module
from xdistil_fast.train.commands.sweep import command_of_one
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.evaluation import Evaluation
from xdistil_fast.train.sweep import PAPER, check_sweep, parameters_of, parse_sizes, sweep

pytest.importorskip("matplotlib")

VOCABULARY = 1000


def test_sizes() -> None:
    assert parse_sizes("50x100, 300x600") == ("50x100", "300x600")
    assert parse_sizes("paper") == PAPER
    assert len(PAPER) == 16
    for text, message in (("50x100,50x100", "once"), ("50", "allowed: ExH"), ("", "allowed: ExH")):
        with pytest.raises(ValueError, match=message):
            parse_sizes(text)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 student, whatever its size: what a run leaves."""
    if "en-ner" not in embedded_models():
        pytest.skip("this installation has no embedded en-ner")
    content = load_folder(resolve_model("en-ner"))
    config = dataclasses.replace(content.config, precision="float32")
    tensors = {name: as_floats(content.tensors, name) for name in config.tensor_shapes()}
    folder = tmp_path_factory.mktemp("student") / "student"
    save_folder(folder, config, tensors, content.tokenizer_json, "a card")
    return folder


class Runs:
    """Stands for distill: a copy of one student, and a dev F1 that is told."""

    def __init__(self, student: Path, f1: Mapping[str, float]) -> None:
        self.student, self.f1 = student, f1
        self.made: list[str] = []

    def __call__(self, config: DistillConfig) -> dict[str, Any]:
        size = config.student
        self.made.append(size)
        assert config.cache is not None
        assert Path(config.output).name == size
        if not Path(config.output).exists():
            shutil.copytree(self.student, config.output)
        labels = load_folder(self.student).config.labels
        return {
            "metrics": {
                "dev": {"f1": self.f1[size]},
                "parameters": parameters_of(size, VOCABULARY, len(labels)),
                "vocabulary": VOCABULARY,
            },
            "labels": labels,
            "digest": size,
            "seconds": 1.5,
        }


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    data = tmp_path / "dev.conll"
    data.write_text("Tim\tB-PER\nmet\tO\nAnn\tB-PER\n\nIn\tO\nOslo\tB-LOC\n")

    def evaluation(teacher: str, corpora: Any, *, known: Path, progress: Any) -> Evaluation:
        record = {
            "model": {"name": "big", "parameters": 10},
            "metrics": {"f1": 80.0, "support": 3},
            "data": [{"name": "dev.conll", "digest": "d" * 64}],
            "seconds": 2.0,
        }
        known.write_text(json.dumps(record))
        return Evaluation(record)

    monkeypatch.setattr(module, "teacher_evaluation", evaluation)
    path = str(data)
    return DistillConfig("big", (path,), (path,), str(tmp_path / "sweep"), progress=False)


SIZES = ("40x10", "10x10", "10x80", "20x10")


def test_the_smallest_that_keeps_the_share(base: DistillConfig, student: Path) -> None:
    # With 1,000 pieces 20x10 has fewer parameters than 10x80, which comes first by its table.
    assert parameters_of("20x10", VOCABULARY) < parameters_of("40x10", VOCABULARY)
    assert parameters_of("40x10", VOCABULARY) < parameters_of("10x80", VOCABULARY)
    distil = Runs(student, {"10x10": 70.0, "20x10": 75.9, "40x10": 76.0, "10x80": 79.0})
    lines: list[str] = []
    content = sweep(base, SIZES, keep=95, seconds=0.01, distil=distil, say=lines.append)
    assert distil.made == ["10x10", "20x10", "40x10"]
    assert content["smallest"] == "40x10"
    assert [row["kept"] for row in content["students"]] == pytest.approx([87.5, 94.875, 95.0])
    assert lines[0].startswith("10x10: dev F1 70.00, 87.5 % of the teacher's, ")
    out = Path(base.output)
    assert sorted(path.name for path in out.iterdir()) == [
        "10x10", "20x10", "40x10", "README.md", "pareto.svg", "sweep.json", "teacher.dev.json",
    ]  # fmt: skip
    assert json.loads((out / "sweep.json").read_text()) == content
    page = (out / "README.md").read_text()
    assert "The smallest student that keeps 95 % of the teacher's dev F1: **40x10**" in page
    served = content["students"][0]["served"]
    assert served["int8"]["bytes"] < 0.5 * served["float32"]["bytes"]
    row = next(line for line in page.splitlines() if line.startswith("| 10x10 "))
    assert [cell.strip() for cell in row.split("|")[2:9]] == [
        f"{parameters_of('10x10', VOCABULARY, 7):,}", "70.00", "87.5 %",
        f"{served['float32']['bytes'] / 1e6:.2f}", f"{served['float32']['tokens_per_second']:,}",
        f"{served['int8']['bytes'] / 1e6:.2f}", f"{served['int8']['tokens_per_second']:,}",
    ]  # fmt: skip
    assert "<svg" in (out / "pareto.svg").read_text()


def test_a_second_call_measures_nothing_again(
    base: DistillConfig, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil = Runs(student, dict.fromkeys(SIZES, 60.0))
    first = sweep(base, SIZES[:1], seconds=0.01, distil=distil)
    monkeypatch.setattr(module, "_measure", lambda *args: pytest.fail("measured again"))
    assert sweep(base, SIZES[:1], seconds=0.01, distil=distil) == first
    assert first["smallest"] is None


def test_none_keeps_the_share(base: DistillConfig, student: Path) -> None:
    distil = Runs(student, dict.fromkeys(SIZES, 60.0))
    content = sweep(base, SIZES[:2], keep=95, seconds=0.01, distil=distil)
    assert len(content["students"]) == 2
    assert content["smallest"] is None
    assert module.summary(content, SIZES[:2]) == (
        "none of 2 sizes keeps 95 % of the teacher's dev F1; the best, 10x10, keeps 75.0 %"
    )


def test_refusals(base: DistillConfig, tmp_path: Path) -> None:
    def refused(message: str, sizes: tuple[str, ...] = SIZES, **more: Any) -> None:
        keep = more.pop("keep", None)
        with pytest.raises(ValueError, match=message):
            sweep(dataclasses.replace(base, **more), sizes, keep=keep)

    refused("sizes is empty", ())
    refused("keep is 0", keep=0)
    refused("does not exist", output=str(tmp_path / "a" / "b"))
    refused("is a file", output=base.dev[0])
    refused("other things than a sweep", output=str(tmp_path))
    assert not Path(base.output).exists()


def test_a_sweep_that_was_killed_as_it_began(tmp_path: Path) -> None:
    (tmp_path / "teacher.dev.json.0123abcd.part").touch()
    check_sweep(tmp_path, ("50x100",), None)


def test_the_command_of_one_student(base: DistillConfig) -> None:
    argv = ["sweep", "--teacher", "big", "--sizes=paper", "--keep", "95", "-o", "sweep", "--cache",
            "c", "--epochs", "2", "-osweep"]  # fmt: skip
    config = dataclasses.replace(base, student="50x100", output="sweep/50x100", cache="c")
    assert command_of_one(argv, config) == [
        "xdistil", "distill", "--teacher", "big", "--epochs", "2", "--student", "50x100",
        "--cache", "c", "-o", "sweep/50x100",
    ]  # fmt: skip


def test_the_command_line_refuses_student(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--teacher", "t", "--train", "a", "--dev", "b", "--sizes", "4x8", "-o", "s"]
    assert cli.main(["sweep", *arguments, "--student", "4x8"]) == 2
    assert "a sweep takes --sizes" in capsys.readouterr().err
