"""Pooling of ragged sequences as a torch operator."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from xdistil_fast.model_config import POOLINGS
from xdistil_fast.torch_ops import cuda
from xdistil_fast.torch_ops.checks import (
    check_devices,
    check_floats,
    check_index,
    int32_view,
    one_precision,
    view,
)


def _check(values: Tensor, cu_seqlens: Tensor, pooling: str) -> None:
    check_floats({"values": (values, (None, None))})
    check_index("cu_seqlens", cu_seqlens, (None,))
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; allowed: {', '.join(map(repr, POOLINGS))}")
    if values.shape[1] % 2 and pooling == "last":
        raise ValueError(
            f"values has {values.shape[1]} columns; pooling 'last' needs an even number, the "
            "forward half and the reverse half"
        )
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have shape [B+1], got [0]")


def _offsets(cu_seqlens: Tensor, total: int) -> list[int]:
    offsets = int32_view("cu_seqlens", cu_seqlens)
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0 to {total}, the rows of values")
    out: list[int] = offsets.tolist()
    return out


def _index_shape(batch: int, width: int, pooling: str) -> tuple[int, int]:
    return (batch if pooling == "max" else 0, width)


# A loop over the sequences in NumPy: one pass over values, next to a BiLSTM's 8 H products for each
# of their elements.
@custom_op("xdistil::pool", mutates_args=(), device_types="cpu")
def _pool(values: Tensor, cu_seqlens: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    _check(values, cu_seqlens, pooling)
    rows = view(values)
    offsets = _offsets(cu_seqlens, len(rows))
    batch, width = len(offsets) - 1, rows.shape[1]
    out = np.zeros((batch, width), rows.dtype)
    index = np.full(_index_shape(batch, width, pooling), -1, np.int64)
    columns, half = np.arange(width), width // 2
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        own = rows[begin:end]
        if begin == end:
            continue
        if pooling == "max":
            highest = own.argmax(axis=0)
            out[row], index[row] = own[highest, columns], begin + highest
        elif pooling == "mean":
            out[row] = own.mean(axis=0)
        else:
            out[row, :half], out[row, half:] = own[-1, :half], own[0, half:]
    return torch.from_numpy(out), torch.from_numpy(index)


@_pool.register_kernel("cuda")
def _pool_cuda(values: Tensor, cu_seqlens: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    _check(values, cu_seqlens, pooling)
    return cuda.pool(values, cu_seqlens, pooling)


@_pool.register_fake
def _pool_fake(values: Tensor, cu_seqlens: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    _check(values, cu_seqlens, pooling)
    batch, width = cu_seqlens.shape[0] - 1, values.shape[1]
    index = values.new_empty(_index_shape(batch, width, pooling), dtype=torch.int64)
    return values.new_empty((batch, width)), index


@custom_op("xdistil::pool_backward", mutates_args=(), device_types="cpu")
def _pool_backward(
    grad_out: Tensor, cu_seqlens: Tensor, index: Tensor, total: int, pooling: str
) -> Tensor:
    grads, offsets = view(grad_out), _offsets(cu_seqlens, total)
    width = grads.shape[1]
    out = np.zeros((total, width), grads.dtype)
    if pooling == "max":
        where, columns = view(index), np.arange(width)
        for grad, own in zip(grads, where, strict=True):
            if width and own[0] >= 0:
                out[own, columns] = grad
    else:
        half = width // 2
        for grad, (begin, end) in zip(grads, itertools.pairwise(offsets), strict=True):
            if begin == end:
                continue
            if pooling == "mean":
                out[begin:end] = grad / (end - begin)
            else:
                out[end - 1, :half], out[begin, half:] = grad[:half], grad[half:]
    return torch.from_numpy(out)


_pool_backward.register_kernel("cuda")(cuda.pool_backward)


@_pool_backward.register_fake
def _pool_backward_fake(
    grad_out: Tensor, cu_seqlens: Tensor, index: Tensor, total: int, pooling: str
) -> Tensor:
    return grad_out.new_empty((total, grad_out.shape[1]))


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, cu_seqlens, pooling = inputs
    ctx.total, ctx.pooling = values.shape[0], pooling
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(cu_seqlens, output[1])


def _pool_autograd(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, None
    cu_seqlens, index = ctx.saved_tensors
    return _pool_backward(grad_out, cu_seqlens, index, ctx.total, ctx.pooling), None, None


_pool.register_autograd(_pool_autograd, setup_context=_pool_setup)


def pool(values: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """One row for each sequence of a ragged batch, differentiable in `values`.

    Args:
        values: [total, D]; for "last" forward and reverse states of a BiLSTM.
        cu_seqlens: [B+1].
        pooling: "max" or "mean" over a sequence's rows, or "last": the first half of its last row
            and the second half of its first, the states that have read all of it.

    Returns:
        [B, D]; zeros for an empty sequence. The gradient of a maximum goes to the first of equals.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, device, pooling or `cu_seqlens` is wrong.
    """
    check_devices(("values", "cu_seqlens"), (values, cu_seqlens))
    out: Tensor = _pool(values, cu_seqlens, pooling)[0]
    return out


one_precision(_pool)
