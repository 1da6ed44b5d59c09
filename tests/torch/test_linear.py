"""The linear layer as torch operator and module: torch's own checks, and torch.nn.Linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from xdistil_fast import nn, torch_ops

DTYPES = [torch.float32, torch.float64]


def make_inputs(dtype: torch.dtype, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((rows, 5), (3, 5), (3,))
    values, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return values, weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    values, weight, bias = make_inputs(dtype)
    opcheck(torch.ops.xdistil.linear.default, (values, weight, bias))
    values, weight = values.detach(), weight.detach()
    grad_out = torch.randn(7, 3, dtype=dtype)
    for needs_values in (True, False):
        opcheck(torch.ops.xdistil.linear_backward.default, (grad_out, values, weight, needs_values))


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(torch_ops.linear, make_inputs(torch.float64))


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 300])
def test_equals_torch(rows: int) -> None:
    torch.manual_seed(1)
    theirs = torch.nn.Linear(33, 70)
    ours = nn.Linear(33, 70)
    ours.load_state_dict(theirs.state_dict())
    values = torch.randn(rows, 33)
    results = []
    for module in (ours, theirs):
        given = values.clone().requires_grad_()
        out = module(given)
        out.cos().sum().backward()
        results.append([out, given.grad, module.weight.grad, module.bias.grad])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_compiles() -> None:
    module = nn.Linear(5, 3)
    values = make_inputs(torch.float32)[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(values), module(values))
    grads = [torch.autograd.grad(f(values).cos().sum(), values)[0] for f in (compiled, module)]
    assert torch.equal(*grads)


def test_autocast_computes_in_float32() -> None:
    values, weight, bias = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch_ops.linear(values.bfloat16(), weight, bias)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch_ops.linear(values.bfloat16().float(), weight, bias))


@pytest.mark.parametrize(
    ("position", "change", "exception", "message"),
    [
        (0, lambda t: t[0], ValueError, r"values must have shape \[any, 5\]"),
        (0, lambda t: t[:, :4], ValueError, r"values must have shape \[any, 5\], got \[7, 4\]"),
        (0, lambda t: t.half(), TypeError, "values must be float32 or float64"),
        (1, lambda t: t[0], ValueError, "weight must have shape"),
        (1, lambda t: t.double(), TypeError, "weight is torch.float64 but values"),
        (1, lambda t: t.to("meta"), ValueError, "weight is on device meta"),
        (2, lambda t: t[:2], ValueError, r"bias must have shape \[3\], got \[2\]"),
    ],
)
def test_bad_arguments(
    position: int, change: Callable[[Tensor], Tensor], exception: type[Exception], message: str
) -> None:
    inputs = [tensor.detach() for tensor in make_inputs(torch.float32)]
    inputs[position] = change(inputs[position])
    with pytest.raises(exception, match=message):
        torch_ops.linear(*inputs)


def test_needs_a_bias() -> None:
    with pytest.raises(ValueError, match="bias must be True"):
        nn.Linear(5, 3, bias=False)
