"""What only a GPU can show: the operators as torch dispatches, compiles and captures them there."""

# Tensor.backward is untyped in torch.
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from xdistil_fast import torch_ops
from xdistil_fast.nn import CRF, BiLSTM, Linear

LENGTHS = [3, 0, 6, 1]
TOTAL, INPUT, HIDDEN, TAGS = sum(LENGTHS), 5, 7, 4


pytestmark = pytest.mark.usefixtures("gpu")


def offsets() -> Tensor:
    return torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)


def lstm_inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOTAL, INPUT)]
    shapes += [(4 * HIDDEN, INPUT), (4 * HIDDEN, HIDDEN), (4 * HIDDEN,), (4 * HIDDEN,)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(0.5 * t).to("cuda", dtype).requires_grad_() for t in tensors]


def crf_inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(TOTAL, TAGS), (TAGS,), (TAGS,), (TAGS, TAGS)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to("cuda", dtype).requires_grad_() for t in tensors]


def tags() -> Tensor:
    return torch.randint(TAGS, (TOTAL,), generator=torch.Generator().manual_seed(2)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_bilstm(dtype: torch.dtype) -> None:
    values, *weights = lstm_inputs(dtype)
    # bfloat16 gradients of two ways to compile differ by their rounding.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype != torch.bfloat16:
        utils.append("test_aot_dispatch_dynamic")
    operator = torch.ops.xdistil.bilstm.default
    opcheck(operator, (values, offsets(), weights, True, False), test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_crf_and_embedding(dtype: torch.dtype) -> None:
    emissions, *scores = crf_inputs(dtype)
    arguments = (emissions, offsets(), tags(), *scores)
    opcheck(torch.ops.xdistil.crf_log_likelihood.default, arguments)
    emissions, *scores = (tensor.detach() for tensor in (emissions, *scores))
    for name in ("crf_marginals", "crf_viterbi"):
        opcheck(getattr(torch.ops.xdistil, name).default, (emissions, offsets(), *scores))
    table = torch.randn(5, 3, dtype=dtype, device="cuda", requires_grad=True)
    opcheck(torch.ops.xdistil.embedding.default, (table, torch.tensor([0, 3, 3], device="cuda")))


def test_gradcheck() -> None:
    values, *weights = lstm_inputs(torch.float64)
    torch.autograd.gradcheck(
        lambda values, *weights: torch_ops.bilstm(values, offsets(), weights), (values, *weights)
    )
    torch.autograd.gradcheck(
        lambda e, *s: torch_ops.crf_log_likelihood(e, offsets(), tags(), *s),
        tuple(crf_inputs(torch.float64)),
    )


def tagger() -> tuple[Any, ...]:
    torch.manual_seed(0)
    modules = BiLSTM(INPUT, HIDDEN), Linear(2 * HIDDEN, TAGS), CRF(TAGS)
    return tuple(module.cuda() for module in modules)


def loss_of(modules: tuple[Any, ...], values: Tensor) -> Tensor:
    bilstm, linear, crf = modules
    out: Tensor = -crf(linear(bilstm(values, offsets())), tags(), cu_seqlens=offsets())
    return out


def gradients(modules: tuple[Any, ...]) -> list[Tensor]:
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


def test_gpu_and_cpu_train_alike() -> None:
    modules, values = tagger(), lstm_inputs(torch.float32)[0]
    loss = loss_of(modules, values)
    loss.backward()
    on_gpu = [grad.cpu() for grad in gradients(modules)]
    for module in modules:
        module.zero_grad()
        module.cpu()
    bilstm, linear, crf = modules
    cu_seqlens = offsets().cpu()
    here = -crf(
        linear(bilstm(values.detach().cpu(), cu_seqlens)), tags().cpu(), cu_seqlens=cu_seqlens
    )
    here.backward()
    torch.testing.assert_close(loss.cpu(), here, rtol=1e-5, atol=1e-5)
    for a, b in zip(on_gpu, gradients(modules), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_bfloat16() -> None:
    modules, values = tagger(), lstm_inputs(torch.float32)[0]
    with torch.autocast("cuda", torch.bfloat16):
        hidden = modules[0](values, offsets())
        loss = loss_of(modules, values)
    assert hidden.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(modules))
    torch.testing.assert_close(loss, loss_of(modules, values), rtol=0.05, atol=0.1)


def test_compile() -> None:
    modules, values = tagger(), lstm_inputs(torch.float32)[0].detach()
    compiled = torch.compile(lambda values: loss_of(modules, values), fullgraph=True)
    torch.testing.assert_close(compiled(values), loss_of(modules, values))


def test_a_step_is_captured_into_a_cuda_graph() -> None:
    modules, values = tagger(), lstm_inputs(torch.float32)[0].detach()
    parameters = [p for module in modules for p in module.parameters()]
    cu_seqlens, gold = offsets(), tags()

    def step() -> Tensor:
        bilstm, linear, crf = modules
        loss: Tensor = -crf(linear(bilstm(values, cu_seqlens)), gold, cu_seqlens=cu_seqlens)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad.copy_(grad)  # type: ignore[union-attr]
        return loss

    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    expected = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for parameter in parameters:
        parameter.grad.zero_()  # type: ignore[union-attr]
    graph.replay()
    torch.cuda.synchronize()
    assert loss.isfinite()
    for parameter, want in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, want)


def test_streams_are_honoured() -> None:
    """Work queued on another stream, behind a long product, must see that product's result."""
    values, *weights = (tensor.detach() for tensor in lstm_inputs(torch.float32))
    expected = torch_ops.bilstm(values, offsets(), weights)
    cu_seqlens = offsets()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(values)
        slow = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            slow = slow @ slow * 1e-3
        late.copy_(values)
        got = torch_ops.bilstm(late, cu_seqlens, weights)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_wrong_devices_are_refused() -> None:
    values, *weights = (tensor.detach() for tensor in lstm_inputs(torch.float32))
    with pytest.raises(ValueError, match="weight_hh_l0 is on device cpu but values is on cuda:0"):
        torch_ops.bilstm(values, offsets(), [weights[0], weights[1].cpu(), *weights[2:]])
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 10"):
        torch_ops.bilstm(values, torch.tensor([0, 4, 3, 10]), weights)
    with pytest.raises(TypeError, match="must be float32 or float64 or bfloat16"):
        torch_ops.bilstm(values.half(), offsets(), [weight.half() for weight in weights])
