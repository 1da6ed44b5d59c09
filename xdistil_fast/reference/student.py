"""Float64 NumPy oracle of a student at inference: token ids to tag scores in three precisions.

What a token adds to the gates of a direction depends on its id alone and is a row of a table; the
recurrence is that of `reference.lstm`, and a linear layer makes scores of both hidden states::

    r(id)        = W_ih embedding[id] + bias
    [i, f, g, o] = r(id_t) + W_hh h_{t-1}
    scores_t     = W_out [h_t forward, h_t reverse] + b_out

of a text classifier once, from the pooled states of a text (`pool`). With a projection, W_out reads
gelu(W_proj [h_t forward, h_t reverse] + b_proj) in place of the states.

The precision says what is rounded on the way; all other arithmetic is float64:

=========  ================  ========================  =================================
           r(id)             W_hh                      h, as the recurrence and W_out see it
=========  ================  ========================  =================================
float32    kept              kept                      kept
bfloat16   to float16        to bfloat16               kept; `bfloat16_products`: the
                                                       recurrence sees it in bfloat16
int8       to float16        int8 with row scales,     rint(63 h) / 63
                             W_out likewise
=========  ================  ========================  =================================

Rounding is to nearest even; what is beyond float16 becomes its largest number. In int8 all products
with h are sums of integers, and so exact. Kernels compute the rest in float32, and where a value
lies next to the middle between two levels they may round it to the other side. In float16 that is
the error of one rounding. But a hidden state that is off by a level goes back into the recurrence,
and a sentence may drift away from there: `fed_back` compares step by step without that.

Sources: as `reference.lstm`; max pooling as in Mukherjee and Hassan Awadallah, 2019
(arXiv 1910.01769, their code), the last state as in ACL 2020, section 6.6; the scheme of int8 is
described in csrc/xdf/kernels.h.

Shapes: `total` tokens in `B` sequences, vocabulary `V`, embedding size `E`, hidden size `H`, `C`
tags. `cu_seqlens` [B+1] ascends from 0 to `total`; sequences of length 0 are allowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xdistil_fast.reference.lstm import sigmoid, to_bfloat16

Array = npt.NDArray[np.float64]

PRECISIONS = ("float32", "bfloat16", "int8")
HIDDEN_LEVELS = 63


def _to_float16(values: Array) -> Array:
    largest = float(np.finfo(np.float16).max)
    rounded: Array = np.clip(values, -largest, largest).astype(np.float16).astype(np.float64)
    return rounded


def _matrix(weight: Any, precision: str) -> Array:
    """A matrix that meets hidden states, as the kernels of `precision` hold it."""
    if precision == "int8":
        levels, scales = weight
        return np.asarray(levels, np.float64) * np.asarray(scales, np.float64)[:, None]
    return np.asarray(weight, np.float64)


def student_hidden(
    ids: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    embedding: npt.ArrayLike,
    bilstm: Sequence[Any],
    precision: str = "float32",
    fed_back: npt.ArrayLike | None = None,
    bfloat16_products: bool = False,
) -> Array:
    """Hidden states of a BiLSTM over token ids.

    Args:
        ids: [total] integers below V.
        cu_seqlens: [B+1].
        embedding: [V, E].
        bilstm: w_ih [4H, E], w_hh [4H, H], bias [4H] of the forward direction, then of the reverse.
            For "int8" each w_hh is a pair: int8 [4H, H] and float32 [4H] scales of its rows.
        precision: "float32", "bfloat16" or "int8".
        fed_back: [total, 2H], what a step finds as the hidden state of the step before, in place
            of its own result.
        bfloat16_products: for "bfloat16", whether both factors of the recurrent product are
            rounded, as on an instruction set that multiplies bfloat16.

    Returns:
        [total, 2H], forward then reverse, before any rounding of the hidden state.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    tokens = np.asarray(ids, np.int64)
    offsets = [int(offset) for offset in np.asarray(cu_seqlens)]
    hidden_size = len(np.asarray(bilstm[2])) // 4
    out = np.zeros((len(tokens), 2 * hidden_size))
    for direction in (0, 1):
        w_ih, weight, bias = bilstm[3 * direction : 3 * direction + 3]
        table = np.asarray(embedding, np.float64) @ np.asarray(w_ih, np.float64).T + bias
        w_hh = _matrix(weight, precision)
        if precision != "float32":
            table = _to_float16(table)
        if precision == "bfloat16":
            w_hh = to_bfloat16(weight)
        columns = slice(direction * hidden_size, (direction + 1) * hidden_size)
        for begin, end in itertools.pairwise(offsets):
            steps = range(begin, end) if direction == 0 else range(end - 1, begin - 1, -1)
            h, c = np.zeros(hidden_size), np.zeros(hidden_size)
            for t in steps:
                z = (table[tokens[t]] + w_hh @ h).reshape(4, hidden_size)
                c = sigmoid(z[1]) * c + sigmoid(z[0]) * np.tanh(z[2])
                out[t, columns] = sigmoid(z[3]) * np.tanh(c)
                h = out[t, columns] if fed_back is None else np.asarray(fed_back)[t, columns]
                if precision == "int8":
                    h = np.rint(HIDDEN_LEVELS * h) / HIDDEN_LEVELS
                elif precision == "bfloat16" and bfloat16_products:
                    h = to_bfloat16(h)
    return out


def student_scores(
    ids: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    embedding: npt.ArrayLike,
    bilstm: Sequence[Any],
    output: Sequence[Any],
    precision: str = "float32",
    bfloat16_products: bool = False,
    projection: Sequence[Any] | None = None,
) -> Array:
    """Scores of every tag for every token.

    Args:
        ids: [total] integers below V.
        cu_seqlens: [B+1].
        embedding: [V, E].
        bilstm: six items, see `student_hidden`.
        output: weight [C, 2H] (for "int8" a pair of bytes and scales) and bias [C].
        precision: "float32", "bfloat16" or "int8".
        bfloat16_products: see `student_hidden`.
        projection: weight [R, 2H] and bias [R] in the same form; the output layer is then [C, R].

    Returns:
        [total, C].

    Raises:
        ValueError: an unknown precision.
    """
    hidden = student_hidden(
        ids, cu_seqlens, embedding, bilstm, precision, bfloat16_products=bfloat16_products
    )
    if precision == "int8":
        hidden = np.rint(HIDDEN_LEVELS * hidden) / HIDDEN_LEVELS
    if projection is not None:
        hidden = gelu(hidden @ _matrix(projection[0], precision).T + np.asarray(projection[1]))
    scores: Array = hidden @ _matrix(output[0], precision).T + np.asarray(output[1], np.float64)
    return scores


def gelu(values: npt.ArrayLike) -> Array:
    """GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415, section 2).

    Args:
        values: of any shape.
    """
    x = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        out: Array = x * sigmoid(2 * u)
    return out


def pool(hidden: npt.ArrayLike, cu_seqlens: npt.ArrayLike, pooling: str) -> Array:
    """One state for each sequence.

    Args:
        hidden: [total, 2H], forward then reverse.
        cu_seqlens: [B+1].
        pooling: "max" or "mean" over the sequence's states, or "last": the forward state of its
            last token and the reverse state of its first.

    Returns:
        [B, 2H]; zeros for an empty sequence.

    Raises:
        ValueError: an unknown pooling.
    """
    if pooling not in ("max", "mean", "last"):
        raise ValueError(f"pooling must be 'max', 'mean' or 'last', got {pooling!r}")
    states = np.asarray(hidden, np.float64)
    offsets = [int(offset) for offset in np.asarray(cu_seqlens)]
    out = np.zeros((len(offsets) - 1, states.shape[1]))
    half = states.shape[1] // 2
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            continue
        if pooling == "last":
            out[row] = np.concatenate([states[end - 1, :half], states[begin, half:]])
        else:
            own = states[begin:end]
            out[row] = own.max(axis=0) if pooling == "max" else own.mean(axis=0)
    return out


def student_class_scores(
    ids: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    embedding: npt.ArrayLike,
    bilstm: Sequence[Any],
    output: Sequence[Any],
    pooling: str,
    precision: str = "float32",
) -> Array:
    """Scores of every class for every sequence; arguments as for `student_scores` and `pool`.

    Returns:
        [B, C].
    """
    hidden = student_hidden(ids, cu_seqlens, embedding, bilstm, precision)
    if precision == "int8":
        hidden = np.rint(HIDDEN_LEVELS * hidden) / HIDDEN_LEVELS
    pooled = pool(hidden, cu_seqlens, pooling)
    scores: Array = pooled @ _matrix(output[0], precision).T + np.asarray(output[1], np.float64)
    return scores
