"""Padded batches and PackedSequence to ragged ones and back; `xdistil_fast.nn` has these functions.

A ragged batch is `values` [total, ...], the sequences one after the other, and `cu_seqlens` [B+1],
their offsets from 0 to `total`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    """Offsets of sequences laid one after the other.

    Args:
        lengths: [B] integers, none negative.

    Returns:
        [B+1] int32: 0, then the running sum of `lengths`.

    Raises:
        TypeError: `lengths` is not of integers.
        ValueError: `lengths` is not one-dimensional or has a negative entry.
    """
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have shape [B], got {list(lengths.shape)}")
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    offsets = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def pack_padded(
    padded: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turns a padded batch into a ragged one. Differentiable.

    Args:
        padded: [T, B, ...], or [B, T, ...] with `batch_first`.
        lengths: [B] integers, 0 to T.
        mask: [T, B], or [B, T] with `batch_first`: true for the first steps of each sequence, those
            to keep. With neither `lengths` nor `mask`, all are kept. Give one of them at most.
        batch_first: the order of the first two dimensions.

    Returns:
        Values [total, ...] and cu_seqlens [B+1] (int32).

    Raises:
        TypeError: `lengths` is not of integers.
        ValueError: shapes do not fit, a length is out of range, or a mask has holes.
    """
    if padded.dim() < 2:
        raise ValueError(f"padded must have at least two dimensions, got {list(padded.shape)}")
    if lengths is not None and mask is not None:
        raise ValueError("give lengths or mask, not both")
    rows = padded if batch_first else padded.transpose(0, 1)
    batch, steps = rows.shape[:2]
    if lengths is None and mask is None:
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=padded.device) * steps
        return rows.reshape(batch * steps, *rows.shape[2:]), offsets
    kept = None
    if mask is not None:
        kept = mask if batch_first or mask.dim() != 2 else mask.transpose(0, 1)
        if tuple(kept.shape) != (batch, steps):
            raise ValueError(
                f"mask must have shape {list(padded.shape[:2])} like padded, got {list(mask.shape)}"
            )
        kept = kept.to(device=padded.device, dtype=torch.bool)
        if bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            raise ValueError("mask must keep the first steps of each sequence, without holes")
        lengths = kept.sum(1)
    assert lengths is not None
    offsets = cu_seqlens_of(lengths)
    if kept is None:
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths must have shape [{batch}], got {list(lengths.shape)}")
        if batch and int(lengths.max()) > steps:
            raise ValueError(f"lengths must be at most {steps}, got {int(lengths.max())}")
        kept = torch.arange(steps, device=padded.device) < lengths.to(padded.device)[:, None]
    return rows[kept], offsets


def unpack_padded(
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    steps: int | None = None,
    batch_first: bool = False,
    padding_value: float = 0.0,
) -> Tensor:
    """Turns a ragged batch into a padded one. Differentiable; the inverse of `pack_padded`.

    Args:
        values: [total, ...].
        cu_seqlens: [B+1], 0 to total, ascending.
        steps: T of the result; the longest length if None.
        batch_first: the order of the first two dimensions.
        padding_value: what fills the rest.

    Returns:
        [T, B, ...], or [B, T, ...] with `batch_first`.

    Raises:
        ValueError: `cu_seqlens` does not fit `values`, or a sequence is longer than `steps`.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or int(cu_seqlens[0]) != 0:
        raise ValueError("cu_seqlens must have shape [B+1] and start at 0")
    if int(cu_seqlens[-1]) != values.shape[0] or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must ascend to {values.shape[0]}, the rows of values")
    longest = int(lengths.max()) if lengths.numel() else 0
    steps = longest if steps is None else steps
    if longest > steps:
        raise ValueError(f"steps must be at least {longest}, the longest sequence, got {steps}")
    kept = torch.arange(steps, device=values.device) < lengths.to(values.device)[:, None]
    padded = values.new_full((lengths.shape[0], steps, *values.shape[1:]), padding_value)
    padded = padded.masked_scatter(
        kept.reshape(kept.shape + (1,) * (values.dim() - 1)).expand_as(padded), values
    )
    return padded if batch_first else padded.transpose(0, 1)


def packed_order(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Row of `packed.data` for each row of the ragged form, in the original order, and offsets.

    A PackedSequence holds step 0 of all sequences, longest first, then step 1 of those that have
    one, and so on: `batch_sizes` [T] counts the sequences at each step.
    """
    sizes = packed.batch_sizes
    batch = int(sizes[0])
    places = packed.unsorted_indices
    places = torch.arange(batch) if places is None else places.cpu()
    lengths = (sizes[None, :] > places[:, None]).sum(1)
    cu_seqlens = cu_seqlens_of(lengths)
    starts = sizes.cumsum(0) - sizes
    begins = cu_seqlens[:-1].to(torch.int64)
    step = torch.arange(int(sizes.sum())) - begins.repeat_interleave(lengths)
    return starts[step] + places.repeat_interleave(lengths), cu_seqlens
