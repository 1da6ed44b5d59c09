"""The packed linear layer against NumPy in float64, on every instruction set this machine has."""

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
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 400]
ROWS = [0, 1, 2, 3, 4, 5, 7, 95, 96, 97, 200]

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


def make_problem(
    rows: int, inputs: int, outputs: int, seed: int = 0, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rows, inputs), dtype=np.float32).astype(dtype),
        rng.standard_normal((outputs, inputs), dtype=np.float32).astype(dtype),
        rng.standard_normal(outputs, dtype=np.float32).astype(dtype),
    )


def run(x: Array, weight: Array, bias: Array | None, threads: int = 1) -> Array:
    out = np.full((len(x), len(weight)), np.nan, dtype=x.dtype)
    _core.linear(_core.LinearWeights(weight, bias), x, out, threads)
    return out


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from(ROWS),
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    with_bias=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**16),
)
def test_equals_numpy(
    using_isa: UsingIsa,
    isa: str,
    rows: int,
    inputs: int,
    outputs: int,
    with_bias: bool,
    dtype: Any,
    seed: int,
) -> None:
    x, weight, bias = make_problem(rows, inputs, outputs, seed, dtype)
    given_bias = bias if with_bias else None
    with using_isa(isa):
        got = run(x, weight, given_bias)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    if with_bias:
        exact += bias
        size += np.abs(bias)
    # The classical bound of a sum of products, (n + 1) u sum |terms|, with u half of eps.
    bound = (inputs + 1) * np.finfo(dtype).eps / 2 * size
    assert (np.abs(got - exact) <= bound + 1e-14).all()


@pytest.mark.parametrize("isa", ISAS)
def test_error_is_within_twice_that_of_torch(using_isa: UsingIsa, isa: str) -> None:
    torch = pytest.importorskip("torch", reason="the error bound is torch's own error")
    x, weight, bias = make_problem(300, 400, 9)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    by_torch = torch.nn.functional.linear(*map(torch.from_numpy, (x, weight, bias))).numpy()
    with using_isa(isa):
        got = run(x, weight, bias)
    floor = 8 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(got - exact).max() <= 2 * np.abs(by_torch - exact).max() + floor


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("outputs", [1, 9, 33, 100])
def test_batch_and_threads_do_not_change_a_row(
    using_isa: UsingIsa, isa: str, dtype: Any, outputs: int
) -> None:
    x, weight, bias = make_problem(200, 100, outputs, dtype=dtype)
    with using_isa(isa):
        batch = run(x, weight, bias)
        for threads in (0, 2, 3):
            np.testing.assert_array_equal(run(x, weight, bias, threads), batch)
        for rows in (slice(0, 1), slice(1, 4), slice(96, 98), slice(150, 200)):
            np.testing.assert_array_equal(run(x[rows], weight, bias), batch[rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_stays_in_its_row(using_isa: UsingIsa, isa: str, bad: float) -> None:
    x, weight, bias = make_problem(7, 33, 9)
    with using_isa(isa):
        clean = run(x, weight, bias)
        x[3, 5] = bad
        dirty = run(x, weight, bias)
    others = [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(dirty[others], clean[others])
    assert not np.isfinite(dirty[3]).any()


def test_attributes() -> None:
    _, weight, bias = make_problem(1, 33, 9)
    weights = _core.LinearWeights(weight, bias)
    assert (weights.in_features, weights.out_features) == (33, 9)
    assert weights.nbytes >= weight.nbytes + bias.nbytes
    assert weights.dtype == np.float32


def test_packed_weights_are_a_copy_and_keep_their_instruction_set(using_isa: UsingIsa) -> None:
    x, weight, bias = make_problem(7, 33, 9)
    with using_isa("generic"):
        want = run(x, weight, bias)
        weights = _core.LinearWeights(weight, bias)
    weight[...] = np.nan
    bias[...] = np.nan
    out = np.empty_like(want)
    _core.linear(weights, x, out)
    np.testing.assert_array_equal(out, want)


def strided(array: Array) -> Array:
    every_other: Array = np.repeat(array, 2, axis=-1)[..., ::2]
    return every_other


def readonly(array: Array) -> Array:
    copy: Array = array.copy()
    copy.flags.writeable = False
    return copy


Change = Callable[[Array], Any]


@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("x", lambda a: a[:, :-1].copy(), ValueError, r"x: .*\[7, 32\].*33"),
        ("x", lambda a: a[0], ValueError, "x: "),
        ("x", strided, ValueError, "x: .*contiguous"),
        ("x", lambda a: a.astype(np.float64), TypeError, "x: .*float64.*float32"),
        ("x", lambda a: a.tolist(), TypeError, "x: .*list"),
        ("out", lambda a: a[:-1].copy(), ValueError, r"out: .*\[6, 9\].*\[7, 9\]"),
        ("out", lambda a: a.astype(np.float64), TypeError, "out: .*float64"),
        ("out", readonly, ValueError, "out: .*writeable"),
        ("out", strided, ValueError, "out: .*contiguous"),
        ("threads", lambda _: -1, ValueError, "threads: .*-1"),
    ],
)
def test_bad_arguments(name: str, change: Change, exception: type[Exception], message: str) -> None:
    x, weight, bias = make_problem(7, 33, 9)
    out = np.full((7, 9), 7.0, dtype=np.float32)
    arguments: dict[str, Any] = {
        "weights": _core.LinearWeights(weight, bias),
        "x": x,
        "out": out,
        "threads": 1,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.linear(**arguments)
    assert (out == 7.0).all(), "the output was written before the check"


@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("weight", lambda a: a[0], ValueError, "weight: "),
        ("weight", lambda a: a[:0].copy(), ValueError, r"weight: .*\[0, 33\]"),
        ("weight", lambda a: a[:, :0].copy(), ValueError, r"weight: .*\[9, 0\]"),
        ("weight", strided, ValueError, "weight: .*contiguous"),
        ("weight", lambda a: a.astype(np.float16), TypeError, "weight: .*float16"),
        ("weight", lambda a: a.tolist(), TypeError, "weight: .*list"),
        ("bias", lambda a: a[:-1].copy(), ValueError, r"bias: .*\[8\].*\[9\]"),
        ("bias", lambda a: a.astype(np.float64), TypeError, "bias: .*float64.*float32"),
    ],
)
def test_bad_weights(name: str, change: Change, exception: type[Exception], message: str) -> None:
    _, weight, bias = make_problem(1, 33, 9)
    arrays: dict[str, Any] = {"weight": weight, "bias": bias}
    arrays[name] = change(arrays[name])
    with pytest.raises(exception, match=message):
        _core.LinearWeights(**arrays)


def test_output_must_not_overlap_the_input() -> None:
    x, weight, bias = make_problem(7, 9, 9)
    with pytest.raises(ValueError, match=r"out: .*share memory.*x"):
        _core.linear(_core.LinearWeights(weight, bias), x, x)


def run_grad(x: Array, grad_out: Array, threads: int = 1) -> tuple[Array, Array]:
    grad_weight = np.full((grad_out.shape[1], x.shape[1]), np.nan, dtype=x.dtype)
    grad_bias = np.full(grad_out.shape[1], np.nan, dtype=x.dtype)
    _core.linear_grad(x, grad_out, grad_weight, grad_bias, threads)
    return grad_weight, grad_bias


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([*ROWS, 127, 128, 129, 300]),
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**16),
)
def test_gradient_equals_numpy(
    using_isa: UsingIsa, isa: str, rows: int, inputs: int, outputs: int, dtype: Any, seed: int
) -> None:
    x, weight, _ = make_problem(rows, inputs, outputs, seed, dtype)
    grad_out = (x @ weight.T).astype(dtype)
    with using_isa(isa):
        grad_weight, grad_bias = run_grad(x, grad_out)
        for threads in (2, 3):
            for one, many in zip(
                (grad_weight, grad_bias), run_grad(x, grad_out, threads), strict=True
            ):
                np.testing.assert_array_equal(many, one)
    exact = grad_out.astype(np.float64)
    for got, factor in ((grad_weight, x.astype(np.float64)), (grad_bias, np.ones((rows, 1)))):
        wanted = exact.T @ factor
        bound = (rows + 1) * np.finfo(dtype).eps / 2 * (np.abs(exact).T @ np.abs(factor))
        assert (np.abs(got.reshape(wanted.shape) - wanted) <= bound + 1e-14).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda a: a[:3], "grad_out.*must be"),
        ("grad_out", lambda a: a.astype(np.float64), "grad_out"),
        ("grad_weight", lambda a: a[:, :2], "grad_weight"),
        ("grad_bias", lambda a: a[:1], "grad_bias"),
        ("threads", lambda _: -1, "threads"),
    ],
)
def test_bad_gradient_arguments(name: str, change: Callable[[Any], Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": np.zeros((4, 3), np.float32),
        "grad_out": np.zeros((4, 2), np.float32),
        "grad_weight": np.zeros((2, 3), np.float32),
        "grad_bias": np.zeros(2, np.float32),
        "threads": 1,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError), match=message):
        _core.linear_grad(**arguments)
