"""Our kernels as torch operators: `torch.ops.xdistil.*` and the functions to call them by.

Each kernel that torch code uses is a `torch.library.custom_op` with a fake implementation (shapes
only, for torch.compile), an autograd formula where it has a gradient, and an autocast rule. The
gradient is an operator of its own, so torch.compile traces through forward and backward alike. The
operators hand NumPy views of detached, contiguous tensors to the extension, which knows nothing of
torch, and compute on `torch.get_num_threads()` threads; the result does not depend on the number.

Common to all of them:

* Ragged batches: `values` [total, ...] and `cu_seqlens` [B+1], int32 or int64, which starts at 0,
  ascends and ends at `total`; sequences of length 0 are allowed.
* float32 or float64, all floating tensors of one call alike. Under torch.autocast the inputs are
  cast to float32 (float64 stays), the kernel runs in float32, and so does its gradient.
* CPU. Another device would register its kernels with `<operator>.register_kernel("cuda")` beside
  the CPU ones here and join `_DEVICES`.
* First derivatives only: differentiating a gradient raises RuntimeError, as does differentiating
  `crf_marginals` or `crf_viterbi`.
* TypeError for a wrong dtype; ValueError for a wrong shape, device, `cu_seqlens`, tag or id. Both
  come before any work.

Sources: Hochreiter & Schmidhuber, "Long Short-Term Memory", 1997; Lafferty, McCallum & Pereira,
"Conditional Random Fields", 2001.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.library import custom_op

from xdistil_fast import _core

__all__ = ["bilstm", "crf_log_likelihood", "crf_marginals", "crf_viterbi", "embedding"]

_DEVICES = ("cpu",)
_DTYPES = (torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)
_WEIGHT_NAMES = tuple(
    f"{name}{suffix}"
    for suffix in ("", "_reverse")
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
)
# The weights the kernel returns a gradient of: a direction's two biases share theirs.
_GRAD_WEIGHTS = (0, 1, 2, 4, 5, 6)

_Shape = tuple[int | None, ...]


def _check_devices(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuses what the dispatcher would only refuse with a list of registrations."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device.type not in _DEVICES:
            raise ValueError(
                f"{name} is on device {tensor.device}; xdistil_fast computes on "
                f"{', '.join(_DEVICES)}: move it with .cpu()"
            )


def _check_floats(shapes: dict[str, tuple[Tensor, _Shape]]) -> None:
    """All of one floating dtype, each of its shape; None in a shape is any size."""
    first, (reference, _) = next(iter(shapes.items()))
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but {first} is {reference.dtype}; they must be alike"
            )
        _check_shape(name, tensor, shape)


def _check_index(name: str, tensor: Tensor, shape: _Shape) -> None:
    if tensor.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    _check_shape(name, tensor, shape)


def _check_shape(name: str, tensor: Tensor, shape: _Shape) -> None:
    fits = len(tensor.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def _view(tensor: Tensor) -> npt.NDArray[Any]:
    # Inside an operator inputs still carry requires_grad, which .numpy() refuses.
    array: npt.NDArray[Any] = tensor.detach().contiguous().numpy()
    return array


def _int32_view(name: str, tensor: Tensor) -> npt.NDArray[np.int32]:
    array = _view(tensor)
    if array.dtype != np.int32:
        limits = np.iinfo(np.int32)
        # A silent wrap-around could turn a bad id into a good one.
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ValueError(
                f"{name} must fit int32, got values from {array.min()} to {array.max()}"
            )
        array = array.astype(np.int32)
    return array


# --- bidirectional LSTM ------------------------------------------------------------------------


def _check_bilstm(values: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor]) -> None:
    if values.dim() != 2:
        raise ValueError(f"values must have shape [total, input_size], got {list(values.shape)}")
    if weights[1].dim() != 2:
        raise ValueError(
            "weight_hh_l0 must have shape [4 * hidden_size, hidden_size], "
            f"got {list(weights[1].shape)}"
        )
    hidden = weights[1].shape[1]
    shapes = [(4 * hidden, values.shape[1]), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)] * 2
    floats: dict[str, tuple[Tensor, _Shape]] = {"values": (values, (None, None))}
    for name, weight, shape in zip(_WEIGHT_NAMES, weights, shapes, strict=True):
        floats[name] = (weight, shape)
    _check_floats(floats)
    _check_index("cu_seqlens", cu_seqlens, (None,))


def _reserve_shape(total: int, hidden_size: int, training: bool) -> tuple[int, int]:
    """Reserve as [total, elements a piece]: the fake operator needs it for a symbolic `total`."""
    return (total if training else 0, _core.bilstm_reserve_size(1, int(hidden_size)))


@custom_op("xdistil::bilstm", mutates_args=(), device_types="cpu")
def _bilstm(
    values: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], training: bool
) -> tuple[Tensor, Tensor]:
    _check_bilstm(values, cu_seqlens, weights)
    total, hidden = values.shape[0], weights[1].shape[1]
    packed = _core.BiLSTMWeights([_view(weight) for weight in weights])
    offsets = _int32_view("cu_seqlens", cu_seqlens)
    out = torch.empty((total, 2 * hidden), dtype=values.dtype)
    # Zeros: the kernel leaves the lanes that round H up alone, and an operator's outputs should be
    # a function of its inputs.
    reserve = torch.zeros(_reserve_shape(total, hidden, training), dtype=values.dtype)
    threads = torch.get_num_threads()
    if training:
        _core.bilstm_forward_train(
            packed, _view(values), offsets, out.numpy(), reserve.view(-1).numpy(), threads
        )
    else:
        _core.bilstm_forward(packed, _view(values), offsets, out.numpy(), threads)
    return out, reserve


@_bilstm.register_fake
def _bilstm_fake(
    values: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], training: bool
) -> tuple[Tensor, Tensor]:
    _check_bilstm(values, cu_seqlens, weights)
    total, hidden = values.shape[0], weights[1].shape[1]
    out = values.new_empty((total, 2 * hidden))
    return out, values.new_empty(_reserve_shape(total, hidden, training))


@custom_op("xdistil::bilstm_backward", mutates_args=(), device_types="cpu")
def _bilstm_backward(
    grad_out: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    reserve: Tensor,
    weights: Sequence[Tensor],
    needs_values: bool,
) -> tuple[Tensor, list[Tensor]]:
    packed = _core.BiLSTMWeights([_view(weight) for weight in weights], training=True)
    grad_values = torch.empty(values.shape if needs_values else (0,), dtype=values.dtype)
    grads = [torch.empty(weights[k].shape, dtype=values.dtype) for k in _GRAD_WEIGHTS]
    # The kernel works in place on the reserve; the graph may be walked again (retain_graph).
    scratch = reserve.detach().clone().view(-1)
    _core.bilstm_backward(
        packed,
        _view(values),
        _int32_view("cu_seqlens", cu_seqlens),
        _view(out),
        scratch.numpy(),
        _view(grad_out),
        grad_values.numpy() if needs_values else None,
        [grad.numpy() for grad in grads],
        torch.get_num_threads(),
    )
    return grad_values, grads


@_bilstm_backward.register_fake
def _bilstm_backward_fake(
    grad_out: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    reserve: Tensor,
    weights: Sequence[Tensor],
    needs_values: bool,
) -> tuple[Tensor, list[Tensor]]:
    grads = [values.new_empty(weights[k].shape) for k in _GRAD_WEIGHTS]
    return values.new_empty(values.shape if needs_values else (0,)), grads


def _bilstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, cu_seqlens, weights, training = inputs
    ctx.training = training
    # Else autograd would fill a gradient of zeros for the reserve, the largest tensor here.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, cu_seqlens, *output, *weights)


def _bilstm_autograd(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, [None] * 8, None
    if not ctx.training:
        raise RuntimeError("xdistil::bilstm ran with training=False and kept nothing for backward")
    values, cu_seqlens, out, reserve, *weights = ctx.saved_tensors
    needs_values, _cu_seqlens, needs_weights, _training = ctx.needs_input_grad
    grad_values, grads = _bilstm_backward(
        grad_out, values, cu_seqlens, out, reserve, weights, needs_values
    )
    by_weight = [grads[k] for k in (0, 1, 2, 2, 3, 4, 5, 5)]
    of_weights = [
        grad if need else None for grad, need in zip(by_weight, needs_weights, strict=True)
    ]
    return grad_values if needs_values else None, None, of_weights, None


_bilstm.register_autograd(_bilstm_autograd, setup_context=_bilstm_setup)


def bilstm(values: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Bidirectional LSTM over a ragged batch, differentiable in `values` and `weights`.

    Keeps what backward needs only if gradients are enabled and some input requires one.

    Args:
        values: [total, I].
        cu_seqlens: [B+1].
        weights: the 8 parameters of a torch.nn.LSTM in its order: w_ih [4H, I], w_hh [4H, H],
            b_ih [4H], b_hh [4H] (gate rows i, f, g, o), then the same of the reverse direction.

    Returns:
        [total, 2H]: forward then reverse hidden state of each piece.

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape, device or `cu_seqlens` is wrong.
    """
    if len(weights) != 8:
        raise ValueError(f"weights must be 8 tensors in the order of nn.LSTM, got {len(weights)}")
    _check_devices(("values", "cu_seqlens", *_WEIGHT_NAMES), (values, cu_seqlens, *weights))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (values, *weights))
    out: Tensor = _bilstm(values, cu_seqlens, list(weights), training)[0]
    return out


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
    _check_floats(
        {
            "emissions": (emissions, (None, None)),
            "start_transitions": (start, (tags,)),
            "end_transitions": (end, (tags,)),
            "transitions": (transitions, (tags, tags)),
        }
    )
    _check_index("cu_seqlens", cu_seqlens, (None,))


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
    _check_index("tags", tags, (emissions.shape[0],))
    out = torch.empty((max(cu_seqlens.shape[0] - 1, 0),), dtype=emissions.dtype)
    _core.crf_log_likelihood(
        _view(emissions),
        _int32_view("cu_seqlens", cu_seqlens),
        _int32_view("tags", tags),
        _view(start),
        _view(end),
        _view(transitions),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


@_crf_log_likelihood.register_fake
def _crf_log_likelihood_fake(
    emissions: Tensor, cu_seqlens: Tensor, tags: Tensor, *scores: Tensor
) -> Tensor:
    _check_crf(emissions, cu_seqlens, *scores)
    _check_index("tags", tags, (emissions.shape[0],))
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
        _view(emissions),
        _int32_view("cu_seqlens", cu_seqlens),
        _int32_view("tags", tags),
        _view(start),
        _view(end),
        _view(transitions),
        _view(grad_out),
        grad_emissions.numpy(),
        grad_start.numpy(),
        grad_end.numpy(),
        grad_transitions.numpy(),
        torch.get_num_threads(),
    )
    return grad_emissions, grad_start, grad_end, grad_transitions


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
    _check_devices((*_CRF_NAMES, "tags"), (emissions, cu_seqlens, start, end, transitions, tags))
    out: Tensor = _crf_log_likelihood(emissions, cu_seqlens, tags, start, end, transitions)
    return out


@custom_op("xdistil::crf_marginals", mutates_args=(), device_types="cpu")
def _crf_marginals(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    _check_crf(emissions, cu_seqlens, start, end, transitions)
    out = torch.empty(emissions.shape, dtype=emissions.dtype)
    _core.crf_marginals(
        _view(emissions),
        _int32_view("cu_seqlens", cu_seqlens),
        _view(start),
        _view(end),
        _view(transitions),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


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
    _check_devices(_CRF_NAMES, (emissions, cu_seqlens, start, end, transitions))
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
        _view(emissions),
        _int32_view("cu_seqlens", cu_seqlens),
        _view(start),
        _view(end),
        _view(transitions),
        tags.numpy(),
        scores.numpy(),
        torch.get_num_threads(),
    )
    return tags, scores


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
    _check_devices(_CRF_NAMES, (emissions, cu_seqlens, start, end, transitions))
    tags, scores = _crf_viterbi(emissions, cu_seqlens, start, end, transitions)
    return tags, scores


# --- embedding ---------------------------------------------------------------------------------


def _check_embedding(table: Tensor, ids: Tensor) -> None:
    _check_floats({"table": (table, (None, None))})
    _check_index("ids", ids, (None,))


@custom_op("xdistil::embedding", mutates_args=(), device_types="cpu")
def _embedding(table: Tensor, ids: Tensor) -> Tensor:
    _check_embedding(table, ids)
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype)
    _core.embedding_gather(
        _view(table), _int32_view("ids", ids), out.numpy(), torch.get_num_threads()
    )
    return out


@_embedding.register_fake
def _embedding_fake(table: Tensor, ids: Tensor) -> Tensor:
    _check_embedding(table, ids)
    return table.new_empty((ids.shape[0], table.shape[1]))


@custom_op("xdistil::embedding_backward", mutates_args=(), device_types="cpu")
def _embedding_backward(grad_out: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    grad_table = torch.empty((num_embeddings, grad_out.shape[1]), dtype=grad_out.dtype)
    _core.embedding_grad(
        _int32_view("ids", ids), _view(grad_out), grad_table.numpy(), torch.get_num_threads()
    )
    return grad_table


@_embedding_backward.register_fake
def _embedding_backward_fake(grad_out: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    return grad_out.new_empty((num_embeddings, grad_out.shape[1]))


def _embedding_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    table, ids = inputs
    ctx.num_embeddings = table.shape[0]
    ctx.save_for_backward(ids)


def _embedding_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
    (ids,) = ctx.saved_tensors
    return _embedding_backward(grad_out, ids, ctx.num_embeddings), None


_embedding.register_autograd(_embedding_autograd, setup_context=_embedding_setup)


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of an embedding table, with a dense gradient whose sums run in a fixed order.

    Args:
        table: [V, E].
        ids: [total], int32 or int64, each in 0..V-1.

    Returns:
        [total, E].

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape or device is wrong, or an id is out of range.
    """
    _check_devices(("table", "ids"), (table, ids))
    out: Tensor = _embedding(table, ids)
    return out


# One precision whatever the autocast dtype: the kernels have no half-precision form, and a CRF's
# sums of exponentials would lose too much in one.
for _op in (_bilstm, _crf_log_likelihood, _crf_marginals, _crf_viterbi, _embedding):
    for _device in _DEVICES:
        _op.register_autocast(_device, torch.float32)
