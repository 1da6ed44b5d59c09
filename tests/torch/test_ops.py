"""The operators as torch sees them: schema, fake, autograd, compile, autocast, errors."""

# Tensor.backward is untyped in torch.
# mypy: allow-untyped-calls

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from xdistil_fast import _core, torch_ops

DTYPES = [torch.float32, torch.float64]
INPUT, HIDDEN, TAGS = 5, 7, 4
LENGTHS = [3, 0, 6, 1]
TOTAL = sum(LENGTHS)

Tensors = dict[str, Tensor]


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def lstm_inputs(dtype: torch.dtype, requires_grad: bool = True, hidden: int = HIDDEN) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "values": (TOTAL, INPUT),
        "w_ih": (4 * hidden, INPUT),
        "w_hh": (4 * hidden, hidden),
        "b_ih": (4 * hidden,),
        "b_hh": (4 * hidden,),
        "w_ih_reverse": (4 * hidden, INPUT),
        "w_hh_reverse": (4 * hidden, hidden),
        "b_ih_reverse": (4 * hidden,),
        "b_hh_reverse": (4 * hidden,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype)
        .mul_(0.5)
        .requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def crf_inputs(dtype: torch.dtype, requires_grad: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "emissions": (TOTAL, TAGS),
        "start": (TAGS,),
        "end": (TAGS,),
        "transitions": (TAGS, TAGS),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def tags() -> Tensor:
    return torch.randint(TAGS, (TOTAL,), generator=torch.Generator().manual_seed(2))


def bilstm(values: Tensor, *weights: Tensor) -> Tensor:
    return torch_ops.bilstm(values, offsets(LENGTHS), weights)


def log_likelihood(emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
    return torch_ops.crf_log_likelihood(
        emissions, offsets(LENGTHS), tags(), start, end, transitions
    )


def embedding(table: Tensor) -> Tensor:
    return torch_ops.embedding(table, torch.tensor([0, 3, 3, 1, 0]))


DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensors]]] = {
    "bilstm": (bilstm, lstm_inputs),
    "crf_log_likelihood": (log_likelihood, crf_inputs),
    "embedding": (
        embedding,
        lambda dtype, requires_grad=True: {
            "table": torch.randn(5, 3, dtype=dtype, requires_grad=requires_grad)
        },
    ),
}


# --- torch's own checks ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_opcheck_bilstm(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    values, *weights = lstm_inputs(dtype).values()
    cu_seqlens = offsets(LENGTHS, index_dtype)
    opcheck(torch.ops.xdistil.bilstm.default, (values, cu_seqlens, weights, True, False))
    values, *weights = (tensor.detach() for tensor in (values, *weights))
    opcheck(torch.ops.xdistil.bilstm.default, (values, cu_seqlens, weights, False, True))
    out, reserve = torch.ops.xdistil.bilstm(values, cu_seqlens, weights, True, False)
    for needs_values, bfloat16 in itertools.product((True, False), repeat=2):
        opcheck(
            torch.ops.xdistil.bilstm_backward.default,
            (out.cos(), values, cu_seqlens, out, reserve, weights, needs_values, bfloat16),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_crf(dtype: torch.dtype) -> None:
    emissions, *scores = crf_inputs(dtype).values()
    cu_seqlens = offsets(LENGTHS)
    opcheck(torch.ops.xdistil.crf_log_likelihood.default, (emissions, cu_seqlens, tags(), *scores))
    emissions, *scores = (tensor.detach() for tensor in (emissions, *scores))
    for name in ("crf_marginals", "crf_viterbi"):
        operator = getattr(torch.ops.xdistil, name)
        opcheck(operator.default, (emissions, cu_seqlens, *scores))
    opcheck(
        torch.ops.xdistil.crf_log_likelihood_backward.default,
        (torch.randn(len(LENGTHS), dtype=dtype), emissions, cu_seqlens, tags(), *scores),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_opcheck_embedding(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    table = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    ids = torch.tensor([0, 3, 3, 1, 0], dtype=index_dtype)
    opcheck(torch.ops.xdistil.embedding.default, (table, ids))
    opcheck(torch.ops.xdistil.embedding_backward.default, (torch.randn(5, 3, dtype=dtype), ids, 6))


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
def test_gradcheck(name: str) -> None:
    function, inputs = DIFFERENTIABLE[name]
    assert torch.autograd.gradcheck(function, tuple(inputs(torch.float64).values()))


@pytest.mark.parametrize("hidden", [1, 16, 19])
def test_gradcheck_bilstm_sizes(hidden: int) -> None:
    inputs = tuple(lstm_inputs(torch.float64, hidden=hidden).values())
    assert torch.autograd.gradcheck(bilstm, inputs, fast_mode=True)


def test_gradcheck_crf_with_forbidden_moves() -> None:
    emissions, start, end, transitions = crf_inputs(torch.float64).values()
    forbidden = torch.zeros(TAGS, TAGS, dtype=torch.float64)
    forbidden[0, 2] = -torch.inf
    allowed_tags = torch.ones(TOTAL, dtype=torch.int64)

    def function(emissions: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return torch_ops.crf_log_likelihood(
            emissions, offsets(LENGTHS), allowed_tags, start, end, transitions.detach() + forbidden
        )

    assert torch.autograd.gradcheck(function, (emissions, start, end))
    # The parameter under a forbidden move has gradient 0, not NaN.
    torch_ops.crf_log_likelihood(
        emissions, offsets(LENGTHS), allowed_tags, start, end, transitions + forbidden
    ).sum().backward()
    assert transitions.grad is not None
    assert transitions.grad[0, 2] == 0
    assert transitions.grad.isfinite().all()


# --- torch.compile -----------------------------------------------------------------------------


def training_loss(inputs: Tensors, ids: Tensor, gold: Tensor, cu_seqlens: Tensor) -> Tensor:
    """All differentiable operators in one graph, with torch's own between them."""
    values = torch_ops.embedding(inputs["table"], ids)
    weights = [inputs[name] for name in list(inputs)[2:10]]
    hidden = torch_ops.bilstm(values, cu_seqlens, weights).tanh()
    emissions = hidden @ inputs["output"]
    return -torch_ops.crf_log_likelihood(
        emissions, cu_seqlens, gold, inputs["start"], inputs["end"], inputs["transitions"]
    ).mean()


def model_inputs() -> Tensors:
    lstm = lstm_inputs(torch.float32)
    generator = torch.Generator().manual_seed(3)
    del lstm["values"]
    scores = crf_inputs(torch.float32)
    del scores["emissions"]
    return {
        "table": torch.randn(11, INPUT, generator=generator).requires_grad_(),
        "output": torch.randn(2 * HIDDEN, TAGS, generator=generator).requires_grad_(),
        **lstm,
        **scores,
    }


# Inductor imports parts of torch that deprecate themselves.
TORCH_JIT = r"ignore:.torch\.jit:DeprecationWarning"

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            shutil.which("g++") is None and shutil.which("clang++") is None,
            reason="inductor needs a C++ compiler",
        ),
    ),
]


@pytest.mark.filterwarnings(TORCH_JIT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_whole_graph_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    inputs = model_inputs()
    compiled = torch.compile(training_loss, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(4)
    # The second call has other sizes: the graph must hold for those, or be made anew.
    for lengths in (LENGTHS, [2, 9, 4], [8]):
        ids = torch.randint(11, (sum(lengths),), generator=generator)
        gold = torch.randint(TAGS, (sum(lengths),), generator=generator)
        results = []
        for function in (training_loss, compiled):
            loss = function(inputs, ids, gold, offsets(lengths))
            gradients = torch.autograd.grad(loss, list(inputs.values()))
            results.append((loss, *gradients))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(TORCH_JIT)
def test_compile_without_gradients() -> None:
    torch._dynamo.reset()
    values, *weights = lstm_inputs(torch.float32).values()
    scores = list(crf_inputs(torch.float32).values())[1:]
    cu_seqlens = offsets(LENGTHS)

    def decode(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        emissions = torch_ops.bilstm(values, cu_seqlens, weights)[:, :TAGS]
        marginals = torch_ops.crf_marginals(emissions, cu_seqlens, *scores)
        return marginals, *torch_ops.crf_viterbi(emissions, cu_seqlens, *scores)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, want in zip(compiled(values), decode(values), strict=True):
            assert torch.equal(got, want)


def test_export() -> None:
    values, *weights = lstm_inputs(torch.float32, requires_grad=False).values()

    class Layer(torch.nn.Module):
        def forward(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
            return torch_ops.bilstm(values, cu_seqlens, weights)

    exported = torch.export.export(Layer(), (values, offsets(LENGTHS)), strict=False)
    got = exported.module()(values, offsets(LENGTHS))
    assert torch.equal(got, Layer()(values, offsets(LENGTHS)))


# --- what backward needs -----------------------------------------------------------------------


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the training kernel ran")

    values, *weights = lstm_inputs(torch.float32).values()
    want = torch_ops.bilstm(values, offsets(LENGTHS), weights)
    monkeypatch.setattr(_core, "bilstm_forward_train", refuse)
    with torch.no_grad():
        assert torch.equal(torch_ops.bilstm(values, offsets(LENGTHS), weights), want)
    with torch.inference_mode():
        assert torch.equal(torch_ops.bilstm(values, offsets(LENGTHS), weights), want)
    frozen = [weight.detach() for weight in weights]
    out = torch_ops.bilstm(values.detach(), offsets(LENGTHS), frozen)
    assert torch.equal(out, want)
    assert not out.requires_grad
    with pytest.raises(AssertionError, match="training kernel"):
        torch_ops.bilstm(values, offsets(LENGTHS), frozen)


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
def test_each_input_alone_gets_the_same_gradient(name: str) -> None:
    function, make = DIFFERENTIABLE[name]
    inputs = make(torch.float32)
    weight = torch.randn(function(*inputs.values()).shape)
    together = torch.autograd.grad((function(*inputs.values()) * weight).sum(), [*inputs.values()])
    for index, key in enumerate(inputs):
        alone = {k: v.detach().requires_grad_(k == key) for k, v in inputs.items()}
        (function(*alone.values()) * weight).sum().backward()
        for other, tensor in alone.items():
            if other != key:
                assert tensor.grad is None
        grad = alone[key].grad
        assert grad is not None
        assert torch.equal(grad, together[index])


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
def test_graph_can_be_walked_twice(name: str) -> None:
    function, make = DIFFERENTIABLE[name]
    inputs = list(make(torch.float32).values())
    out = function(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
def test_second_derivatives_are_refused(name: str) -> None:
    function, make = DIFFERENTIABLE[name]
    inputs = list(make(torch.float64).values())
    loss = function(*inputs).square().sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.backward([gradient.sum() for gradient in gradients])


def test_gradient_without_reserve_is_refused() -> None:
    values, *weights = lstm_inputs(torch.float32).values()
    out, _ = torch.ops.xdistil.bilstm(values, offsets(LENGTHS), weights, False, False)
    with pytest.raises(RuntimeError, match="training=False"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["crf_marginals", "crf_viterbi"])
def test_what_has_no_gradient_says_so(name: str) -> None:
    emissions, *scores = crf_inputs(torch.float32).values()
    result = getattr(torch_ops, name)(emissions, offsets(LENGTHS), *scores)
    result = result[1] if isinstance(result, tuple) else result
    with pytest.raises(RuntimeError, match=f"xdistil.{name}"):
        result.sum().backward()


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
def test_repeats_are_bit_equal_whatever_the_threads(name: str) -> None:
    function, make = DIFFERENTIABLE[name]
    inputs = list(make(torch.float32).values())
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            out = function(*inputs)
            results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_threads_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    forward = _core.bilstm_forward

    def spy(*arguments: Any) -> None:
        used.append(arguments[-1])
        forward(*arguments)

    monkeypatch.setattr(_core, "bilstm_forward", spy)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            bilstm(*lstm_inputs(torch.float32, requires_grad=False).values())
    finally:
        torch.set_num_threads(before)
    assert used == [1, 3]


# --- forms of input ----------------------------------------------------------------------------


def spread(tensor: Tensor) -> Tensor:
    """The same values in memory that is not contiguous."""
    wide = tensor.detach().repeat_interleave(2, dim=-1)[..., ::2]
    assert not wide.is_contiguous() or tensor.shape[-1] == 1
    return wide.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
def test_non_contiguous_inputs(name: str) -> None:
    function, make = DIFFERENTIABLE[name]
    inputs = list(make(torch.float32).values())
    wide = [spread(tensor) for tensor in inputs]
    want, got = function(*inputs), function(*wide)
    assert torch.equal(got, want)
    # ... and a gradient that comes in transposed.
    weight = torch.randn(tuple(reversed(want.shape)))
    weight = weight.t() if weight.dim() == 2 else weight
    want_grads = torch.autograd.grad(want, inputs, weight.contiguous())
    got_grads = torch.autograd.grad(got, wide, weight)
    assert all(map(torch.equal, got_grads, want_grads))


def test_index_dtypes_are_alike() -> None:
    values, *weights = lstm_inputs(torch.float32, requires_grad=False).values()
    emissions, *scores = crf_inputs(torch.float32, requires_grad=False).values()
    for narrow, wide in [(offsets(LENGTHS), offsets(LENGTHS, torch.int64))]:
        assert torch.equal(
            torch_ops.bilstm(values, narrow, weights), torch_ops.bilstm(values, wide, weights)
        )
        assert torch.equal(
            torch_ops.crf_log_likelihood(emissions, narrow, tags().int(), *scores),
            torch_ops.crf_log_likelihood(emissions, wide, tags(), *scores),
        )


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_do(lengths: list[int]) -> None:
    cu_seqlens = offsets(lengths)
    inputs = lstm_inputs(torch.float32)
    values, *weights = inputs.values()
    out = torch_ops.bilstm(values[:0], cu_seqlens, weights)
    assert out.shape == (0, 2 * HIDDEN)
    grads = torch.autograd.grad(out.sum(), [values, *weights])
    assert not any(grad.any() for grad in grads)
    emissions, *scores = crf_inputs(torch.float32).values()
    result = torch_ops.crf_log_likelihood(emissions[:0], cu_seqlens, tags()[:0], *scores)
    assert torch.equal(result, torch.zeros(len(lengths)))
    grads = torch.autograd.grad(result.sum(), [emissions, *scores])
    assert not any(grad.any() for grad in grads)
    marginals = torch_ops.crf_marginals(emissions[:0], cu_seqlens, *scores)
    assert marginals.shape == (0, TAGS)
    best, best_scores = torch_ops.crf_viterbi(emissions[:0], cu_seqlens, *scores)
    assert best.shape == (0,)
    assert best.dtype == torch.int32
    assert torch.equal(best_scores, torch.zeros(len(lengths)))
    table = torch.randn(5, 3, requires_grad=True)
    rows = torch_ops.embedding(table, torch.tensor([], dtype=torch.int64))
    assert rows.shape == (0, 3)
    rows.sum().backward()
    assert table.grad is not None
    assert not table.grad.any()


# --- autocast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DIFFERENTIABLE))
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(name: str, low: torch.dtype) -> None:
    if name == "bilstm" and low == torch.bfloat16 and _core.multiplies_bfloat16():
        pytest.skip("here its products are in bfloat16: test_bilstm.py")
    function, make = DIFFERENTIABLE[name]
    first, *others = make(torch.float32).values()
    first_low = first.detach().to(low).requires_grad_()
    with torch.autocast("cpu", dtype=low):
        out = function(first_low, *others)
    assert out.dtype == torch.float32
    exact = first_low.detach().float().requires_grad_()
    want = function(exact, *others)
    assert torch.equal(out, want)
    got_grads = torch.autograd.grad(out.sum(), [first_low, *others])
    want_grads = torch.autograd.grad(want.sum(), [exact, *others])
    assert got_grads[0].dtype == low
    assert torch.equal(got_grads[0], want_grads[0].to(low))
    assert all(map(torch.equal, got_grads[1:], want_grads[1:]))


@pytest.mark.filterwarnings(TORCH_JIT)
def test_autocast_compiles_whole() -> None:
    torch._dynamo.reset()
    inputs = list(lstm_inputs(torch.float32).values())

    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return bilstm(*inputs).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs), function(*inputs)
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got, inputs)
    assert all(map(torch.equal, grads, torch.autograd.grad(want, inputs)))


def test_autocast_leaves_float64_alone() -> None:
    inputs = lstm_inputs(torch.float64).values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bilstm(*inputs)
    assert out.dtype == torch.float64
    assert torch.equal(out, bilstm(*inputs))


# --- errors ------------------------------------------------------------------------------------

Change = Callable[[Tensor], Tensor]

BAD_LSTM: list[tuple[str, Change, type[Exception], str]] = [
    ("values", lambda t: t[0], ValueError, r"values must have shape \[total, input_size\]"),
    ("values", lambda t: t[:, 1:], ValueError, r"weight_ih_l0 must have shape \[28, 4\]"),
    ("values", lambda t: t.bfloat16(), TypeError, r"values must be float32 or float64.*bfloat16"),
    ("values", lambda t: t.long(), TypeError, "values must be float32 or float64"),
    ("values", lambda t: t.double(), TypeError, "weight_ih_l0 is .*float32 .*values.*float64"),
    ("values", lambda t: t.to("meta"), ValueError, "values is on device meta"),
    ("w_hh", lambda t: t[0], ValueError, "weight_hh_l0 must have shape"),
    ("w_hh", lambda t: t[1:], ValueError, r"weight_hh_l0 must have shape \[28, 7\]"),
    ("b_hh", lambda t: t[1:], ValueError, r"bias_hh_l0 must have shape \[28\].*\[27\]"),
    ("b_hh_reverse", lambda t: t.double(), TypeError, "bias_hh_l0_reverse is .*float64"),
    ("w_ih_reverse", lambda t: t.to("meta"), ValueError, "weight_ih_l0_reverse is on device meta"),
    ("cu_seqlens", lambda t: t.float(), TypeError, "cu_seqlens must be int32 or int64"),
    ("cu_seqlens", lambda t: t[None], ValueError, r"cu_seqlens must have shape \[any\]"),
    ("cu_seqlens", lambda t: t[:0], ValueError, "cu_seqlens"),
    ("cu_seqlens", lambda t: t[1:], ValueError, "cu_seqlens.*start with 0"),
    ("cu_seqlens", lambda t: t[:-1], ValueError, "cu_seqlens.*end with"),
    ("cu_seqlens", lambda t: t.flip(0), ValueError, "cu_seqlens"),
    ("cu_seqlens", lambda t: t.long() + 2**32, ValueError, "cu_seqlens must fit int32"),
    ("cu_seqlens", lambda t: t.to("meta"), ValueError, "cu_seqlens is on device meta"),
]


@pytest.mark.parametrize(("name", "change", "exception", "message"), BAD_LSTM)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_bad_lstm_arguments(
    name: str, change: Change, exception: type[Exception], message: str, requires_grad: bool
) -> None:
    inputs = lstm_inputs(torch.float32, requires_grad)
    inputs["cu_seqlens"] = offsets(LENGTHS)
    inputs[name] = change(inputs[name])
    cu_seqlens = inputs.pop("cu_seqlens")
    values, *weights = inputs.values()
    with pytest.raises(exception, match=message):
        torch_ops.bilstm(values, cu_seqlens, weights)


def test_wrong_number_of_weights() -> None:
    values, *weights = lstm_inputs(torch.float32).values()
    with pytest.raises(ValueError, match=r"weights must be 8 tensors.*got 4"):
        torch_ops.bilstm(values, offsets(LENGTHS), weights[:4])


BAD_CRF: list[tuple[str, Change, type[Exception], str]] = [
    ("emissions", lambda t: t[0], ValueError, r"emissions must have shape \[total, num_tags\]"),
    ("emissions", lambda t: t[:, 1:], ValueError, r"start_transitions must have shape \[3\]"),
    ("emissions", lambda t: t.half(), TypeError, r"emissions must be float32 or float64"),
    ("emissions", lambda t: t.to("meta"), ValueError, "emissions is on device meta"),
    ("start", lambda t: t.double(), TypeError, "start_transitions is .*float64 .*emissions"),
    ("start", lambda t: t * torch.nan, ValueError, "(?i)nan"),
    ("end", lambda t: t[1:], ValueError, r"end_transitions must have shape \[4\].*\[3\]"),
    ("end", lambda t: t + torch.inf, ValueError, "(?i)inf"),
    ("transitions", lambda t: t[1:], ValueError, r"transitions must have shape \[4, 4\].*\[3, 4\]"),
    ("transitions", lambda t: t.to("meta"), ValueError, "transitions is on device meta"),
    ("cu_seqlens", lambda t: t.double(), TypeError, "cu_seqlens must be int32 or int64"),
    ("cu_seqlens", lambda t: t[:-1], ValueError, "cu_seqlens"),
    ("cu_seqlens", lambda t: t.flip(0), ValueError, "cu_seqlens"),
]
BAD_TAGS: list[tuple[str, Change, type[Exception], str]] = [
    ("tags", lambda t: t.float(), TypeError, "tags must be int32 or int64"),
    ("tags", lambda t: t[1:], ValueError, r"tags must have shape \[10\], got \[9\]"),
    ("tags", lambda t: t - 4, ValueError, "tags.*-"),
    ("tags", lambda t: t + 4, ValueError, "tags"),
    ("tags", lambda t: t + 2**32, ValueError, "tags must fit int32"),
    ("tags", lambda t: t.to("meta"), ValueError, "tags is on device meta"),
]


@pytest.mark.parametrize(("name", "change", "exception", "message"), BAD_CRF + BAD_TAGS)
def test_bad_crf_arguments(
    name: str, change: Change, exception: type[Exception], message: str
) -> None:
    inputs = crf_inputs(torch.float32)
    inputs["cu_seqlens"], inputs["tags"] = offsets(LENGTHS), tags()
    inputs[name] = change(inputs[name])
    with pytest.raises(exception, match=message):
        torch_ops.crf_log_likelihood(**inputs)
    if name != "tags":
        del inputs["tags"]
        for function in (torch_ops.crf_marginals, torch_ops.crf_viterbi):
            with pytest.raises(exception, match=message):
                function(**inputs)


@pytest.mark.parametrize(
    ("table", "ids", "exception", "message"),
    [
        (torch.zeros(5), torch.tensor([0]), ValueError, "table must have shape"),
        (torch.zeros(5, 3).half(), torch.tensor([0]), TypeError, "table must be float32"),
        (torch.zeros(5, 3, device="meta"), torch.tensor([0]), ValueError, "table is on device"),
        (torch.zeros(5, 3), torch.tensor([0.0]), TypeError, "ids must be int32 or int64"),
        (torch.zeros(5, 3), torch.tensor([[0]]), ValueError, r"ids must have shape \[any\]"),
        (torch.zeros(5, 3), torch.tensor([0, 5]), ValueError, "ids.*5 at position 1"),
        (torch.zeros(5, 3), torch.tensor([-1]), ValueError, "ids.*-1 at position 0"),
        (torch.zeros(5, 3), torch.tensor([2**32]), ValueError, "ids must fit int32"),
    ],
)
def test_bad_embedding_arguments(
    table: Tensor, ids: Tensor, exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        torch_ops.embedding(table, ids)
