"""Options, the thread count of both sides, and what is recorded about the machine."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpuinfo
import pytest
import torch

from bench.corpus import Texts, corpus_texts, own_texts
from bench.duel import Turns
from bench.peers import versions
from xdistil_fast import _core
from xdistil_fast.model_io import ModelFolder, load_folder, resolve_model
from xdistil_fast.quantization import as_floats


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xdistil-fast")
    group.addoption("--turns", type=int, default=7, help="turns per case (default: 7)")
    group.addoption(
        "--turn-seconds", type=float, default=0.12, help="seconds per side and turn (default: 0.12)"
    )
    group.addoption(
        "--model", default="en-ner", help="student for real text (default: the embedded en-ner)"
    )
    group.addoption(
        "--corpus",
        type=Path,
        action="append",
        default=[],
        help="real text (CoNLL, JSON lines, one text a line; also gzipped); may be repeated",
    )
    group.addoption(
        "--texts", type=int, default=512, help="texts taken of each corpus (default: 512)"
    )


def pytest_configure(config: pytest.Config) -> None:
    for path in config.getoption("corpus"):
        if not path.is_file():
            raise pytest.UsageError(f"--corpus {path}: there is no such file")
    torch.set_num_threads(_core.default_threads())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases with real text run once for each corpus, or on sentences of our own."""
    if "texts" in metafunc.fixturenames:
        paths = metafunc.config.getoption("corpus")
        count = metafunc.config.getoption("texts")
        values = [corpus_texts(path) for path in paths] or [own_texts(count)]
        metafunc.parametrize("texts", values, ids=[value.name for value in values])


@pytest.fixture(scope="session")
def turns(pytestconfig: pytest.Config) -> Turns:
    return Turns(pytestconfig.getoption("turns"), pytestconfig.getoption("turn_seconds"))


@pytest.fixture(scope="session")
def threads() -> int:
    """Of every side: all cores that this process may use."""
    return torch.get_num_threads()


@pytest.fixture(scope="session")
def text_count(pytestconfig: pytest.Config) -> int:
    """Texts that a case takes of its corpus."""
    return int(pytestconfig.getoption("texts"))


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> ModelFolder:
    """The student for real text, in float32: every side begins with the same weights."""
    folder = load_folder(resolve_model(pytestconfig.getoption("model")))
    config = replace(folder.config, precision="float32")
    tensors = {name: as_floats(folder.tensors, name) for name in config.tensor_shapes()}
    return replace(folder, config=config, tensors=tensors)


@pytest.fixture
def sample(texts: Texts, text_count: int) -> list[str]:
    """What most cases take of a corpus."""
    return texts.sample(text_count)


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """In place of pytest-benchmark's, which names the host."""
    cpu = cpuinfo.get_cpu_info()
    return {
        "cpu": cpu.get("brand_raw") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": _core.active_isa(),
        "isas_available": _core.isas_available(),
        "system": f"{platform.system()} {platform.release()}",
        "python_version": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info.pop("project", None)  # the name of a folder on somebody's machine
