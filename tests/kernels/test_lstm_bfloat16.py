"""BiLSTM training with products of bfloat16, on each instruction set that multiplies it.

Two yardsticks. The oracle that rounds the same factors: what is left is float32, and here and there
a number next to a tie that goes to the other side. And the exact oracle: bfloat16 keeps 8 bits, so
each factor is off by up to 2^-9 of itself and a product by 2^-8. In sums such errors come with both
signs; through the recurrence they feed one another. Errors are norms relative to norms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast.reference import lstm as oracle

MULTIPLY_BFLOAT16 = [isa for isa in _core.isas_available() if isa == "avx512bf16"]
LENGTHS = [[], [0], [1], [5], [0, 3, 0], [1, 1, 1, 1], [7, 2, 0, 31, 1, 4], [3] * 70 + [90]]
# Of the rounding oracle: a number on the other side of a tie is off by 2^-8 of itself. There are
# few of them, but in a small tensor one may be all of the norm.
NEAR, NEAR_SMALL = 2e-3, 2.0**-8
# Of the exact one: see above; 2^-8 is 0.0039.
EXACT = 2.0**-7

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]
Results = dict[str, Array]

pytestmark = pytest.mark.skipif(
    not MULTIPLY_BFLOAT16,
    reason=f"no instruction set here multiplies bfloat16: {', '.join(_core.isas_available())}",
)
on_each = pytest.mark.parametrize("isa", MULTIPLY_BFLOAT16)


class Problem:
    def __init__(self, lengths: list[int], input_size: int, hidden_size: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        bound = 1.0 / np.sqrt(max(input_size, hidden_size))
        gates, total = 4 * hidden_size, sum(lengths)
        shapes = [(gates, input_size), (gates, hidden_size), (gates,), (gates,)] * 2
        self.x = rng.standard_normal((total, input_size), dtype=np.float32)
        self.cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        self.weights = [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in shapes]
        self.grad_out = rng.standard_normal((total, 2 * hidden_size), dtype=np.float32)
        self.hidden_size = hidden_size

    def expected(self, bfloat16: bool) -> Results:
        batch = (self.x, self.cu_seqlens, self.weights)
        out = oracle.bilstm_forward(*batch, bfloat16=bfloat16)
        gradients = oracle.bilstm_backward(*batch, self.grad_out, bfloat16=bfloat16)
        return named(out, gradients.values, gradients.weights)

    def infer(self, threads: int = 1) -> Array:
        out = np.full_like(self.grad_out, np.nan)
        weights = _core.BiLSTMWeights(self.weights, bfloat16=True)
        _core.bilstm_forward(weights, self.x, self.cu_seqlens, out, threads)
        return out

    def train(self, threads: int = 1, bfloat16: bool = True) -> Results:
        weights = _core.BiLSTMWeights(self.weights, training=True, bfloat16=bfloat16)
        out = np.full_like(self.grad_out, np.nan)
        size = _core.bilstm_reserve_size(len(self.x), self.hidden_size)
        reserve = np.full(size, np.nan, np.float32)
        _core.bilstm_forward_train(weights, self.x, self.cu_seqlens, out, reserve, threads)
        assert np.isfinite(reserve).all()
        grad_x = np.full_like(self.x, np.nan)
        grads = [np.full_like(self.weights[k], np.nan) for k in (0, 1, 2, 4, 5, 6)]
        batch = (self.x, self.cu_seqlens, out, reserve, self.grad_out)
        _core.bilstm_backward(weights, *batch, grad_x, grads, threads)
        return named(out, grad_x, grads)


def named(out: Array, grad_x: Array, grads: list[Array]) -> Results:
    names = ("w_ih", "w_hh", "b", "w_ih_reverse", "w_hh_reverse", "b_reverse")
    return {"out": out, "x": grad_x, **dict(zip(names, grads, strict=True))}


def error(got: Array, want: Array) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    norm = float(np.linalg.norm(want))
    distance = float(np.linalg.norm(got.astype(np.float64) - want))
    return distance / norm if norm else distance


def assert_near(got: Results, want: Results, bound: float) -> None:
    for name, values in got.items():
        assert np.isfinite(values).all(), name
        assert error(values, want[name]) <= bound, name


# --- against the oracle ------------------------------------------------------------------------


@on_each
@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), max_size=6),
    input_size=st.integers(1, 40),
    hidden_size=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    input_size: int,
    hidden_size: int,
    seed: int,
) -> None:
    problem = Problem(lengths, input_size, hidden_size, seed)
    with using_isa(isa):
        got = problem.train()
        np.testing.assert_array_equal(problem.infer(), got["out"])
    assert_near(got, problem.expected(bfloat16=True), NEAR_SMALL)


@on_each
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("hidden_size", [15, 16, 17, 100, 200])
def test_lengths(using_isa: UsingIsa, isa: str, lengths: list[int], hidden_size: int) -> None:
    problem = Problem(lengths, 50, hidden_size)
    with using_isa(isa):
        got = problem.train()
    assert_near(got, problem.expected(bfloat16=True), NEAR)
    assert_near(got, problem.expected(bfloat16=False), EXACT)


@on_each
def test_products_are_rounded(using_isa: UsingIsa, isa: str) -> None:
    """Else nothing here would show that they are."""
    problem = Problem([7, 2, 31], 50, 100)
    exact = problem.expected(bfloat16=False)
    with using_isa(isa):
        got, float32 = problem.train(), problem.train(bfloat16=False)
    for name, values in got.items():
        assert error(float32[name], exact[name]) < 1e-5, name
        if not name.startswith("b"):
            assert error(values, exact[name]) > 1e-4, name


# --- batch, threads ----------------------------------------------------------------------------


@on_each
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("hidden_size", [9, 33, 200])
def test_batch_equals_single(
    using_isa: UsingIsa, isa: str, lengths: list[int], hidden_size: int
) -> None:
    problem = Problem(lengths, 21, hidden_size)
    with using_isa(isa):
        whole = problem.train()
        for begin, end in itertools.pairwise(problem.cu_seqlens.tolist()):
            alone = Problem([end - begin], 21, hidden_size)
            alone.weights = problem.weights
            alone.x, alone.grad_out = problem.x[begin:end], problem.grad_out[begin:end]
            got = alone.train()
            np.testing.assert_array_equal(got["out"], whole["out"][begin:end])
            np.testing.assert_array_equal(got["x"], whole["x"][begin:end])


@on_each
@pytest.mark.parametrize("lengths", [*LENGTHS, [40], [70] * 9 + [5] * 30])
@pytest.mark.parametrize("hidden_size", [17, 200])
def test_threads_do_not_change_the_result(
    using_isa: UsingIsa, isa: str, lengths: list[int], hidden_size: int
) -> None:
    problem = Problem(lengths, 33, hidden_size)
    with using_isa(isa):
        want = problem.train()
        for threads in (0, 2, 3, 8):
            got = problem.train(threads)
            for name, values in got.items():
                np.testing.assert_array_equal(values, want[name], err_msg=name)


# --- arguments ---------------------------------------------------------------------------------


@on_each
def test_packed_weights_keep_their_kernels(using_isa: UsingIsa, isa: str) -> None:
    problem = Problem([4, 5, 3], 7, 17)
    with using_isa(isa):
        want = problem.infer()
        weights = _core.BiLSTMWeights(problem.weights, bfloat16=True)
        assert weights.dtype == np.float32
    out = np.empty_like(want)
    with using_isa("generic"):
        _core.bilstm_forward(weights, problem.x, problem.cu_seqlens, out)
    np.testing.assert_array_equal(out, want)
