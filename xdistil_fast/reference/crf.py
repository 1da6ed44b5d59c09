"""Float64 NumPy oracle of the ragged linear-chain CRF, in log space; and all paths, one by one.

Tags y of a sequence of T pieces score::

    s(y) = start[y_0] + sum_t emissions[t, y_t] + sum_{t>0} transitions[y_{t-1}, y_t] + end[y_{T-1}]

and have probability exp(s(y) - log Z), where Z sums exp(s) over all C^T paths. -inf forbids. The
recursions below take C^2 logarithms of sums a step; `enumerate_paths` takes none and trusts nothing
but the sum above, for as many paths as can be listed.

By definition:

* a sequence of length 0 has log-likelihood 0 and no tags;
* tags that use a forbidden move have log-likelihood -inf, and the usual gradient "observed minus
  expected", its limit as the forbidden score goes to -inf;
* a sequence without any possible path has log-likelihood -inf, gradient and marginals 0, Viterbi
  score -inf and all tags 0.

Source: Lafferty, McCallum & Pereira, "Conditional Random Fields", 2001; the gradient is derived in
Sutton & McCallum, "An Introduction to Conditional Random Fields", 2012, section 4.

Shapes: `total` pieces in `B` sequences, `C` tags. `cu_seqlens` [B+1] holds the offset of each
sequence and ends at `total`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tags = npt.NDArray[np.int32]

MAX_PATHS = 4096


class CRFGradients(NamedTuple):
    """Gradients of a CRF's log-likelihood.

    Attributes:
        emissions: [total, C].
        start: [C].
        end: [C].
        transitions: [C, C].
    """

    emissions: Array
    start: Array
    end: Array
    transitions: Array


class Enumeration(NamedTuple):
    """What a listing of all paths of one sequence of T pieces says.

    Attributes:
        log_z: log of the sum of exp(score) over all paths; -inf if none is possible.
        marginals: [T, C], probability of each tag at each piece.
        moves: [C, C], expected number of moves from tag (row) to tag (column).
        tags: [T], the best path; of equal ones that with the lowest last tag, then the lowest
            last but one, and so on.
        score: the score of `tags`.
    """

    log_z: float
    marginals: Array
    moves: Array
    tags: Tags
    score: float


class _Model(NamedTuple):
    emissions: Array
    offsets: list[int]
    start: Array
    end: Array
    transitions: Array


def _check(
    emissions: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    start: npt.ArrayLike,
    end: npt.ArrayLike,
    transitions: npt.ArrayLike,
) -> _Model:
    arrays = [np.asarray(array, dtype=np.float64) for array in (emissions, start, end, transitions)]
    if arrays[0].ndim != 2 or arrays[0].shape[1] == 0:
        raise ValueError(f"emissions must be [total, C] with C > 0, got shape {arrays[0].shape}")
    total, tags = arrays[0].shape
    for name, array, shape in zip(
        ("start", "end", "transitions"), arrays[1:], [(tags,), (tags,), (tags, tags)], strict=True
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    for name, array in zip(("emissions", "start", "end", "transitions"), arrays, strict=True):
        if not (array < np.inf).all():
            raise ValueError(f"{name} must be finite or -inf, has nan or inf")
    offsets = [int(offset) for offset in np.asarray(cu_seqlens)]
    ascending = all(a <= b for a, b in itertools.pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != total or not ascending:
        raise ValueError(f"cu_seqlens must ascend from 0 to {total}, got {offsets}")
    return _Model(arrays[0], offsets, *arrays[1:])


def _check_tags(tags: npt.ArrayLike, total: int, num_tags: int) -> list[int]:
    array = np.asarray(tags)
    if array.shape != (total,):
        raise ValueError(f"tags must have shape {(total,)}, got {array.shape}")
    listed = [int(tag) for tag in array]
    for position, tag in enumerate(listed):
        if not 0 <= tag < num_tags:
            raise ValueError(f"tags must be in 0..{num_tags - 1}, got {tag} at {position}")
    return listed


def _log_sum_exp(x: Array, axis: int) -> Array:
    largest = x.max(axis=axis, keepdims=True)
    # Where all is -inf there is nothing to take off.
    shift = np.where(np.isneginf(largest), 0.0, largest)
    with np.errstate(divide="ignore"):
        total: Array = np.log(np.exp(x - shift).sum(axis=axis)) + shift.squeeze(axis)
    return total


def _forward(e: Array, model: _Model) -> Array:
    """[T, C]: log of the sum over paths that end with tag j at piece t, emission included."""
    alpha = np.empty_like(e)
    alpha[0] = model.start + e[0]
    for t in range(1, len(e)):
        alpha[t] = _log_sum_exp(alpha[t - 1][:, None] + model.transitions, axis=0) + e[t]
    return alpha


def _backward(e: Array, model: _Model) -> Array:
    """[T, C]: log of the sum over paths that go on from tag i at piece t, its emission excluded."""
    beta = np.empty_like(e)
    beta[-1] = model.end
    for t in range(len(e) - 1, 0, -1):
        beta[t - 1] = _log_sum_exp(model.transitions + (e[t] + beta[t])[None, :], axis=1)
    return beta


def _score(e: Array, tags: list[int], model: _Model) -> float:
    score = model.start[tags[0]] + model.end[tags[-1]]
    score += sum(e[t, tag] for t, tag in enumerate(tags))
    score += sum(model.transitions[i, j] for i, j in itertools.pairwise(tags))
    return float(score)


def crf_log_likelihood(
    emissions: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    tags: npt.ArrayLike,
    start: npt.ArrayLike,
    end: npt.ArrayLike,
    transitions: npt.ArrayLike,
) -> Array:
    """Log-likelihood of the tags of each sequence.

    Args:
        emissions: [total, C].
        cu_seqlens: [B+1] integers, 0 to `total`, ascending.
        tags: [total] integers in 0..C-1.
        start: [C].
        end: [C].
        transitions: [C, C], from row to column.

    Returns:
        [B].

    Raises:
        ValueError: a shape, score, tag or `cu_seqlens` does not fit.
    """
    model = _check(emissions, cu_seqlens, start, end, transitions)
    gold = _check_tags(tags, *model.emissions.shape)
    out = np.zeros(len(model.offsets) - 1)
    for b, (first, last) in enumerate(itertools.pairwise(model.offsets)):
        if first == last:
            continue
        e = model.emissions[first:last]
        score = _score(e, gold[first:last], model)
        log_z = float(_log_sum_exp(_forward(e, model)[-1] + model.end, axis=0))
        out[b] = -np.inf if np.isneginf(score) else score - log_z
    return out


def crf_log_likelihood_grad(
    emissions: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    tags: npt.ArrayLike,
    start: npt.ArrayLike,
    end: npt.ArrayLike,
    transitions: npt.ArrayLike,
    grad_out: npt.ArrayLike,
) -> CRFGradients:
    """Gradients of `sum(grad_out * crf_log_likelihood(...))`: observed minus expected counts.

    Args:
        emissions: [total, C].
        cu_seqlens: [B+1].
        tags: [total].
        start: [C].
        end: [C].
        transitions: [C, C].
        grad_out: [B].

    Returns:
        Gradients of emissions, start, end and transitions.

    Raises:
        ValueError: a shape, score, tag or `cu_seqlens` does not fit.
    """
    model = _check(emissions, cu_seqlens, start, end, transitions)
    gold = _check_tags(tags, *model.emissions.shape)
    weights = np.asarray(grad_out, dtype=np.float64)
    if weights.shape != (len(model.offsets) - 1,):
        raise ValueError(
            f"grad_out must have shape {(len(model.offsets) - 1,)}, got {weights.shape}"
        )
    grads = CRFGradients(*(np.zeros_like(a) for a in (model.emissions, *model[2:])))
    for weight, first, last in zip(weights, model.offsets, model.offsets[1:], strict=False):
        if first == last:
            continue
        e, y = model.emissions[first:last], gold[first:last]
        alpha, beta = _forward(e, model), _backward(e, model)
        log_z = _log_sum_exp(alpha[-1] + model.end, axis=0)
        if np.isneginf(log_z):
            continue
        rows = -np.exp(alpha + beta - log_z)
        moves = np.zeros_like(model.transitions)
        for t in range(1, len(e)):
            moves -= np.exp(
                alpha[t - 1][:, None] + model.transitions + (e[t] + beta[t])[None, :] - log_z
            )
            moves[y[t - 1], y[t]] += 1.0
        rows[np.arange(len(e)), y] += 1.0
        grads.emissions[first:last] = weight * rows
        grads.start[:] += weight * rows[0]
        grads.end[:] += weight * rows[-1]
        grads.transitions[:] += weight * moves
    return grads


def crf_marginals(
    emissions: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    start: npt.ArrayLike,
    end: npt.ArrayLike,
    transitions: npt.ArrayLike,
) -> Array:
    """Probability of each tag at each piece.

    Args:
        emissions: [total, C].
        cu_seqlens: [B+1].
        start: [C].
        end: [C].
        transitions: [C, C].

    Returns:
        [total, C]; the rows of a sequence with a possible path sum to 1.

    Raises:
        ValueError: a shape, score or `cu_seqlens` does not fit.
    """
    model = _check(emissions, cu_seqlens, start, end, transitions)
    out = np.zeros_like(model.emissions)
    for first, last in itertools.pairwise(model.offsets):
        if first == last:
            continue
        e = model.emissions[first:last]
        alpha = _forward(e, model)
        log_z = _log_sum_exp(alpha[-1] + model.end, axis=0)
        if not np.isneginf(log_z):
            out[first:last] = np.exp(alpha + _backward(e, model) - log_z)
    return out


def crf_viterbi(
    emissions: npt.ArrayLike,
    cu_seqlens: npt.ArrayLike,
    start: npt.ArrayLike,
    end: npt.ArrayLike,
    transitions: npt.ArrayLike,
) -> tuple[Tags, Array]:
    """The best path of each sequence.

    Of equal candidates the lowest tag is taken, at the end and at every step back.

    Args:
        emissions: [total, C].
        cu_seqlens: [B+1].
        start: [C].
        end: [C].
        transitions: [C, C].

    Returns:
        Tags [total] and the score of each sequence's path [B] (0 for length 0).

    Raises:
        ValueError: a shape, score or `cu_seqlens` does not fit.
    """
    model = _check(emissions, cu_seqlens, start, end, transitions)
    tags = np.zeros(len(model.emissions), dtype=np.int32)
    scores = np.zeros(len(model.offsets) - 1)
    for b, (first, last) in enumerate(itertools.pairwise(model.offsets)):
        if first == last:
            continue
        e = model.emissions[first:last]
        delta = model.start + e[0]
        pointers = []
        for row in e[1:]:
            candidates = delta[:, None] + model.transitions
            pointers.append(candidates.argmax(axis=0))  # argmax takes the first of equals
            delta = candidates.max(axis=0) + row
        final = delta + model.end
        if np.isneginf(final.max()):
            scores[b] = -np.inf
            continue
        path = [int(final.argmax())]
        for pointer in reversed(pointers):
            path.append(int(pointer[path[-1]]))
        path.reverse()
        tags[first:last] = path
        scores[b] = _score(e, path, model)
    return tags, scores


def enumerate_paths(
    emissions: npt.ArrayLike,
    start: npt.ArrayLike,
    end: npt.ArrayLike,
    transitions: npt.ArrayLike,
) -> Enumeration:
    """Lists every path of one sequence and sums over the list.

    Args:
        emissions: [T, C], T > 0, C ** T at most `MAX_PATHS`.
        start: [C].
        end: [C].
        transitions: [C, C].

    Returns:
        What the list says.

    Raises:
        ValueError: a shape or score does not fit, or there are too many paths.
    """
    length = np.shape(emissions)[0]
    e, _, start_, end_, transitions_ = _check(emissions, [0, length], start, end, transitions)
    tags = e.shape[1]
    if length == 0 or tags**length > MAX_PATHS:
        raise ValueError(f"C ** T must be at most {MAX_PATHS} and T > 0, got {tags} ** {length}")
    # Ordered by last tag, then last but one, ...: the first of equals is the one to take.
    paths = [path[::-1] for path in itertools.product(range(tags), repeat=length)]
    scores = np.array(
        [
            start_[path[0]]
            + sum(e[t, tag] for t, tag in enumerate(path))
            + sum(transitions_[i, j] for i, j in itertools.pairwise(path))
            + end_[path[-1]]
            for path in paths
        ]
    )
    marginals, moves = np.zeros_like(e), np.zeros_like(transitions_)
    best = int(scores.argmax())
    if np.isneginf(scores[best]):
        return Enumeration(-np.inf, marginals, moves, np.zeros(length, np.int32), -np.inf)
    log_z = float(_log_sum_exp(scores, axis=0))
    for path, probability in zip(paths, np.exp(scores - log_z), strict=True):
        for t, tag in enumerate(path):
            marginals[t, tag] += probability
        for i, j in itertools.pairwise(path):
            moves[i, j] += probability
    return Enumeration(
        log_z, marginals, moves, np.array(paths[best], dtype=np.int32), float(scores[best])
    )
