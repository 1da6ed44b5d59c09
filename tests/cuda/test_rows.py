"""The kernels over rows, and the operators that stand on torch and on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xdistil_fast.reference import student as oracle
from xdistil_fast.torch_ops import cuda


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (5, 9, 40), (7, 33, 70)])
@pytest.mark.parametrize(
    ("input_type", "output_type", "gelu"),
    [
        ("float32", "float32", False),
        ("float32", "float32", True),
        ("bfloat16", "float32", False),
        ("bfloat16", "float32", True),
        ("float32", "float16", False),
    ],
)
def test_linear(
    device: Any, rows: int, outputs: int, inputs: int, input_type: str, output_type: str, gelu: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(getattr(torch, input_type))
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    out = torch.empty((rows, outputs), dtype=getattr(torch, output_type), device=device.name)
    tensors = [tensor.to(device.name) for tensor in (x, weight, bias)]
    device.extension.linear(
        input_type,
        output_type,
        rows,
        outputs,
        inputs,
        *(tensor.data_ptr() for tensor in (*tensors, out)),
        *cuda._place(out),
        gelu,
    )
    expected = (x.double() @ weight.double().t() + bias.double()).numpy()
    if gelu:
        expected = oracle.gelu(expected)
    if output_type == "float16":
        # The rounding of a number next to the middle between two may go either way.
        step = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64)
        assert (np.abs(out.double().cpu().numpy() - expected) <= 0.502 * step + 1e-5).all()
    else:
        torch.testing.assert_close(out.cpu().double().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 2049.0, 65519.0, 1e9, -1e9, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 1e-12]
)
def test_rounding_to_half(device: Any, value: float) -> None:
    x = torch.tensor([[value]], device=device.name)
    one, zero = torch.ones(1, 1, device=device.name), torch.zeros(1, device=device.name)
    out = torch.empty(1, 1, dtype=torch.float16, device=device.name)
    device.extension.linear(
        "float32", "float16", 1, 1, 1, *(t.data_ptr() for t in (x, one, zero, out)), *cuda._place(x)
    )
    expected = np.float32(np.clip(value, -65504, 65504)).astype(np.float16)
    assert out.item() == float(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ids", [[], [3], [0, 3, 3, 1, 0, 3], [4] * 70], ids=len)
def test_embedding_gradient(device: Any, dtype: torch.dtype, ids: list[int]) -> None:
    grad_out = torch.randn(len(ids), 33, generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected = torch.zeros(5, 33, dtype=dtype)
    for row, index in zip(grad_out, ids, strict=True):
        expected[index] += row  # the same order, hence the same bits
    positions = torch.tensor(ids, dtype=torch.int32, device=device.name)
    got = cuda.embedding_backward(grad_out.to(device.name), positions, 5)
    assert torch.equal(got.cpu(), expected)


def test_embedding_gradient_passes_over_what_is_no_row(device: Any) -> None:
    ids = torch.tensor([1, -1, 7, 1], device=device.name)
    got = cuda.embedding_backward(torch.ones(4, 2, device=device.name), ids, 3)
    assert got.tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("lengths", [[], [0], [5], [2, 7, 7, 0, 2, 9] * 13], ids=len)
def test_order_by_length(device: Any, lengths: list[int]) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    on_device = torch.tensor(offsets, device=device.name)
    order = cuda._order(on_device, int(offsets[-1]))
    assert order.tolist() == np.argsort(-np.array(lengths), kind="stable").tolist()


POOLED = [[], [0], [0, 0], [1], [3, 0, 5, 1], [40, 2, 0, 33, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("lengths", POOLED, ids=str)
@pytest.mark.parametrize("width", [2, 34, 300])
def test_pooling_and_its_gradient(
    device: Any, dtype: torch.dtype, pooling: str, lengths: list[int], width: int
) -> None:
    """Against the operators of the CPU, which tests/torch compares with the reference."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    # Few different values, so that there are equal maxima, exact sums and negative ones.
    values = torch.randint(-9, 9, (total, width), generator=generator).to(dtype) - 20
    grad_out = torch.randn(len(lengths), width, generator=generator, dtype=dtype)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    expected, index = torch.ops.xdistil.pool(values, offsets, pooling)
    out, where = cuda.pool(values.to(device.name), offsets.to(device.name), pooling)
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=0)
    assert torch.equal(where.cpu(), index)
    arguments = (grad_out, offsets, index)
    wanted = torch.ops.xdistil.pool_backward(*arguments, total, pooling)
    on_device = [tensor.to(device.name) for tensor in arguments]
    grads = cuda.pool_backward(on_device[0], on_device[1], on_device[2], total, pooling)
    torch.testing.assert_close(grads.cpu(), wanted, rtol=1e-6, atol=0)


def test_pooling_in_bfloat16_into_the_middle_of_an_array(device: Any) -> None:
    values = torch.tensor([[1.5, -2.0], [0.25, -3.0], [9.0, 9.0]], dtype=torch.bfloat16)
    rows = values.to(device.name)
    out = torch.full((5, 2), 7.0, device=device.name)
    # The last run is none of the rows that there are said to be.
    bounds = torch.tensor([[0, 2], [1, 1], [1, 3]], dtype=torch.int32, device=device.name)
    for task, expected in (("max", [1.5, -2.0]), ("sum", [1.75, -5.0]), ("last", [0.25, -2.0])):
        device.extension.pool_rows(
            task, "bfloat16", 2, 3, 2, bounds.data_ptr(), 0, rows.data_ptr(), out[1:].data_ptr(), 0,
            *cuda._place(out),
        )  # fmt: skip
        assert out.tolist() == [[7.0, 7.0], expected, [0.0, 0.0], [0.0, 0.0], [7.0, 7.0]]


def test_interleaving_is_undone(device: Any) -> None:
    weights = [torch.randn(12, 5, device=device.name) for _ in range(2)]
    mixed = cuda._interleave(weights)
    assert torch.equal(mixed[4 * 3 + 1 * 4 + 2], weights[1][2 * 3 + 1])  # reverse, unit 1, gate g
    for got, weight in zip(cuda._separate(mixed), weights, strict=True):
        assert torch.equal(got, weight)
