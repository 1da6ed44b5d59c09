"""Two devices to run the same tests on: a GPU, where there is one, and its emulation on the CPU.

The emulation is csrc/cuda compiled as C++ (csrc/cuda/portable.cuh): the same kernels, indices,
tiles and launches, with loops for lanes, warps and blocks. It says nothing about the hardware's
memory ordering, nor about speed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xdistil_fast import _backend

ROOT = Path(__file__).parents[2]
_SOURCES = [f"csrc/cuda/{name}.cu" for name in ("crf", "device", "lstm", "rows")]
_SOURCES.append("csrc/bindings/cuda.cpp")


def _compile(folder: Path, target: Path) -> None:
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the emulation of a GPU needs a C++ compiler; there is no {compiler}")
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", '-DXDF_VERSION="emulated"']
    flags += ["-DXDF_CUDA_MODULE=_cuda_emulated", *(f"-I{path}" for path in includes)]
    running = []
    for source in _SOURCES:
        made = folder / f"{Path(source).stem}.{source.rsplit('.', 1)[1]}.o"
        command = [compiler, *flags, "-x", "c++", "-c", str(ROOT / source), "-o", str(made)]
        running.append((made, subprocess.Popen(command)))
    for made, process in running:
        assert process.wait() == 0, f"{made.name} does not compile"
    objects = [str(made) for made, _ in running]
    half = target.with_suffix(".part")
    subprocess.run([compiler, "-shared", *objects, "-o", str(half)], check=True)
    half.rename(target)


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The module `_cuda_emulated`, compiled if its sources have changed."""
    pytest.importorskip("pybind11", reason="the emulation of a GPU is compiled with pybind11")
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*(ROOT / "csrc/cuda").iterdir(), ROOT / "csrc/bindings/cuda.cpp"]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulated" / digest.hexdigest()[:16]
    target = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(folder, target)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _using(module: Any) -> Iterator[None]:
    original = _backend.cuda
    _backend.cuda = lambda: module
    _backend.device_info.cache_clear()
    _backend.lstm_plan.cache_clear()
    try:
        yield
    finally:
        _backend.cuda = original
        _backend.device_info.cache_clear()
        _backend.lstm_plan.cache_clear()


@pytest.fixture(scope="session")
def gpu() -> None:
    """A GPU that the extension and torch run on; skips, saying why, where there is none."""
    try:
        _backend.device_info(0)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"no GPU: {error}")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU: this torch was built without CUDA")


@dataclass(frozen=True)
class Device:
    """Where a test runs: the name of torch's device, and our extension."""

    name: str
    extension: Any


@pytest.fixture(scope="session", params=["emulated", "gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The emulation; then the GPU, or a skipped test that says why not."""
    if request.param == "emulated":
        module = request.getfixturevalue("emulated")
        with _using(module):
            yield Device("cpu", module)
        return
    request.getfixturevalue("gpu")
    yield Device("cuda", _backend.cuda())
