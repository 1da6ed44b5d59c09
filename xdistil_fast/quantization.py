"""Weights as bytes: how a model folder stores them, and what the int8 kernels take.

A quantised matrix is an int8 array and a float32 scale for each of its rows, the output channels
(of the embedding table: the pieces): row n stands for ``scales[n] * bytes[n]``. The bytes of the
matrices that int8 kernels may multiply, the recurrent weights, the projection and the output layer,
are chosen by `_core.quantize_rows`, so that the 16-bit sums of any instruction set hold them
exactly; all others only save space and are multiplied as floats, and so is an output layer that
reads a projection or a pooled state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdistil_fast import _core
from xdistil_fast.model_config import MULTIPLIED_AS_BYTES, QUANTIZED, scales_name

Floats = NDArray[np.float32]
Bytes = NDArray[np.int8]


def quantize_matrix(name: str, weight: Floats) -> tuple[Bytes, Floats]:
    """Rounds a matrix to bytes.

    Args:
        name: the tensor's, which says whether int8 kernels multiply it.
        weight: float32 [N, K], finite.

    Returns:
        int8 [N, K], and float32 [N] scales of its rows.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if name in MULTIPLIED_AS_BYTES:
        levels, scales = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
        _core.quantize_rows(weight, levels, scales)
        return levels, scales
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales < np.finfo(np.float32).tiny] = 1  # zeros, or as good as
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def quantize_tensors(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The tensors of a float32 model as an int8 folder stores them."""
    out: dict[str, NDArray[Any]] = {}
    for name, value in tensors.items():
        if name in QUANTIZED:
            out[name], out[scales_name(name)] = quantize_matrix(name, value)
        else:
            out[name] = value
    return out


def as_floats(tensors: Mapping[str, NDArray[Any]], name: str) -> Floats:
    """A tensor as float32, whether it is stored as bytes or not."""
    value = tensors[name]
    if value.dtype != np.int8:
        return value
    floats: Floats = value * tensors[scales_name(name)][:, None]
    return floats


def as_bytes(tensors: Mapping[str, NDArray[Any]], name: str) -> tuple[Bytes, Floats]:
    """A matrix as bytes with their scales, as it is stored or quantised here."""
    value = tensors[name]
    if value.dtype == np.int8:
        return value, tensors[scales_name(name)]
    return quantize_matrix(name, value)
