"""The benchmark tables: written from a run, never by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = "<!-- benchmarks: begin, written by `make bench` -->"
END = "<!-- benchmarks: end -->"
# `python -m bench.tables` without the extra that the rest of bench/ needs.
TABLES = ROOT / "bench" / "tables.py"


def _run(when: str, seconds: float) -> dict[str, Any]:
    return {
        "datetime": f"{when}T12:00:00+00:00",
        "machine_info": {
            "cpu": "Some CPU (R) 3000",
            "threads": 2,
            "isa": "avx2",
            "python_version": "3.11.1",
            "load_average": 0.25,
            "versions": {"xdistil-fast": "0.1.0", "torch": "2.13.0"},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            {
                "fullname": "bench/bench_kernels.py::bench_bilstm_forward",
                "extra_info": {
                    "group": "kernels",
                    "task": "BiLSTM forward",
                    "batch": 32,
                    "length": 128,
                    "pieces": 32 * 128,
                    "sizes": {"E": 100, "H": 200},
                    "threads": 2,
                    "turns": 3,
                    "sides": {
                        "xdistil-fast float32": {"setting": "", "seconds": seconds, "p99": 0.5},
                        "xdistil-fast int8": {"setting": "", "seconds": 0.01, "p99": None},
                        "torch.nn.LSTM": {"setting": "", "seconds": 0.04, "p99": None},
                        "ONNX Runtime": {"setting": "spinning", "seconds": 0.03, "p99": None},
                    },
                    "ratios": {
                        "float32": {
                            "torch.nn.LSTM": [1.9, 2.0, 2.1],
                            "ONNX Runtime": [0.7, 0.8, 0.9],
                        },
                        "int8": {
                            "torch.nn.LSTM": [3.9, 3.999, 4.1],
                            "ONNX Runtime": [2.7, 2.8, 2.9],
                        },
                    },
                    "aims": {
                        "float32": {"torch.nn.LSTM": 1.0, "ONNX Runtime": 1.0},
                        "int8": {"torch.nn.LSTM": 4.0},
                    },
                    "notes": {"ONNX Runtime": "a note on it"},
                    "agreement": {"xdistil-fast int8": 0.987},
                    "headline": True,
                },
            },
            {
                "fullname": "bench/bench_students.py::bench_scaling",
                "extra_info": {
                    "group": "scaling",
                    "task": "student",
                    "batch": 2,
                    "length": None,
                    "pieces": 50,
                    "sizes": {"H": 8},
                    "threads": 2,
                    "turns": 3,
                    "sides": {
                        "xdistil-fast float32": {"setting": "", "seconds": 0.001, "p99": None},
                        "torch": {"setting": "", "seconds": 0.002, "p99": None},
                    },
                    "ratios": {"float32": {"torch": [2.0, 2.0, 2.0]}},
                    "aims": {},
                    "headline": False,
                },
            },
            {
                "fullname": "bench/bench_footprint.py::bench_footprint",
                "extra_info": {
                    "group": "size, memory, load time",
                    "footprints": [
                        {
                            "model": "xdistil-fast float32",
                            "disk_bytes": 4_800_000,
                            "load_seconds": 0.25,
                            "loaded_bytes": 43_400_000,
                            "peak_bytes": None,
                        }
                    ],
                },
            },
        ],
    }


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    return tmp_path


def _tables(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TABLES), "--root", str(tree), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def _file(tree: Path, run: dict[str, Any]) -> str:
    path = tree / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return str(path)


def test_a_run_is_filed_and_shown(tree: Path) -> None:
    result = _tables(tree, _file(tree, _run("2026-01-02", 0.02)))
    assert result.returncode == 0, result.stderr
    name = "2026-01-02-some-cpu-r-3000-avx2.json"
    assert [path.name for path in (tree / "bench" / "results").iterdir()] == [name]
    readme = (tree / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"before\n{BEGIN}\n| ")
    assert readme.endswith(f"{END}\nafter\n")
    assert "torch.nn.LSTM 2.00×, ONNX Runtime 0.80×" in readme
    assert "204,800" in readme  # 32 * 128 pieces in 20 ms
    page = (tree / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert "1.00×: met" in page
    assert "1.00×: missed" in page
    assert "| student, H 8 | 2 texts, 50 pieces | float32 | 1 ms | 50,000 | torch 2.00× |" in page
    assert "student, H 8" not in readme
    assert "![scaling](img/scaling.svg)" in page
    assert "**3.999×** | 3.90× to 4.10× | 4.00×: missed" in page
    assert "| int8 | 10 ms |  | ONNX Runtime (spinning) | 30 ms |  | **2.80×** |" in page
    assert "| float32 | 20 ms | 500 ms | torch.nn.LSTM |" in page
    assert "- ONNX Runtime: a note on it." in page
    assert "xdistil-fast int8: the same result as xdistil-fast in float32 for 98.7% of" in page
    assert "| xdistil-fast float32 | 4.8 MB | 250 ms | 43.4 MB |  |" in page
    assert f"(../bench/results/{name})" in page
    assert _tables(tree, "--check").returncode == 0


def test_the_newest_run_wins_whatever_the_order_of_files(tree: Path) -> None:
    assert _tables(tree, _file(tree, _run("2026-03-02", 0.02))).returncode == 0
    assert _tables(tree, _file(tree, _run("2026-01-02", 0.01))).returncode == 0
    assert "commit 0123456789, 2026-03-02" in (tree / "README.md").read_text(encoding="utf-8")


def test_a_table_changed_by_hand_is_noticed(tree: Path) -> None:
    assert _tables(tree, _file(tree, _run("2026-01-02", 0.02))).returncode == 0
    readme = tree / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace("ONNX Runtime 0.80×", "ONNX Runtime 8.00×"), encoding="utf-8")
    result = _tables(tree, "--check")
    assert result.returncode == 1
    assert "README.md" in result.stderr


def test_show_writes_nothing(tree: Path) -> None:
    before = sorted(tree.rglob("*"))
    run = _file(tree, _run("2026-01-02", 0.02))
    result = _tables(tree, "--show", run)
    assert result.returncode == 0
    assert "**2.00×**" in result.stdout
    assert sorted(tree.rglob("*")) == [*before, Path(run)]


@pytest.mark.parametrize("content", ["{", "{}", '{"benchmarks": [{"fullname": "x"}]}'])
def test_what_is_no_run_is_refused(tree: Path, content: str) -> None:
    path = tree / "run.json"
    path.write_text(content, encoding="utf-8")
    result = _tables(tree, str(path))
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert not (tree / "bench").exists()
    assert "old" in (tree / "README.md").read_text(encoding="utf-8")


def test_published_tables_are_those_of_the_newest_run() -> None:
    if not list((ROOT / "bench" / "results").glob("*.json")):
        pytest.skip("no benchmark run is recorded")
    result = subprocess.run(
        [sys.executable, str(TABLES), "--check"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_published_plots_are_of_the_newest_run() -> None:
    results = ROOT / "bench" / "results"
    runs = {path: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    newest = max(runs, key=lambda path: str(runs[path]["datetime"]), default=None)
    if newest is None:
        pytest.skip("no benchmark run is recorded")
    groups = {entry["extra_info"]["group"] for entry in runs[newest]["benchmarks"]}
    if "scaling" not in groups:
        pytest.skip("the recorded benchmark run has no scaling cases, of which the plots are")
    plots = list((ROOT / "docs" / "img").glob("*.svg"))
    assert {path.stem for path in plots} >= {"scaling", "speed-and-size"}
    for plot in plots:
        assert f"<dc:title>{newest.name}</dc:title>" in plot.read_text(encoding="utf-8")
