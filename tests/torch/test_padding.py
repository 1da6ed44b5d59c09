"""pack_padded, unpack_padded and cu_seqlens_of: between padded and ragged batches."""

# Tensor.backward is untyped in torch.
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xdistil_fast.nn import cu_seqlens_of, pack_padded, unpack_padded


def make_padded(lengths: list[int], steps: int, rest: tuple[int, ...]) -> Tensor:
    """[B, T, ...] with every element different."""
    shape = (len(lengths), steps, *rest)
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=5),
    extra=st.integers(0, 2),
    rest=st.sampled_from([(), (3,), (2, 3)]),
    batch_first=st.booleans(),
    by=st.sampled_from(["lengths", "mask", "byte mask"]),
)
def test_there_and_back(
    lengths: list[int], extra: int, rest: tuple[int, ...], batch_first: bool, by: str
) -> None:
    steps = max(lengths, default=0) + extra
    padded = make_padded(lengths, steps, rest)
    rows = [row[:length] for row, length in zip(padded, lengths, strict=True)]
    want = torch.cat(rows) if rows else torch.zeros(0, *rest)
    kept = torch.arange(steps) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    given_padded = padded if batch_first else padded.transpose(0, 1)
    arguments: dict[str, Any] = {"lengths": torch.tensor(lengths, dtype=torch.int64)}
    if by != "lengths":
        mask = kept if batch_first else kept.t()
        arguments = {"mask": mask if by == "mask" else mask.byte()}
    values, cu_seqlens = pack_padded(given_padded, **arguments, batch_first=batch_first)
    assert torch.equal(values, want)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().tolist() == lengths
    assert cu_seqlens[0] == 0

    back = unpack_padded(values, cu_seqlens, steps=steps, batch_first=batch_first, padding_value=-1)
    back = back if batch_first else back.transpose(0, 1)
    assert torch.equal(back[kept], want)
    assert (back[~kept] == -1).all()
    shortest = unpack_padded(values, cu_seqlens, batch_first=True)
    assert shortest.shape == (len(lengths), max(lengths, default=0), *rest)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_lengths_all_is_kept(batch_first: bool) -> None:
    padded = make_padded([4, 4, 4], 4, (2,))
    given_padded = padded if batch_first else padded.transpose(0, 1)
    values, cu_seqlens = pack_padded(given_padded, batch_first=batch_first)
    assert torch.equal(values, padded.reshape(12, 2))
    assert cu_seqlens.tolist() == [0, 4, 8, 12]


def test_integers_are_packed_too() -> None:
    tags = torch.tensor([[1, 2, 9], [3, 9, 9]])
    values, _ = pack_padded(tags, torch.tensor([2, 1]), batch_first=True)
    assert values.tolist() == [1, 2, 3]
    assert values.dtype == torch.int64
    back = unpack_padded(values, torch.tensor([0, 2, 3]), batch_first=True, padding_value=-100)
    assert back.tolist() == [[1, 2], [3, -100]]


def test_gradients_pass() -> None:
    padded = make_padded([2, 3], 3, (2,)).double().requires_grad_()
    lengths = torch.tensor([2, 3])
    assert torch.autograd.gradcheck(
        lambda x: pack_padded(x, lengths, batch_first=True)[0], (padded,)
    )
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: unpack_padded(x, torch.tensor([0, 2, 5]), steps=4), (values,)
    )


def test_deterministic_algorithms_are_enough() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        padded = make_padded([2, 3], 3, (2,)).requires_grad_()
        values, cu_seqlens = pack_padded(padded, torch.tensor([2, 3]), batch_first=True)
        unpack_padded(values, cu_seqlens).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert padded.grad is not None
    assert padded.grad.sum() == 10


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"lengths": torch.tensor([2.0, 3.0])}, TypeError, "lengths must be integers.*float32"),
        ({"lengths": torch.tensor([True, True])}, TypeError, "lengths must be integers.*bool"),
        ({"lengths": torch.tensor([[2, 3]])}, ValueError, r"lengths must have shape \[B\]"),
        ({"lengths": torch.tensor([2])}, ValueError, r"lengths must have shape \[2\], got \[1\]"),
        ({"lengths": torch.tensor([2, -1])}, ValueError, "not be negative, got -1"),
        ({"lengths": torch.tensor([2, 4])}, ValueError, "at most 3, got 4"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask must have shape \[2, 3\].*\[3, 2\]"),
        ({"mask": torch.ones(2)}, ValueError, r"mask must have shape \[2, 3\].*\[2\]"),
        ({"mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, ValueError, "without holes"),
        ({"mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, ValueError, "without holes"),
        ({"mask": torch.ones(2, 3), "lengths": torch.tensor([2, 3])}, ValueError, "not both"),
    ],
)
def test_bad_packing(arguments: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        pack_padded(torch.zeros(2, 3, 4), **arguments, batch_first=True)


def test_one_dimension_is_no_batch() -> None:
    with pytest.raises(ValueError, match="at least two dimensions"):
        pack_padded(torch.zeros(3))


@pytest.mark.parametrize(
    ("cu_seqlens", "steps", "message"),
    [
        (torch.tensor([1, 5]), None, "start at 0"),
        (torch.tensor([[0, 5]]), None, r"shape \[B\+1\]"),
        (torch.tensor([], dtype=torch.int32), None, r"shape \[B\+1\]"),
        (torch.tensor([0, 4]), None, "ascend to 5"),
        (torch.tensor([0, 4, 2, 5]), None, "ascend to 5"),
        (torch.tensor([0, 2, 5]), 2, "steps must be at least 3.*got 2"),
    ],
)
def test_bad_unpacking(cu_seqlens: Tensor, steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_padded(torch.zeros(5, 2), cu_seqlens, steps=steps)


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match=r"lengths must have shape \[B\]"):
        cu_seqlens_of(torch.tensor(3))
    assert cu_seqlens_of(torch.tensor([], dtype=torch.int64)).tolist() == [0]
