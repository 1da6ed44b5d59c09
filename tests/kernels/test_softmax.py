"""Row-wise softmax against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core

ISAS = _core.isas_available()
INF = float("inf")

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


def softmax(logits: Array, threads: int = 1) -> Array:
    out = np.full_like(logits, np.nan)
    _core.softmax(logits, out, threads)
    return out


def expected(logits: Array) -> Array:
    x = logits.astype(np.float64)
    p = np.exp(x - x.max(axis=1, keepdims=True, initial=-INF))
    share: Array = p / p.sum(axis=1, keepdims=True)
    return share


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=80)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 100]),
    columns=st.sampled_from([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 200]),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    forbidden=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_equals_numpy(
    using_isa: UsingIsa,
    isa: str,
    rows: int,
    columns: int,
    dtype: Any,
    scale: float,
    shift: float,
    forbidden: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((rows, columns)) + shift).astype(dtype)
    logits[rng.random(logits.shape) < forbidden] = -INF
    logits[:, 0] = dtype(shift)  # at least one is possible
    with using_isa(isa):
        got = softmax(logits)
    np.testing.assert_allclose(got, expected(logits), atol=4 * np.finfo(dtype).eps, rtol=0)
    assert not got[np.isneginf(logits)].any()
    np.testing.assert_allclose(got.sum(axis=1), 1.0, rtol=columns * np.finfo(dtype).eps)


@pytest.mark.parametrize("isa", ISAS)
def test_error_is_within_twice_that_of_torch(using_isa: UsingIsa, isa: str) -> None:
    torch = pytest.importorskip("torch", reason="the error bound is that of torch.softmax")
    logits = (4.0 * np.random.default_rng(0).standard_normal((4000, 9))).astype(np.float32)
    want = expected(logits)
    by_torch = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    with using_isa(isa):
        got = softmax(logits)
    floor = float(np.finfo(np.float32).eps)
    assert np.abs(got - want).max() <= 2 * np.abs(by_torch - want).max() + floor


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 8, 9, 17])
@pytest.mark.parametrize("bad", [np.nan, INF, "all -inf"])
def test_undefined_rows_are_nan(
    using_isa: UsingIsa, isa: str, columns: int, bad: float | str
) -> None:
    logits = np.zeros((3, columns), dtype=np.float32)
    if isinstance(bad, str):
        logits[1] = -INF
    else:
        logits[1, -1] = bad
    with using_isa(isa):
        got = softmax(logits)
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]], 1.0 / columns, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 9, 16])
def test_neither_rows_nor_threads_change_the_result(
    using_isa: UsingIsa, isa: str, columns: int
) -> None:
    logits = np.random.default_rng(0).standard_normal((30_001, columns)).astype(np.float32)
    with using_isa(isa):
        got = softmax(logits)
        for threads in (0, 2, 3):
            np.testing.assert_array_equal(softmax(logits, threads), got)
        np.testing.assert_array_equal(softmax(logits[77:78]), got[77:78])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 7, 9, 17])
def test_only_the_output_is_written(using_isa: UsingIsa, isa: str, columns: int) -> None:
    logits = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    kept = logits.copy()
    room = np.full(logits.size + 64, 7.0, dtype=np.float32)
    with using_isa(isa):
        _core.softmax(logits, room[32:-32].reshape(logits.shape))
    assert (room[:32] == 7.0).all()
    assert (room[-32:] == 7.0).all()
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize(
    ("logits", "out", "kind", "message"),
    [
        ([[0.0]], None, TypeError, r"logits: got list, must be a NumPy array"),
        (np.zeros((2, 3), np.int32), None, TypeError, r"logits: has dtype int32, must be float32"),
        (np.zeros(3, np.float32), None, ValueError, r"logits: has shape \[3\], must be"),
        (np.zeros((2, 0), np.float32), None, ValueError, r"logits: has 0 columns"),
        (np.zeros((2, 6), np.float32)[:, ::2], None, ValueError, r"logits: must be C-contiguous"),
        (
            np.zeros((2, 3), np.float32),
            np.zeros((2, 4), np.float32),
            ValueError,
            r"out: .*\[2, 4\]",
        ),
        (np.zeros((2, 3), np.float32), np.zeros((2, 3)), TypeError, r"out: has dtype float64"),
    ],
)
def test_bad_input(logits: Any, out: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        _core.softmax(logits, np.zeros((2, 3), np.float32) if out is None else out)


def test_shared_memory_is_refused() -> None:
    logits = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="out: must not share memory with logits"):
        _core.softmax(logits, logits)
    assert (logits == 1.0).all()
