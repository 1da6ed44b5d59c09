"""Embedding, bidirectional LSTM and linear layer as torch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from xdistil_fast import _core
from xdistil_fast.torch_ops import cuda
from xdistil_fast.torch_ops.checks import (
    Shape,
    check_devices,
    check_floats,
    check_index,
    int32_view,
    one_precision,
    view,
)

_WEIGHT_NAMES = tuple(
    f"{name}{suffix}"
    for suffix in ("", "_reverse")
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
)
# The weights the kernel returns a gradient of: a direction's two biases share theirs.
_GRAD_WEIGHTS = (0, 1, 2, 4, 5, 6)


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
    floats: dict[str, tuple[Tensor, Shape]] = {"values": (values, (None, None))}
    for name, weight, shape in zip(_WEIGHT_NAMES, weights, shapes, strict=True):
        floats[name] = (weight, shape)
    check_floats(floats, bfloat16=values.device.type == "cuda")
    check_index("cu_seqlens", cu_seqlens, (None,))


def _reserve_shape(total: int, hidden_size: int, training: bool) -> tuple[int, int]:
    """Reserve as [total, elements a piece]: the fake operator needs it for a symbolic `total`."""
    return (total if training else 0, _core.bilstm_reserve_size(1, int(hidden_size)))


def _packed(weights: Sequence[Tensor], bfloat16: bool, training: bool = False) -> Any:
    """`bfloat16`: for products of bfloat16, if the instruction set has them."""
    bfloat16 = bfloat16 and weights[0].dtype == torch.float32 and _core.multiplies_bfloat16()
    return _core.BiLSTMWeights([view(weight) for weight in weights], training, bfloat16)


@custom_op("xdistil::bilstm", mutates_args=(), device_types="cpu")
def _bilstm(
    values: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    training: bool,
    bfloat16: bool,
) -> tuple[Tensor, Tensor]:
    _check_bilstm(values, cu_seqlens, weights)
    total, hidden = values.shape[0], weights[1].shape[1]
    packed = _packed(weights, bfloat16)
    offsets = int32_view("cu_seqlens", cu_seqlens)
    out = torch.empty((total, 2 * hidden), dtype=values.dtype)
    reserve = torch.empty(_reserve_shape(total, hidden, training), dtype=values.dtype)
    threads = torch.get_num_threads()
    if training:
        _core.bilstm_forward_train(
            packed, view(values), offsets, out.numpy(), reserve.view(-1).numpy(), threads
        )
    else:
        _core.bilstm_forward(packed, view(values), offsets, out.numpy(), threads)
    return out, reserve


@_bilstm.register_kernel("cuda")
def _bilstm_cuda(
    values: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    training: bool,
    bfloat16: bool,  # here autocast casts the inputs
) -> tuple[Tensor, Tensor]:
    _check_bilstm(values, cu_seqlens, weights)
    return cuda.bilstm(values, cu_seqlens, weights, training)


@_bilstm.register_fake
def _bilstm_fake(
    values: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    training: bool,
    bfloat16: bool,
) -> tuple[Tensor, Tensor]:
    _check_bilstm(values, cu_seqlens, weights)
    total, hidden = values.shape[0], weights[1].shape[1]
    out = values.new_empty((total, 2 * hidden))
    if values.device.type == "cuda":
        kept = (total if training else 0, 10 * hidden)
        return out, values.new_empty(kept, dtype=cuda.accumulator(values.dtype))
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
    bfloat16: bool,
) -> tuple[Tensor, list[Tensor]]:
    packed = _packed(weights, bfloat16, training=True)
    grad_values = torch.empty(values.shape if needs_values else (0,), dtype=values.dtype)
    grads = [torch.empty(weights[k].shape, dtype=values.dtype) for k in _GRAD_WEIGHTS]
    _core.bilstm_backward(
        packed,
        view(values),
        int32_view("cu_seqlens", cu_seqlens),
        view(out),
        view(reserve).reshape(-1),
        view(grad_out),
        grad_values.numpy() if needs_values else None,
        [grad.numpy() for grad in grads],
        torch.get_num_threads(),
    )
    return grad_values, grads


@_bilstm_backward.register_kernel("cuda")
def _bilstm_backward_cuda(
    grad_out: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    reserve: Tensor,
    weights: Sequence[Tensor],
    needs_values: bool,
    bfloat16: bool,
) -> tuple[Tensor, list[Tensor]]:
    return cuda.bilstm_backward(grad_out, values, cu_seqlens, out, reserve, weights, needs_values)


@_bilstm_backward.register_fake
def _bilstm_backward_fake(
    grad_out: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    reserve: Tensor,
    weights: Sequence[Tensor],
    needs_values: bool,
    bfloat16: bool,
) -> tuple[Tensor, list[Tensor]]:
    grads = [values.new_empty(weights[k].shape) for k in _GRAD_WEIGHTS]
    return values.new_empty(values.shape if needs_values else (0,)), grads


def _bilstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, cu_seqlens, weights, training, bfloat16 = inputs
    ctx.training, ctx.bfloat16 = training, bfloat16
    # Else autograd would fill a gradient of zeros for the reserve, the largest tensor here.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, cu_seqlens, *output, *weights)


def _bilstm_autograd(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, [None] * 8, None, None
    if not ctx.training:
        raise RuntimeError("xdistil::bilstm ran with training=False and kept nothing for backward")
    values, cu_seqlens, out, reserve, *weights = ctx.saved_tensors
    needs_values, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_values, grads = _bilstm_backward(
        grad_out, values, cu_seqlens, out, reserve, weights, needs_values, ctx.bfloat16
    )
    by_weight = [grads[k] for k in (0, 1, 2, 2, 3, 4, 5, 5)]
    of_weights = [
        grad if need else None for grad, need in zip(by_weight, needs_weights, strict=True)
    ]
    return grad_values if needs_values else None, None, of_weights, None, None


_bilstm.register_autograd(_bilstm_autograd, setup_context=_bilstm_setup)


def bilstm(values: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Bidirectional LSTM over a ragged batch, differentiable in `values` and `weights`.

    Keeps what backward needs only if gradients are enabled and some input requires one.

    Args:
        values: [total, I].
        cu_seqlens: [B+1].
        weights: the 8 parameters of a torch.nn.LSTM in its order: w_ih [4H, I], w_hh [4H, H],
            b_ih [4H], b_hh [4H] (gate rows i, f, g, o), then the same of the reverse direction.

    On CUDA bfloat16 is a dtype too, summed in float32. On the CPU, under torch.autocast in
    bfloat16, what is multiplied is rounded to it, forward and backward, if the processor multiplies
    bfloat16 (AVX-512 BF16); sums, gates, states, gradients and the result stay float32.

    Returns:
        [total, 2H]: forward then reverse hidden state of each piece.

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape, device or `cu_seqlens` is wrong.
    """
    if len(weights) != 8:
        raise ValueError(f"weights must be 8 tensors in the order of nn.LSTM, got {len(weights)}")
    check_devices(("values", "cu_seqlens", *_WEIGHT_NAMES), (values, cu_seqlens, *weights))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (values, *weights))
    bfloat16 = (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    out: Tensor = _bilstm(values, cu_seqlens, list(weights), training, bfloat16)[0]
    return out


# --- linear layer ------------------------------------------------------------------------------


def _check_linear(values: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(
            f"weight must have shape [out_features, in_features], got {list(weight.shape)}"
        )
    out_features, in_features = weight.shape
    check_floats(
        {
            "values": (values, (None, in_features)),
            "weight": (weight, (None, None)),
            "bias": (bias, (out_features,)),
        }
    )


@custom_op("xdistil::linear", mutates_args=(), device_types="cpu")
def _linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_linear(values, weight, bias)
    out = torch.empty((values.shape[0], weight.shape[0]), dtype=values.dtype)
    packed = _core.LinearWeights(view(weight), view(bias))
    _core.linear(packed, view(values), out.numpy(), torch.get_num_threads())
    return out


@_linear.register_kernel("cuda")
def _linear_cuda(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_linear(values, weight, bias)
    return cuda.linear(values, weight, bias)


@_linear.register_fake
def _linear_fake(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_linear(values, weight, bias)
    return values.new_empty((values.shape[0], weight.shape[0]))


@custom_op("xdistil::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(
    grad_out: Tensor, values: Tensor, weight: Tensor, needs_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    threads = torch.get_num_threads()
    grad_values = torch.empty(values.shape if needs_values else (0,), dtype=values.dtype)
    grad_weight = torch.empty(weight.shape, dtype=values.dtype)
    grad_bias = torch.empty(weight.shape[:1], dtype=values.dtype)
    if needs_values:
        transposed = _core.LinearWeights(view(weight.t()))
        _core.linear(transposed, view(grad_out), grad_values.numpy(), threads)
    _core.linear_grad(view(values), view(grad_out), grad_weight.numpy(), grad_bias.numpy(), threads)
    return grad_values, grad_weight, grad_bias


_linear_backward.register_kernel("cuda")(cuda.linear_backward)


@_linear_backward.register_fake
def _linear_backward_fake(
    grad_out: Tensor, values: Tensor, weight: Tensor, needs_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        values.new_empty(values.shape if needs_values else (0,)),
        values.new_empty(weight.shape),
        values.new_empty(weight.shape[:1]),
    )


def _linear_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    values, weight, _bias = inputs
    ctx.save_for_backward(values, weight)


def _linear_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    values, weight = ctx.saved_tensors
    needs_values = ctx.needs_input_grad[0]
    grad_values, grad_weight, grad_bias = _linear_backward(grad_out, values, weight, needs_values)
    return grad_values if needs_values else None, grad_weight, grad_bias


_linear.register_autograd(_linear_autograd, setup_context=_linear_setup)


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Values weight^T + bias, differentiable in all three, its sums in a fixed order.

    Args:
        values: [total, in_features].
        weight: [out_features, in_features].
        bias: [out_features].

    Returns:
        [total, out_features].

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape or device is wrong.
    """
    check_devices(("values", "weight", "bias"), (values, weight, bias))
    out: Tensor = _linear(values, weight, bias)
    return out


# --- embedding ---------------------------------------------------------------------------------


def _check_embedding(table: Tensor, ids: Tensor) -> None:
    check_floats({"table": (table, (None, None))})
    check_index("ids", ids, (None,))


@custom_op("xdistil::embedding", mutates_args=(), device_types="cpu")
def _embedding(table: Tensor, ids: Tensor) -> Tensor:
    _check_embedding(table, ids)
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype)
    _core.embedding_gather(
        view(table), int32_view("ids", ids), out.numpy(), torch.get_num_threads()
    )
    return out


@_embedding.register_kernel("cuda")
def _embedding_cuda(table: Tensor, ids: Tensor) -> Tensor:
    _check_embedding(table, ids)
    return cuda.embedding(table, ids)


@_embedding.register_fake
def _embedding_fake(table: Tensor, ids: Tensor) -> Tensor:
    _check_embedding(table, ids)
    return table.new_empty((ids.shape[0], table.shape[1]))


@custom_op("xdistil::embedding_backward", mutates_args=(), device_types="cpu")
def _embedding_backward(grad_out: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    grad_table = torch.empty((num_embeddings, grad_out.shape[1]), dtype=grad_out.dtype)
    _core.embedding_grad(
        int32_view("ids", ids), view(grad_out), grad_table.numpy(), torch.get_num_threads()
    )
    return grad_table


_embedding_backward.register_kernel("cuda")(cuda.embedding_backward)


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
    check_devices(("table", "ids"), (table, ids))
    out: Tensor = _embedding(table, ids)
    return out


one_precision(_bilstm, cuda=torch.bfloat16)
one_precision(_linear, _embedding)
