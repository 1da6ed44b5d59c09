"""The device code as nvcc takes it, and what ptxas said of it last."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "cuda_kernels.json"
LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3xdf4cuda11run_programINS0_13OrderByLengthEEEvNT_4ArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN3xdf4cuda11run_programINS0_13OrderByLengthEEEvNT_4ArgsE
    8 bytes stack frame, {spill} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 1024 bytes smem, 384 bytes cmem[0]
"""  # noqa: E501


def table(log: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.cuda_table", str(log), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_spilling_kernel_is_an_error(tmp_path: Path) -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("there is no c++filt")
    log, made = tmp_path / "build.log", tmp_path / "table.json"
    log.write_text(LOG.replace("{spill}", "12"))
    result = table(log, "-o", str(made))
    assert result.returncode == 1, result.stderr
    assert "spills registers: OrderByLength" in result.stderr
    assert json.loads(made.read_text())["kernels"] == [
        {
            "architecture": "sm_80",
            "stack": 8,
            "spill_stores": 12,
            "spill_loads": 4,
            "registers": 29,
            "shared_memory": 1024,
            "kernel": "OrderByLength",
        }
    ]
    log.write_text("nothing to be done")
    result = table(log)
    assert result.returncode == 1
    assert "the log names no kernel" in result.stderr


def test_no_kernel_spills_on_either_architecture() -> None:
    """As of the last `make cuda`."""
    kernels = json.loads(RESULTS.read_text(encoding="utf-8"))["kernels"]
    names = {row["kernel"].split("<")[0] for row in kernels}
    assert {"LstmForward", "LstmBackward", "Crf", "CrfReduce", "EmbeddingGrad", "PoolRows"} <= names
    assert {row["architecture"] for row in kernels} == {"sm_80", "sm_90a"}
    for row in kernels:
        assert row["spill_stores"] == row["spill_loads"] == 0, row["kernel"]


def test_nvcc_takes_the_sources(tmp_path: Path) -> None:
    """One file, to intermediate code: seconds. `make cuda` compiles all of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    made = tmp_path / "rows.ptx"
    subprocess.run(
        [nvcc, "-std=c++17", "-arch=compute_90", "--ptx", "-I", str(ROOT / "csrc"),
         str(ROOT / "csrc/cuda/rows.cu"), "-o", str(made)],
        check=True,
    )  # fmt: skip
    assert "EmbeddingGrad" in made.read_text()
