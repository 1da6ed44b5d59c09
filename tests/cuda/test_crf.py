"""The CRF on a GPU, and its emulation, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xdistil_fast import reference
from xdistil_fast.torch_ops import cuda

LENGTHS = [3, 0, 7, 1, 5, 2, 2, 9, 4, 0, 6, 40, 1]
# The oracle in log space is no more exact itself.
TOLERANCE = {torch.float64: 2e-12, torch.float32: 4e-6}


class Case:
    """A random CRF and batch, rounded to a dtype.

    Args:
        forbidden: share of scores that are -inf.
        scale: of all scores.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        num_tags: int,
        device: str,
        forbidden: float = 0.0,
        scale: float = 1.0,
        lengths: list[int] = LENGTHS,
    ) -> None:
        random = np.random.default_rng(num_tags)
        total = sum(lengths)
        shapes = ((total, num_tags), (num_tags,), (num_tags,), (num_tags, num_tags))
        arrays = [scale * random.normal(size=shape) for shape in shapes]
        for array in arrays:
            array[random.random(array.shape) < forbidden] = -np.inf
        self.dtype = dtype
        self.floats = [torch.tensor(a, dtype=dtype, device=device) for a in arrays]
        self.cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        self.tags = torch.tensor(random.integers(0, num_tags, total), device=device)
        self.grad_out = torch.tensor(random.normal(size=len(lengths)), dtype=dtype, device=device)
        self.arrays = [tensor.double().cpu().numpy() for tensor in self.floats]
        self.offsets = self.cu_seqlens.cpu().numpy()

    def assert_close(self, got: Any, expected: Any, scale: float = 1.0) -> None:
        array = got.double().cpu().numpy()
        assert got.dtype == self.dtype
        assert array.shape == expected.shape
        assert not np.isnan(array).any()
        assert np.array_equal(np.isneginf(array), np.isneginf(expected))
        finite = np.isfinite(expected)
        error = np.abs(array[finite] - expected[finite]) / (1 + np.abs(expected[finite]))
        assert error.max(initial=0) <= TOLERANCE[self.dtype] * scale

    def check(self, scale: float = 1.0) -> None:
        """All four functions against the oracle."""
        emissions, *scores = self.floats
        e, *s = self.arrays
        gold = self.tags.cpu().numpy()
        got = cuda.crf_log_likelihood(emissions, self.cu_seqlens, self.tags, *scores)
        expected = reference.crf_log_likelihood(e, self.offsets, gold, *s)
        self.assert_close(got, expected, scale)
        grads = cuda.crf_log_likelihood_backward(
            self.grad_out, emissions, self.cu_seqlens, self.tags, *scores
        )
        weights = self.grad_out.double().cpu().numpy()
        wanted = reference.crf_log_likelihood_grad(e, self.offsets, gold, *s, weights)
        for a, b in zip(grads, wanted, strict=True):
            self.assert_close(a, b, scale)
        marginals = cuda.crf_marginals(emissions, self.cu_seqlens, *scores)
        self.assert_close(marginals, reference.crf_marginals(e, self.offsets, *s), scale)
        tags, best = cuda.crf_viterbi(emissions, self.cu_seqlens, *scores)
        wanted_tags, wanted_scores = reference.crf_viterbi(e, self.offsets, *s)
        assert tags.tolist() == wanted_tags.tolist()
        self.assert_close(best, wanted_scores)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("forbidden", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("num_tags", [1, 2, 9, 31, 32, 33, 70])
def test_equals_the_oracle(
    device: Any, dtype: torch.dtype, num_tags: int, forbidden: float
) -> None:
    Case(dtype, num_tags, device.name, forbidden).check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_that_probabilities_cannot_hold(device: Any, dtype: torch.dtype) -> None:
    """exp(-300) is 0 in float32; the errors are those of scores of thousands."""
    Case(dtype, 9, device.name, forbidden=0.1, scale=300.0).check(scale=100.0)


def test_long_sequences_keep_their_precision(device: Any) -> None:
    Case(torch.float32, 5, device.name, lengths=[700, 3]).check(scale=20.0)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [33]], ids=str)
def test_small_batches(device: Any, lengths: list[int]) -> None:
    Case(torch.float64, 3, device.name, lengths=lengths).check()


def test_more_sequences_than_warps(device: Any) -> None:
    """A warp takes several of them then, and adds up their gradients."""
    lengths = [1, 0, 2] * 1400
    assert device.extension.crf_slots(2, len(lengths)) < len(lengths)
    Case(torch.float64, 2, device.name, lengths=lengths).check(scale=100.0)


def test_equal_paths_take_the_lower_tags(device: Any) -> None:
    zeros = (
        torch.zeros((6, 37), device=device.name),
        *(torch.zeros(shape, device=device.name) for shape in ((37,), (37,), (37, 37))),
    )
    offsets = torch.tensor([0, 4, 6], dtype=torch.int32, device=device.name)
    tags, scores = cuda.crf_viterbi(zeros[0], offsets, *zeros[1:])
    assert tags.tolist() == [0] * 6
    assert scores.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_a_tag_that_is_none_is_nan_and_touches_nothing(device: Any, bad: int) -> None:
    case = Case(torch.float32, 9, device.name)
    emissions, *scores = case.floats
    case.tags[2] = bad
    out = cuda.crf_log_likelihood(emissions, case.cu_seqlens, case.tags, *scores)
    assert out[0].isnan()
    assert not out[1:].isnan().any()
    cuda.crf_log_likelihood_backward(case.grad_out, emissions, case.cu_seqlens, case.tags, *scores)


def test_same_bits_every_time_and_in_any_order(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(torch.float32, 9, device.name, forbidden=0.1)
    emissions, *scores = case.floats
    arguments = (case.grad_out, emissions, case.cu_seqlens, case.tags, *scores)
    first = cuda.crf_log_likelihood_backward(*arguments)
    monkeypatch.setenv("XDF_EMULATED_REVERSE", "1")
    second = cuda.crf_log_likelihood_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
