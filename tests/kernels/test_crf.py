"""CRF kernels against the float64 oracle, and the oracle against the list of all paths.

Exactness is tested in float64, accuracy in float32 against the error pytorch-crf makes on the same
numbers, and batch and threads against each other to the bit. Scores far apart, forbidden moves and
sequences without a path take the kernels' second way of computing: they are part of every sweep.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast import reference as oracle

ISAS = _core.isas_available()
TAGS = [1, 2, 7, 8, 9, 16, 17, 33]
LENGTHS = [[], [0], [1], [5], [0, 3, 0], [1, 1, 1, 1], [7, 2, 0, 31, 1, 4], [3] * 70 + [90]]
SCORES = ("emissions", "start", "end", "transitions")
INF = float("inf")

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]
Change = Callable[[Array], Any]


@dataclass
class Problem:
    emissions: Array
    cu_seqlens: Array
    tags: Array
    start: Array
    end: Array
    transitions: Array
    grad_out: Array

    @property
    def scores(self) -> tuple[Array, Array, Array, Array]:
        return self.emissions, self.start, self.end, self.transitions

    def sequences(self) -> list[slice]:
        return [slice(a, b) for a, b in itertools.pairwise(self.cu_seqlens.tolist())]

    def only(self, index: int) -> Problem:
        part = self.sequences()[index]
        return replace(
            self,
            emissions=self.emissions[part],
            cu_seqlens=np.array([0, part.stop - part.start], dtype=np.int32),
            tags=self.tags[part],
            grad_out=self.grad_out[index : index + 1],
        )


def make_problem(
    lengths: list[int],
    num_tags: int,
    seed: int = 0,
    dtype: Any = np.float32,
    scale: float = 2.0,
    forbidden: float = 0.0,
) -> Problem:
    """Normal scores times `scale`; a share `forbidden` of them is -inf."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)

    def scores(*shape: int) -> Array:
        values = scale * rng.standard_normal(shape)
        # Values that float32 holds exactly, so that every precision computes the same problem.
        return (
            np.where(rng.random(shape) < forbidden, -INF, values).astype(np.float32).astype(dtype)
        )

    return Problem(
        scores(total, num_tags),
        np.cumsum([0, *lengths], dtype=np.int32),
        rng.integers(0, num_tags, total, dtype=np.int32),
        scores(num_tags),
        scores(num_tags),
        scores(num_tags, num_tags),
        rng.standard_normal(len(lengths)).astype(np.float32).astype(dtype),
    )


def log_likelihood(problem: Problem, threads: int = 1) -> Array:
    p = problem
    out = np.full(len(p.cu_seqlens) - 1, np.nan, dtype=p.emissions.dtype)
    _core.crf_log_likelihood(
        p.emissions, p.cu_seqlens, p.tags, p.start, p.end, p.transitions, out, threads
    )
    return out


def gradients(problem: Problem, threads: int = 1) -> dict[str, Array]:
    """By what they are gradients of."""
    p = problem
    grads = {f"grad_{name}": np.full_like(getattr(p, name), np.nan) for name in SCORES}
    _core.crf_log_likelihood_grad(
        p.emissions,
        p.cu_seqlens,
        p.tags,
        p.start,
        p.end,
        p.transitions,
        p.grad_out,
        **grads,
        threads=threads,
    )
    return {name: grads[f"grad_{name}"] for name in SCORES}


def marginals(problem: Problem, threads: int = 1) -> Array:
    p = problem
    out = np.full_like(p.emissions, np.nan)
    _core.crf_marginals(p.emissions, p.cu_seqlens, p.start, p.end, p.transitions, out, threads)
    return out


def everything(problem: Problem, threads: int = 1) -> dict[str, Array]:
    return {
        "log-likelihood": log_likelihood(problem, threads),
        "marginals": marginals(problem, threads),
        **gradients(problem, threads),
    }


def expected(problem: Problem) -> dict[str, Array]:
    p = problem
    model = (p.start, p.end, p.transitions)
    grads = oracle.crf_log_likelihood_grad(p.emissions, p.cu_seqlens, p.tags, *model, p.grad_out)
    return {
        "log-likelihood": oracle.crf_log_likelihood(p.emissions, p.cu_seqlens, p.tags, *model),
        "marginals": oracle.crf_marginals(p.emissions, p.cu_seqlens, *model),
        **grads._asdict(),
    }


def error(got: Array, want: Array) -> float:
    """Largest difference; infinities must agree."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_array_equal(got[~np.isfinite(got)], want[~np.isfinite(want)])
    finite = np.isfinite(want)
    return float(np.abs(got[finite].astype(np.float64) - want[finite]).max(initial=0.0))


def check_against_oracle(problem: Problem) -> None:
    """A loose bound in units of rounding errors: catches what is wrong, not what is inaccurate."""
    got, want = everything(problem), expected(problem)
    eps = float(np.finfo(problem.emissions.dtype).eps)
    longest = int(np.diff(problem.cu_seqlens).max(initial=1))
    finite = [np.abs(scores[np.isfinite(scores)]).max(initial=1.0) for scores in problem.scores]
    # The oracle's own sums in log space are as large as the scores of a path.
    oracle_error = 8 * np.finfo(np.float64).eps * longest * max(finite)
    for name, value in want.items():
        size = float(np.abs(value[np.isfinite(value)]).max(initial=1.0))
        if name == "log-likelihood":
            size += max(finite)  # of the score a sequence starts with, rounded once
        bound = 4 * eps * (longest + size) + 8 * oracle_error * (1 + longest)
        assert error(got[name], value) <= bound, name


# --- the oracle against the list of all paths --------------------------------------------------


def differences(function: Callable[[], float], scores: Array, step: float = 1e-5) -> Array:
    """Central differences of function() by each of `scores`, changed in place."""
    grad = np.zeros_like(scores)
    for index in np.ndindex(scores.shape):
        kept = scores[index]
        values = []
        for moved in (kept + step, kept - step):
            scores[index] = moved
            values.append(function())
        scores[index] = kept
        grad[index] = (values[0] - values[1]) / (2 * step)
    return grad


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from(
        [(1, 1), (1, 5), (2, 1), (2, 3), (2, 12), (3, 6), (4, 5), (9, 3), (33, 2)]
    ),
    scale=st.sampled_from([0.5, 3.0, 50.0]),
    forbidden=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 2**16),
)
def test_oracle_equals_the_sum_over_all_paths(
    size: tuple[int, int], scale: float, forbidden: float, seed: int
) -> None:
    num_tags, length = size
    p = make_problem([length], num_tags, seed, np.float64, scale, forbidden)
    listed = oracle.enumerate_paths(p.emissions, p.start, p.end, p.transitions)
    want = expected(p)
    np.testing.assert_allclose(want["marginals"], listed.marginals, atol=1e-12)
    gold = np.zeros_like(p.emissions)
    gold[np.arange(length), p.tags] = 1.0
    moves = np.zeros_like(p.transitions)
    np.add.at(moves, (p.tags[:-1], p.tags[1:]), 1.0)
    score = p.start[p.tags[0]] + p.end[p.tags[-1]] + p.emissions[gold == 1.0].sum()
    score += p.transitions[p.tags[:-1], p.tags[1:]].sum()
    if np.isneginf(listed.log_z):
        assert np.isneginf(want["log-likelihood"])
        assert not any(want[name].any() for name in ("emissions", "start", "end", "transitions"))
        return
    np.testing.assert_allclose(want["log-likelihood"], score - listed.log_z, atol=1e-10)
    rows = p.grad_out * (gold - listed.marginals)
    np.testing.assert_allclose(want["emissions"], rows, atol=1e-10)
    np.testing.assert_allclose(want["start"], rows[0], atol=1e-10)
    np.testing.assert_allclose(want["end"], rows[-1], atol=1e-10)
    np.testing.assert_allclose(want["transitions"], p.grad_out * (moves - listed.moves), atol=1e-10)


# --- the kernels against the oracle ------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 30]), max_size=5),
    num_tags=st.sampled_from(TAGS),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1e4]),
    forbidden=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_kernels_equal_the_oracle(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    num_tags: int,
    dtype: Any,
    scale: float,
    forbidden: float,
    seed: int,
) -> None:
    with using_isa(isa):
        check_against_oracle(make_problem(lengths, num_tags, seed, dtype, scale, forbidden))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tags", [65, 130, 257])
def test_many_tags(using_isa: UsingIsa, isa: str, num_tags: int) -> None:
    with using_isa(isa):
        check_against_oracle(make_problem([4, 1, 6], num_tags, seed=num_tags))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("soft", [-30.0, -70.0, -100.0, -1e4, -INF])
@pytest.mark.parametrize("length", [3, 64, 300])
def test_soft_and_hard_constraints(
    using_isa: UsingIsa, isa: str, dtype: Any, soft: float, length: int
) -> None:
    """Moves ruled out by a large negative score, as many training codes do, or by -inf."""
    p = make_problem([length], 9, seed=length, dtype=dtype)
    for inside in range(2, 9, 2):  # O, B-1, I-1, B-2, ...: I after its own B or I only
        allowed = np.isin(np.arange(9), [inside - 1, inside])
        p.transitions[~allowed, inside] = soft
        p.start[inside] = soft
    p.tags[:] = np.where(p.tags % 2 == 0, 0, p.tags)
    with using_isa(isa):
        check_against_oracle(p)
        if soft == -INF:
            assert not gradients(p)["transitions"][0, 2:9:2].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [30, 31, 200])
@pytest.mark.parametrize("step", [5.0, 40.0, 300.0])
def test_a_path_that_starts_badly_and_ends_well(
    using_isa: UsingIsa, isa: str, length: int, step: float
) -> None:
    """Two tags that cannot reach each other: the better one in the end looks lost half-way."""
    p = make_problem([length], 3, scale=0.5)
    half = length // 2
    p.transitions[0, 1] = p.transitions[1, 0] = -INF
    p.transitions[2, :] = p.transitions[:, 2] = -INF
    p.emissions[:half, 1] -= step
    p.emissions[half:, 0] -= 1.1 * step
    p.tags[:] = 0
    with using_isa(isa):
        check_against_oracle(p)
        p.tags[:] = 1
        check_against_oracle(p)


@pytest.mark.parametrize("isa", ISAS)
def test_the_best_path_looks_lost_from_both_ends(using_isa: UsingIsa, isa: str) -> None:
    """One path is bad at both ends, the other in the middle: seen from either end alone, the first
    has vanished before the second turns out to be worse.
    """
    p = make_problem([16], 15, scale=0.0)
    p.emissions[:, :-1] = p.transitions[:] = -INF
    slow = [0, *range(14), 13]  # from 0 to 13 by way of all tags, each move at a price
    p.emissions[np.arange(16), slow] = 0.0
    p.emissions[[0, 1, 14, 15], 14] = -75.0
    p.transitions[np.arange(13), np.arange(1, 14)] = -25.0
    p.transitions[[0, 13, 14], [0, 13, 14]] = 0.0
    p.tags[:] = 14
    with using_isa(isa):
        check_against_oracle(p)
        assert log_likelihood(p)[0] > -1e-6
        p.tags[:] = slow
        check_against_oracle(p)
        np.testing.assert_allclose(log_likelihood(p), -25.0, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("step", [10.0, 40.0, 80.0])
def test_the_only_path_is_disliked(using_isa: UsingIsa, isa: str, step: float) -> None:
    """Beside it a tag that leads nowhere, preferred at first, and one out of reach, later."""
    p = make_problem([9], 3, scale=0.0)
    p.transitions[~np.eye(3, dtype=bool)] = -INF
    p.start[1] = p.end[0] = -INF
    p.emissions[5:, 0] = p.emissions[:3, 1] = -INF
    p.emissions[[0, 1, 7, 8], 2] = -step
    p.tags[:] = 2
    with using_isa(isa):
        check_against_oracle(p)
        np.testing.assert_allclose(log_likelihood(p), 0.0, atol=1e-6)
        np.testing.assert_allclose(marginals(p)[:, 2], 1.0, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("price", [20.0, 60.0, 85.0, 90.0])
def test_the_only_move_is_dear(using_isa: UsingIsa, isa: str, price: float) -> None:
    p = make_problem([6], 3, scale=0.0)
    p.transitions[:] = -INF
    p.transitions[[0, 1, 2], [0, 1, 2]] = 0.0
    p.transitions[0, 1] = -10.0
    p.emissions[3:, 0] = p.emissions[:3, 1:] = -INF
    p.emissions[3, 1] = -price
    p.tags[:] = [0, 0, 0, 1, 1, 1]
    with using_isa(isa):
        check_against_oracle(p)
        np.testing.assert_allclose(log_likelihood(p), 0.0, atol=1e-6)
        np.testing.assert_allclose(marginals(p)[4, 1], 1.0, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("price", [50.0, 61.0, 75.0, 501.0, 1e4])
def test_moves_too_dear_to_be_kept(using_isa: UsingIsa, isa: str, dtype: Any, price: float) -> None:
    """Changing the tag costs more than P holds next to its other moves, yet is what is best."""
    p = make_problem([10], 2, dtype=dtype, scale=0.0)
    p.transitions[~np.eye(2, dtype=bool)] = -price
    p.emissions[:5, 1] = p.emissions[5:, 0] = -1.1 * price / 5
    p.tags[5:] = 1
    p.tags[:5] = 0
    with using_isa(isa):
        check_against_oracle(p)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tags", [5, 9, 20])
def test_left_to_right(using_isa: UsingIsa, isa: str, num_tags: int) -> None:
    """Each tag leads to itself or the next; the last, alone allowed in the end, is disliked."""
    p = make_problem([60], num_tags, scale=1.0)
    reach = np.subtract.outer(np.arange(num_tags), np.arange(num_tags))
    p.transitions[(reach != 0) & (reach != -1)] = -INF
    p.end[:-1] = -INF
    p.start[1:] = -INF
    p.emissions -= 12.0 * np.arange(num_tags, dtype=np.float32)
    p.tags[:] = np.minimum(np.arange(60), num_tags - 1)
    with using_isa(isa):
        check_against_oracle(p)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_sequence(using_isa: UsingIsa, isa: str, dtype: Any) -> None:
    p = make_problem([5000], 9, dtype=dtype)
    with using_isa(isa):
        check_against_oracle(p)
        np.testing.assert_allclose(marginals(p).sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_one_tag_is_certain(using_isa: UsingIsa, isa: str) -> None:
    p = make_problem([4, 1, 0, 30], 1, scale=100.0)
    with using_isa(isa):
        np.testing.assert_allclose(log_likelihood(p), 0.0, atol=1e-9)
        np.testing.assert_array_equal(marginals(p), 1.0)
        assert max(np.abs(grad).max() for grad in gradients(p).values()) <= 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [2.0, 300.0])
def test_gradient_by_differences(using_isa: UsingIsa, isa: str, scale: float) -> None:
    p = make_problem([4, 0, 1, 3], 5, dtype=np.float64, scale=scale)
    with using_isa(isa):
        grads = gradients(p)
        for name, grad in grads.items():
            numeric = differences(lambda: float(p.grad_out @ log_likelihood(p)), getattr(p, name))
            np.testing.assert_allclose(grad, numeric, atol=1e-6 * scale, err_msg=name)


def by_pytorch_crf(problem: Problem) -> dict[str, Array]:
    """What pytorch-crf computes of the same problem in the same dtype, one sequence at a time."""
    torch = pytest.importorskip("torch", reason="the error bound is that of pytorch-crf")
    torchcrf = pytest.importorskip("torchcrf", reason="the error bound is that of pytorch-crf")
    p = problem
    crf = torchcrf.CRF(p.emissions.shape[1]).to(torch.from_numpy(p.emissions).dtype)
    model = (crf.start_transitions, crf.end_transitions, crf.transitions)
    with torch.no_grad():
        for parameter, scores in zip(model, p.scores[1:], strict=True):
            parameter.copy_(torch.from_numpy(scores))
    emissions = torch.from_numpy(p.emissions).requires_grad_()
    lengths = torch.from_numpy(np.diff(p.cu_seqlens))
    parts = [torch.arange(part.start, part.stop) for part in p.sequences()]
    order = torch.nn.utils.rnn.pad_sequence(parts)
    mask = torch.arange(len(order))[:, None] < lengths
    out = crf(emissions[order], torch.from_numpy(p.tags)[order].long(), mask=mask, reduction="none")
    (out * torch.from_numpy(p.grad_out)).sum().backward()
    assert emissions.grad is not None
    grads = [emissions.grad, *(parameter.grad for parameter in model)]
    names = ("log-likelihood", *SCORES)
    return dict(zip(names, (a.detach().numpy() for a in (out, *grads)), strict=True))


@functools.cache
def hard_problem(
    lengths: tuple[int, ...], num_tags: int, scale: float
) -> tuple[Problem, dict[str, Array], dict[str, Array]]:
    """A problem, its solution, and pytorch-crf's; computed once for all instruction sets."""
    p = make_problem(list(lengths), num_tags, seed=num_tags, scale=scale)
    return p, expected(p), by_pytorch_crf(p)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0, 100.0])
@pytest.mark.parametrize(
    ("lengths", "num_tags"),
    [((64,) * 32, 9), ((30, 3, 17, 1), 2), ((9,) * 70, 17), ((40, 12), 33)],
)
def test_error_is_within_twice_that_of_pytorch_crf(
    using_isa: UsingIsa, isa: str, lengths: tuple[int, ...], num_tags: int, scale: float
) -> None:
    p, want, torch_got = hard_problem(lengths, num_tags, scale)
    with using_isa(isa):
        got = everything(p)
    for name, value in torch_got.items():
        # The floor is a few units in the last place of the largest element.
        floor = 4 * np.finfo(np.float32).eps * max(1.0, float(np.abs(want[name]).max()))
        assert error(got[name], want[name]) <= 2 * error(value, want[name]) + floor, name


# --- what the formula leaves open --------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_sequences(using_isa: UsingIsa, isa: str, dtype: Any) -> None:
    with using_isa(isa):
        for lengths in ([], [0], [0, 0, 0]):
            got = everything(make_problem(lengths, 9, dtype=dtype))
            assert got["log-likelihood"].shape == (len(lengths),)
            assert got["transitions"].shape == (9, 9)
            assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("where", ["start", "end", "transitions", "emissions"])
def test_impossible_tags(using_isa: UsingIsa, isa: str, dtype: Any, where: str) -> None:
    """log p = -inf; the gradient stays observed minus expected, and finite."""
    p = make_problem([4, 5], 9, dtype=dtype)
    p.tags[:4] = [3, 1, 2, 0]
    index: Any = {"start": 3, "end": 0, "transitions": (1, 2), "emissions": (1, 1)}[where]
    getattr(p, where)[index] = -INF
    with using_isa(isa):
        assert log_likelihood(p)[0] == -INF
        grads = gradients(p)
        share = marginals(p)
    assert all(np.isfinite(grad).all() for grad in grads.values())
    gold = np.zeros((4, 9))
    gold[np.arange(4), p.tags[:4]] = 1.0
    np.testing.assert_allclose(
        grads["emissions"][:4], p.grad_out[0] * (gold - share[:4]), atol=1e-6
    )
    assert np.abs(grads["emissions"][0]).max() > 1e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("where", ["start", "end", "transitions", "emissions"])
def test_no_possible_path(using_isa: UsingIsa, isa: str, dtype: Any, where: str) -> None:
    """log p = -inf, gradient and marginals 0: the sequence counts for nothing, others as ever."""
    p = make_problem([4, 5], 9, dtype=dtype)
    if where == "emissions":
        p.emissions[2] = -INF
    else:
        getattr(p, where)[...] = -INF
    with using_isa(isa):
        got = everything(p)
        alone = everything(p.only(1))
    assert got["log-likelihood"][0] == -INF
    assert not got["marginals"][:4].any()
    assert not got["emissions"][:4].any()
    np.testing.assert_array_equal(got["transitions"], alone["transitions"])
    if where == "emissions":
        assert got["transitions"].any()
        assert got["log-likelihood"][1] > -INF


@pytest.mark.parametrize("isa", ISAS)
def test_grad_out_weighs_sequences(using_isa: UsingIsa, isa: str) -> None:
    p = make_problem([4, 5, 3], 9)
    p.grad_out[:] = [0.0, 2.0, -1.0]
    with using_isa(isa):
        got = gradients(p)
        second = gradients(replace(p.only(1), grad_out=np.ones(1, np.float32)))
        third = gradients(replace(p.only(2), grad_out=np.ones(1, np.float32)))
    assert not got["emissions"][:4].any()
    for name in ("start", "end", "transitions"):
        np.testing.assert_allclose(got[name], 2.0 * second[name] - third[name], atol=2e-6)


# --- bit for bit -------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_tags", [1, 8, 9, 33])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_batch_equals_single(
    using_isa: UsingIsa, isa: str, dtype: Any, num_tags: int, lengths: list[int]
) -> None:
    # The scale sends some of the sequences, not all, the second way.
    p = make_problem(lengths, num_tags, dtype=dtype, scale=12.0, forbidden=0.05)
    with using_isa(isa):
        batch = everything(p, threads=2)
        for index, part in enumerate(p.sequences()):
            single = everything(p.only(index))
            for name in ("marginals", "emissions"):
                np.testing.assert_array_equal(single[name], batch[name][part], err_msg=name)
            assert single["log-likelihood"][0] == batch["log-likelihood"][index]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lengths", [*LENGTHS, [100, 3, 0, 250] * 30])
def test_threads_do_not_change_the_result(
    using_isa: UsingIsa, isa: str, dtype: Any, lengths: list[int]
) -> None:
    p = make_problem(lengths, 33, dtype=dtype)
    with using_isa(isa):
        one = everything(p, threads=1)
        for threads in (0, 2, 3, 8):
            for name, value in everything(p, threads).items():
                np.testing.assert_array_equal(value, one[name], err_msg=f"{name}, {threads}")


def test_shared_between_python_threads() -> None:
    p = make_problem([30, 4, 0, 12, 25] * 40, 17)
    want = everything(p)
    wrong: list[str] = []

    def work() -> None:
        for repeat in range(5):
            for name, value in everything(p, 1 + repeat % 3).items():
                if not np.array_equal(value, want[name]):
                    wrong.append(name)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tags", TAGS)
def test_only_the_output_is_written(using_isa: UsingIsa, isa: str, num_tags: int) -> None:
    p = make_problem([3, 0, 5, 1], num_tags)
    kept = [array.copy() for array in (*p.scores, p.tags, p.cu_seqlens, p.grad_out)]
    room = np.full(p.emissions.size + 64, 7.0, dtype=np.float32)
    inner = room[32:-32].reshape(p.emissions.shape)
    with using_isa(isa):
        _core.crf_marginals(p.emissions, p.cu_seqlens, p.start, p.end, p.transitions, inner)
        np.testing.assert_array_equal(inner, marginals(p))
        gradients(p)
        log_likelihood(p)
    assert (room[:32] == 7.0).all()
    assert (room[-32:] == 7.0).all()
    now = (*p.scores, p.tags, p.cu_seqlens, p.grad_out)
    assert all(np.array_equal(a, b) for a, b in zip(kept, now, strict=True))
