"""Token ids to tag scores, against the float64 oracle and on every instruction set there is.

float32 must be its parts to the bit (the parts have tests of their own). bfloat16 is float32 of
rounded numbers, and must be as near to the oracle as float32 is: where hidden states are rounded
too, step by step, since one next to a tie may go to either side. In int8 all sums are integers and
must be exact; only a hidden state next to the middle between two of its levels may go to either
side, and what that does to scores is bounded by what int8 loses anyway.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast.reference import student as oracle

ISAS = _core.isas_available()
MULTIPLY_BFLOAT16 = ("avx512bf16",)
PRECISIONS = ("float32", "bfloat16", "int8")
# The sizes of groups, of blocks of units, of chunks of k and of blocks of columns, and beside them.
HIDDEN = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70]
LENGTHS = [[], [0], [1], [5], [0, 3, 0], [6, 5, 4], [7, 2, 0, 31, 1, 4], [3] * 70 + [20, 19]]
# As test_lstm.py has it for shapes of all kinds; the tight bound is that float32 is its parts.
FLOAT32_ERROR = 2e-6
# Of one hidden state, in levels of 1 / 63. The short tanh is good to 1.4e-4, which is 0.009 levels;
# i, f, g, o and c add up to a few of those at most.
LEVEL_ERROR = 0.03

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


@dataclass
class Problem:
    """A student in float32 and a batch for it."""

    ids: Array
    cu_seqlens: Array
    embedding: Array
    bilstm: list[Array]  # w_ih, w_hh, bias, and those of the reverse
    output: tuple[Array, Array]

    @property
    def hidden_size(self) -> int:
        return len(self.bilstm[2]) // 4

    def arrays(self, precision: str) -> tuple[Array, list[Any], tuple[Any, Array]]:
        """Embedding, BiLSTM and output layer as the kernels and the oracle take them."""
        if precision != "int8":
            return self.embedding, list(self.bilstm), self.output
        bilstm: list[Any] = list(self.bilstm)
        for at in (1, 4):
            bilstm[at] = quantize(self.bilstm[at])
        return self.embedding, bilstm, (quantize(self.output[0]), self.output[1])


def make_problem(
    lengths: list[int],
    hidden_size: int,
    embedding_size: int = 5,
    num_tags: int = 9,
    seed: int = 0,
    vocab_size: int = 50,
) -> Problem:
    rng = np.random.default_rng(seed)
    gates = 4 * hidden_size
    # As nn.LSTM starts: sums of size 1.
    bound = 1.0 / np.sqrt(max(hidden_size, embedding_size))
    shapes = [(gates, embedding_size), (gates, hidden_size), (gates,)] * 2
    return Problem(
        rng.integers(0, vocab_size, sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths], dtype=np.int32),
        rng.standard_normal((vocab_size, embedding_size), dtype=np.float32),
        [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in shapes],
        (
            rng.standard_normal((num_tags, 2 * hidden_size), dtype=np.float32),
            rng.standard_normal(num_tags, dtype=np.float32),
        ),
    )


def quantize(weight: Array) -> tuple[Array, Array]:
    levels, scales = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    _core.quantize_rows(weight, levels, scales)
    return levels, scales


def compute(
    problem: Problem,
    precision: str,
    arrays: tuple[Array, list[Any], tuple[Any, Array]],
    table_ids: Array | None = None,
    threads: int = 1,
) -> Array:
    if table_ids is None:
        table_ids = np.arange(len(problem.embedding), dtype=np.int32)
    weights = _core.StudentWeights(precision, *arrays, table_ids, threads)
    out = np.full((len(problem.ids), len(arrays[2][1])), np.nan, np.float32)
    _core.student_scores(weights, problem.ids, problem.cu_seqlens, out, threads)
    assert np.isfinite(out).all(), "a score was not written"
    return out


def scores(problem: Problem, precision: str, threads: int = 1) -> Array:
    return compute(problem, precision, problem.arrays(precision), threads=threads)


def expected(problem: Problem, precision: str, isa: str = "") -> Array:
    arrays = problem.arrays(precision)
    return oracle.student_scores(
        problem.ids, problem.cu_seqlens, *arrays, precision, isa in MULTIPLY_BFLOAT16
    )


def plain(weight: Array) -> tuple[Any, Array]:
    """An output layer whose scores are the sums of bytes and hidden levels as they are."""
    scales = np.full(len(weight), oracle.HIDDEN_LEVELS, np.float32)
    return (weight, scales), np.zeros(len(weight), np.float32)


def hidden_states(problem: Problem) -> Array:
    """The hidden states of bfloat16: an output layer in float32 that hands them on."""
    embedding, bilstm, _ = problem.arrays("bfloat16")
    size = 2 * problem.hidden_size
    identity = (np.eye(size, dtype=np.float32), np.zeros(size, np.float32))
    return compute(problem, "bfloat16", (embedding, bilstm, identity))


def hidden_levels(problem: Problem) -> Array:
    """The hidden states of int8, -63 to 63."""
    embedding, bilstm, _ = problem.arrays("int8")
    output = plain(np.eye(2 * problem.hidden_size, dtype=np.int8))
    return compute(problem, "int8", (embedding, bilstm, output))


def error(got: Array, want: Array) -> float:
    return float(np.abs(got.astype(np.float64) - want).max(initial=0.0))


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


shapes = given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), max_size=6),
    hidden_size=st.integers(1, 70),
    embedding_size=st.integers(1, 20),
    num_tags=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)


# --- against the oracle ------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@shapes
def test_float32_is_its_parts(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    hidden_size: int,
    embedding_size: int,
    num_tags: int,
    seed: int,
) -> None:
    problem = make_problem(lengths, hidden_size, embedding_size, num_tags, seed)
    forward, reverse = problem.bilstm[:3], problem.bilstm[3:]
    zeros = np.zeros(4 * hidden_size, np.float32)
    total = len(problem.ids)
    with using_isa(isa):
        got = scores(problem, "float32")
        x = np.empty((total, embedding_size), np.float32)
        hidden = np.empty((total, 2 * hidden_size), np.float32)
        want = np.empty((total, num_tags), np.float32)
        _core.embedding_gather(problem.embedding, problem.ids, x)
        weights = _core.BiLSTMWeights([*forward, zeros, *reverse, zeros])
        _core.bilstm_forward(weights, x, problem.cu_seqlens, hidden)
        _core.linear(_core.LinearWeights(*problem.output), hidden, want)
    np.testing.assert_array_equal(got, want)
    exact = expected(problem, "float32")
    assert error(got, exact) <= FLOAT32_ERROR * max(1.0, float(np.abs(exact).max(initial=0.0)))


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@shapes
def test_bfloat16_is_near_the_oracle(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    hidden_size: int,
    embedding_size: int,
    num_tags: int,
    seed: int,
) -> None:
    problem = make_problem(lengths, hidden_size, embedding_size, num_tags, seed)
    # Table rows that float16 holds exactly, so that none is rounded to another side than the
    # oracle's: each is a column of W_ih.
    vocab_size = len(problem.embedding)
    problem.embedding = np.eye(vocab_size, dtype=np.float32)
    rng = np.random.default_rng(seed)
    for at in (0, 3):
        rows = rng.uniform(-2, 2, (4 * hidden_size, vocab_size))
        problem.bilstm[at] = rows.astype(np.float16).astype(np.float32)
        problem.bilstm[at + 2][:] = 0
    with using_isa(isa):
        assert _core.multiplies_bfloat16() == (isa in MULTIPLY_BFLOAT16)
        got = scores(problem, "bfloat16")
        hidden = hidden_states(problem)
    # Output as float32; each step from the state that the kernel itself had before it.
    embedding, bilstm, (weight, bias) = problem.arrays("bfloat16")
    want = hidden.astype(np.float64) @ weight.astype(np.float64).T + bias
    assert error(got, want) <= FLOAT32_ERROR * max(1.0, float(np.abs(want).max(initial=0.0)))
    want = oracle.student_hidden(
        problem.ids,
        problem.cu_seqlens,
        embedding,
        bilstm,
        "bfloat16",
        hidden,
        isa in MULTIPLY_BFLOAT16,
    )
    assert error(hidden, want) <= FLOAT32_ERROR
    if isa not in MULTIPLY_BFLOAT16:  # nothing is rounded on the way: the whole, too
        want = expected(problem, "bfloat16")
        assert error(got, want) <= FLOAT32_ERROR * max(1.0, float(np.abs(want).max(initial=0.0)))


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@shapes
def test_int8_hidden_states_are_those_of_the_oracle(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    hidden_size: int,
    embedding_size: int,
    num_tags: int,
    seed: int,
) -> None:
    problem = make_problem(lengths, hidden_size, embedding_size, num_tags, seed)
    with using_isa(isa):
        levels = hidden_levels(problem)
    assert (levels == np.rint(levels)).all()
    assert np.abs(levels).max(initial=0) <= oracle.HIDDEN_LEVELS
    # Each step from the kernel's own state before it: a rounding to the other side stays one level.
    embedding, bilstm, _ = problem.arrays("int8")
    fed_back = levels / oracle.HIDDEN_LEVELS
    want = oracle.student_hidden(
        problem.ids, problem.cu_seqlens, embedding, bilstm, "int8", fed_back
    )
    assert error(levels, want * oracle.HIDDEN_LEVELS) <= 0.5 + LEVEL_ERROR


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@shapes
def test_int8_output_layer_is_exact(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    hidden_size: int,
    embedding_size: int,
    num_tags: int,
    seed: int,
) -> None:
    problem = make_problem(lengths, hidden_size, embedding_size, num_tags, seed)
    embedding, bilstm, ((weight, _), _) = problem.arrays("int8")
    with using_isa(isa):
        levels = hidden_levels(problem)
        got = compute(problem, "int8", (embedding, bilstm, plain(weight)))
    np.testing.assert_array_equal(got, levels @ weight.astype(np.float64).T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("precision", "usual", "largest", "other_tags"),
    [("bfloat16", 0.05, 0.5, 0.0), ("int8", 0.5, 3.0, 0.02)],
)
def test_roundings_to_the_other_side_are_few(
    using_isa: UsingIsa, isa: str, precision: str, usual: float, largest: float, other_tags: float
) -> None:
    """No step is set right here: this is what users get.

    The yardstick is what the precision loses against float32, by the oracle, which rounds what the
    instruction set rounds. In bfloat16 only a few table rows can be rounded to another side; where
    hidden states are rounded, in int8 and where bfloat16 is multiplied, they feed others, and still
    much stays the same. So the error against the exact float64 student is at most 1 + `usual` times
    what the rounding of weights and states implies.
    """
    if isa in MULTIPLY_BFLOAT16:
        largest = 3.0
    problem = make_problem([40, 30, 21, 3, 0, 1] * 5, 100, 50, seed=7)
    want = expected(problem, precision, isa)
    loss = rms(want - expected(problem, "float32"))
    with using_isa(isa):
        got = scores(problem, precision)
    assert rms(got - want) <= usual * loss
    assert error(got, want) <= largest * loss
    assert np.mean(got.argmax(1) != want.argmax(1)) <= other_tags


def test_instruction_sets_agree_in_int8(using_isa: UsingIsa) -> None:
    problem = make_problem([40, 30, 21, 3, 0, 1] * 5, 100, 50, seed=7)
    loss = rms(expected(problem, "int8") - expected(problem, "float32"))
    by_isa = []
    for isa in ISAS:
        with using_isa(isa):
            by_isa.append(scores(problem, "int8"))
    for a, b in itertools.combinations(by_isa, 2):
        assert rms(a - b) <= 0.5 * loss
        assert np.mean(a.argmax(1) != b.argmax(1)) <= 0.02


# --- sums at their limits ----------------------------------------------------------------------


def extreme_rows(rows: int, width: int) -> Array:
    """Bytes as large as quantize_rows may make them, in every arrangement that it may."""
    rng = np.random.default_rng(rows * width)
    limit = 258  # of the positive, and of the negative weights of a set
    plus, minus, even = [127, 127, limit - 254], [-127, -127, 254 - limit], [33, 33] + [32] * 6
    patterns = [plus, minus, even, [-x for x in even], plus + minus]
    out = np.zeros((rows, width), np.int8)
    for row in range(rows):
        for chunk, part in itertools.product(range(0, width, 16), (0, 1)):
            columns = np.arange(chunk, min(chunk + 16, width))
            columns = columns[columns // 2 % 2 == part]
            pattern = patterns[rng.integers(len(patterns))][: len(columns)]
            out[row, rng.permutation(columns)[: len(pattern)]] = pattern
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden_size", [4, 8, 16, 24, 33, 64, 70, 200])
def test_int8_sums_do_not_overflow(using_isa: UsingIsa, isa: str, hidden_size: int) -> None:
    """Hidden states of +-63 on bytes at their limit; a sum that wraps is off by 65536."""
    rng = np.random.default_rng(hidden_size)
    plus, minus, mixed, probe = range(4)
    lengths = [8] * 9
    batch = [[probe, *[kind] * 6, probe] for kind in (plus, minus, mixed)] * 3
    problem = make_problem(lengths, hidden_size)
    problem.ids = np.array(batch, np.int32).ravel()
    # Tokens that open every gate, so that c counts them up or down and h is +-1 after a few, and
    # one that forgets c and shows what the recurrent half adds to g.
    gates = np.full((4, 4, hidden_size), 20.0, np.float32)  # [token, gate, unit]
    gates[plus, 2], gates[minus, 2] = 20, -20
    gates[mixed, 2] = rng.choice([-20, 20], hidden_size)
    gates[probe, 1], gates[probe, 2] = -20, 0
    embedding = np.eye(4, dtype=np.float32)
    w_ih = np.ascontiguousarray(gates.reshape(4, -1).T)
    w_hh = extreme_rows(4 * hidden_size, hidden_size)
    # One sum that wraps is one off in g: far enough to be seen, near enough not to be flattened.
    scales = np.full(4 * hidden_size, 63 / 65536, np.float32)
    problem.embedding = embedding
    bilstm = [w_ih, (w_hh, scales), np.zeros(4 * hidden_size, np.float32)] * 2

    width = 2 * hidden_size
    weight = extreme_rows(65, width)
    with using_isa(isa):
        levels = compute(problem, "int8", (embedding, bilstm, plain(np.eye(width, dtype=np.int8))))
        got = compute(problem, "int8", (embedding, bilstm, plain(weight)))
    charged = levels.reshape(9, 8, 2, hidden_size)
    assert (np.abs(charged[:, 6, 0]) == 63).all()
    assert (np.abs(charged[:, 1, 1]) == 63).all()
    np.testing.assert_array_equal(got, levels @ weight.astype(np.float64).T)
    want = oracle.student_hidden(
        problem.ids, problem.cu_seqlens, embedding, bilstm, "int8", levels / oracle.HIDDEN_LEVELS
    )
    assert error(levels, want * oracle.HIDDEN_LEVELS) <= 0.5 + LEVEL_ERROR


# --- bit for bit -------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("hidden_size", HIDDEN)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_batch_equals_single(
    using_isa: UsingIsa, isa: str, precision: str, hidden_size: int, lengths: list[int]
) -> None:
    problem = make_problem(lengths, hidden_size)
    with using_isa(isa):
        batch = scores(problem, precision, threads=2)
        for begin, end in itertools.pairwise(problem.cu_seqlens.tolist()):
            alone = replace(
                problem,
                ids=problem.ids[begin:end],
                cu_seqlens=np.array([0, end - begin], np.int32),
            )
            np.testing.assert_array_equal(scores(alone, precision), batch[begin:end])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("hidden_size", [17, 200])
@pytest.mark.parametrize("lengths", [*LENGTHS, [40], [30, 3], [70] * 9 + [5] * 30])
def test_threads_do_not_change_the_result(
    using_isa: UsingIsa, isa: str, precision: str, hidden_size: int, lengths: list[int]
) -> None:
    problem = make_problem(lengths, hidden_size)
    arrays = problem.arrays(precision)
    with using_isa(isa):
        one = compute(problem, precision, arrays)
        for threads in (0, 2, 3, 8, 8, 8):  # who takes which part differs from call to call
            many = compute(problem, precision, arrays, threads=threads)
            np.testing.assert_array_equal(many, one)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(deadline=None, max_examples=25)
@given(
    hidden_size=st.integers(1, 40),
    embedding_size=st.integers(1, 20),
    table_ids=st.lists(st.integers(0, 49), unique=True),
    seed=st.integers(0, 2**16),
)
def test_the_table_does_not_change_the_result(
    using_isa: UsingIsa,
    isa: str,
    precision: str,
    hidden_size: int,
    embedding_size: int,
    table_ids: list[int],
    seed: int,
) -> None:
    problem = make_problem([7, 2, 0, 31, 1, 4], hidden_size, embedding_size, seed=seed)
    arrays = problem.arrays(precision)
    with using_isa(isa):
        want = compute(problem, precision, arrays)
        for ids in (table_ids, [], range(49, -1, -1), range(25)):
            some = np.array(ids, np.int32)
            for threads in (1, 3):
                got = compute(problem, precision, arrays, some, threads)
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_sequences_change_nothing(using_isa: UsingIsa, isa: str, precision: str) -> None:
    problem = make_problem([4, 5, 3], 17)
    with using_isa(isa):
        want = scores(problem, precision)
        problem.cu_seqlens = np.array([0, 0, 4, 9, 9, 9, 12, 12], np.int32)
        np.testing.assert_array_equal(scores(problem, precision), want)


# --- packed weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_keep_their_instruction_set(using_isa: UsingIsa, precision: str) -> None:
    problem = make_problem([4, 5, 3], 17)
    for table_ids in (np.arange(50, dtype=np.int32), np.arange(0, dtype=np.int32)):
        with using_isa("generic"):
            want = scores(problem, precision)
            weights = _core.StudentWeights(precision, *problem.arrays(precision), table_ids)
        out = np.empty_like(want)
        _core.student_scores(weights, problem.ids, problem.cu_seqlens, out)
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_are_a_copy(precision: str) -> None:
    """But for the embedding, which only ids without a row in the table are looked up in."""
    problem = make_problem([4, 5, 3], 17)
    want = scores(problem, precision)
    embedding, bilstm, output = problem.arrays(precision)
    table_ids = np.arange(50, dtype=np.int32)
    weights = _core.StudentWeights(precision, embedding, bilstm, output, table_ids)
    for item in (embedding, *bilstm, *output):
        for array in item if isinstance(item, tuple) else (item,):
            array[...] = 3
    table_ids[:] = 0
    out = np.empty_like(want)
    _core.student_scores(weights, problem.ids, problem.cu_seqlens, out)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_embedding_is_kept(precision: str) -> None:
    problem = make_problem([4, 5, 3], 17)
    want = scores(problem, precision)
    embedding, bilstm, output = problem.arrays(precision)
    weights = _core.StudentWeights(
        precision, embedding.copy(), bilstm, output, np.empty(0, np.int32)
    )
    np.full_like(embedding, np.nan)  # takes the memory of the copy if it was let go
    out = np.empty_like(want)
    _core.student_scores(weights, problem.ids, problem.cu_seqlens, out)
    np.testing.assert_array_equal(out, want)


def test_attributes() -> None:
    problem = make_problem([3], 64, embedding_size=10, num_tags=5)
    sizes = {}
    for precision in PRECISIONS:
        arrays = problem.arrays(precision)
        row = _core.StudentWeights.table_row_nbytes(precision, 64)
        assert row == 2 * 4 * 64 * (4 if precision == "float32" else 2)
        for count in (0, 7, 50):
            weights = _core.StudentWeights(precision, *arrays, np.arange(count, dtype=np.int32))
            assert weights.precision == precision
            assert weights.table_nbytes == count * row
            sizes[precision] = weights.nbytes
    assert sizes["float32"] > sizes["bfloat16"] > sizes["int8"] > 2 * 4 * 64 * (10 * 4 + 64)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shared_between_python_threads(precision: str) -> None:
    problem = make_problem([30, 4, 0, 12, 25], 100)
    want = scores(problem, precision)
    table_ids = np.arange(25, dtype=np.int32)
    weights = _core.StudentWeights(precision, *problem.arrays(precision), table_ids)
    wrong: list[int] = []

    def work(index: int) -> None:
        out = np.empty_like(want)
        for repeat in range(20):
            out.fill(np.nan)
            _core.student_scores(weights, problem.ids, problem.cu_seqlens, out, 1 + repeat % 3)
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
    problem = make_problem([30, 4, 0, 12, 25], 100)
    want = scores(problem, "int8", threads=3)  # the pool's threads do not survive the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if np.array_equal(scores(problem, "int8", threads=3), want) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
