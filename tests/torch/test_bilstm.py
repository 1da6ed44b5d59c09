"""nn.BiLSTM against torch.nn.LSTM, in each form of batch; the NumPy oracle against both."""

# Tensor.backward is untyped in torch.
# mypy: allow-untyped-calls

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from xdistil_fast import _core
from xdistil_fast.nn import BiLSTM, cu_seqlens_of
from xdistil_fast.reference import lstm as oracle

NAMES = [
    "weight_ih_l0",
    "weight_hh_l0",
    "bias_ih_l0",
    "bias_hh_l0",
    "weight_ih_l0_reverse",
    "weight_hh_l0_reverse",
    "bias_ih_l0_reverse",
    "bias_hh_l0_reverse",
]
LENGTHS = [4, 9, 1, 6]


def make_values(lengths: list[int], size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(sum(lengths), size, generator=generator, dtype=dtype)


def make_pair(size: int, hidden: int, dtype: torch.dtype) -> tuple[nn.LSTM, BiLSTM]:
    torch.manual_seed(6)
    lstm = nn.LSTM(size, hidden, bidirectional=True, dtype=dtype)
    return lstm, BiLSTM.from_torch(lstm)


def torch_results(
    lstm: nn.LSTM, values: Tensor, lengths: list[int], weight: Tensor
) -> list[Tensor]:
    """Output and gradients (values, then parameters) of nn.LSTM on a PackedSequence."""
    values = values.detach().requires_grad_()
    packed = pack_sequence(list(torch.split(values, lengths)), enforce_sorted=False)
    padded, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True)
    out = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    grads = torch.autograd.grad(out, [values, *lstm.parameters()], weight)
    return [out.detach(), *grads]


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "size", "hidden"),
    [([1], 1, 1), (LENGTHS, 7, 9), ([33, 2, 17, 17, 40], 100, 64), ([20] * 8, 50, 200)],
)
def test_error_is_within_twice_that_of_torch(lengths: list[int], size: int, hidden: int) -> None:
    lstm, module = make_pair(size, hidden, torch.float32)
    values = make_values(lengths, size)
    weight = torch.randn(sum(lengths), 2 * hidden)
    exact = torch_results(copy.deepcopy(lstm).double(), values.double(), lengths, weight.double())
    by_torch = torch_results(lstm, values, lengths, weight)

    values.requires_grad_()
    out = module(values, cu_seqlens_of(torch.tensor(lengths)))
    grads = torch.autograd.grad(out, [values, *module.parameters()], weight)
    for name, got, theirs, want in zip(
        ["out", "values", *NAMES], [out.detach(), *grads], by_torch, exact, strict=True
    ):
        floor = 8 * torch.finfo(torch.float32).eps * want.abs().max()
        bound = 2 * (theirs - want).abs().max() + floor
        assert bound < 1e-4 * max(1.0, float(want.abs().max())), "torch itself is far off"
        assert (got - want).abs().max() <= bound, name


@pytest.mark.parametrize(("lengths", "size", "hidden"), [(LENGTHS, 7, 9), ([3, 12], 33, 17)])
def test_float64_equals_torch(lengths: list[int], size: int, hidden: int) -> None:
    lstm, module = make_pair(size, hidden, torch.float64)
    values = make_values(lengths, size, torch.float64)
    weight = torch.randn(sum(lengths), 2 * hidden, dtype=torch.float64)
    want = torch_results(lstm, values, lengths, weight)
    values.requires_grad_()
    out = module(values, cu_seqlens_of(torch.tensor(lengths)))
    got = [out.detach(), *torch.autograd.grad(out, [values, *module.parameters()], weight)]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_oracle_equals_torch() -> None:
    # The kernels are measured against the oracle; here the oracle is measured against torch.
    lstm, _ = make_pair(7, 9, torch.float64)
    values = make_values(LENGTHS, 7, torch.float64)
    weight = torch.randn(sum(LENGTHS), 18, dtype=torch.float64)
    want = torch_results(lstm, values, LENGTHS, weight)
    bounds = np.cumsum([0, *LENGTHS])
    weights = [parameter.detach().numpy() for parameter in lstm.parameters()]
    out = oracle.bilstm_forward(values.numpy(), bounds, weights)
    grads = oracle.bilstm_backward(values.numpy(), bounds, weights, weight.numpy())
    by_weight = [grads.weights[k] for k in (0, 1, 2, 2, 3, 4, 5, 5)]
    for ours, theirs in zip([out, grads.values, *by_weight], want, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-13)


def test_final_states_are_rows_of_the_output() -> None:
    lstm, module = make_pair(7, 9, torch.float64)
    values = make_values([5], 7, torch.float64)
    _, (h_n, _) = lstm(values[:, None])
    out = module(values, torch.tensor([0, 5]))
    torch.testing.assert_close(torch.stack([out[-1, :9], out[0, 9:]])[:, None], h_n)


# --- autocast ----------------------------------------------------------------------------------

needs_bfloat16 = pytest.mark.skipif(
    not _core.multiplies_bfloat16(),
    reason=f"{_core.active_isa()} does not multiply bfloat16: autocast computes in float32",
)


@needs_bfloat16
@pytest.mark.parametrize(
    ("lengths", "size", "hidden"),
    [
        ([1], 1, 1),
        ([1], 7, 9),
        (LENGTHS, 7, 9),
        ([33, 2, 17, 17, 40], 100, 64),
        ([20] * 8, 50, 200),
    ],
)
def test_autocast_multiplies_bfloat16(lengths: list[int], size: int, hidden: int) -> None:
    """Output and gradients within 2^-7 (norms) of the exact ones: twice a product's rounding."""
    lstm, module = make_pair(size, hidden, torch.float32)
    values = make_values(lengths, size)
    weight = torch.randn(sum(lengths), 2 * hidden)
    exact = torch_results(copy.deepcopy(lstm).double(), values.double(), lengths, weight.double())
    values.requires_grad_()
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(values, cu_seqlens)
    # As torch has it, backward runs outside and in the precision of its forward.
    grads = torch.autograd.grad(out, [values, *module.parameters()], weight)
    for name, got, want in zip(
        ["out", "values", *NAMES], [out.detach(), *grads], exact, strict=True
    ):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 2.0**-7 * want.norm(), name
    assert not torch.equal(out, module(values, cu_seqlens))


@needs_bfloat16
def test_autocast_backward_has_the_precision_of_its_forward() -> None:
    _, module = make_pair(20, 30, torch.float32)
    values = make_values(LENGTHS, 20)
    cu_seqlens = cu_seqlens_of(torch.tensor(LENGTHS))
    weight = torch.randn(sum(LENGTHS), 60)

    def gradients(forward: bool, backward: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            out = module(values, cu_seqlens)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            return list(torch.autograd.grad(out, list(module.parameters()), weight))

    assert all(map(torch.equal, gradients(True, True), gradients(True, False)))
    assert all(map(torch.equal, gradients(False, True), gradients(False, False)))
    assert not torch.equal(gradients(True, True)[0], gradients(False, False)[0])


@needs_bfloat16
def test_without_gradients_autocast_gives_the_same_states() -> None:
    _, module = make_pair(20, 30, torch.float32)
    values = make_values([*LENGTHS, 0], 20)
    cu_seqlens = cu_seqlens_of(torch.tensor([*LENGTHS, 0]))
    with torch.autocast("cpu", torch.bfloat16):
        want = module(values, cu_seqlens)
        with torch.no_grad():
            assert torch.equal(module(values, cu_seqlens), want)
        assert module(values[:0], torch.tensor([0, 0])).shape == (0, 60)


# --- forms of batch ----------------------------------------------------------------------------


def ragged_output(module: BiLSTM, values: Tensor, lengths: list[int]) -> Tensor:
    out: Tensor = module(values, cu_seqlens_of(torch.tensor(lengths)))
    return out


@pytest.mark.parametrize("lengths", [LENGTHS, [9, 6, 4, 1], [3], [2, 2, 2]])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequence(lengths: list[int], enforce_sorted: bool) -> None:
    if enforce_sorted:
        lengths = sorted(lengths, reverse=True)
    lstm, module = make_pair(7, 9, torch.float32)
    values = make_values(lengths, 7).requires_grad_()
    packed = pack_sequence(list(torch.split(values, lengths)), enforce_sorted=enforce_sorted)
    got = module(packed)
    assert isinstance(got, PackedSequence)
    want, _ = lstm(packed)
    torch.testing.assert_close(got.data, want.data, rtol=1e-5, atol=1e-6)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    # Bit for bit what the ragged form gives, gradients too.
    padded, _ = pad_packed_sequence(got, batch_first=True)
    rows = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    ragged = ragged_output(module, values, lengths)
    assert torch.equal(rows, ragged)
    inputs = [values, *module.parameters()]
    weight = torch.randn_like(rows)
    grads = torch.autograd.grad(rows, inputs, weight)
    assert all(map(torch.equal, grads, torch.autograd.grad(ragged, inputs, weight)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("by", ["lengths", "mask"])
def test_padded(batch_first: bool, by: str) -> None:
    lengths = [4, 9, 0, 6]
    module = BiLSTM(7, 9, batch_first=batch_first)
    values = make_values(lengths, 7)
    padded = pad_sequence(
        list(torch.split(values, lengths)), batch_first=batch_first, padding_value=9e9
    )
    padded.requires_grad_()
    kept = torch.arange(9) < torch.tensor(lengths)[:, None]
    mask = kept if batch_first else kept.t()
    arguments = {"mask": mask} if by == "mask" else {"lengths": torch.tensor(lengths)}
    out = module(padded, **arguments)
    assert out.shape == (*padded.shape[:2], 18)
    rows = out if batch_first else out.transpose(0, 1)
    assert torch.equal(rows[kept], ragged_output(module, values, lengths))
    assert not out[~mask].any()
    out.sum().backward()
    assert padded.grad is not None
    assert not padded.grad[~mask].any()
    assert padded.grad[mask].any()


@pytest.mark.parametrize("batch_first", [True, False])
def test_padded_without_lengths_equals_torch(batch_first: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(7, 9, bidirectional=True, batch_first=batch_first)
    values = torch.randn(3, 5, 7)
    module = BiLSTM.from_torch(lstm)
    torch.testing.assert_close(module(values), lstm(values)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(4, 7)}, "give cu_seqlens"),
        (
            {
                "values": torch.zeros(4, 7),
                "cu_seqlens": torch.tensor([0, 4]),
                "mask": torch.ones(4),
            },
            "neither lengths nor mask",
        ),
        ({"values": torch.zeros(4, 7), "lengths": torch.tensor([4])}, "give cu_seqlens"),
        (
            {"values": torch.zeros(4, 1, 7), "cu_seqlens": torch.tensor([0, 4])},
            "padded batch: give lengths or mask, not cu_seqlens",
        ),
        (
            {"values": pack_sequence([torch.zeros(4, 7)]), "lengths": torch.tensor([4])},
            "a PackedSequence has its lengths",
        ),
        (
            {"values": torch.zeros(7), "cu_seqlens": torch.tensor([0, 4])},
            r"\[total, 7\], got \[7\]",
        ),
        (
            {"values": torch.zeros(4, 6), "cu_seqlens": torch.tensor([0, 4])},
            r"\[total, 7\], got \[4, 6\]",
        ),
        ({"values": torch.zeros(4, 1, 6)}, r"\[total, 7\], got \[4, 6\]"),
        (
            {
                "values": torch.zeros(4, 1, 7),
                "mask": torch.ones(4, 1),
                "lengths": torch.tensor([4]),
            },
            "not both",
        ),
    ],
)
def test_bad_forms_of_batch(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiLSTM(7, 9)(**arguments)


# --- as a module -------------------------------------------------------------------------------


def test_parameters_are_those_of_torch() -> None:
    torch.manual_seed(11)
    lstm = nn.LSTM(7, 9, bidirectional=True)
    torch.manual_seed(11)
    module = BiLSTM(7, 9)
    ours, theirs = dict(module.named_parameters()), dict(lstm.named_parameters())
    assert list(ours) == list(theirs) == NAMES
    for name in NAMES:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_first", [True, False])
def test_round_trip_through_torch(dtype: torch.dtype, batch_first: bool) -> None:
    module = BiLSTM(7, 9, batch_first=batch_first, dtype=dtype).eval()
    lstm = module.to_torch()
    assert isinstance(lstm, nn.LSTM)
    assert (lstm.batch_first, lstm.bidirectional, lstm.training) == (batch_first, True, False)
    back = BiLSTM.from_torch(lstm)
    assert back.batch_first == batch_first
    assert not back.training
    for name, parameter in module.named_parameters():
        other = dict(back.named_parameters())[name]
        assert torch.equal(parameter, other)
        assert parameter.dtype == other.dtype
        assert parameter.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, "num_layers=2"),
        ({"bidirectional": False}, "bidirectional=False"),
        ({"proj_size": 3}, "proj_size=3"),
        ({"bias": False}, "bias=False"),
    ],
)
def test_from_torch_refuses(options: dict[str, Any], message: str) -> None:
    lstm = nn.LSTM(7, 9, **{"bidirectional": True, **options})
    with pytest.raises(ValueError, match=f"lstm has {message}; BiLSTM supports"):
        BiLSTM.from_torch(lstm)


def test_from_torch_refuses_dropout() -> None:
    lstm = nn.LSTM(7, 9, bidirectional=True)
    lstm.dropout = 0.5
    with pytest.raises(ValueError, match=r"lstm has dropout=0.5; BiLSTM supports dropout=0 only"):
        BiLSTM.from_torch(lstm)


@pytest.mark.parametrize(("size", "hidden"), [(0, 4), (4, 0), (-1, 4)])
def test_bad_sizes(size: int, hidden: int) -> None:
    with pytest.raises(ValueError, match=r"(input|hidden)_size must be at least 1, got"):
        BiLSTM(size, hidden)


def test_copies_and_pickles() -> None:
    module = BiLSTM(7, 9)
    values = make_values(LENGTHS, 7)
    want = ragged_output(module, values, LENGTHS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(ragged_output(other, values, LENGTHS), want)


def test_sees_a_changed_weight() -> None:
    # Weights are packed at every call: nothing stale may remain after an optimiser's step.
    module = BiLSTM(7, 9)
    values = make_values(LENGTHS, 7)
    before = ragged_output(module, values, LENGTHS)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    ragged_output(module, values, LENGTHS).sum().backward()
    optimizer.step()
    after = ragged_output(module, values, LENGTHS)
    assert not torch.equal(before, after)
    want, _ = module.to_torch()(
        pack_sequence(list(torch.split(values, LENGTHS)), enforce_sorted=False)
    )
    padded, _ = pad_packed_sequence(want, batch_first=True)
    rows = torch.cat([row[:length] for row, length in zip(padded, LENGTHS, strict=True)])
    torch.testing.assert_close(after, rows, rtol=1e-5, atol=1e-6)


def test_half_precision_module_is_refused() -> None:
    module = BiLSTM(7, 9).to(torch.bfloat16)
    with pytest.raises(TypeError, match="float32 or float64"):
        module(make_values(LENGTHS, 7).bfloat16(), cu_seqlens_of(torch.tensor(LENGTHS)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    module = BiLSTM(7, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in (LENGTHS, [5, 5], [11]):
        values, cu_seqlens = make_values(lengths, 7), cu_seqlens_of(torch.tensor(lengths))
        got, want = compiled(values, cu_seqlens), module(values, cu_seqlens)
        assert torch.equal(got, want)
        grads = torch.autograd.grad(got.sum(), list(module.parameters()))
        assert all(
            map(torch.equal, grads, torch.autograd.grad(want.sum(), list(module.parameters())))
        )
