"""The recurrence in bytes on a GPU, and its emulation, against the float64 oracle and the CPU."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdistil_fast import _backend
from xdistil_fast.cuda_student import CudaStudent
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.quantization import as_bytes, quantize_tensors
from xdistil_fast.reference import student_hidden
from xdistil_fast.student import Student
from xdistil_fast.torch_ops import cuda

LENGTHS = [3, 0, 7, 1, 5, 2, 2, 9, 4, 0, 6, 1, 1, 1, 8, 3, 2, 5, 7]
# Share of the states that are another level than on the CPU, whose activations are good to 1.4e-4
# and a GPU's to 5e-4, and by how much: one that is off feeds those after.
OTHERS = {"cpu": (0.02, 1), "cuda": (0.08, 3)}
# Of a level, by which a state before rounding may be on the other side of the middle: sums of
# float32, and on a GPU its tanh, good to 2^-11 of 63 levels, three times.
BEYOND_HALF = {"cpu": 0.001, "cuda": 0.1}
VOCABULARY, EMBEDDING = 30, 5


def model(hidden: int, pooling: str | None = None) -> Any:
    """A student of plain tags whose scores are its states in levels; or a classifier."""
    labels = [f"T{k}" for k in range(2 * hidden if pooling is None else 3)]
    config = ModelConfig(
        labels=tuple(labels),
        vocab_size=VOCABULARY,
        embedding_size=EMBEDDING,
        hidden_size=hidden,
        precision="int8",
        task="token-classification" if pooling is None else "text-classification",
        pooling=pooling,
    )
    random = np.random.default_rng(hidden)
    shapes = {
        name: shape for name, shape in config.tensor_shapes().items() if not name.endswith("scales")
    }
    tensors: dict[str, Any] = {
        name: random.normal(0, 1.5 / np.sqrt(shape[-1]), shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors["embedding.weight"] *= np.float32(2)
    tensors = quantize_tensors(tensors)
    if pooling is None:
        tensors["output.weight"] = np.eye(2 * hidden, dtype=np.int8)
        tensors["output.weight.scales"] = np.full(2 * hidden, 63, np.float32)
        tensors["output.bias"] = np.zeros(2 * hidden, np.float32)
    return SimpleNamespace(config=config, tensors=tensors)


def batch(lengths: list[int] = LENGTHS) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return random.integers(0, VOCABULARY, cu_seqlens[-1]).astype(np.int32), cu_seqlens


def exact(made: Any, ids: Any, cu_seqlens: Any, levels: Any) -> Any:
    """States in levels before rounding, by the oracle, each from the kernel's own state before."""
    tensors = made.tensors
    weights: list[Any] = []
    for end in ("", "_reverse"):
        w_ih = tensors[f"bilstm.weight_ih_l0{end}"]
        if w_ih.dtype == np.int8:
            w_ih = w_ih * tensors[f"bilstm.weight_ih_l0{end}.scales"][:, None]
        bias = tensors[f"bilstm.bias_ih_l0{end}"] + tensors[f"bilstm.bias_hh_l0{end}"]
        weights += [w_ih, as_bytes(tensors, f"bilstm.weight_hh_l0{end}"), bias]
    table = tensors["embedding.weight"] * tensors["embedding.weight.scales"][:, None]
    return 63 * student_hidden(ids, cu_seqlens, table, weights, "int8", levels / 63)


def check(device: Any, made: Any, levels: Any, ids: Any, cu_seqlens: Any) -> None:
    assert np.array_equal(levels, np.rint(levels))
    assert 40 < np.abs(levels).max() <= 63  # the whole range is used
    off = np.abs(exact(made, ids, cu_seqlens, levels) - levels)
    assert off.max() <= 0.5 + BEYOND_HALF[device.name]


@pytest.mark.parametrize("hidden", [1, 7, 8, 17, 33, 50, 200])
def test_states_are_those_of_the_oracle(device: Any, hidden: int) -> None:
    made = model(hidden)
    ids, cu_seqlens = batch(LENGTHS if hidden < 100 else [3, 2])
    student = CudaStudent(made.config, made.tensors, 1)
    assert student.precision == "int8"
    levels = student.logits(ids, cu_seqlens)
    if hidden > 1:
        check(device, made, levels, ids, cu_seqlens)
    here = Student(made.config, made.tensors, 1).logits(ids, cu_seqlens)
    share, largest = OTHERS[device.name]
    assert (levels != here).mean() <= share
    assert np.abs(levels - here).max(initial=0) <= largest


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("rows", "cluster", "hidden"),
    [(8, 1, 40), (8, 2, 25), (8, 4, 57), (16, 1, 20), (16, 2, 33), (32, 1, 20), (32, 2, 24)],
)
def test_no_result_depends_on_the_plan(
    device: Any,
    rows: int,
    cluster: int,
    hidden: int,
    resident: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = model(hidden)
    ids, cu_seqlens = batch(LENGTHS * 2)
    student = CudaStudent(made.config, made.tensors, 1)
    levels = student.logits(ids, cu_seqlens)
    check(device, made, levels, ids, cu_seqlens)
    info = _backend.device_info(0)
    if info["max_cluster"] < cluster:
        pytest.skip(f"this GPU has no clusters of {cluster} blocks")
    plan = _backend.lstm_plan
    if not resident:  # all that a block needs but its weights
        least = plan("int8", False, hidden, 38, 0, rows, cluster)
        weights = -(-hidden // 8) * -(-hidden // 32) * 1024
        info = {**info, "shared_memory": least.shared_memory - weights // cluster // 2}
        monkeypatch.setattr(_backend, "device_info", lambda device: info)
    plan.cache_clear()
    chosen = functools.partial(plan, rows=rows, cluster=cluster)
    monkeypatch.setattr(_backend, "lstm_plan", chosen)
    try:
        assert chosen("int8", False, hidden, 38, 0).resident == resident
        for reverse in "01":  # the order of warps, in the emulation
            monkeypatch.setenv("XDF_EMULATED_REVERSE", reverse)
            np.testing.assert_array_equal(student.logits(ids, cu_seqlens), levels)
    finally:
        plan.cache_clear()


def test_a_sentence_alone_is_the_sentence_among_others(device: Any) -> None:
    made = model(19)
    ids, cu_seqlens = batch()
    student = CudaStudent(made.config, made.tensors, 1)
    whole = student.logits(ids, cu_seqlens)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        alone = student.logits(ids[begin:end], np.array([0, end - begin], np.int32))
        np.testing.assert_array_equal(alone, whole[begin:end])


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
def test_pooled_states(device: Any, pooling: str) -> None:
    """Given the states, pooling is exact and the output layer in float32, as on the CPU."""
    made, of_states = model(18, pooling), model(18)
    shared = {k: v for k, v in made.tensors.items() if "output" not in k}
    ids, cu_seqlens = batch()
    states = CudaStudent(of_states.config, {**of_states.tensors, **shared}, 1)
    levels = states.logits(ids, cu_seqlens).astype(np.float64)
    got = CudaStudent(made.config, made.tensors, 1).class_logits(ids, cu_seqlens)
    weight, scales = as_bytes(made.tensors, "output.weight")
    for text, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        own, pooled = levels[begin:end], np.zeros(36)
        if len(own) and pooling == "max":
            pooled = own.max(axis=0)
        elif len(own) and pooling == "mean":
            pooled = own.mean(axis=0)
        elif len(own):
            pooled = np.concatenate([own[-1, :18], own[0, 18:]])
        scores = pooled / 63 @ (weight * scales[:, None]).T + made.tensors["output.bias"]
        np.testing.assert_allclose(got[text], scores, rtol=0, atol=2e-6 * np.abs(scores).max())


def test_what_bytes_do_not_have(device: Any) -> None:
    with pytest.raises(ValueError, match="'int8' has no backward pass"):
        _backend.lstm_plan("int8", True, 8, 1, 0)
    with pytest.raises(ValueError, match="'int8' is packed from bytes, for the forward pass"):
        device.extension.lstm_pack("int8", False, 8, True, 0, 0, 0, 0, 0)
    plan = _backend.lstm_plan("int8", False, 8, 1, 0)
    with pytest.raises(ValueError, match="scales: must be given for kind 'int8'"):
        device.extension.lstm_forward("int8", 8, plan, 1, 1, *[0] * 4, "float16", *[0] * 6)


@pytest.mark.parametrize("hidden", [1, 5])
def test_packing_keeps_every_weight_once(device: Any, hidden: int) -> None:
    import torch

    # Each weight of a direction can be told by its value.
    weights = torch.arange(1, 1 + 4 * hidden * hidden, dtype=torch.int8).view(4 * hidden, hidden)
    both = [weights.to(device.name), (-weights).to(device.name)]
    size = device.extension.lstm_packed_size("int8", False, hidden)
    packed = torch.full((size,), 111, dtype=torch.int8, device=device.name)
    pointers = [tensor.data_ptr() for tensor in (*both, packed)]
    device.extension.lstm_pack("int8", False, hidden, False, *pointers, *cuda._place(packed))
    for direction, weight in enumerate(both):
        mine = packed.view(2, -1)[direction]
        assert torch.equal(mine[mine != 0].sort().values, weight.flatten().sort().values)
