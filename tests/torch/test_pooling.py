"""`torch_ops.pool` and `nn.Pool` against the float64 reference and against finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast import torch_ops
from xdistil_fast.nn import Pool
from xdistil_fast.reference import pool as reference

POOLINGS = ("max", "mean", "last")


def batch(lengths: list[int], width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return torch.randn(sum(lengths), width, dtype=dtype, generator=generator), offsets


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), half=st.integers(1, 9))
def test_is_the_reference(pooling: str, lengths: list[int], half: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        values, offsets = batch(lengths, 2 * half, dtype)
        got = Pool(pooling)(values, offsets)
        assert got.dtype == dtype
        want = reference(values.double().numpy(), offsets.numpy(), pooling)
        np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 5], [2, 2]])
def test_gradient(pooling: str, lengths: list[int]) -> None:
    values, offsets = batch(lengths, 4, torch.float64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch_ops.pool(v, offsets, pooling), (values,))
    torch.library.opcheck(torch.ops.xdistil.pool.default, (values, offsets, pooling))


def test_of_equal_maxima_the_first_gets_the_gradient() -> None:
    values = torch.ones(3, 2, requires_grad=True)
    torch_ops.pool(values, torch.tensor([0, 3]), "max").sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_compiles(pooling: str) -> None:
    values, offsets = batch([3, 0, 2], 4, torch.float32)
    values.requires_grad_()
    module = torch.compile(Pool(pooling), backend="aot_eager", fullgraph=True)
    got = module(values, offsets)
    got.square().sum().backward()
    found = values.grad
    values.grad = None
    want = Pool(pooling)(values, offsets)
    want.square().sum().backward()
    assert torch.equal(got, want)
    assert found is not None
    assert torch.equal(found, values.grad)


def test_refuses_what_does_not_fit() -> None:
    values, offsets = batch([2, 3], 3, torch.float32)
    with pytest.raises(ValueError, match="pooling is 'sum'"):
        Pool("sum")
    with pytest.raises(ValueError, match="'last' needs an even number"):
        torch_ops.pool(values, offsets, "last")
    for wrong in ([0, 4], [1, 5], [0, 6, 5], []):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            torch_ops.pool(values, torch.tensor(wrong, dtype=torch.int32), "max")
    with pytest.raises(TypeError, match="values must be float32"):
        torch_ops.pool(values.half(), offsets, "max")
