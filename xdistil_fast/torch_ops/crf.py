"""The linear-chain CRF as torch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from xdistil_fast import _core
from xdistil_fast.torch_ops import cuda
from xdistil_fast.torch_ops.checks import (
    check_devices,
    check_floats,
    check_index,
    int32_view,
    one_precision,
    view,
)

# --- linear-chain CRF --------------------------------------------------------------------------


_CRF_NAMES = ("emissions", "cu_seqlens", "start_transitions", "end_transitions", "transitions")


def _check_crf(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> None:
    if emissions.dim() != 2:
        raise ValueError(
            f"emissions must have shape [total, num_tags], got {list(emissions.shape)}"
        )
    tags = emissions.shape[1]
    check_floats(
        {
            "emissions": (emissions, (None, None)),
            "start_transitions": (start, (tags,)),
            "end_transitions": (end, (tags,)),
            "transitions": (transitions, (tags, tags)),
        }
    )
    check_index("cu_seqlens", cu_seqlens, (None,))


@custom_op("xdistil::crf_log_likelihood", mutates_args=(), device_types="cpu")
def _crf_log_likelihood(
    emissions: Tensor,
    cu_seqlens: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
) -> Tensor:
    _check_crf(emissions, cu_seqlens, start, end, transitions)
    check_index("tags", tags, (emissions.shape[0],))
    out = torch.empty((max(cu_seqlens.shape[0] - 1, 0),), dtype=emissions.dtype)
    _core.crf_log_likelihood(
        view(emissions),
        int32_view("cu_seqlens", cu_seqlens),
        int32_view("tags", tags),
        view(start),
        view(end),
        view(transitions),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


@_crf_log_likelihood.register_kernel("cuda")
def _crf_log_likelihood_cuda(
    emissions: Tensor, cu_seqlens: Tensor, tags: Tensor, *scores: Tensor
) -> Tensor:
    _check_crf(emissions, cu_seqlens, *scores)
    check_index("tags", tags, (emissions.shape[0],))
    return cuda.crf_log_likelihood(emissions, cu_seqlens, tags, *scores)


@_crf_log_likelihood.register_fake
def _crf_log_likelihood_fake(
    emissions: Tensor, cu_seqlens: Tensor, tags: Tensor, *scores: Tensor
) -> Tensor:
    _check_crf(emissions, cu_seqlens, *scores)
    check_index("tags", tags, (emissions.shape[0],))
    return emissions.new_empty((cu_seqlens.shape[0] - 1,))


@custom_op("xdistil::crf_log_likelihood_backward", mutates_args=(), device_types="cpu")
def _crf_log_likelihood_backward(
    grad_out: Tensor,
    emissions: Tensor,
    cu_seqlens: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # empty_like would keep the strides of a non-contiguous input.
    grad_emissions, grad_start, grad_end, grad_transitions = (
        torch.empty(tensor.shape, dtype=tensor.dtype)
        for tensor in (emissions, start, end, transitions)
    )
    _core.crf_log_likelihood_grad(
        view(emissions),
        int32_view("cu_seqlens", cu_seqlens),
        int32_view("tags", tags),
        view(start),
        view(end),
        view(transitions),
        view(grad_out),
        grad_emissions.numpy(),
        grad_start.numpy(),
        grad_end.numpy(),
        grad_transitions.numpy(),
        torch.get_num_threads(),
    )
    return grad_emissions, grad_start, grad_end, grad_transitions


_crf_log_likelihood_backward.register_kernel("cuda")(cuda.crf_log_likelihood_backward)


@_crf_log_likelihood_backward.register_fake
def _crf_log_likelihood_backward_fake(
    grad_out: Tensor, emissions: Tensor, cu_seqlens: Tensor, tags: Tensor, *scores: Tensor
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (emissions, *scores))


def _crf_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _crf_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    emissions, start, end, transitions = _crf_log_likelihood_backward(grad_out, *ctx.saved_tensors)
    return emissions, None, None, start, end, transitions


_crf_log_likelihood.register_autograd(_crf_autograd, setup_context=_crf_setup)


def crf_log_likelihood(
    emissions: Tensor,
    cu_seqlens: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
) -> Tensor:
    """Log-likelihood of the tags of each sequence under a linear-chain CRF, differentiable.

    Args:
        emissions: [total, C], the score of each tag at each piece.
        cu_seqlens: [B+1].
        tags: [total], int32 or int64, each in 0..C-1.
        start: [C], score of beginning with a tag. -inf forbids a move, here and below.
        end: [C], score of ending with a tag.
        transitions: [C, C], score of going from tag (row) to tag (column).

    Returns:
        [B]. 0 for a sequence of length 0; -inf for tags that use a forbidden move.

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape, device, tag, score or `cu_seqlens` is wrong.
    """
    check_devices((*_CRF_NAMES, "tags"), (emissions, cu_seqlens, start, end, transitions, tags))
    out: Tensor = _crf_log_likelihood(emissions, cu_seqlens, tags, start, end, transitions)
    return out


@custom_op("xdistil::crf_marginals", mutates_args=(), device_types="cpu")
def _crf_marginals(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    _check_crf(emissions, cu_seqlens, start, end, transitions)
    out = torch.empty(emissions.shape, dtype=emissions.dtype)
    _core.crf_marginals(
        view(emissions),
        int32_view("cu_seqlens", cu_seqlens),
        view(start),
        view(end),
        view(transitions),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


@_crf_marginals.register_kernel("cuda")
def _crf_marginals_cuda(emissions: Tensor, cu_seqlens: Tensor, *scores: Tensor) -> Tensor:
    _check_crf(emissions, cu_seqlens, *scores)
    return cuda.crf_marginals(emissions, cu_seqlens, *scores)


@_crf_marginals.register_fake
def _crf_marginals_fake(emissions: Tensor, cu_seqlens: Tensor, *scores: Tensor) -> Tensor:
    _check_crf(emissions, cu_seqlens, *scores)
    return emissions.new_empty(emissions.shape)


def crf_marginals(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """Probability of each tag at each piece under a linear-chain CRF; not differentiable.

    Args:
        emissions: [total, C].
        cu_seqlens: [B+1].
        start: [C].
        end: [C].
        transitions: [C, C], from row to column; -inf forbids a move.

    Returns:
        [total, C]; rows sum to 1.

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape, device, score or `cu_seqlens` is wrong.
    """
    check_devices(_CRF_NAMES, (emissions, cu_seqlens, start, end, transitions))
    out: Tensor = _crf_marginals(emissions, cu_seqlens, start, end, transitions)
    return out


@custom_op("xdistil::crf_viterbi", mutates_args=(), device_types="cpu")
def _crf_viterbi(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    _check_crf(emissions, cu_seqlens, start, end, transitions)
    tags = torch.empty((emissions.shape[0],), dtype=torch.int32)
    scores = torch.empty((max(cu_seqlens.shape[0] - 1, 0),), dtype=emissions.dtype)
    _core.crf_viterbi(
        view(emissions),
        int32_view("cu_seqlens", cu_seqlens),
        view(start),
        view(end),
        view(transitions),
        tags.numpy(),
        scores.numpy(),
        torch.get_num_threads(),
    )
    return tags, scores


@_crf_viterbi.register_kernel("cuda")
def _crf_viterbi_cuda(
    emissions: Tensor, cu_seqlens: Tensor, *scores: Tensor
) -> tuple[Tensor, Tensor]:
    _check_crf(emissions, cu_seqlens, *scores)
    return cuda.crf_viterbi(emissions, cu_seqlens, *scores)


@_crf_viterbi.register_fake
def _crf_viterbi_fake(
    emissions: Tensor, cu_seqlens: Tensor, *scores: Tensor
) -> tuple[Tensor, Tensor]:
    _check_crf(emissions, cu_seqlens, *scores)
    tags = emissions.new_empty((emissions.shape[0],), dtype=torch.int32)
    return tags, emissions.new_empty((cu_seqlens.shape[0] - 1,))


def crf_viterbi(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """Best tags of each sequence under a linear-chain CRF, ties towards the lower tag.

    The scores carry no gradient.

    Args:
        emissions: [total, C].
        cu_seqlens: [B+1].
        start: [C].
        end: [C].
        transitions: [C, C], from row to column; -inf forbids a move.

    Returns:
        Tags [total] (int32) and the score of each sequence's best path [B].

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape, device, score or `cu_seqlens` is wrong.
    """
    check_devices(_CRF_NAMES, (emissions, cu_seqlens, start, end, transitions))
    tags, scores = _crf_viterbi(emissions, cu_seqlens, start, end, transitions)
    return tags, scores


one_precision(_crf_log_likelihood, _crf_marginals, _crf_viterbi)
