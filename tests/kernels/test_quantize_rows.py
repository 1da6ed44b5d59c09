"""Rounding of weight rows to bytes whose sums no kernel lets overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from xdistil_fast import _core

CHUNK, SET_LIMIT = 16, 258  # csrc/xdf/kernels.h: kInt8Chunk, kInt8SetLimit
TINY = float(np.finfo(np.float32).tiny)

Array = np.ndarray[Any, np.dtype[Any]]


def quantize(weight: Array) -> tuple[Array, Array]:
    levels = np.full(weight.shape, -128, np.int8)
    scales = np.full(len(weight), np.nan, np.float32)
    _core.quantize_rows(weight, levels, scales)
    return levels, scales


def largest_sets(values: Array) -> Array:
    """By row the largest sum of the positive or of the negative values of a set.

    A set is the columns k of a chunk that have the same k // 2 % 2.
    """
    rows, width = values.shape
    chunks = -(-width // CHUNK)
    padded = np.zeros((rows, chunks * CHUNK))
    padded[:, :width] = values
    sets = padded.reshape(rows, chunks, CHUNK // 4, 2, 2)  # [row, chunk, four, set, two]
    positive = np.maximum(sets, 0).sum(axis=(2, 4))
    negative = np.maximum(-sets, 0).sum(axis=(2, 4))
    return np.maximum(positive, negative).max(axis=(1, 2), initial=0.0)


def check(weight: Array) -> None:
    levels, scales = quantize(weight)
    assert np.abs(levels.astype(int)).max(initial=0) <= 127
    assert largest_sets(levels).max(initial=0) <= SET_LIMIT
    assert np.isfinite(scales).all()
    assert (scales >= TINY).all()
    exact = weight.astype(np.float64)
    # No scale is larger than it must be: either the largest weight or a set asks for it, and half a
    # percent at a time for sets that rounding carries past their limit.
    needed = np.maximum(np.abs(exact).max(axis=1) / 127, largest_sets(exact) / SET_LIMIT)
    used = needed >= TINY
    assert (scales[used] <= needed[used] * 1.05).all()
    assert not levels[~used].any()
    # Half a level, and of the smallest floats what the division leaves.
    bound = 0.5001 * scales.astype(np.float64)[:, None]
    assert (np.abs(levels * scales.astype(np.float64)[:, None] - exact)[used] <= bound[used]).all()


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 70),
    power=st.integers(-44, 37),
    shape=st.sampled_from(["normal", "uniform", "positive", "constant", "sparse"]),
    seed=st.integers(0, 2**16),
)
def test_random_rows(rows: int, width: int, power: int, shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = {
        "normal": lambda: rng.standard_normal((rows, width)),
        "uniform": lambda: rng.uniform(-1, 1, (rows, width)),
        "positive": lambda: rng.uniform(0, 1, (rows, width)),
        "constant": lambda: np.full((rows, width), rng.choice([-1.0, 1.0])),
        "sparse": lambda: rng.uniform(-1, 1, (rows, width)) * (rng.random((rows, width)) < 0.1),
    }[shape]()
    check((weight * 10.0**power).astype(np.float32))


@settings(deadline=None, max_examples=200)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 40)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_any_finite_floats(weight: Array) -> None:
    check(weight)


@pytest.mark.parametrize("width", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 6.3e-44, -1e-40, 1e-38, 1e-36, -3.4e38])
def test_constant_rows(width: int, value: float) -> None:
    """From zeros over what has no scale to the largest float."""
    check(np.full((2, width), value, np.float32))


def test_one_column() -> None:
    weight = np.array([[2.54], [-1.27], [0.0]], np.float32)
    levels, scales = quantize(weight)
    np.testing.assert_array_equal(levels, [[127], [-127], [0]])
    np.testing.assert_allclose(scales, [0.02, 0.01, 1.0], rtol=1e-6)


def test_bytes_survive() -> None:
    """Bytes within the limits are found again, where a row has one that sets the scale."""
    weight = np.zeros((3, 40), np.float32)
    weight[0, [0, 1, 4]] = 127, 127, 4
    weight[1, [2, 3, 6, 18]] = -127, -127, -4, 127
    weight[2, [16, 5]] = 127, -3
    levels, scales = quantize(weight)
    np.testing.assert_array_equal(levels, weight)
    np.testing.assert_array_equal(scales, [1, 1, 1])


def test_rows_are_on_their_own() -> None:
    weight = np.random.default_rng(0).standard_normal((9, 33), dtype=np.float32)
    levels, scales = quantize(weight)
    for row in range(9):
        alone_levels, alone_scales = quantize(weight[row : row + 1])
        np.testing.assert_array_equal(alone_levels[0], levels[row])
        np.testing.assert_array_equal(alone_scales[0], scales[row])


Change = Callable[[Array], Any]


@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("weight", lambda a: np.where(a > 2, np.inf, a), ValueError, "weight: .*not finite"),
        ("weight", lambda a: np.where(a > 2, np.nan, a), ValueError, "weight: .*not finite"),
        ("weight", lambda a: a[0], ValueError, r"weight: .*\[33\]"),
        ("weight", lambda a: a[:, :0].copy(), ValueError, "weight: .*0 columns"),
        ("weight", lambda a: a[:, ::2], ValueError, "weight: .*contiguous"),
        ("weight", lambda a: a.astype(np.float64), TypeError, "weight: .*float64.*float32"),
        ("weight", lambda a: a.tolist(), TypeError, "weight: .*list"),
        ("out", lambda a: a[:-1].copy(), ValueError, r"out: .*\[8, 33\].*\[9, 33\]"),
        ("out", lambda a: a[:, :-1].copy(), ValueError, r"out: .*\[9, 32\].*\[9, 33\]"),
        ("out", lambda a: a.astype(np.uint8), TypeError, "out: .*uint8.*int8"),
        ("out", lambda a: np.broadcast_to(a, a.shape), ValueError, "out: .*writeable"),
        ("scales", lambda a: a[:-1].copy(), ValueError, r"scales: .*\[8\].*\[9\]"),
        ("scales", lambda a: a[:, None].copy(), ValueError, r"scales: .*\[9, 1\].*\[9\]"),
        ("scales", lambda a: a.astype(np.float64), TypeError, "scales: .*float64.*float32"),
        ("scales", lambda a: np.broadcast_to(a, a.shape), ValueError, "scales: .*writeable"),
    ],
)
def test_bad_arguments(name: str, change: Change, exception: type[Exception], message: str) -> None:
    weight = np.random.default_rng(0).standard_normal((9, 33), dtype=np.float32)
    weight[4, 5] = 3
    arguments: dict[str, Any] = {
        "weight": weight,
        "out": np.full((9, 33), 7, np.int8),
        "scales": np.full(9, 7, np.float32),
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.quantize_rows(**arguments)
    for untouched in {"out", "scales"} - {name}:
        assert (arguments[untouched] == 7).all(), "an output was written before the check"


def test_outputs_must_not_overlap() -> None:
    memory = np.zeros(64, np.float32)
    weight, scales = memory[:16].reshape(4, 4), memory[12:16]
    with pytest.raises(ValueError, match=r"scales: .*share memory.*weight"):
        _core.quantize_rows(weight, np.empty((4, 4), np.int8), scales)
    out = memory[12:16].view(np.int8).reshape(4, 4)
    with pytest.raises(ValueError, match=r"out: .*share memory.*weight"):
        _core.quantize_rows(weight, out, np.empty(4, np.float32))
    with pytest.raises(ValueError, match="share memory"):
        _core.quantize_rows(weight, memory[20:24].view(np.int8).reshape(4, 4), memory[20:24])
