"""Float64 NumPy oracle of the ragged bidirectional LSTM: forward and hand-written backward.

One direction runs, for t = 1..T of each sequence with h_0 = c_0 = 0::

    [i, f, g, o] = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh      (gate rows in this order)
    i, f, o      = sigmoid(.),  g = tanh(.)
    c_t          = f * c_{t-1} + i * g
    h_t          = o * tanh(c_t)

and the reverse direction runs the same over x_T..x_1. The output row of a piece is
[h forward, h reverse]. Written for reading, one sequence and one step at a time: compiled kernels
are measured against it, so it must be obviously right rather than fast.

With `bfloat16` the factors of every product with a matrix are rounded to bfloat16, forward and
backward: weights, x, h, and the gradients at the gates. Nothing else is.

Sources: Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; the
forget gate of Gers, Schmidhuber & Cummins, "Learning to Forget", 2000, in the form and gate order
of torch.nn.LSTM.

Shapes: `total` pieces in `B` sequences, input size `I`, hidden size `H`. `cu_seqlens` [B+1] holds
the offset of each sequence in `values` and ends at `total`; sequences of length 0 are allowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rounding = Callable[[Array], Array]


class _Trace(NamedTuple):
    """What one direction of one sequence leaves for its backward, all in processing order."""

    gates: Array  # [T, 4, H]: i, f, g, o after their activations
    cells: Array  # [T + 1, H]: c_0 .. c_T
    hidden: Array  # [T + 1, H]: h_0 .. h_T


class BiLSTMGradients(NamedTuple):
    """Gradients of a bidirectional LSTM.

    Attributes:
        values: [total, I].
        weights: six arrays: w_ih [4H, I], w_hh [4H, H], bias [4H] of the forward direction, then
            of the reverse. The two biases of a direction only ever occur as their sum, so `bias`
            is the gradient of each.
    """

    values: Array
    weights: list[Array]


def sigmoid(z: Array) -> Array:
    """The logistic function, of any shape."""
    # tanh saturates cleanly where exp(-z) would overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def to_bfloat16(values: npt.ArrayLike) -> Array:
    """Numbers that float32 holds, rounded to the upper 16 bits of it, halfway cases to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    rounded: Array = upper.view(np.float32).astype(np.float64)
    return rounded


def _kept(values: Array) -> Array:
    return values


def _check(
    values: npt.ArrayLike, cu_seqlens: npt.ArrayLike, weights: Sequence[npt.ArrayLike]
) -> tuple[Array, list[int], list[Array]]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"values must be [total, I], got shape {x.shape}")
    offsets = [int(offset) for offset in np.asarray(cu_seqlens)]
    ascending = all(a <= b for a, b in itertools.pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != x.shape[0] or not ascending:
        raise ValueError(f"cu_seqlens must ascend from 0 to {x.shape[0]}, got {offsets}")
    if len(weights) != 8:
        raise ValueError(f"weights must be 8 arrays in the order of nn.LSTM, got {len(weights)}")
    arrays = [np.asarray(weight, dtype=np.float64) for weight in weights]
    hidden = arrays[1].shape[-1]
    expected = [(4 * hidden, x.shape[1]), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)] * 2
    shapes = [array.shape for array in arrays]
    if shapes != expected:
        raise ValueError(f"weights must have shapes {expected}, got {shapes}")
    return x, offsets, arrays


def _run(x: Array, weights: Sequence[Array], factor: Rounding) -> _Trace:
    """One direction over one sequence `x` [T, I], given in processing order."""
    w_ih, w_hh, b_ih, b_hh = factor(weights[0]), factor(weights[1]), *weights[2:]
    x = factor(x)
    steps, hidden_size = x.shape[0], w_hh.shape[1]
    gates = np.zeros((steps, 4, hidden_size))
    cells = np.zeros((steps + 1, hidden_size))
    hidden = np.zeros((steps + 1, hidden_size))
    for t in range(steps):
        z = (w_ih @ x[t] + b_ih + w_hh @ factor(hidden[t]) + b_hh).reshape(4, hidden_size)
        i, f, g, o = sigmoid(z[0]), sigmoid(z[1]), np.tanh(z[2]), sigmoid(z[3])
        gates[t] = i, f, g, o
        cells[t + 1] = f * cells[t] + i * g
        hidden[t + 1] = o * np.tanh(cells[t + 1])
    return _Trace(gates, cells, hidden)


def _run_backward(
    x: Array, weights: Sequence[Array], trace: _Trace, grad_hidden: Array, factor: Rounding
) -> tuple[Array, Array, Array, Array]:
    """Gradients (x, w_ih, w_hh, bias) of one direction; `grad_hidden` [T, H] is dL/dh_t."""
    w_ih, w_hh = factor(weights[0]), factor(weights[1])
    steps, hidden_size = grad_hidden.shape
    grad_z = np.zeros((steps, 4 * hidden_size))
    grad_h_next = np.zeros(hidden_size)
    grad_c_next = np.zeros(hidden_size)
    for t in reversed(range(steps)):
        i, f, g, o = trace.gates[t]
        tanh_c = np.tanh(trace.cells[t + 1])
        grad_h = grad_hidden[t] + grad_h_next
        grad_c = grad_c_next + grad_h * o * (1.0 - tanh_c * tanh_c)
        grad_z[t] = np.concatenate(
            [
                grad_c * g * i * (1.0 - i),
                grad_c * trace.cells[t] * f * (1.0 - f),
                grad_c * i * (1.0 - g * g),
                grad_h * tanh_c * o * (1.0 - o),
            ]
        )
        grad_h_next = w_hh.T @ factor(grad_z[t])
        grad_c_next = grad_c * f
    rounded, hidden = factor(grad_z), factor(trace.hidden[:-1])
    return rounded @ w_ih, rounded.T @ factor(x), rounded.T @ hidden, grad_z.sum(axis=0)


def bilstm_forward(
    values: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    weights: Sequence[npt.ArrayLike],
    bfloat16: bool = False,
) -> Array:
    """Bidirectional LSTM over a ragged batch.

    Args:
        values: [total, I].
        cu_seqlens: [B+1] integers, 0 to `total`, ascending.
        weights: 8 arrays as torch.nn.LSTM holds them: w_ih [4H, I], w_hh [4H, H], b_ih [4H],
            b_hh [4H] of the forward direction, then of the reverse.
        bfloat16: round what is multiplied, see above.

    Returns:
        [total, 2H]: forward then reverse hidden state of each piece.

    Raises:
        ValueError: a shape or `cu_seqlens` does not fit.
    """
    x, offsets, arrays = _check(values, cu_seqlens, weights)
    hidden_size = arrays[1].shape[1]
    factor = to_bfloat16 if bfloat16 else _kept
    out = np.zeros((x.shape[0], 2 * hidden_size))
    for begin, end in itertools.pairwise(offsets):
        sequence = x[begin:end]
        out[begin:end, :hidden_size] = _run(sequence, arrays[:4], factor).hidden[1:]
        reverse = _run(sequence[::-1], arrays[4:], factor)
        out[begin:end, hidden_size:] = reverse.hidden[1:][::-1]
    return out


def bilstm_backward(
    values: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    weights: Sequence[npt.ArrayLike],
    grad_out: npt.ArrayLike,
    bfloat16: bool = False,
) -> BiLSTMGradients:
    """Gradients of `sum(grad_out * bilstm_forward(values, cu_seqlens, weights))`.

    Args:
        values: [total, I].
        cu_seqlens: [B+1] integers, 0 to `total`, ascending.
        weights: 8 arrays, see `bilstm_forward`.
        grad_out: [total, 2H].
        bfloat16: round what is multiplied, see above.

    Returns:
        Gradients of `values` and of the weights.

    Raises:
        ValueError: a shape or `cu_seqlens` does not fit.
    """
    x, offsets, arrays = _check(values, cu_seqlens, weights)
    hidden_size = arrays[1].shape[1]
    grad = np.asarray(grad_out, dtype=np.float64)
    if grad.shape != (x.shape[0], 2 * hidden_size):
        raise ValueError(
            f"grad_out must have shape {(x.shape[0], 2 * hidden_size)}, got {grad.shape}"
        )
    factor = to_bfloat16 if bfloat16 else _kept
    grad_values = np.zeros_like(x)
    grad_weights = [np.zeros_like(arrays[k]) for k in (0, 1, 2, 4, 5, 6)]
    for begin, end in itertools.pairwise(offsets):
        for direction in (0, 1):
            # The reverse direction is the forward one over the sequence turned round.
            order = slice(None) if direction == 0 else slice(None, None, -1)
            own = arrays[4 * direction : 4 * direction + 4]
            columns = slice(direction * hidden_size, (direction + 1) * hidden_size)
            sequence = x[begin:end][order]
            trace = _run(sequence, own, factor)
            grad_x, *grads = _run_backward(
                sequence, own, trace, grad[begin:end, columns][order], factor
            )
            grad_values[begin:end] += grad_x[order]
            for k, grad_weight in enumerate(grads):
                grad_weights[3 * direction + k] += grad_weight
    return BiLSTMGradients(grad_values, grad_weights)
