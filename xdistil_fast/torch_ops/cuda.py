"""The operators' kernels for CUDA tensors.

Products over all tokens at once (the input half, the gradients of the weights) are torch's, which
has cuBLAS; what runs step by step (the recurrence, the CRF) is ours. Arguments have been checked
for shape and dtype by the callers. What lies on the GPU is not checked for its values, since that
would wait for it: impossible `cu_seqlens` make sequences empty, impossible tags a likelihood NaN.
`cu_seqlens` on the CPU is checked in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xdistil_fast import _backend

_KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums and cell states are kept in."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _place(tensor: Tensor) -> tuple[int, int]:
    """Number of the device, and its current stream, as the kernels take them."""
    if tensor.device.type != "cuda":
        return 0, 0  # the emulation of the tests
    device = tensor.device.index
    return device, torch.cuda.current_stream(device).cuda_stream


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to what the kernels move at once."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _offsets(cu_seqlens: Tensor, values: Tensor) -> Tensor:
    total = values.shape[0]
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens is empty; it must have one element more than the batch")
    if cu_seqlens.device.type == "cpu":
        ascends = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or not ascends:
            raise ValueError(
                f"cu_seqlens must ascend from 0 to {total}, the number of rows, "
                f"got {cu_seqlens.tolist()[:20]}"
            )
    return _dense(cu_seqlens.to(device=values.device, dtype=torch.int32))


# --- bidirectional LSTM ------------------------------------------------------------------------


def _interleave(weights: Sequence[Tensor]) -> Tensor:
    """Rows of both directions, gate by gate as in torch, to [direction, unit, gate]."""
    both = torch.stack([weight.detach() for weight in weights])
    hidden = both.shape[1] // 4
    return both.view(2, 4, hidden, -1).transpose(1, 2).reshape(8 * hidden, *weights[0].shape[1:])


def _separate(interleaved: Tensor) -> list[Tensor]:
    """The inverse: one contiguous tensor [4H, ...] of each direction."""
    hidden = interleaved.shape[0] // 8
    both = interleaved.view(2, hidden, 4, -1).transpose(1, 2)
    shape = (4 * hidden, *interleaved.shape[1:])
    # Copies even where the order is the same already: no output of an operator may share memory.
    return [
        both[direction].clone(memory_format=torch.contiguous_format).view(shape)
        for direction in (0, 1)
    ]


def _packed(weights: Sequence[Tensor], backward: bool) -> Tensor:
    forward, reverse = _dense(weights[1]), _dense(weights[5])
    kind, hidden = _KINDS[forward.dtype], forward.shape[1]
    extension = _backend.cuda()
    packed = forward.new_empty(extension.lstm_packed_size(kind, backward, hidden))
    extension.lstm_pack(
        kind,
        backward,
        hidden,
        False,
        forward.data_ptr(),
        reverse.data_ptr(),
        packed.data_ptr(),
        *_place(forward),
    )
    return packed


def _order(offsets: Tensor, total: int) -> Tensor:
    batch = offsets.shape[0] - 1
    order = torch.empty(batch, dtype=torch.int32, device=offsets.device)
    _backend.cuda().order_by_length(
        batch, total, offsets.data_ptr(), order.data_ptr(), *_place(offsets)
    )
    return order


def _reserve_parts(reserve: Tensor, total: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Activated gates [total, 2, H, 4] and cell states [total, 2, H]."""
    flat = reserve.view(-1)
    return flat[: total * 8 * hidden], flat[total * 8 * hidden :]


def bilstm(
    values: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], training: bool
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.layers._bilstm`; reserve [total, 10 H] holds gates, then cell states."""
    total, hidden = values.shape[0], weights[1].shape[1]
    device, stream = _place(values)
    kind = _KINDS[values.dtype]
    plan = _backend.lstm_plan(kind, False, hidden, max(cu_seqlens.shape[0] - 1, 0), device)
    offsets = _offsets(cu_seqlens, values)
    out = values.new_empty((total, 2 * hidden))
    reserve = values.new_empty(
        (total if training else 0, 10 * hidden), dtype=accumulator(values.dtype)
    )
    if total == 0:
        return out, reserve
    bias = _interleave([weights[2] + weights[3], weights[6] + weights[7]])
    gates_in = torch.addmm(bias, values.detach(), _interleave([weights[0], weights[4]]).t())
    gates, cells = _reserve_parts(reserve, total, hidden)
    packed, order = _packed(weights, backward=False), _order(offsets, total)
    _backend.cuda().lstm_forward(
        kind,
        hidden,
        plan,
        offsets.shape[0] - 1,
        total,
        offsets.data_ptr(),
        order.data_ptr(),
        packed.data_ptr(),
        gates_in.data_ptr(),
        kind,
        0,
        out.data_ptr(),
        gates.data_ptr() if training else 0,
        cells.data_ptr() if training else 0,
        device,
        stream,
    )
    return out, reserve


def _previous(out: Tensor, offsets: Tensor, direction: int) -> Tensor:
    """[total, H]: the hidden state that each token's step found, 0 at the first one."""
    total, hidden = out.shape[0], out.shape[1] // 2
    # A row more on either side: sequences without tokens may start at `total` or end at 0.
    rows = out.new_zeros((total + 2, hidden))
    if direction == 0:
        rows[2 : total + 1] = out[: total - 1, :hidden]
        rows.index_fill_(0, offsets[:-1].to(torch.int64).clamp(0, total) + 1, 0.0)
    else:
        rows[1:total] = out[1:, hidden:]
        rows.index_fill_(0, offsets[1:].to(torch.int64).clamp(0, total), 0.0)
    return rows[1 : total + 1]


def bilstm_backward(
    grad_out: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    reserve: Tensor,
    weights: Sequence[Tensor],
    needs_values: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See `torch_ops.layers._bilstm_backward`."""
    total, hidden = values.shape[0], weights[1].shape[1]
    device, stream = _place(values)
    kind = _KINDS[values.dtype]
    offsets = _offsets(cu_seqlens, values)
    batch = offsets.shape[0] - 1
    grad_gates = values.new_empty((total, 8 * hidden))
    values, out = values.detach(), out.detach()
    if total > 0:
        plan = _backend.lstm_plan(kind, True, hidden, batch, device)
        grad_out, reserve = _dense(grad_out), _dense(reserve)
        gates, cells = _reserve_parts(reserve, total, hidden)
        packed, order = _packed(weights, backward=True), _order(offsets, total)
        _backend.cuda().lstm_backward(
            kind,
            hidden,
            plan,
            batch,
            total,
            offsets.data_ptr(),
            order.data_ptr(),
            packed.data_ptr(),
            gates.data_ptr(),
            cells.data_ptr(),
            grad_out.data_ptr(),
            grad_gates.data_ptr(),
            device,
            stream,
        )
    input_weights = _interleave([weights[0], weights[4]])
    grad_values = grad_gates @ input_weights if needs_values else values.new_empty((0,))
    of_input = _separate(grad_gates.t() @ values)
    of_bias = _separate(grad_gates.sum(0))
    grads: list[Tensor] = []
    for direction in (0, 1):
        columns = grad_gates[:, direction * 4 * hidden : (direction + 1) * 4 * hidden]
        recurrent = columns.t() @ _previous(out, offsets, direction)
        by_gate = recurrent.view(hidden, 4, hidden).transpose(0, 1).reshape(4 * hidden, hidden)
        grads += [of_input[direction], by_gate, of_bias[direction]]
    return grad_values, grads


# --- linear layer and embedding ----------------------------------------------------------------


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `torch_ops.layers._linear`."""
    return torch.addmm(bias.detach(), values.detach(), weight.detach().t())


def linear_backward(
    grad_out: Tensor, values: Tensor, weight: Tensor, needs_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_ops.layers._linear_backward`."""
    values, weight = values.detach(), weight.detach()
    grad_values = grad_out @ weight if needs_values else values.new_empty((0,))
    return grad_values, grad_out.t() @ values, grad_out.sum(0)


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """See `torch_ops.layers._embedding`."""
    return table.detach().index_select(0, ids)


def embedding_backward(grad_out: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    """See `torch_ops.layers._embedding_backward`: rows of an id are summed in their order."""
    grad_table = grad_out.new_zeros((num_embeddings, grad_out.shape[1]))
    if grad_table.numel() == 0 or ids.shape[0] == 0:
        return grad_table
    grad_out = _dense(grad_out)
    ascending, order = torch.sort(ids.to(torch.int64), stable=True)
    _backend.cuda().embedding_grad(
        grad_out.dtype == torch.float64,
        ids.shape[0],
        num_embeddings,
        grad_out.shape[1],
        ascending.data_ptr(),
        order.data_ptr(),
        grad_out.data_ptr(),
        grad_table.data_ptr(),
        *_place(grad_out),
    )
    return grad_table


# --- pooling -----------------------------------------------------------------------------------


def pool(values: Tensor, cu_seqlens: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """See `torch_ops.pooling._pool`."""
    total, width = values.shape
    offsets = _offsets(cu_seqlens, values)
    batch = offsets.shape[0] - 1
    out = values.new_empty((batch, width))
    index = values.new_empty((batch if pooling == "max" else 0, width), dtype=torch.int64)
    if batch == 0 or width == 0:
        return out, index
    rows = _dense(values)
    bounds = torch.stack([offsets[:-1], offsets[1:]], dim=1)
    lengths = offsets.diff().clamp(min=1)
    _backend.cuda().pool_rows(
        "sum" if pooling == "mean" else pooling,
        _KINDS[values.dtype],
        total,
        batch,
        width,
        bounds.data_ptr(),
        lengths.data_ptr() if pooling == "mean" else 0,
        rows.data_ptr(),
        out.data_ptr(),
        index.data_ptr() if pooling == "max" else 0,
        *_place(values),
    )
    return out, index


def pool_backward(
    grad_out: Tensor, cu_seqlens: Tensor, index: Tensor, total: int, pooling: str
) -> Tensor:
    """See `torch_ops.pooling._pool_backward`."""
    width, half = grad_out.shape[1], grad_out.shape[1] // 2
    # A row more, which takes what sequences without rows would get.
    out = grad_out.new_zeros((total + 1, width))
    grad_out = grad_out.detach()
    if total == 0:
        return out[:0].clone()
    offsets = _offsets(cu_seqlens, out[:total]).to(torch.int64)
    if pooling == "max":
        out.scatter_(0, index.where(index >= 0, total), grad_out)
    elif pooling == "mean":
        shares = grad_out / offsets.diff().clamp(min=1)[:, None]
        rows = torch.arange(total, device=out.device)
        own = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        return shares.index_select(0, own.clamp(max=len(shares) - 1))
    else:
        some = offsets.diff() > 0
        out[(offsets[1:] - 1).where(some, total).clamp(0, total), :half] = grad_out[:, :half]
        out[offsets[:-1].where(some, total).clamp(0, total), half:] = grad_out[:, half:]
    return out[:total].clone()


# --- linear-chain CRF --------------------------------------------------------------------------


class _Crf:
    """What all CRF kernels take, kept alive until they are queued."""

    def __init__(self, emissions: Tensor, cu_seqlens: Tensor, scores: Sequence[Tensor]) -> None:
        self.total, self.num_tags = emissions.shape
        if self.num_tags == 0:
            raise ValueError("emissions must have at least one tag (column)")
        self.batch = max(cu_seqlens.shape[0] - 1, 0)
        self.emissions = _dense(emissions)
        self.offsets = _offsets(cu_seqlens, emissions)
        self.scores = [_dense(score) for score in scores]  # start, end, transitions
        self.slots = _backend.cuda().crf_slots(self.num_tags, self.batch)
        wide = self.num_tags > _backend.cuda().shared_tags
        self.memory = emissions.new_empty(self.slots * 2 * self.num_tags if wide else 0)

    def arguments(self) -> tuple[int | bool, ...]:
        return (
            self.emissions.dtype == torch.float64,
            self.num_tags,
            self.batch,
            self.total,
            self.emissions.data_ptr(),
            self.offsets.data_ptr(),
            *(score.data_ptr() for score in self.scores),
            self.memory.data_ptr(),
        )


def _tags(tags: Tensor, emissions: Tensor) -> Tensor:
    # A number beyond int32 must not become a tag by being cut.
    limit = torch.iinfo(torch.int32)
    return _dense(tags.to(emissions.device).clamp(limit.min, limit.max).to(torch.int32))


def crf_log_likelihood(
    emissions: Tensor,
    cu_seqlens: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
) -> Tensor:
    """See `torch_ops.crf._crf_log_likelihood`."""
    crf = _Crf(emissions, cu_seqlens, (start, end, transitions))
    out = emissions.new_empty((crf.batch,))
    gold = _tags(tags, emissions)
    if crf.batch:
        _backend.cuda().crf_log_likelihood(
            *crf.arguments(), gold.data_ptr(), out.data_ptr(), *_place(emissions)
        )
    return out


def crf_log_likelihood_backward(
    grad_out: Tensor,
    emissions: Tensor,
    cu_seqlens: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `torch_ops.crf._crf_log_likelihood_backward`."""
    crf = _Crf(emissions, cu_seqlens, (start, end, transitions))
    tags_count = crf.num_tags
    grads = [emissions.new_empty(t.shape) for t in (emissions, start, end, transitions)]
    if crf.batch == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_(), grads[3].zero_()
    alpha, taken = emissions.new_empty(crf.emissions.shape), emissions.new_empty(crf.total)
    partial = emissions.new_empty(crf.slots * tags_count * (tags_count + 2))
    weights, gold = _dense(grad_out), _tags(tags, emissions)
    _backend.cuda().crf_log_likelihood_grad(
        *crf.arguments(),
        gold.data_ptr(),
        weights.data_ptr(),
        alpha.data_ptr(),
        taken.data_ptr(),
        partial.data_ptr(),
        *(grad.data_ptr() for grad in grads),
        *_place(emissions),
    )
    return grads[0], grads[1], grads[2], grads[3]


def crf_marginals(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """See `torch_ops.crf._crf_marginals`."""
    crf = _Crf(emissions, cu_seqlens, (start, end, transitions))
    out, alpha = emissions.new_empty(emissions.shape), emissions.new_empty(emissions.shape)
    taken = emissions.new_empty(crf.total)
    if crf.batch:
        _backend.cuda().crf_marginals(
            *crf.arguments(),
            alpha.data_ptr(),
            taken.data_ptr(),
            out.data_ptr(),
            *_place(emissions),
        )
    return out


def crf_viterbi(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.crf._crf_viterbi`."""
    crf = _Crf(emissions, cu_seqlens, (start, end, transitions))
    tags = emissions.new_empty((crf.total,), dtype=torch.int32)
    scores = emissions.new_empty((crf.batch,))
    pointers = emissions.new_empty(emissions.shape, dtype=torch.int16)
    if crf.batch:
        _backend.cuda().crf_viterbi(
            *crf.arguments(),
            pointers.data_ptr(),
            tags.data_ptr(),
            scores.data_ptr(),
            *_place(emissions),
        )
    return tags, scores
