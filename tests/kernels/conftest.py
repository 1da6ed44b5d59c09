"""What tests of several kernels need. Fixtures of the session, which hypothesis lets in as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from xdistil_fast import _core


@contextlib.contextmanager
def _using_isa(name: str) -> Iterator[None]:
    before = _core.active_isa()
    _core.set_isa(name)
    try:
        yield
    finally:
        _core.set_isa(before)


@pytest.fixture(scope="session")
def using_isa() -> Callable[[str], AbstractContextManager[None]]:
    """`with using_isa(name):` makes the kernels of an instruction set the active ones."""
    return _using_isa
