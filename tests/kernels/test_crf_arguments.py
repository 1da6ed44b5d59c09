"""Arguments that the CRF kernels and their oracle refuse, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdistil_fast import _core
from xdistil_fast import reference as oracle

SCORES = ("emissions", "start", "end", "transitions")

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Array], Any]


def make_problem(lengths: list[int], num_tags: int) -> Any:
    """Three small sequences of arguments that are all in order."""
    rng = np.random.default_rng(0)
    total = sum(lengths)

    def scores(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return SimpleNamespace(
        emissions=scores(total, num_tags),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        tags=rng.integers(0, num_tags, total, dtype=np.int32),
        start=scores(num_tags),
        end=scores(num_tags),
        transitions=scores(num_tags, num_tags),
        grad_out=scores(len(lengths)),
    )


def with_value(value: float, *index: int) -> Change:
    def change(array: Array) -> Array:
        copy: Array = array.copy()
        copy[index] = value
        return copy

    return change


def strided(array: Array) -> Array:
    every_other: Array = np.repeat(array, 2, axis=-1)[..., ::2]
    return every_other


def readonly(array: Array) -> Array:
    copy: Array = array.copy()
    copy.flags.writeable = False
    return copy


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int32)


ARGUMENTS = ("emissions", "cu_seqlens", "tags", "start", "end", "transitions")
BAD_INPUT: list[tuple[str, Change, type[Exception], str]] = [
    ("emissions", lambda a: a.tolist(), TypeError, r"emissions: got list, must be a NumPy array"),
    ("emissions", lambda a: a.astype(np.float16), TypeError, r"emissions: .*float16.*float32 or"),
    ("emissions", lambda a: a[0], ValueError, r"emissions: has shape \[9\], must be \[\*, \*\]"),
    ("emissions", lambda a: a[:, :0].copy(), ValueError, r"emissions: has 0 tags.*1 to 4096"),
    (
        "emissions",
        lambda a: np.zeros((12, 4097), np.float32),
        ValueError,
        r"emissions: has 4097 tags",
    ),
    ("emissions", strided, ValueError, r"emissions: must be C-contiguous"),
    ("emissions", with_value(np.nan, 7, 3), ValueError, r"emissions: has -?nan at \[7, 3\].*-inf"),
    ("emissions", with_value(np.inf, 11, 8), ValueError, r"emissions: has inf at \[11, 8\]"),
    ("cu_seqlens", lambda a: a.astype(np.int64), TypeError, r"cu_seqlens: has dtype int64.*int32"),
    ("cu_seqlens", lambda a: a[:0], ValueError, r"cu_seqlens: is empty"),
    ("cu_seqlens", lambda a: ints(1, 4, 9, 12), ValueError, r"cu_seqlens: starts with 1.*with 0"),
    ("cu_seqlens", lambda a: ints(0, 9, 4, 12), ValueError, r"cu_seqlens: descends at position 2"),
    ("cu_seqlens", lambda a: ints(0, 4, 9, 11), ValueError, r"cu_seqlens: ends with 11.*12"),
    ("tags", lambda a: a.astype(np.int64), TypeError, r"tags: has dtype int64, must be int32"),
    ("tags", lambda a: a[:-1], ValueError, r"tags: has shape \[11\], must be \[12\]"),
    ("tags", with_value(9, 5), ValueError, r"tags: has 9 at position 5, must be 0 to 8"),
    ("tags", with_value(-1, 0), ValueError, r"tags: has -1 at position 0, must be 0 to 8"),
    ("start", lambda a: a[:-1], ValueError, r"start: has shape \[8\], must be \[9\]"),
    ("start", lambda a: a.astype(np.float64), TypeError, r"start: has dtype float64.*float32"),
    ("start", with_value(np.nan, 2), ValueError, r"start: has -?nan at \[2\]"),
    ("end", lambda a: None, TypeError, r"end: got NoneType, must be a NumPy array"),
    ("end", with_value(np.inf, 0), ValueError, r"end: has inf at \[0\], must be finite or -inf"),
    ("transitions", lambda a: a[:-1], ValueError, r"transitions: has shape \[8, 9\]"),
    ("transitions", np.asfortranarray, ValueError, r"transitions: must be C-contiguous"),
    ("transitions", with_value(np.nan, 4, 1), ValueError, r"transitions: has -?nan at \[4, 1\]"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD_INPUT)
def test_bad_input(name: str, change: Change, kind: type[Exception], message: str) -> None:
    p = make_problem([4, 5, 3], 9)
    arguments = {key: getattr(p, key) for key in ARGUMENTS}
    arguments[name] = change(arguments[name])
    untagged = {key: value for key, value in arguments.items() if key != "tags"}
    grads = {f"grad_{key}": np.full_like(getattr(p, key), 7.0) for key in SCORES}
    out, rows, tags = (np.full_like(a, 7) for a in (p.grad_out, p.emissions, p.tags))
    with pytest.raises(kind, match=message):
        _core.crf_log_likelihood(**arguments, out=out)
    with pytest.raises(kind, match=message):
        _core.crf_log_likelihood_grad(**arguments, grad_out=p.grad_out, **grads)
    if name != "tags":
        with pytest.raises(kind, match=message):
            _core.crf_marginals(**untagged, out=rows)
        with pytest.raises(kind, match=message):
            _core.crf_viterbi(**untagged, tags=tags, scores=out)
    assert all((output == 7).all() for output in (out, rows, tags, *grads.values()))


BAD_OUTPUT: list[tuple[str, Change, type[Exception], str]] = [
    ("grad_out", lambda a: a[:-1], ValueError, r"grad_out: has shape \[2\], must be \[3\]"),
    ("grad_out", lambda a: a.astype(np.float64), TypeError, r"grad_out: has dtype float64"),
    ("grad_emissions", lambda a: a[:-1], ValueError, r"grad_emissions: has shape \[11, 9\]"),
    ("grad_emissions", readonly, ValueError, r"grad_emissions: must be writeable"),
    ("grad_start", lambda a: a[:-1], ValueError, r"grad_start: has shape \[8\], must be \[9\]"),
    ("grad_end", lambda a: a.astype(np.float64), TypeError, r"grad_end: has dtype float64"),
    ("grad_transitions", np.asfortranarray, ValueError, r"grad_transitions: must be C-contig"),
    ("threads", lambda a: -1, ValueError, r"threads: got -1, must be 0"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD_OUTPUT)
def test_bad_output(name: str, change: Change, kind: type[Exception], message: str) -> None:
    p = make_problem([4, 5, 3], 9)
    grads = {f"grad_{key}": np.full_like(getattr(p, key), 7.0) for key in SCORES}
    arguments: dict[str, Any] = {"grad_out": p.grad_out, **grads, "threads": 1}
    arguments[name] = change(arguments[name])
    with pytest.raises(kind, match=message):
        _core.crf_log_likelihood_grad(
            p.emissions, p.cu_seqlens, p.tags, p.start, p.end, p.transitions, **arguments
        )
    assert all((grad == 7.0).all() for grad in grads.values())


def test_shared_memory_is_refused() -> None:
    p = make_problem([4, 5, 3], 9)
    model = (p.start, p.end, p.transitions)
    kept = p.emissions.copy()
    with pytest.raises(ValueError, match="out: must not share memory with emissions"):
        _core.crf_marginals(p.emissions, p.cu_seqlens, *model, p.emissions)
    with pytest.raises(ValueError, match="scores: must not share memory with start"):
        _core.crf_viterbi(p.emissions, p.cu_seqlens, *model, p.tags, p.start[:3])
    grads = {f"grad_{key}": np.zeros_like(getattr(p, key)) for key in SCORES}
    grads["grad_end"] = grads["grad_start"]
    with pytest.raises(ValueError, match="grad_end: must not share memory with grad_start"):
        _core.crf_log_likelihood_grad(
            p.emissions, p.cu_seqlens, p.tags, *model, p.grad_out, **grads
        )
    np.testing.assert_array_equal(p.emissions, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 5]}, "cu_seqlens"),
        ({"tags": [0, 1, 9]}, "9 at 2"),
        ({"start": [0.0]}, "start"),
        ({"transitions": [[0.0, 0.0], [0.0, np.nan]]}, "transitions"),
        ({"emissions": np.zeros((3, 0))}, "emissions"),
    ],
)
def test_the_oracle_checks_its_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "emissions": np.zeros((3, 2)),
        "cu_seqlens": [0, 3],
        "tags": [0, 1, 0],
        "start": np.zeros(2),
        "end": np.zeros(2),
        "transitions": np.zeros((2, 2)),
    }
    with pytest.raises(ValueError, match=message):
        oracle.crf_log_likelihood(**{**arguments, **change})


def test_too_many_paths_to_list() -> None:
    with pytest.raises(ValueError, match=r"at most 4096"):
        oracle.enumerate_paths(np.zeros((13, 2)), np.zeros(2), np.zeros(2), np.zeros((2, 2)))
