"""Sections of bench/gpu_report.py run, tiny and in emulation: a GPU may come but once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_models, gpu_report


class Clock(gpu_report.Clock):
    """Times a single call, without a GPU."""

    def time(self, run: Callable[[], Any], seconds: float = 0.0) -> dict[str, Any]:
        begin = time.perf_counter()
        run()
        return {"median_us": 1e6 * (time.perf_counter() - begin)}

    def graphed(self, run: Callable[[], Any]) -> tuple[Callable[[], None], str]:
        return run, "no graph here"


@pytest.fixture
def report(
    device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[gpu_report.Report]:
    if device.name != "cpu":
        pytest.skip("for the emulation alone")
    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
    monkeypatch.setattr(
        gpu_models, "SHAPES", {"32x32": (2, 3), "32x128": (3, 2), "512x128": (2, 2)}
    )
    monkeypatch.setattr(gpu_models, "ALL_SHAPES", ("32x32", "ragged 3"))
    monkeypatch.setattr(gpu_models, "LOG_MEDIAN", 1.0)
    monkeypatch.setattr(gpu_models, "VOCABULARY", 20)
    small = {"E50 H200": (4, 24), "E300 H600": (3, 17)}
    monkeypatch.setattr(gpu_models, "STUDENTS", small)
    report = gpu_report.Report(tmp_path, 9)
    yield report
    report.close()


def errors(found: Any) -> list[str]:
    """Every recorded error, at any depth."""
    if isinstance(found, dict):
        # Some CPUs have no LSTM in half precision in torch, whose rivals here are for GPUs.
        error = str(found.get("error", ""))
        own = [error] if error and "primitive descriptor for the LSTM" not in error else []
        return own + [error for value in found.values() for error in errors(value)]
    return []


@pytest.mark.parametrize("name", ["inference", "crf", "training", "classes", "plans"])
def test_a_section_runs(report: gpu_report.Report, name: str) -> None:
    body = getattr(gpu_report, name)
    assert report.section(name, 0, lambda: body(report, Clock(report)))
    written = json.loads((report.folder / "gpu_report.json").read_text(encoding="utf-8"))
    assert errors(written) == []
    results = written[name]
    assert len(results) >= 2
    if name == "inference":
        entry = results["E50 H200, 32x32"]
        assert entry["error float32"] < 1e-5
        assert entry["error bfloat16"] < 0.05
        assert entry["error int8"] < 0.05
    if name == "crf":
        assert results["32x32"]["largest difference of gradients"] < 1e-5
    if name == "classes":
        entries = [results[f"{pooling}, 32x128"] for pooling in ("max", "mean", "last")]
        for entry in entries:
            assert entry["error float32"] < 1e-5
            assert max(entry["error bfloat16"], entry["error int8"]) < 0.05
            assert entry["largest difference of gradients"] < 1e-5
    if name == "training":
        assert results["E50 H200, 32x128"]["largest relative difference"] < 1e-4


def test_a_section_that_fails_is_recorded(report: gpu_report.Report) -> None:
    def fails() -> None:
        raise RuntimeError("no such luck")

    assert not report.section("luck", 0, fails)
    assert not report.section("late", 1e9, dict)
    assert report.section("more", 0, lambda: {"a": 1})
    written = json.loads((report.folder / "gpu_report.json").read_text(encoding="utf-8"))
    assert written["luck"] == {"error": "RuntimeError: no such luck"}
    assert "left_out" in written["late"]
    assert written["more"] == {"a": 1}
