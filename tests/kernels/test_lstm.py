"""BiLSTM kernels against the float64 oracle, on every instruction set this machine has.

Exactness is tested in float64 (tight), accuracy in float32 against the error torch.nn.LSTM makes on
the same numbers, and batch, order, threads and training against each other to the bit.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast.reference import lstm as oracle

ISAS = _core.isas_available()
SIZES = [1, 7, 8, 9, 16, 17, 33, 100, 200]
LENGTHS = [[], [0], [1], [5], [0, 3, 0], [1, 1, 1, 1], [7, 2, 0, 31, 1, 4], [3] * 70 + [90]]

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


@dataclass
class Problem:
    x: Array
    cu_seqlens: Array
    weights: list[Array]
    grad_out: Array

    @property
    def hidden_size(self) -> int:
        return int(self.weights[1].shape[1])

    def sequences(self) -> list[slice]:
        bounds = self.cu_seqlens.tolist()
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def make_problem(
    lengths: list[int], input_size: int, hidden_size: int, seed: int = 0, dtype: Any = np.float32
) -> Problem:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    # As nn.LSTM starts, but for wide inputs: sums of size 1, so that rounding is a matter of the
    # kernels and not of the problem.
    bound = 1.0 / np.sqrt(max(input_size, hidden_size))
    gates = 4 * hidden_size
    shapes = [(gates, input_size), (gates, hidden_size), (gates,), (gates,)] * 2
    # Values that float32 holds exactly, so that every precision computes the same problem.
    return Problem(
        rng.standard_normal((total, input_size), dtype=np.float32).astype(dtype),
        np.cumsum([0, *lengths], dtype=np.int32),
        [rng.uniform(-bound, bound, shape).astype(np.float32).astype(dtype) for shape in shapes],
        rng.standard_normal((total, 2 * hidden_size), dtype=np.float32).astype(dtype),
    )


def infer(problem: Problem, threads: int = 1) -> Array:
    out = np.full_like(problem.grad_out, np.nan)
    weights = _core.BiLSTMWeights(problem.weights)
    _core.bilstm_forward(weights, problem.x, problem.cu_seqlens, out, threads)
    return out


def train(problem: Problem, threads: int = 1) -> dict[str, Array]:
    """Output of the training forward and all gradients, by name."""
    dtype = problem.x.dtype
    weights = _core.BiLSTMWeights(problem.weights, training=True)
    out = np.full_like(problem.grad_out, np.nan)
    reserve = np.full(
        _core.bilstm_reserve_size(len(problem.x), problem.hidden_size), np.nan, dtype=dtype
    )
    _core.bilstm_forward_train(weights, problem.x, problem.cu_seqlens, out, reserve, threads)
    grad_x = np.full_like(problem.x, np.nan)
    grads = [np.full_like(problem.weights[k], np.nan) for k in (0, 1, 2, 4, 5, 6)]
    _core.bilstm_backward(
        weights,
        problem.x,
        problem.cu_seqlens,
        out,
        reserve,
        problem.grad_out,
        grad_x,
        grads,
        threads,
    )
    return named(out, grad_x, grads)


def named(out: Array, grad_x: Array, grads: list[Array]) -> dict[str, Array]:
    names = ("w_ih", "w_hh", "b", "w_ih_reverse", "w_hh_reverse", "b_reverse")
    return {"out": out, "x": grad_x, **dict(zip(names, grads, strict=True))}


def expected(problem: Problem) -> dict[str, Array]:
    out = oracle.bilstm_forward(problem.x, problem.cu_seqlens, problem.weights)
    gradients = oracle.bilstm_backward(
        problem.x, problem.cu_seqlens, problem.weights, problem.grad_out
    )
    return named(out, gradients.values, gradients.weights)


def by_torch(problem: Problem) -> dict[str, Array]:
    """What torch.nn.LSTM computes of the same problem in the same dtype."""
    torch = pytest.importorskip("torch", reason="the error bound is torch.nn.LSTM's own error")
    lstm = torch.nn.LSTM(problem.x.shape[1], problem.hidden_size, bidirectional=True)
    lstm.to(torch.from_numpy(problem.x).dtype)
    with torch.no_grad():
        for parameter, weight in zip(lstm.parameters(), problem.weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))
    x = torch.from_numpy(problem.x).requires_grad_()
    parts = [s for s in problem.sequences() if s.stop > s.start]
    packed = torch.nn.utils.rnn.pack_sequence([x[s] for s in parts], enforce_sorted=False)
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)
    out = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    out.backward(torch.from_numpy(problem.grad_out))
    grads = [parameter.grad.numpy() for parameter in lstm.parameters()]
    return named(out.detach().numpy(), x.grad.numpy(), [grads[k] for k in (0, 1, 2, 4, 5, 6)])


def error(got: Array, want: Array) -> float:
    return float(np.abs(got.astype(np.float64) - want).max(initial=0.0))


# --- against the oracle ------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), max_size=6),
    input_size=st.sampled_from(SIZES),
    hidden_size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**16),
)
def test_float64_equals_the_oracle(
    lengths: list[int], input_size: int, hidden_size: int, seed: int
) -> None:
    problem = make_problem(lengths, input_size, hidden_size, seed, np.float64)
    want, got = expected(problem), train(problem)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-11, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(infer(problem), got["out"])


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), max_size=6),
    input_size=st.sampled_from(SIZES),
    hidden_size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**16),
)
def test_float32_is_near_the_oracle(
    using_isa: UsingIsa, isa: str, lengths: list[int], input_size: int, hidden_size: int, seed: int
) -> None:
    # Wide shapes, loose bound: catches lanes, tiles and tails gone wrong. The tight bound is below.
    problem = make_problem(lengths, input_size, hidden_size, seed)
    want = expected(problem)
    with using_isa(isa):
        got = train(problem)
        np.testing.assert_array_equal(infer(problem), got["out"])
    for name, value in want.items():
        scale = max(1.0, float(np.abs(value).max(initial=0.0)))
        assert error(got[name], value) <= 2e-6 * scale, name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("lengths", "input_size", "hidden_size"),
    [
        ([40, 3, 17, 1], 1, 1),
        ([40, 3, 17, 1], 7, 9),
        ([40, 3, 17, 1], 33, 16),
        ([12] * 9, 100, 33),
        ([64, 30, 0, 5], 100, 200),
        ([9] * 70, 8, 17),
    ],
)
def test_error_is_within_twice_that_of_torch(
    using_isa: UsingIsa, isa: str, lengths: list[int], input_size: int, hidden_size: int
) -> None:
    problem = make_problem(lengths, input_size, hidden_size, seed=hidden_size)
    want, torch_got = expected(problem), by_torch(problem)
    with using_isa(isa):
        got = train(problem)
    for name, value in want.items():
        # The floor is a few units in the last place of the largest element.
        floor = 8 * np.finfo(np.float32).eps * float(np.abs(value).max())
        bound = 2 * error(torch_got[name], value) + floor
        assert error(got[name], value) <= bound, name


@pytest.mark.parametrize("isa", ISAS)
def test_saturated_gates(using_isa: UsingIsa, isa: str) -> None:
    problem = make_problem([6, 2], 9, 17)
    problem.x *= 1e4
    with using_isa(isa):
        got = train(problem)
    want = expected(problem)
    for name in ("out", "x", "b"):
        assert np.isfinite(got[name]).all()
        assert error(got[name], want[name]) <= 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_stays_in_its_sequence(using_isa: UsingIsa, isa: str, bad: float) -> None:
    problem = make_problem([4, 5, 3], 9, 17)
    with using_isa(isa):
        clean = infer(problem)
        problem.x[6, 2] = bad
        dirty = infer(problem)
    np.testing.assert_array_equal(dirty[:4], clean[:4])
    np.testing.assert_array_equal(dirty[9:], clean[9:])
    if np.isnan(bad):
        assert np.isnan(dirty[6:9, :17]).all()
        assert np.isnan(dirty[4:7, 17:]).all()
        np.testing.assert_array_equal(dirty[4:6, :17], clean[4:6, :17])


@pytest.mark.parametrize("isa", ISAS)
def test_no_sequences(using_isa: UsingIsa, isa: str) -> None:
    with using_isa(isa):
        for lengths in ([], [0, 0]):
            got = train(make_problem(lengths, 9, 17))
            assert all(not value.any() for value in got.values())
            assert got["w_hh"].shape == (68, 17)


# --- bit for bit -------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden_size", [1, 8, 17, 100, 200])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_batch_equals_single(
    using_isa: UsingIsa, isa: str, hidden_size: int, lengths: list[int]
) -> None:
    problem = make_problem(lengths, 33, hidden_size)
    with using_isa(isa):
        batch = train(problem, threads=2)
        for part in problem.sequences():
            alone = Problem(
                problem.x[part],
                np.array([0, part.stop - part.start], dtype=np.int32),
                problem.weights,
                problem.grad_out[part],
            )
            single = train(alone)
            np.testing.assert_array_equal(single["out"], batch["out"][part])
            np.testing.assert_array_equal(single["x"], batch["x"][part])
            np.testing.assert_array_equal(infer(alone), batch["out"][part])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_threads_do_not_change_the_result(
    using_isa: UsingIsa, isa: str, dtype: Any, lengths: list[int]
) -> None:
    problem = make_problem(lengths, 33, 100, dtype=dtype)
    with using_isa(isa):
        one = train(problem, threads=1)
        for threads in (0, 2, 3, 8):
            many = train(problem, threads=threads)
            for name, value in one.items():
                np.testing.assert_array_equal(many[name], value, err_msg=f"{name}, {threads}")
            np.testing.assert_array_equal(infer(problem, threads), one["out"])


@pytest.mark.parametrize("isa", ISAS)
def test_empty_sequences_change_nothing(using_isa: UsingIsa, isa: str) -> None:
    problem = make_problem([4, 5, 3], 9, 17)
    with using_isa(isa):
        without = train(problem)
        problem.cu_seqlens = np.array([0, 0, 4, 9, 9, 9, 12, 12], dtype=np.int32)
        with_empty = train(problem)
    for name, value in without.items():
        np.testing.assert_array_equal(with_empty[name], value, err_msg=name)


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_are_written_without_grad_x_too(using_isa: UsingIsa, isa: str) -> None:
    problem = make_problem([4, 5, 3], 9, 17)
    with using_isa(isa):
        want = train(problem)
        weights = _core.BiLSTMWeights(problem.weights, training=True)
        out = np.empty_like(problem.grad_out)
        reserve = np.empty(_core.bilstm_reserve_size(12, 17), dtype=np.float32)
        _core.bilstm_forward_train(weights, problem.x, problem.cu_seqlens, out, reserve)
        grads = [np.ones_like(problem.weights[k]) for k in (0, 1, 2, 4, 5, 6)]
        _core.bilstm_backward(
            weights, problem.x, problem.cu_seqlens, out, reserve, problem.grad_out, None, grads
        )
    got = named(out, want["x"], grads)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_packed_weights_keep_their_instruction_set(using_isa: UsingIsa) -> None:
    problem = make_problem([4, 5, 3], 9, 17)
    with using_isa("generic"):
        want = infer(problem)
        weights = _core.BiLSTMWeights(problem.weights)
    out = np.empty_like(want)
    _core.bilstm_forward(weights, problem.x, problem.cu_seqlens, out)
    np.testing.assert_array_equal(out, want)


def test_packed_weights_are_a_copy() -> None:
    problem = make_problem([4, 5, 3], 9, 17)
    want = infer(problem)
    weights = _core.BiLSTMWeights(problem.weights)
    for weight in problem.weights:
        weight[...] = np.nan
    out = np.empty_like(want)
    _core.bilstm_forward(weights, problem.x, problem.cu_seqlens, out)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lengths", [[40], [30, 3], [70] * 9 + [5] * 30])
def test_threads_that_share_a_run(using_isa: UsingIsa, isa: str, lengths: list[int]) -> None:
    """A model large enough that a step is cut into parts, and more threads than there are runs."""
    problem = make_problem(lengths, 24, 200)
    with using_isa(isa):
        one = train(problem, threads=1)["out"]
        for threads in (2, 3, 8):
            np.testing.assert_array_equal(train(problem, threads)["out"], one)
            for _ in range(5):  # who takes which part differs from call to call
                np.testing.assert_array_equal(infer(problem, threads), one)


# --- threads and processes ---------------------------------------------------------------------


def test_shared_between_python_threads() -> None:
    problem = make_problem([30, 4, 0, 12, 25], 33, 100)
    want = infer(problem)
    weights = _core.BiLSTMWeights(problem.weights)
    wrong: list[int] = []

    def work(index: int) -> None:
        out = np.empty_like(want)
        for repeat in range(20):
            out.fill(np.nan)
            _core.bilstm_forward(weights, problem.x, problem.cu_seqlens, out, 1 + repeat % 3)
            if not np.array_equal(out, want):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_works_in_a_forked_process() -> None:
    problem = make_problem([30, 4, 0, 12, 25], 33, 100)
    want = infer(problem, threads=3)  # the pool's threads exist now, and do not survive the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if np.array_equal(infer(problem, threads=3), want) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# --- sizes -------------------------------------------------------------------------------------


def test_attributes() -> None:
    problem = make_problem([3], 9, 17)
    for dtype in (np.float32, np.float64):
        arrays = [weight.astype(dtype) for weight in problem.weights]
        weights = _core.BiLSTMWeights(arrays)
        assert (weights.input_size, weights.hidden_size) == (9, 17)
        assert weights.dtype == np.dtype(dtype)
        assert weights.nbytes >= sum(a.nbytes for a in arrays) - arrays[2].nbytes * 2
        assert _core.BiLSTMWeights(arrays, training=True).nbytes > weights.nbytes


def test_reserve_size() -> None:
    assert _core.bilstm_reserve_size(0, 200) == 0
    one = _core.bilstm_reserve_size(1, 200)
    assert one >= 2 * 5 * 200  # four gates and the cell state, in both directions
    # torch_ops counts on the size being a whole number of elements a piece.
    assert _core.bilstm_reserve_size(1234, 200) == 1234 * one
    for total, hidden_size in ((-1, 8), (3, 0), (3, -8), (3, 1 << 40)):
        with pytest.raises(ValueError, match=r"total|hidden_size"):
            _core.bilstm_reserve_size(total, hidden_size)
