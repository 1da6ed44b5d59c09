"""Options, the thread count of both sides, and what is recorded about the machine."""

from __future__ import annotations

import os
import platform
from typing import Any

import cpuinfo
import pytest
import torch

from bench.duel import Turns
from bench.peers import versions
from xdistil_fast import _core


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xdistil-fast")
    group.addoption("--turns", type=int, default=11, help="turns per case (default: 11)")
    group.addoption(
        "--turn-seconds", type=float, default=0.3, help="seconds per side and turn (default: 0.3)"
    )


def pytest_configure() -> None:
    torch.set_num_threads(_core.default_threads())


@pytest.fixture(scope="session")
def turns(pytestconfig: pytest.Config) -> Turns:
    return Turns(pytestconfig.getoption("turns"), pytestconfig.getoption("turn_seconds"))


@pytest.fixture(scope="session")
def threads() -> int:
    """Of every side: all cores that this process may use."""
    return torch.get_num_threads()


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
