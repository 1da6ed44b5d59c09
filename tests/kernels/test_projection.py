"""GELU, and students whose output layer reads the GELU of a projection.

Such a student must be its parts to the bit: one whose output layer is the projection, GELU, and a
linear layer. These have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import _core
from xdistil_fast.reference import student as oracle

ISAS = _core.isas_available()
PRECISIONS = ("float32", "bfloat16", "int8")
POOLINGS = (None, "max", "mean", "last")
LENGTHS = [[], [0], [1], [6, 5, 0, 4], [300], [7] * 90]
V, E = 50, 5

Array = np.ndarray[Any, np.dtype[Any]]
UsingIsa = Callable[[str], AbstractContextManager[None]]


def gelu(values: Array) -> Array:
    out = values.copy()
    _core.gelu(out)
    return out


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 200]),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 5.0, 100.0, 1e18, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_gelu_is_the_oracle(
    using_isa: UsingIsa, isa: str, size: int, dtype: Any, scale: float, seed: int
) -> None:
    values = (scale * np.random.default_rng(seed).standard_normal(size)).astype(dtype)
    with using_isa(isa):
        got = gelu(values)
    want = oracle.gelu(values)
    allowed = 4 * np.finfo(dtype).eps * np.maximum(np.abs(values.astype(np.float64)), 1) + 1e-12
    assert (np.abs(got - want) <= allowed).all()


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_at_the_ends(using_isa: UsingIsa, isa: str) -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, 50.0, -50.0, np.nan], np.float32)
    with using_isa(isa):
        np.testing.assert_array_equal(gelu(values), np.array([0, 0, np.inf, 0, 50, 0, np.nan]))


@pytest.mark.parametrize("isa", ISAS)
def test_error_of_gelu_is_within_twice_that_of_torch(using_isa: UsingIsa, isa: str) -> None:
    torch = pytest.importorskip("torch", reason="the error bound is that of torch's GELU")
    values = np.linspace(-8, 8, 400_001, dtype=np.float32)
    by_torch = torch.nn.functional.gelu(torch.from_numpy(values), approximate="tanh").numpy()
    with using_isa(isa):
        got = gelu(values)
    want = oracle.gelu(values)
    assert np.abs(got - want).max() <= 2 * np.abs(by_torch - want).max()


def test_gelu_refuses() -> None:
    with pytest.raises(ValueError, match=r"values: .*\[2, 2\]"):
        _core.gelu(np.zeros((2, 2), np.float32))
    with pytest.raises(TypeError, match=r"values: .*int32"):
        _core.gelu(np.zeros(2, np.int32))
    fixed = np.zeros(2, np.float32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="values: must be writeable"):
        _core.gelu(fixed)


class Problem:
    """A projected student and a batch for it."""

    def __init__(
        self, lengths: list[int], H: int, R: int, C: int, precision: str, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)

        def floats(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32)

        def matrix(*shape: int) -> Any:
            weight = floats(*shape) / np.sqrt(np.float32(shape[1]))
            if precision != "int8":
                return weight
            levels, scales = np.empty(shape, np.int8), np.empty(shape[0], np.float32)
            _core.quantize_rows(weight, levels, scales)
            return levels, scales

        self.precision = precision
        self.ids = rng.integers(0, V, sum(lengths), dtype=np.int32)
        self.cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        self.embedding = floats(V, E)
        self.bilstm = [
            part for _ in range(2) for part in (floats(4 * H, E), matrix(4 * H, H), floats(4 * H))
        ]
        self.projection = matrix(R, 2 * H), floats(R)
        self.output = matrix(C, R), floats(C)

    def scores(self, output: Any, pooling: str | None, projection: Any = None) -> Array:
        weights = _core.StudentWeights(
            self.precision,
            self.embedding,
            self.bilstm,
            output,
            np.arange(0, V, 2, dtype=np.int32),
            1,
            pooling,
            projection,
        )
        rows = len(self.ids) if pooling is None else len(self.cu_seqlens) - 1
        out = np.full((rows, len(output[1])), np.nan, np.float32)
        call = _core.student_scores if pooling is None else _core.student_class_scores
        call(weights, self.ids, self.cu_seqlens, out, threads=2)
        assert np.isfinite(out).all(), "a score was not written"
        return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@settings(deadline=None, max_examples=15)
@given(
    lengths=st.sampled_from(LENGTHS),
    H=st.sampled_from([1, 8, 17, 33]),
    R=st.sampled_from([1, 3, 16, 65, 130]),
    C=st.sampled_from([1, 9, 17]),
    seed=st.integers(0, 2**16),
)
def test_a_projected_student_is_its_parts(
    using_isa: UsingIsa,
    isa: str,
    precision: str,
    pooling: str | None,
    lengths: list[int],
    H: int,
    R: int,
    C: int,
    seed: int,
) -> None:
    problem = Problem(lengths, H, R, C, precision, seed)
    weight, bias = problem.output
    floats = weight[0] * weight[1][:, None] if precision == "int8" else weight
    with using_isa(isa):
        got = problem.scores(problem.output, pooling, problem.projection)
        projected = gelu(problem.scores(problem.projection, pooling).reshape(-1)).reshape(-1, R)
        want = np.empty((len(projected), C), np.float32)
        _core.linear(_core.LinearWeights(floats, bias), projected, want, 1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
def test_float32_is_the_oracle(using_isa: UsingIsa, isa: str) -> None:
    problem = Problem([7, 2, 0, 31, 1, 4], 33, 20, 9, "float32")
    with using_isa(isa):
        got = problem.scores(problem.output, None, problem.projection)
    arrays = (problem.embedding, problem.bilstm, problem.output)
    want = oracle.student_scores(
        problem.ids, problem.cu_seqlens, *arrays, projection=problem.projection
    )
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection": 1}, "projection: got 1 arrays, must be 2: weight, bias"),
        ({"projection": 0}, "projection bias: has 0 values, must be 1 to"),
        ({"output": 5}, "output weight: has shape"),
    ],
)
def test_bad_layers(precision: str, change: dict[str, int], message: str) -> None:
    problem = Problem([3], 4, 6, 2, precision)
    projection: Any = problem.projection
    if change.get("projection") == 1:
        projection = projection[:1]
    elif change.get("projection") == 0:
        projection = projection[0], np.zeros(0, np.float32)
    else:  # an output layer that does not fit the projection
        problem = Problem([3], 4, 5, 2, precision)
    with pytest.raises(ValueError, match=message):
        problem.scores(problem.output, None, projection)
