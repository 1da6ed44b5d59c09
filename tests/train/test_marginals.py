from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from xdistil_fast import torch_ops
from xdistil_fast.reference.crf import enumerate_paths
from xdistil_fast.train.marginals import crf_log_marginals

C = 3
# Sentences of 2, 0, 1, 4 and 0 pieces.
CU = np.array([0, 2, 2, 3, 7, 7], np.int32)


def scores(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(4)
    shapes = ((int(CU[-1]), C), (C,), (C,), (C, C))
    emissions, start, end, moves = (
        torch.from_numpy(2 * rng.standard_normal(shape)).to(dtype) for shape in shapes
    )
    return emissions, start, end, moves


def test_marginals_are_those_of_all_paths() -> None:
    emissions, start, end, moves = scores()
    found = crf_log_marginals(emissions, torch.from_numpy(CU), start, end, moves).exp().numpy()
    for first, last in itertools.pairwise(CU):
        if first == last:
            continue
        listed = enumerate_paths(emissions[first:last], start, end, moves)
        np.testing.assert_allclose(found[first:last], listed.marginals, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_are_those_of_the_kernel(dtype: torch.dtype) -> None:
    emissions, start, end, moves = scores(dtype)
    cu = torch.from_numpy(CU)
    found = crf_log_marginals(emissions, cu, start, end, moves).exp()
    torch.testing.assert_close(found, torch_ops.crf_marginals(emissions, cu, start, end, moves))


def test_gradient() -> None:
    parts = [part.requires_grad_() for part in scores()]
    weights = torch.from_numpy(np.random.default_rng(5).standard_normal((int(CU[-1]), C)))

    def total(emissions: Tensor, *rest: Tensor) -> Tensor:
        found = crf_log_marginals(emissions, torch.from_numpy(CU), *rest)
        return (weights * found).sum()

    assert torch.autograd.gradcheck(total, parts)


def test_long_sentences_and_large_scores_stay_finite() -> None:
    rng = np.random.default_rng(6)
    emissions = torch.from_numpy(40 * rng.standard_normal((300, C)).astype(np.float32))
    emissions.requires_grad_()
    _, start, end, moves = scores(torch.float32)
    found = crf_log_marginals(emissions, torch.tensor([0, 300]), start, end, moves)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(300))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert emissions.grad is not None
    assert bool(torch.isfinite(emissions.grad).all())


def test_no_piece() -> None:
    _, start, end, moves = scores()
    none = torch.zeros((0, C), dtype=torch.float64)
    assert crf_log_marginals(none, torch.tensor([0, 0]), start, end, moves).shape == (0, C)
    assert crf_log_marginals(none, torch.tensor([0]), start, end, moves).shape == (0, C)
