"""Arguments that the BiLSTM kernels refuse, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdistil_fast import _core

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Array], Any]


def make_problem(lengths: list[int], input_size: int, hidden_size: int) -> Any:
    """Arguments of a small batch that are all in order."""
    rng = np.random.default_rng(0)
    total, gates = sum(lengths), 4 * hidden_size
    shapes = [(gates, input_size), (gates, hidden_size), (gates,), (gates,)] * 2
    return SimpleNamespace(
        x=rng.standard_normal((total, input_size), dtype=np.float32),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        weights=[rng.standard_normal(shape, dtype=np.float32) for shape in shapes],
        grad_out=rng.standard_normal((total, 2 * hidden_size), dtype=np.float32),
    )


def strided(array: Array) -> Array:
    every_other: Array = np.repeat(array, 2, axis=-1)[..., ::2]
    return every_other


def readonly(array: Array) -> Array:
    copy: Array = array.copy()
    copy.flags.writeable = False
    return copy


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int32)


Change = Callable[[Array], Any]

BAD_FORWARD: list[tuple[str, Change, type[Exception], str]] = [
    ("x", lambda a: a[:, :-1].copy(), ValueError, r"x: .*\[12, 8\].*9"),
    ("x", lambda a: a[0], ValueError, "x: "),
    ("x", lambda a: a.astype(np.float64), TypeError, "x: .*float64.*float32"),
    ("x", lambda a: a.astype(np.float16), TypeError, "x: .*float16"),
    ("x", strided, ValueError, "x: .*contiguous"),
    ("x", lambda a: a.tolist(), TypeError, "x: .*list"),
    ("cu_seqlens", lambda a: a.astype(np.int64), TypeError, "cu_seqlens: .*int64.*int32"),
    ("cu_seqlens", lambda _: ints(), ValueError, "cu_seqlens: .*empty"),
    ("cu_seqlens", lambda _: ints(1, 12), ValueError, "cu_seqlens: .*1.*start with 0"),
    ("cu_seqlens", lambda _: ints(-1, 12), ValueError, "cu_seqlens: .*-1.*start with 0"),
    ("cu_seqlens", lambda _: ints(0, 9, 4, 12), ValueError, r"cu_seqlens: .*9 to 4.*ascend"),
    ("cu_seqlens", lambda _: ints(0, 14, 12), ValueError, r"cu_seqlens: .*14 to 12.*ascend"),
    ("cu_seqlens", lambda _: ints(0, 4, 11), ValueError, "cu_seqlens: .*11.*12"),
    ("cu_seqlens", lambda _: ints(0, 4, 13), ValueError, "cu_seqlens: .*13.*12"),
    ("cu_seqlens", lambda a: a[None], ValueError, "cu_seqlens: "),
    ("cu_seqlens", lambda a: np.repeat(a, 2)[::2], ValueError, "cu_seqlens: .*contiguous"),
    ("out", lambda a: a[:-1].copy(), ValueError, r"out: .*\[11, 34\].*\[12, 34\]"),
    ("out", lambda a: a.astype(np.float64), TypeError, "out: .*float64"),
    ("out", readonly, ValueError, "out: .*writeable"),
    ("out", strided, ValueError, "out: .*contiguous"),
    ("reserve", lambda a: a[:-1].copy(), ValueError, "reserve: "),
    ("reserve", readonly, ValueError, "reserve: .*writeable"),
    ("reserve", lambda a: a.astype(np.float64), TypeError, "reserve: "),
    ("threads", lambda _: -1, ValueError, "threads: .*-1"),
]


def forward_arguments() -> dict[str, Any]:
    problem = make_problem([4, 5, 3], 9, 17)
    return {
        "weights": _core.BiLSTMWeights(problem.weights, training=True),
        "x": problem.x,
        "cu_seqlens": problem.cu_seqlens,
        "out": np.full_like(problem.grad_out, 7.0),
        "reserve": np.full(_core.bilstm_reserve_size(12, 17), 7.0, dtype=np.float32),
        "threads": 1,
    }


@pytest.mark.parametrize(("name", "change", "exception", "message"), BAD_FORWARD)
def test_bad_forward_arguments(
    name: str, change: Change, exception: type[Exception], message: str
) -> None:
    arguments = forward_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.bilstm_forward_train(**arguments)
    if name != "reserve":
        inference = {key: value for key, value in arguments.items() if key != "reserve"}
        with pytest.raises(exception, match=message):
            _core.bilstm_forward(**inference)
    for untouched in ("out", "reserve"):
        if untouched != name:
            assert (arguments[untouched] == 7.0).all(), "an output was written before the check"


def backward_arguments() -> dict[str, Any]:
    arguments = forward_arguments()
    _core.bilstm_forward_train(**arguments)
    hidden, inputs = 17, 9
    shapes = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,)] * 2
    arguments["grad_out"] = np.ones_like(arguments["out"])
    arguments["grad_x"] = np.full_like(arguments["x"], 7.0)
    arguments["grad_weights"] = [np.full(shape, 7.0, dtype=np.float32) for shape in shapes]
    return arguments


def first_changed(change: Change) -> Change:
    return lambda arrays: [change(arrays[0]), *arrays[1:]]


BAD_BACKWARD: list[tuple[str, Change, type[Exception], str]] = [
    ("out", lambda a: a[:-1].copy(), ValueError, "out: "),
    ("grad_out", lambda a: a[:-1].copy(), ValueError, "grad_out: "),
    ("grad_out", lambda a: a.astype(np.float64), TypeError, "grad_out: "),
    ("grad_out", strided, ValueError, "grad_out: .*contiguous"),
    ("grad_x", lambda a: a[:-1].copy(), ValueError, "grad_x: "),
    ("grad_x", readonly, ValueError, "grad_x: .*writeable"),
    ("grad_x", lambda a: a.astype(np.float64), TypeError, "grad_x: "),
    ("reserve", lambda a: a[:-1].copy(), ValueError, "reserve: "),
    ("cu_seqlens", lambda _: ints(0, 9, 4, 12), ValueError, "cu_seqlens: "),
    ("grad_weights", lambda a: a[:5], ValueError, "grad_weights: .*5.*6"),
    ("grad_weights", lambda a: [*a, a[0]], ValueError, "grad_weights: .*7.*6"),
    ("grad_weights", first_changed(readonly), ValueError, "grad_weights.*w_ih: .*writeable"),
    ("grad_weights", first_changed(lambda a: a.T.copy()), ValueError, "grad_weights.*w_ih: "),
    ("grad_weights", first_changed(lambda a: a.astype(float)), TypeError, "grad_weights.*w_ih: "),
    ("threads", lambda _: -1, ValueError, "threads: .*-1"),
]


@pytest.mark.parametrize(("name", "change", "exception", "message"), BAD_BACKWARD)
def test_bad_backward_arguments(
    name: str, change: Change, exception: type[Exception], message: str
) -> None:
    arguments = backward_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.bilstm_backward(**arguments)
    if name != "grad_x":
        assert (arguments["grad_x"] == 7.0).all()
    if name != "grad_weights":
        assert all((grad == 7.0).all() for grad in arguments["grad_weights"])


def test_backward_leaves_the_reserve_for_another_time() -> None:
    arguments = backward_arguments()
    arguments["reserve"] = readonly(arguments["reserve"])
    results = []
    for _ in range(2):
        _core.bilstm_backward(**arguments)
        results.append([a.copy() for a in (arguments["grad_x"], *arguments["grad_weights"])])
    for once, again in zip(*results, strict=True):
        np.testing.assert_array_equal(once, again)


def test_backward_refuses_weights_packed_for_inference() -> None:
    arguments = backward_arguments()
    arguments["weights"] = _core.BiLSTMWeights(make_problem([1], 9, 17).weights)
    with pytest.raises(ValueError, match=r"weights: .*training=True"):
        _core.bilstm_backward(**arguments)


@pytest.mark.parametrize(
    ("index", "change", "exception", "message"),
    [
        (0, lambda a: a[:-1].copy(), ValueError, r"weights\[0\].*67"),
        (0, lambda a: a[:, :0].copy(), ValueError, r"weights\[0\].*0 columns"),
        (0, lambda a: a[0], ValueError, r"weights\[0\]"),
        (1, lambda a: a[:, :-1].copy(), ValueError, r"weights\[1\].*\[68, 16\].*\[68, 17\]"),
        (3, lambda a: a[None], ValueError, r"weights\[3\]"),
        (4, lambda a: a[:, :-1].copy(), ValueError, r"weights\[4\].*\[68, 8\].*\[68, 9\]"),
        (5, strided, ValueError, r"weights\[5\].*contiguous"),
        (6, lambda a: a.astype(np.float64), TypeError, r"weights\[6\].*float64.*float32"),
        (0, lambda a: a.astype(np.float16), TypeError, r"weights\[0\].*float16"),
        (0, lambda a: a.tolist(), TypeError, r"weights\[0\].*list"),
    ],
)
def test_bad_weights(index: int, change: Change, exception: type[Exception], message: str) -> None:
    weights: list[Any] = make_problem([1], 9, 17).weights
    weights[index] = change(weights[index])
    with pytest.raises(exception, match=message):
        _core.BiLSTMWeights(weights)


@pytest.mark.parametrize("count", [0, 4, 7, 9])
def test_wrong_number_of_weights(count: int) -> None:
    weights = make_problem([1], 9, 17).weights * 2
    with pytest.raises(ValueError, match=f"weights: .*{count}.*8"):
        _core.BiLSTMWeights(weights[:count])


def test_outputs_must_not_overlap() -> None:
    # 2H = I: an output of the same shape as the input.
    problem = make_problem([4, 5, 3], 16, 8)
    weights = _core.BiLSTMWeights(problem.weights, training=True)
    x, cu_seqlens = problem.x, problem.cu_seqlens
    with pytest.raises(ValueError, match=r"out: .*share memory.*x"):
        _core.bilstm_forward(weights, x, cu_seqlens, x)
    size = _core.bilstm_reserve_size(12, 8)
    memory = np.zeros(size, dtype=np.float32)
    inside = memory[: 12 * 16].reshape(12, 16)
    with pytest.raises(ValueError, match="share memory"):
        _core.bilstm_forward_train(weights, x, cu_seqlens, inside, memory)
    with pytest.raises(ValueError, match="share memory"):
        _core.bilstm_forward_train(weights, inside, cu_seqlens, np.empty_like(x), memory)


@pytest.mark.parametrize("name", ["x", "out", "grad_out", "reserve"])
def test_backward_outputs_must_not_overlap(name: str) -> None:
    # 18 rows of 16: each input has the elements of grad_x and, more than that, of w_hh.
    problem = make_problem([6, 7, 5], 16, 8)
    weights = _core.BiLSTMWeights(problem.weights, training=True)
    inputs: dict[str, Any] = {
        "x": problem.x,
        "out": np.zeros_like(problem.grad_out),
        "reserve": np.zeros(_core.bilstm_reserve_size(18, 8), dtype=np.float32),
        "grad_out": problem.grad_out,
    }
    grads = [np.zeros_like(problem.weights[k]) for k in (0, 1, 2, 4, 5, 6)]
    memory = inputs[name].reshape(-1)

    def backward(grad_x: Array | None, grad_weights: list[Array]) -> None:
        _core.bilstm_backward(
            weights,
            cu_seqlens=problem.cu_seqlens,
            grad_x=grad_x,
            grad_weights=grad_weights,
            **inputs,
        )

    with pytest.raises(ValueError, match=f"grad_x: .*share memory.*{name}"):
        backward(memory[: 18 * 16].reshape(18, 16), grads)
    grads[4] = memory[: 32 * 8].reshape(32, 8)
    with pytest.raises(ValueError, match=f"grad_weights.*w_hh: .*share memory.*{name}"):
        backward(None, grads)


def test_gradients_must_not_overlap_each_other() -> None:
    arguments = backward_arguments()
    arguments["grad_weights"][3] = arguments["grad_weights"][0]
    with pytest.raises(ValueError, match="share memory"):
        _core.bilstm_backward(**arguments)


def test_bfloat16_needs_an_instruction_set_that_multiplies_it(
    using_isa: Callable[[str], AbstractContextManager[None]],
) -> None:
    weights = [np.zeros(shape, np.float32) for shape in [(8, 3), (8, 2), (8,), (8,)] * 2]
    with using_isa("generic"):
        assert not _core.multiplies_bfloat16()
        with pytest.raises(ValueError, match=r"bfloat16: got True, must be False.*'generic'"):
            _core.BiLSTMWeights(weights, bfloat16=True)
    with pytest.raises(ValueError, match=r"bfloat16: got True, must be False.*float64"):
        _core.BiLSTMWeights([weight.astype(np.float64) for weight in weights], bfloat16=True)
