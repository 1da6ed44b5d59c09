"""Students from piece ids to logits: our kernels against every other runtime."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.corpus import Texts
from bench.duel import OURS, Case, Turns, duel
from bench.ours import IntArray, our_calls, random_student
from bench.peers import (
    ONNX_RUNTIME,
    ONNX_RUNTIME_INT8,
    OPENVINO,
    OPENVINO_BF16,
    TORCH,
    openvino_has_bfloat16,
)
from bench.student_peers import (
    BY_LENGTH,
    EQUAL,
    GIVEN,
    FloatArray,
    Logits,
    PaddedBatch,
    StudentPeers,
    padded_batches,
    ragged_logits,
    same_tags,
)
from bench.tables import SCALING
from xdistil_fast import Tagger
from xdistil_fast.model_io import ModelConfig, ModelFolder, Tensors

_PEER_BATCH = 32
_FLOAT32 = (TORCH, ONNX_RUNTIME, OPENVINO)


def _aims(float32: float, int8: float) -> dict[str, dict[str, float]]:
    """What we hold ourselves to, in each precision against peers of that precision."""
    return {"float32": dict.fromkeys(_FLOAT32, float32), "int8": {ONNX_RUNTIME_INT8: int8}}


def _dense_aims(hidden_size: int, shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    if shape == (32, 128):
        return _aims(1.5, 2.0 if hidden_size > 200 else 2.5)
    return _aims(1.0, 2.5 if shape == (1, 32) else 1.0)


@functools.lru_cache(maxsize=1)
def _random(size: tuple[int, int], projection_size: int) -> tuple[ModelConfig, Tensors]:
    return random_student(*size, projection_size)


@functools.lru_cache(maxsize=1)
def _random_peers(size: tuple[int, int], projection_size: int, threads: int) -> StudentPeers:
    return StudentPeers(_random(size, projection_size)[1], threads)


def _dense(vocab_size: int, batch: int, length: int) -> tuple[IntArray, IntArray]:
    random = np.random.default_rng(1)
    ids = random.integers(0, vocab_size, batch * length).astype(np.int32)
    return ids, np.arange(0, batch * length + 1, length, dtype=np.int32)


def _check(
    expected: FloatArray,
    ours: dict[str, FloatArray],
    peers: dict[str, dict[str, Logits]],
    batches: dict[str, list[PaddedBatch]],
) -> dict[str, float]:
    """Fails where float32 differs; returns how often the others give float32's tag."""
    agreement = {f"{OURS} {name}": same_tags(logits, expected) for name, logits in ours.items()}
    del agreement[f"{OURS} float32"]
    for peer, settings in peers.items():
        for name, run in settings.items():
            order = next(batches[key] for key in batches if name.endswith(key))
            logits = ragged_logits(run(), order)
            if peer in _FLOAT32:
                np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
            else:
                agreement[peer] = min(agreement.get(peer, 1.0), same_tags(logits, expected))
    return agreement


def _notes() -> dict[str, str]:
    if openvino_has_bfloat16():
        return {}
    return {OPENVINO_BF16: "not measured: this CPU has no bfloat16 and it would run float32"}


_SHAPES = [(32, 32), (32, 128), (1, 32), (1, 512)]
_SIZES = [(50, 100), (50, 200), (100, 200), (300, 600)]
_SCALING_SIZE = (100, 200)


def _dense_duel(
    benchmark: BenchmarkFixture,
    turns: Turns,
    group: str,
    size: tuple[int, int],
    shape: tuple[int, int],
    threads: int,
    task: str = "student, ids to logits",
    projection_size: int = 0,
) -> None:
    (embedding_size, hidden_size), (batch, length) = size, shape
    config, tensors = _random(size, projection_size)
    ids, cu_seqlens = _dense(config.vocab_size, batch, length)
    ours = our_calls(config, tensors, threads, ids, cu_seqlens)
    results = {name: call() for name, call in ours.items()}
    expected = results["float32"]
    batches = padded_batches(ids, cu_seqlens, batch)
    peers = _random_peers(size, projection_size, threads).all(batches, False, expected)
    agreement = _check(expected, results, peers, {"": batches})
    case = Case(
        group=group,
        task=task,
        batch=batch,
        length=length,
        pieces=batch * length,
        sizes={"E": embedding_size, "H": hidden_size},
        threads=threads,
        aims=_dense_aims(hidden_size, shape),
        notes=_notes(),
        agreement=agreement,
        parameters={OURS: sum(value.size for value in tensors.values())},
        headline=group != SCALING and size == _SCALING_SIZE,
    )
    duel(benchmark, case, ours, peers, turns)


@pytest.mark.parametrize("shape", _SHAPES, ids=[f"{b}x{t}" for b, t in _SHAPES])
@pytest.mark.parametrize("size", _SIZES, ids=[f"E{e}-H{h}" for e, h in _SIZES])
def bench_dense(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    size: tuple[int, int],
    shape: tuple[int, int],
) -> None:
    _dense_duel(benchmark, turns, "students, dense batches", size, shape, threads)


@pytest.mark.parametrize("shape", [(32, 128), (1, 32)], ids=["32x128", "1x32"])
def bench_projected(
    benchmark: BenchmarkFixture, turns: Turns, threads: int, shape: tuple[int, int]
) -> None:
    """A student whose output layer reads a projection of 128, and the same in other runtimes."""
    task = "projected student, ids to logits"
    group = "students, dense batches"
    _dense_duel(benchmark, turns, group, (50, 200), shape, threads, task, projection_size=128)


def bench_ragged(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    model: ModelFolder,
    texts: Texts,
    sample: list[str],
) -> None:
    config, tensors = model.config, model.tensors
    encoded = Tagger(config, tensors, model.tokenizer).tag_batch(sample).encoded
    ids, cu_seqlens = encoded.ids, encoded.cu_pieces
    ours = our_calls(config, tensors, threads, ids, cu_seqlens)
    results = {name: call() for name, call in ours.items()}
    expected = results["float32"]
    orders = {
        order: padded_batches(ids, cu_seqlens, _PEER_BATCH, order)
        for order in (GIVEN, BY_LENGTH, EQUAL)
    }
    all_peers = StudentPeers(tensors, threads)
    peers: dict[str, dict[str, Logits]] = {}
    for order, batches in orders.items():
        for peer, settings in all_peers.all(batches, order != EQUAL, expected).items():
            for name, run in settings.items():
                peers.setdefault(peer, {})[f"{name}, {order}" if name else order] = run
    agreement = _check(expected, results, peers, orders)
    case = Case(
        group="students, real text",
        task=f"student, ids to logits, {texts.name}",
        batch=len(sample),
        length=None,
        pieces=len(ids),
        sizes={"E": config.embedding_size, "H": config.hidden_size},
        threads=threads,
        aims=_aims(3.0, 3.0),
        notes=_notes(),
        agreement=agreement,
        headline=True,
    )
    duel(benchmark, case, ours, peers, turns)


_SCALING = [
    *((32, length, "all") for length in (8, 16, 64, 256)),
    *((batch, 32, "all") for batch in (2, 4, 8, 16, 64, 128)),
    (32, 32, "one"),
    (1, 32, "one"),
]


@pytest.mark.parametrize(
    ("batch", "length", "cores"), _SCALING, ids=[f"{b}x{t}-{n}-threads" for b, t, n in _SCALING]
)
def bench_scaling(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    batch: int,
    length: int,
    cores: str,
) -> None:
    """The points of the curves that the dense cases lack; fewer turns, for a figure alone."""
    if cores == "one" and threads == 1:
        pytest.skip("one core: the dense cases ran on one thread already")
    used = 1 if cores == "one" else threads
    before = torch.get_num_threads()
    torch.set_num_threads(used)
    try:
        few = Turns(min(3, turns.count), turns.seconds)
        task = "student, ids to logits" + (", one thread" if cores == "one" else "")
        _dense_duel(benchmark, few, SCALING, _SCALING_SIZE, (batch, length), used, task)
    finally:
        torch.set_num_threads(before)
