"""Token ids to class scores, against the float64 oracle and on every instruction set there is.

The hidden states are those of `student_scores`, which test_student.py compares with the oracle. So
pooling and output layer are compared here with the oracle's, given the kernels' own states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast.reference import student as oracle

ISAS = _core.isas_available()
PRECISIONS = ("float32", "bfloat16", "int8")
POOLINGS = ("max", "mean", "last")
LENGTHS = [[], [0], [1], [5], [0, 3, 0], [6, 5, 4], [7, 2, 0, 31, 1, 4], [3] * 70 + [20, 19]]
# Of scores of size 1, over a product of 2H terms and the mean before it.
ERROR = 2e-6

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


@dataclass
class Problem:
    """A student with its arrays as the kernels and the oracle take them, and a batch for it."""

    precision: str
    ids: Array
    cu_seqlens: Array
    embedding: Array
    bilstm: list[Any]
    output: tuple[Any, Array]

    def weights(self, pooling: str | None, output: tuple[Any, Array] | None = None) -> Any:
        table_ids = np.arange(0, len(self.embedding), 2, dtype=np.int32)
        arrays = (self.embedding, self.bilstm, self.output if output is None else output)
        return _core.StudentWeights(self.precision, *arrays, table_ids, 1, pooling)


def quantize(weight: Array) -> tuple[Array, Array]:
    levels, scales = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    _core.quantize_rows(weight, levels, scales)
    return levels, scales


def make_problem(
    lengths: list[int],
    hidden_size: int,
    precision: str = "float32",
    classes: int = 3,
    seed: int = 0,
) -> Problem:
    rng = np.random.default_rng(seed)
    embedding_size, gates, vocab_size = 5, 4 * hidden_size, 50
    bound = 1.0 / np.sqrt(max(hidden_size, embedding_size))
    shapes = [(gates, embedding_size), (gates, hidden_size), (gates,)] * 2
    bilstm: list[Any] = [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in shapes]
    output: Any = rng.standard_normal((classes, 2 * hidden_size), dtype=np.float32)
    if precision == "int8":
        bilstm[1], bilstm[4], output = quantize(bilstm[1]), quantize(bilstm[4]), quantize(output)
    return Problem(
        precision,
        rng.integers(0, vocab_size, sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths], dtype=np.int32),
        rng.standard_normal((vocab_size, embedding_size), dtype=np.float32),
        bilstm,
        (output, rng.standard_normal(classes, dtype=np.float32)),
    )


def hidden(problem: Problem) -> Array:
    """The kernels' own hidden states, by way of an output layer that shows them as they are."""
    width = len(problem.bilstm[2]) // 2
    output: Any = np.eye(width, dtype=np.float32)
    if problem.precision == "int8":
        scales = np.full(width, oracle.HIDDEN_LEVELS, np.float32)
        output = np.eye(width, dtype=np.int8), scales
    out = np.empty((len(problem.ids), width), np.float32)
    weights = problem.weights(None, (output, np.zeros(width, np.float32)))
    _core.student_scores(weights, problem.ids, problem.cu_seqlens, out)
    scale = oracle.HIDDEN_LEVELS if problem.precision == "int8" else 1
    return out.astype(np.float64) / scale


def matrix(problem: Problem) -> Array:
    weight = problem.output[0]
    if problem.precision == "int8":
        return weight[0].astype(np.float64) * weight[1][:, None]
    return np.asarray(weight, np.float64)


def compute(problem: Problem, pooling: str, threads: int = 1, windows: Any = ()) -> Array:
    texts = len(windows[0] if windows else problem.cu_seqlens) - 1
    out = np.full((texts, len(problem.output[1])), np.nan, np.float32)
    _core.student_class_scores(
        problem.weights(pooling), problem.ids, problem.cu_seqlens, out, *windows, threads=threads
    )
    assert np.isfinite(out).all(), "a score was not written"
    return out


def check(got: Array, want: Array) -> None:
    np.testing.assert_allclose(
        got, want, rtol=0, atol=ERROR * max(1.0, np.abs(want).max(initial=0))
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 40]), max_size=6),
    hidden_size=st.integers(1, 70),
    classes=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_pools_the_hidden_states(
    using_isa: UsingIsa,
    isa: str,
    precision: str,
    pooling: str,
    lengths: list[int],
    hidden_size: int,
    classes: int,
    seed: int,
) -> None:
    problem = make_problem(lengths, hidden_size, precision, classes, seed)
    with using_isa(isa):
        states = hidden(problem)
        got = compute(problem, pooling)
    pooled = oracle.pool(states, problem.cu_seqlens, pooling)
    check(got, pooled @ matrix(problem).T + problem.output[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_float32_is_the_oracle(using_isa: UsingIsa, isa: str, pooling: str) -> None:
    problem = make_problem([7, 2, 0, 31, 1, 4], 33)
    arrays = (problem.embedding, problem.bilstm, problem.output)
    want = oracle.student_class_scores(problem.ids, problem.cu_seqlens, *arrays, pooling)
    with using_isa(isa):
        check(compute(problem, pooling), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_few_texts_change_class_in_int8(
    using_isa: UsingIsa, isa: str, precision: str, pooling: str
) -> None:
    """No step is set right here, so hidden states next to a tie may go to either side."""
    problem = make_problem([40, 30, 21, 3, 0, 1] * 20, 100, precision, seed=7)
    arrays = (problem.embedding, problem.bilstm, problem.output)
    want = oracle.student_class_scores(problem.ids, problem.cu_seqlens, *arrays, pooling, precision)
    with using_isa(isa):
        got = compute(problem, pooling)
    assert np.mean(got.argmax(1) != want.argmax(1)) <= (0.03 if precision == "int8" else 0)
    assert np.abs(got - want).max() <= {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.5}[precision]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_batch_equals_single_on_any_number_of_threads(
    using_isa: UsingIsa, isa: str, precision: str, pooling: str, lengths: list[int]
) -> None:
    problem = make_problem(lengths, 17, precision)
    with using_isa(isa):
        batch = compute(problem, pooling, threads=2)
        for threads in (0, 1, 3, 8):
            np.testing.assert_array_equal(compute(problem, pooling, threads), batch)
        for row, (begin, end) in enumerate(itertools.pairwise(problem.cu_seqlens.tolist())):
            alone = make_problem(lengths, 17, precision)
            alone.ids, alone.cu_seqlens = alone.ids[begin:end], np.array([0, end - begin], np.int32)
            np.testing.assert_array_equal(compute(alone, pooling)[0], batch[row])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_without_pieces_gets_the_bias(precision: str, pooling: str) -> None:
    problem = make_problem([0, 4, 0], 9, precision)
    scores = compute(problem, pooling)
    np.testing.assert_array_equal(scores[[0, 2]], [problem.output[1]] * 2)


# --- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.lists(st.integers(0, 12), max_size=4), max_size=5),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_windows(
    precision: str, pooling: str, texts: list[list[int]], seed: int, data: st.DataObject
) -> None:
    """Pooled over the cores of a text's windows, as if those were one sequence."""
    problem = make_problem([length for text in texts for length in text], 17, precision, seed=seed)
    bounds = list(itertools.pairwise(problem.cu_seqlens.tolist()))
    cores = np.array(
        [sorted(data.draw(st.tuples(*[st.integers(a, b)] * 2))) for a, b in bounds], np.int32
    ).reshape(-1, 2)
    cu_windows = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    got = compute(problem, pooling, 2, (cu_windows, cores))
    kept = [np.arange(begin, end) for begin, end in cores]
    lengths = [sum(map(len, kept[a:b])) for a, b in itertools.pairwise(cu_windows)]
    states = hidden(problem)[np.concatenate([*kept, np.zeros(0, np.int64)]).astype(np.int64)]
    pooled = oracle.pool(states, np.cumsum([0, *lengths]), pooling)
    check(got, pooled @ matrix(problem).T + problem.output[1])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_of_more_pieces_than_are_held_at_once(precision: str, pooling: str) -> None:
    """The kernel keeps 16,384 hidden states; a text goes on in the next part, and in a third."""
    lengths = [200] * 5 + [300] * 130 + [0] + [100] * 3
    problem = make_problem(lengths, 3, precision)
    cu_windows = np.array([0, 2, 2, 5, 135, 135, 136, 137, 139], np.int32)
    ends = problem.cu_seqlens
    cores = np.stack([ends[:-1], ends[1:]], axis=1)
    got = compute(problem, pooling, 2, (cu_windows, cores))
    pooled = oracle.pool(hidden(problem), ends[cu_windows], pooling)
    check(got, pooled @ matrix(problem).T + problem.output[1])
    for text in (3, 7):  # alone, it is cut at other places
        a, b = cu_windows[text : text + 2]
        alone = make_problem(lengths, 3, precision)
        alone.ids = problem.ids[ends[a] : ends[b]]
        alone.cu_seqlens = ends[a : b + 1] - ends[a]
        windows = (np.array([0, b - a], np.int32), np.ascontiguousarray(cores[a:b] - ends[a]))
        np.testing.assert_array_equal(compute(alone, pooling, 1, windows)[0], got[text])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_long_sequences(using_isa: UsingIsa, isa: str, precision: str, pooling: str) -> None:
    """Sums of bytes are kept in 16 bits for 516 states at most; here of states near 1."""
    problem = make_problem([516, 517, 1300], 3, precision)
    for at in (2, 5):  # open gates: c grows from step to step, and h with it
        problem.bilstm[at][:] = 9
    with using_isa(isa):
        states = hidden(problem)
        got = compute(problem, pooling)
    assert states.mean() > 0.9
    pooled = oracle.pool(states, problem.cu_seqlens, pooling)
    check(got, pooled @ matrix(problem).T + problem.output[1])


# --- arguments ---------------------------------------------------------------------------------


def test_refuses_what_does_not_fit() -> None:
    problem = make_problem([3, 4], 9)
    out = np.empty((2, 3), np.float32)
    good = (problem.weights("max"), problem.ids, problem.cu_seqlens, out)
    with pytest.raises(ValueError, match="pooling: got 'sum', must be 'max', 'mean', 'last'"):
        problem.weights("sum")
    with pytest.raises(ValueError, match="have no pooling"):
        _core.student_class_scores(problem.weights(None), *good[1:])
    with pytest.raises(ValueError, match="have a pooling"):
        _core.student_scores(good[0], problem.ids, problem.cu_seqlens, np.empty((7, 3), np.float32))
    with pytest.raises(ValueError, match="out: has shape"):
        _core.student_class_scores(*good[:3], np.empty((7, 3), np.float32))
    with pytest.raises(ValueError, match="ids: has 50"):
        _core.student_class_scores(good[0], np.full(7, 50, np.int32), *good[2:])
    windows = np.array([0, 1, 2], np.int32)
    with pytest.raises(ValueError, match="cu_windows: must be given with cores"):
        _core.student_class_scores(*good, windows)
    cores = np.array([[0, 3], [3, 7]], np.int32)
    with pytest.raises(ValueError, match="cu_windows: ends with 1, must end with the number"):
        _core.student_class_scores(*good, np.array([0, 0, 1], np.int32), cores)
    with pytest.raises(ValueError, match="cores: has shape"):
        _core.student_class_scores(*good, windows, cores[:1])
    for wrong in ([[0, 4], [3, 7]], [[2, 1], [3, 7]], [[0, 3], [2, 7]], [[-1, 3], [3, 7]]):
        with pytest.raises(ValueError, match=r"cores: has .* must ascend within its window"):
            _core.student_class_scores(*good, windows, np.array(wrong, np.int32))
