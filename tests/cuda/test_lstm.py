"""The recurrence on a GPU, and its emulation, against the float64 oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xdistil_fast import _backend
from xdistil_fast.reference import bilstm_backward, bilstm_forward
from xdistil_fast.torch_ops import cuda

LENGTHS = [3, 0, 7, 1, 5, 2, 2, 9, 4, 0, 6, 1, 1, 1, 8, 3, 2, 5, 7]
# Of the largest value: rounding of the type, over sums this long.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 3e-2}


class Case:
    """A random BiLSTM and batch, rounded to a dtype, and what the oracle makes of them."""

    def __init__(
        self, dtype: torch.dtype, input_size: int, hidden: int, lengths: list[int], device: str
    ) -> None:
        random = np.random.default_rng(len(lengths) + hidden)
        bound = 1 / np.sqrt(hidden)
        shapes = [(4 * hidden, input_size), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)] * 2

        def tensor(array: Any) -> Tensor:
            return torch.tensor(array, dtype=dtype, device=device)

        total = sum(lengths)
        self.weights = [tensor(random.uniform(-bound, bound, shape)) for shape in shapes]
        self.values = tensor(random.normal(size=(total, input_size)))
        self.grad_out = tensor(random.normal(size=(total, 2 * hidden)))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.cu_seqlens = torch.tensor(offsets, device=device)

    def run(self) -> list[Tensor]:
        """The output, then all gradients."""
        out, reserve = cuda.bilstm(self.values, self.cu_seqlens, self.weights, True)
        grad_values, grads = cuda.bilstm_backward(
            self.grad_out, self.values, self.cu_seqlens, out, reserve, self.weights, True
        )
        return [out, grad_values, *grads]

    def oracle(self) -> list[np.ndarray]:
        values, grad_out, *weights = (
            tensor.double().cpu().numpy() for tensor in (self.values, self.grad_out, *self.weights)
        )
        offsets = self.cu_seqlens.cpu().numpy()
        grads = bilstm_backward(values, offsets, weights, grad_out)
        return [bilstm_forward(values, offsets, weights), grads.values, *grads.weights]


@contextlib.contextmanager
def planned(rows: int, cluster: int) -> Iterator[None]:
    """Tiles of so many rows (16 at most in the backward pass) and clusters of so many blocks."""
    original = _backend.lstm_plan

    def plan(kind: str, backward: bool, hidden: int, batch: int, device: int) -> Any:
        tile = min(rows, 16) if backward else rows
        return original(kind, backward, hidden, batch, device, tile, cluster)

    _backend.lstm_plan = plan
    try:
        yield
    finally:
        _backend.lstm_plan = original


def assert_close(got: list[Tensor], expected: list[np.ndarray], dtype: torch.dtype) -> None:
    for tensor, array in zip(got, expected, strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == array.shape
        error = np.abs(tensor.double().cpu().numpy() - array).max(initial=0)
        assert error <= TOLERANCE[dtype] * max(1e-3, np.abs(array).max(initial=0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("input_size", "hidden"), [(5, 1), (3, 7), (5, 8), (4, 17), (6, 33), (9, 50)]
)
def test_equals_the_oracle(device: Any, dtype: torch.dtype, input_size: int, hidden: int) -> None:
    case = Case(dtype, input_size, hidden, LENGTHS, device.name)
    assert_close(case.run(), case.oracle(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "cluster", "hidden"), [(8, 2, 25), (8, 4, 57), (16, 1, 20), (16, 2, 24), (32, 1, 20)]
)
def test_every_plan_equals_the_oracle(
    device: Any, dtype: torch.dtype, rows: int, cluster: int, hidden: int
) -> None:
    case = Case(dtype, 4, hidden, LENGTHS * 2, device.name)
    try:
        with planned(rows, cluster):
            got = case.run()
    except ValueError:
        if device.name == "cpu" or cluster == 1:
            raise
        pytest.skip(f"this GPU has no clusters of {cluster} blocks")
    assert_close(got, case.oracle(), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_that_fit_no_shared_memory(
    device: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(dtype, 3, 40, [4, 2, 5], device.name)
    shared_memory = 28_000 if dtype == torch.float64 else 16_000
    limits = {"processors": 8, "shared_memory": shared_memory, "max_cluster": 1}
    monkeypatch.setattr(_backend, "device_info", lambda device: limits)
    _backend.lstm_plan.cache_clear()
    kind = str(dtype).removeprefix("torch.")
    try:
        assert not any(_backend.lstm_plan(kind, back, 40, 3, 0).resident for back in (False, True))
        got = case.run()
    finally:
        _backend.lstm_plan.cache_clear()
    assert_close(got, case.oracle(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_size_of_real_students(device: Any, dtype: torch.dtype) -> None:
    case = Case(dtype, 50, 200, [3, 2], device.name)
    assert_close(case.run(), case.oracle(), dtype)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 0, 4, 0], [12]], ids=str)
def test_small_batches(device: Any, lengths: list[int]) -> None:
    case = Case(torch.float32, 3, 9, lengths, device.name)
    assert_close(case.run(), case.oracle(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_depends_on_the_company_or_the_plan(device: Any, dtype: torch.dtype) -> None:
    case = Case(dtype, 4, 24, LENGTHS, device.name)
    gates = cuda.bilstm(case.values, case.cu_seqlens, case.weights, False)[0]
    with planned(16, 2 if device.extension.device_info(0)["max_cluster"] > 1 else 1):
        again = cuda.bilstm(case.values, case.cu_seqlens, case.weights, True)[0]
    assert torch.equal(gates, again)
    if device.name != "cpu":
        return  # torch's product before the recurrence has kernels for each size
    begin, end = 3, 10
    single = cuda.bilstm(case.values[begin:end].clone(), torch.tensor([0, 7]), case.weights, False)[
        0
    ]
    torch.testing.assert_close(single, gates[begin:end], rtol=0, atol=1e-6)


def test_order_of_warps_does_not_matter(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp that read what another writes in the same phase would show here."""
    if device.name != "cpu":
        pytest.skip("for the emulation alone")
    for dtype, hidden in ((torch.float32, 25), (torch.bfloat16, 57)):
        case = Case(dtype, 4, hidden, LENGTHS, "cpu")
        with planned(8, 2):
            monkeypatch.delenv("XDF_EMULATED_REVERSE", raising=False)
            forwards = case.run()
            monkeypatch.setenv("XDF_EMULATED_REVERSE", "1")
            backwards = case.run()
        assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_same_bits_every_time(device: Any) -> None:
    case = Case(torch.float32, 4, 24, LENGTHS, device.name)
    first, second = case.run(), case.run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "offsets", [[0, 5, 3, 9], [-4, 3, 6, 9], [0, 3, 6, 2_000_000], [9, 9, 9, 9], [4, 3, 2, 1]]
)
def test_impossible_offsets_touch_nothing(device: Any, offsets: list[int]) -> None:
    case = Case(torch.float32, 3, 9, [3, 3, 3], device.name)
    if device.name == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 9"):
            cuda.bilstm(case.values, torch.tensor(offsets), case.weights, True)
        return
    out, _ = cuda.bilstm(case.values, torch.tensor(offsets, device=device.name), case.weights, True)
    torch.cuda.synchronize()
    assert out.shape == (9, 18)


def test_kernels_take_impossible_offsets_as_empty(device: Any) -> None:
    total, hidden, kind = 9, 5, "float32"
    offsets = torch.tensor([0, 3, 2, 2_000_000, 9, -1, 9], dtype=torch.int32, device=device.name)
    batch = len(offsets) - 1
    order = torch.empty(batch, dtype=torch.int32, device=device.name)
    place = cuda._place(offsets)
    device.extension.order_by_length(batch, total, offsets.data_ptr(), order.data_ptr(), *place)
    assert sorted(order.tolist()) == list(range(batch))
    assert order.tolist()[0] == 0
    packed = torch.ones(device.extension.lstm_packed_size(kind, False, hidden), device=device.name)
    gates = torch.ones((total, 8 * hidden), device=device.name)
    out = torch.full((total, 2 * hidden), torch.nan, device=device.name)
    plan = _backend.lstm_plan(kind, False, hidden, batch, 0)
    pointers = [t.data_ptr() for t in (offsets, order, packed, gates)]
    device.extension.lstm_forward(
        kind, hidden, plan, batch, total, *pointers, kind, 0, out.data_ptr(), 0, 0, *place
    )
    assert not out[:3].isnan().any()
    assert out[3:].isnan().all()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [1, 8, 19, 32])
def test_packing_keeps_every_weight_once(
    device: Any, kind: str, hidden: int, backward: bool
) -> None:
    dtype = getattr(torch, kind)
    # A weight and its direction can be told by its value; of bfloat16, by its bits.
    codes = torch.arange(1000, 1000 + 8 * hidden * hidden, dtype=torch.int16)
    values = codes.view(dtype) if kind == "bfloat16" else codes.to(dtype)
    weights = values.to(device.name).view(2, 4 * hidden, hidden)
    forward, reverse = weights[0].clone(), weights[1].clone()
    size = device.extension.lstm_packed_size(kind, backward, hidden)
    packed = torch.full((size,), torch.nan, dtype=dtype, device=device.name)
    device.extension.lstm_pack(
        kind,
        backward,
        hidden,
        False,
        forward.data_ptr(),
        reverse.data_ptr(),
        packed.data_ptr(),
        *cuda._place(packed),
    )
    for direction in (0, 1):
        mine = packed.view(2, -1)[direction].cpu()
        kept = mine[mine != 0]
        assert torch.equal(kept.sort().values, weights[direction].cpu().flatten().sort().values)
