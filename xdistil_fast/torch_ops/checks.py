"""What every operator asks of its arguments, and their views as NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)
Shape = tuple[int | None, ...]


def check_devices(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuses what the dispatcher would only refuse with a list of registrations.

    All on the device of the first; `cu_seqlens` may stay on the CPU.
    """
    device = tensors[0].device
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device.type not in DEVICES:
            raise ValueError(
                f"{name} is on device {tensor.device}; xdistil_fast computes on "
                f"{', '.join(DEVICES)}: move it with .cpu()"
            )
        if tensor.device != device and not (name == "cu_seqlens" and tensor.device.type == "cpu"):
            raise ValueError(
                f"{name} is on device {tensor.device} but {names[0]} is on {device}; "
                "they must be together"
            )


def check_floats(shapes: dict[str, tuple[Tensor, Shape]], bfloat16: bool = False) -> None:
    """All of one floating dtype, each of its shape; None in a shape is any size."""
    first, (reference, _) = next(iter(shapes.items()))
    allowed = (*_DTYPES, torch.bfloat16) if bfloat16 else _DTYPES
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but {first} is {reference.dtype}; they must be alike"
            )
        check_shape(name, tensor, shape)


def check_index(name: str, tensor: Tensor, shape: Shape) -> None:
    """Integers of a supported dtype, of that shape."""
    if tensor.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    check_shape(name, tensor, shape)


def check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    """None in a shape is any size."""
    fits = len(tensor.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def view(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's memory, or a contiguous copy of it."""
    # Inside an operator inputs still carry requires_grad, which .numpy() refuses.
    array: npt.NDArray[Any] = tensor.detach().contiguous().numpy()
    return array


def int32_view(name: str, tensor: Tensor) -> npt.NDArray[np.int32]:
    """`view` of integers, as int32; ValueError if one does not fit."""
    array = view(tensor)
    if array.dtype != np.int32:
        limits = np.iinfo(np.int32)
        # A silent wrap-around could turn a bad id into a good one.
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ValueError(
                f"{name} must fit int32, got values from {array.min()} to {array.max()}"
            )
        array = array.astype(np.int32)
    return array


def one_precision(*operators: Any, cuda: torch.dtype = torch.float32) -> None:
    """Registers the autocast rule: float32 whatever the autocast dtype, or `cuda` on a GPU.

    The kernels have no half-precision form, but for the recurrence on a GPU, and a CRF's sums of
    exponentials would lose too much in one. On the CPU `layers.bilstm` rounds for its products what
    it is given in float32.
    """
    for operator in operators:
        operator.register_autocast("cpu", torch.float32)
        operator.register_autocast("cuda", cuda)
