"""Embedding gather and its gradient. Both are copies and ordered sums, so equality is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Array], Any]


def make_problem(
    vocab_size: int, embedding_size: int, total: int, seed: int = 0, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((vocab_size, embedding_size)).astype(dtype),
        rng.integers(0, vocab_size, total, dtype=np.int32),
        rng.standard_normal((total, embedding_size)).astype(dtype),
    )


def ordered_sum(ids: Array, grad_out: Array, vocab_size: int) -> Array:
    grad_table = np.zeros((vocab_size, grad_out.shape[1]), dtype=grad_out.dtype)
    for position, row in enumerate(ids):
        grad_table[row] += grad_out[position]
    return grad_table


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.sampled_from([1, 2, 9, 300, 5000]),
    embedding_size=st.sampled_from([1, 7, 8, 17, 100]),
    total=st.sampled_from([0, 1, 5, 511, 512, 513, 1500]),
    dtype=st.sampled_from([np.float32, np.float64]),
    threads=st.sampled_from([0, 1, 2, 3]),
    seed=st.integers(0, 2**16),
)
def test_gather_and_gradient(
    vocab_size: int, embedding_size: int, total: int, dtype: Any, threads: int, seed: int
) -> None:
    table, ids, grad_out = make_problem(vocab_size, embedding_size, total, seed, dtype)
    out = np.full_like(grad_out, np.nan)
    _core.embedding_gather(table, ids, out, threads)
    np.testing.assert_array_equal(out, table[ids])
    # Written, not accumulated: what was there before does not count.
    grad_table = np.full_like(table, np.nan)
    _core.embedding_grad(ids, grad_out, grad_table, threads)
    np.testing.assert_array_equal(grad_table, ordered_sum(ids, grad_out, vocab_size))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4, 9, 1], r"ids: .*9 at position 2.*0 to 8"),
        ([0, -1, 3, 9], r"ids: .*-1 at position 1.*0 to 8"),
        ([2**31 - 1, 0, 0, 0], r"ids: .*2147483647 at position 0"),
        ([0, 0, 0, -(2**31)], r"ids: .*-2147483648 at position 3"),
    ],
)
def test_ids_out_of_range(ids: list[int], message: str) -> None:
    table, _, grad_out = make_problem(9, 5, 4)
    array = np.array(ids, dtype=np.int32)
    out = np.full_like(grad_out, 7.0)
    with pytest.raises(ValueError, match=message):
        _core.embedding_gather(table, array, out)
    grad_table = np.full_like(table, 7.0)
    with pytest.raises(ValueError, match=message):
        _core.embedding_grad(array, grad_out, grad_table)
    assert (out == 7.0).all()
    assert (grad_table == 7.0).all()


def strided(array: Array) -> Array:
    every_other: Array = np.repeat(array, 2, axis=-1)[..., ::2]
    return every_other


def readonly(array: Array) -> Array:
    copy: Array = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("table", lambda a: a[0], ValueError, "table: "),
        ("table", strided, ValueError, "table: .*contiguous"),
        ("table", lambda a: a.astype(np.float16), TypeError, "table: .*float16"),
        ("table", lambda a: a.astype(np.float64), TypeError, "out: .*float32.*float64"),
        ("ids", lambda a: a.astype(np.int64), TypeError, "ids: .*int64.*int32"),
        ("ids", lambda a: a[None], ValueError, "ids: "),
        ("ids", strided, ValueError, "ids: .*contiguous"),
        ("ids", lambda a: a.tolist(), TypeError, "ids: .*list"),
        ("out", lambda a: a[:-1].copy(), ValueError, r"out: .*\[3, 5\].*\[4, 5\]"),
        ("out", readonly, ValueError, "out: .*writeable"),
        ("out", strided, ValueError, "out: .*contiguous"),
        ("threads", lambda _: -1, ValueError, "threads: .*-1"),
    ],
)
def test_bad_gather_arguments(
    name: str, change: Change, exception: type[Exception], message: str
) -> None:
    table, ids, grad_out = make_problem(9, 5, 4)
    out = np.full_like(grad_out, 7.0)
    arguments: dict[str, Any] = {"table": table, "ids": ids, "out": out, "threads": 1}
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.embedding_gather(**arguments)
    assert (out == 7.0).all()


@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("grad_out", lambda a: a[:-1].copy(), ValueError, "grad_out: "),
        ("grad_out", lambda a: a.astype(np.int32), TypeError, "grad_out: .*int32"),
        ("grad_out", strided, ValueError, "grad_out: .*contiguous"),
        ("ids", lambda a: a.astype(np.int64), TypeError, "ids: .*int64.*int32"),
        ("grad_table", lambda a: a[:, :-1].copy(), ValueError, r"grad_table: .*\[9, 4\].*5"),
        ("grad_table", lambda a: a.astype(np.float64), TypeError, "grad_table: .*float64"),
        ("grad_table", readonly, ValueError, "grad_table: .*writeable"),
        ("grad_table", strided, ValueError, "grad_table: .*contiguous"),
        ("threads", lambda _: -1, ValueError, "threads: .*-1"),
    ],
)
def test_bad_gradient_arguments(
    name: str, change: Change, exception: type[Exception], message: str
) -> None:
    table, ids, grad_out = make_problem(9, 5, 4)
    grad_table = np.full_like(table, 7.0)
    arguments: dict[str, Any] = {
        "ids": ids,
        "grad_out": grad_out,
        "grad_table": grad_table,
        "threads": 1,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.embedding_grad(**arguments)
    assert (grad_table == 7.0).all()


def test_outputs_must_not_overlap_inputs() -> None:
    table, ids, grad_out = make_problem(4, 5, 4)
    with pytest.raises(ValueError, match=r"out: .*share memory.*table"):
        _core.embedding_gather(table, ids, table)
    with pytest.raises(ValueError, match=r"grad_table: .*share memory.*grad_out"):
        _core.embedding_grad(ids, grad_out, grad_out)
