"""Viterbi kernel against the float64 oracle, and the oracle against the list of all paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast import reference as oracle

ISAS = _core.isas_available()
TAGS = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130]
LENGTHS = [[], [0], [1], [5], [0, 3, 0], [1, 1, 1, 1], [7, 2, 0, 31, 1, 4], [3] * 70 + [90]]
INF = float("inf")

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


class Problem(NamedTuple):
    """In the order the kernel and the oracle take them."""

    emissions: Array
    cu_seqlens: Array
    start: Array
    end: Array
    transitions: Array

    def sequences(self) -> list[slice]:
        return [slice(a, b) for a, b in itertools.pairwise(self.cu_seqlens.tolist())]


def make_problem(
    lengths: list[int],
    num_tags: int,
    seed: int = 0,
    dtype: Any = np.float32,
    scale: float = 2.0,
    forbidden: float = 0.0,
    whole: bool = False,
) -> Problem:
    """Normal scores; whole: small whole numbers instead, whose sums are exact and often equal."""
    rng = np.random.default_rng(seed)

    def scores(*shape: int) -> Array:
        values = rng.integers(-2, 3, shape) if whole else scale * rng.standard_normal(shape)
        return (
            np.where(rng.random(shape) < forbidden, -INF, values).astype(np.float32).astype(dtype)
        )

    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return Problem(
        scores(sum(lengths), num_tags),
        offsets,
        scores(num_tags),
        scores(num_tags),
        scores(num_tags, num_tags),
    )


def decode(p: Problem, threads: int = 1) -> tuple[Array, Array]:
    tags = np.full(len(p.emissions), -7, dtype=np.int32)
    scores = np.full(len(p.cu_seqlens) - 1, np.nan, dtype=p.emissions.dtype)
    _core.crf_viterbi(*p, tags, scores, threads)
    return tags, scores


def score_of(p: Problem, tags: Array) -> Array:
    """Scores of given paths, in float64."""
    scores = []
    for part in p.sequences():
        path = [int(tag) for tag in tags[part]]
        if not path:
            scores.append(0.0)
            continue
        score = float(p.start[path[0]]) + float(p.end[path[-1]])
        score += sum(float(row[tag]) for row, tag in zip(p.emissions[part], path, strict=True))
        score += sum(float(p.transitions[i, j]) for i, j in itertools.pairwise(path))
        scores.append(score)
    return np.array(scores)


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([(1, 1), (1, 5), (2, 1), (2, 12), (3, 6), (4, 5), (9, 3), (33, 2)]),
    forbidden=st.sampled_from([0.0, 0.2, 0.6]),
    whole=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_oracle_finds_the_best_of_all_paths(
    size: tuple[int, int], forbidden: float, whole: bool, seed: int
) -> None:
    num_tags, length = size
    p = make_problem([length], num_tags, seed, np.float64, forbidden=forbidden, whole=whole)
    listed = oracle.enumerate_paths(p.emissions, p.start, p.end, p.transitions)
    tags, scores = oracle.crf_viterbi(*p)
    np.testing.assert_array_equal(tags, listed.tags)
    np.testing.assert_allclose(scores, listed.score, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 15, 16, 17, 18, 40]), max_size=5),
    num_tags=st.sampled_from(TAGS),
    dtype=st.sampled_from([np.float32, np.float64]),
    forbidden=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_ties_go_to_the_lower_tag(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    num_tags: int,
    dtype: Any,
    forbidden: float,
    seed: int,
) -> None:
    p = make_problem(lengths, num_tags, seed, dtype, forbidden=forbidden, whole=True)
    with using_isa(isa):
        tags, scores = decode(p)
    want_tags, want_scores = oracle.crf_viterbi(*p)
    np.testing.assert_array_equal(tags, want_tags)
    np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 15, 16, 17, 18, 40]), max_size=5),
    num_tags=st.sampled_from(TAGS),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    forbidden=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_the_path_is_the_best(
    using_isa: UsingIsa,
    isa: str,
    lengths: list[int],
    num_tags: int,
    dtype: Any,
    scale: float,
    forbidden: float,
    seed: int,
) -> None:
    p = make_problem(lengths, num_tags, seed, dtype, scale, forbidden)
    with using_isa(isa):
        tags, scores = decode(p)
    _, best = oracle.crf_viterbi(*p)
    eps = float(np.finfo(dtype).eps)
    possible = np.isfinite(best)
    np.testing.assert_array_equal(np.isneginf(scores), ~possible)
    # The score is that of the path, and no path is better by more than what rounding hides.
    of_path = score_of(p, tags)
    np.testing.assert_allclose(scores[possible], of_path[possible], rtol=eps)
    assert (best[possible] - of_path[possible] <= 128 * eps * scale).all()


@pytest.mark.parametrize("isa", ISAS)
def test_equals_pytorch_crf(using_isa: UsingIsa, isa: str) -> None:
    torch = pytest.importorskip("torch", reason="the peer is pytorch-crf")
    torchcrf = pytest.importorskip("torchcrf", reason="the peer is pytorch-crf")
    p = make_problem([12, 64, 1, 30], 9)
    crf = torchcrf.CRF(9)
    with torch.no_grad():
        crf.start_transitions.copy_(torch.from_numpy(p.start))
        crf.end_transitions.copy_(torch.from_numpy(p.end))
        crf.transitions.copy_(torch.from_numpy(p.transitions))
    with using_isa(isa):
        tags, _ = decode(p)
    for part in p.sequences():
        emissions = torch.from_numpy(p.emissions[part])[:, None]
        mask = torch.ones(emissions.shape[:2], dtype=torch.bool)  # its own default is deprecated
        assert crf.decode(emissions, mask)[0] == tags[part].tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_tags", [256, 257, 1024])
def test_many_tags(using_isa: UsingIsa, isa: str, dtype: Any, num_tags: int) -> None:
    p = make_problem([5, 1, 3], num_tags, dtype=dtype, whole=True)
    with using_isa(isa):
        tags, scores = decode(p, threads=0)
    want_tags, want_scores = oracle.crf_viterbi(*p)
    np.testing.assert_array_equal(tags, want_tags)
    np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("isa", ISAS)
def test_all_equal(using_isa: UsingIsa, isa: str) -> None:
    p = make_problem([4, 0, 40], 17)._replace(
        start=np.zeros(17, np.float32),
        end=np.zeros(17, np.float32),
        transitions=np.zeros((17, 17), np.float32),
    )
    p.emissions[:] = 0.25
    with using_isa(isa):
        tags, scores = decode(p)
    assert not tags.any()
    np.testing.assert_array_equal(scores, [1.0, 0.0, 10.0])


@pytest.mark.parametrize("isa", ISAS)
def test_precision_does_not_fade_with_length(using_isa: UsingIsa, isa: str) -> None:
    """Two paths apart by 2^-10 a piece, scores of some 1000: float32 alone would lose them."""
    length = 20_000
    emissions = np.full((length, 2), 1000.0, dtype=np.float32)
    emissions[::2, 0] += 2.0**-10
    emissions[1::2, 1] += 2.0**-10
    zero = np.zeros(2, np.float32)
    p = Problem(
        emissions, np.array([0, length], np.int32), zero, zero, np.zeros((2, 2), np.float32)
    )
    with using_isa(isa):
        tags, scores = decode(p)
    np.testing.assert_array_equal(tags, np.arange(length) % 2)
    assert scores[0] == np.float32(score_of(p, tags)[0])


@pytest.mark.parametrize("isa", ISAS)
def test_constraints_hold(using_isa: UsingIsa, isa: str) -> None:
    p = make_problem([200] * 3, 9)
    for inside in range(2, 9, 2):
        p.transitions[~np.isin(np.arange(9), [inside - 1, inside]), inside] = -INF
        p.start[inside] = -INF
    p.emissions[:, 2::2] += 3.0
    with using_isa(isa):
        tags, _ = decode(p)
    assert (tags % 2 == 0).any()
    for part in p.sequences():
        before = [0, *tags[part].tolist()]
        for previous, tag in itertools.pairwise(before):
            assert tag == 0 or tag % 2 == 1 or previous in (tag - 1, tag)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("where", ["start", "end", "transitions", "emissions"])
def test_no_possible_path(using_isa: UsingIsa, isa: str, dtype: Any, where: str) -> None:
    p = make_problem([4, 1, 40], 9, dtype=dtype)
    if where == "emissions":
        p.emissions[2] = -INF
    else:
        getattr(p, where)[...] = -INF
    with using_isa(isa):
        tags, scores = decode(p)
    want_tags, want_scores = oracle.crf_viterbi(*p)
    assert scores[0] == -INF
    assert not tags[:4].any()
    np.testing.assert_array_equal(tags, want_tags)
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(want_scores))


@pytest.mark.parametrize("isa", ISAS)
def test_no_sequences(using_isa: UsingIsa, isa: str) -> None:
    with using_isa(isa):
        for lengths in ([], [0, 0]):
            tags, scores = decode(make_problem(lengths, 9))
            assert tags.shape == (0,)
            np.testing.assert_array_equal(scores, np.zeros(len(lengths)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tags", [1, 8, 9, 33])
@pytest.mark.parametrize("lengths", [*LENGTHS, [100, 3, 0, 250] * 30])
def test_neither_batch_nor_threads_change_the_result(
    using_isa: UsingIsa, isa: str, num_tags: int, lengths: list[int]
) -> None:
    p = make_problem(lengths, num_tags)
    with using_isa(isa):
        tags, scores = decode(p)
        for threads in (0, 2, 3, 8):
            more_tags, more_scores = decode(p, threads)
            np.testing.assert_array_equal(more_tags, tags)
            np.testing.assert_array_equal(more_scores, scores)
        for index, part in enumerate(p.sequences()):
            offsets = np.array([0, part.stop - part.start], np.int32)
            single = p._replace(emissions=p.emissions[part], cu_seqlens=offsets)
            own_tags, own_scores = decode(single)
            np.testing.assert_array_equal(own_tags, tags[part])
            assert own_scores[0] == scores[index]


@pytest.mark.parametrize(
    ("name", "make", "kind", "message"),
    [
        ("tags", lambda a: a.astype(np.int64), TypeError, r"tags: has dtype int64, must be int32"),
        ("tags", lambda a: a[:-1], ValueError, r"tags: has shape \[11\], must be \[12\]"),
        ("scores", lambda a: a[:-1], ValueError, r"scores: has shape \[2\], must be \[3\]"),
        ("scores", lambda a: a.astype(np.float64), TypeError, r"scores: has dtype float64"),
        ("scores", lambda a: a.tolist(), TypeError, r"scores: got list, must be a NumPy array"),
        ("threads", lambda a: 5000, ValueError, r"threads: got 5000, must be 0 .* to 4096"),
    ],
)
def test_bad_input(name: str, make: Any, kind: type[Exception], message: str) -> None:
    p = make_problem([4, 5, 3], 9)
    outputs: dict[str, Any] = {
        "tags": np.full(12, 7, np.int32),
        "scores": np.full(3, 7.0, np.float32),
        "threads": 1,
    }
    given_outputs = {**outputs, name: make(outputs[name])}
    with pytest.raises(kind, match=message):
        _core.crf_viterbi(*p, **given_outputs)
    assert (outputs["tags"] == 7).all()
    assert (outputs["scores"] == 7.0).all()
