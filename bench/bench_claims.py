"""The paper's claim on this machine: a student of E=50, H=2x200 against its teacher.

Mukherjee and Hassan Awadallah report 51 times the speed of mBERT at batch 32, length 32, on a
P100 against their own TensorFlow code. Here the plain teacher is torch in float32, the best one
whichever runtime is fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.bench_text import STUDENT_INT8, onnx_taggers, taggers
from bench.corpus import Texts
from bench.duel import OURS, Case, Turns, duel
from bench.onnx_tagger import onnx_settings
from bench.ours import our_calls, random_student
from bench.teacher_peers import MBERT, MINILM, FloatArray, TeacherPeers
from bench.text_peers import hf_pipeline, hf_tokenizer
from xdistil_fast.model_io import ModelFolder

_SIZE = (50, 200)
_VOCABULARY = 30_000
_CLAIM = 51.0
_TEXTS = 32
_TURNS = 3
# A runtime that takes so many times as long as torch in float32 gets no turns.
_HOPELESS = 2.0
# How far logits may be from those of torch in float32, relative to their size.
_EXACT, _ROUNDED = 1e-4, 0.1

PLAIN = f"{MBERT.name}, torch float32"
PIPELINE = f"{MBERT.name}, transformers pipeline"
ONNX_INT8_TEXT = f"{MBERT.name}, tokenizers + ONNX Runtime int8"

# transformers and torch warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mbert(threads: int) -> Iterator[TeacherPeers]:
    with TeacherPeers(MBERT, threads) as peers:
        yield peers


@pytest.fixture(scope="module")
def minilm(threads: int) -> Iterator[TeacherPeers]:
    with TeacherPeers(MINILM, threads) as peers:
        yield peers


def _few(turns: Turns) -> Turns:
    """Calls of a teacher take a second and more."""
    return Turns(min(_TURNS, turns.count), turns.seconds)


def _ids(batch: int, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.random.default_rng(1).integers(0, _VOCABULARY, (batch, length))


def _runtimes(
    peers: TeacherPeers, batch: int, length: int, torch_too: bool
) -> tuple[dict[str, dict[str, Callable[[], object]]], dict[str, str]]:
    """Every runtime of a teacher, after comparing their logits, and notes on them."""
    ids = _ids(batch, length)
    name = peers.size.name
    plain = peers.torch(ids)
    expected = plain()
    out: dict[str, dict[str, Callable[[], object]]] = {}
    notes: dict[str, str] = {}
    if torch_too:
        out[f"{name}, torch float32"] = {"": plain}
        autocast, side = peers.torch(ids, bfloat16=True), f"{name}, torch bfloat16"
        assert _error(autocast(), expected) < _ROUNDED
        times = [_seconds(autocast) / _seconds(plain) for _ in range(2)]
        if min(times) < _HOPELESS:
            out[side] = {"autocast": autocast}
        else:
            notes[side] = (
                f"left out: by autocast it took {min(times):.1f} times as long as float32 here"
            )
        exact = peers.onnx(ids, int8=False)
        assert _error(exact["spinning"](), expected) < _EXACT
        out[f"{name}, ONNX Runtime"] = dict(exact)
    small = peers.onnx(ids, int8=True)
    assert _error(small["spinning"](), expected) < _ROUNDED
    out[f"{name}, ONNX Runtime int8"] = dict(small)
    return out, notes


def _error(logits: FloatArray, expected: FloatArray) -> float:
    """Size of the difference relative to the logits, those of `O` left out: a large constant."""
    difference = np.linalg.norm((logits - expected)[..., 1:])
    return float(difference / np.linalg.norm(expected[..., 1:]))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize(("batch", "length"), [(32, 32), (1, 32)], ids=["32x32", "1x32"])
def bench_without_tokenising(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    mbert: TeacherPeers,
    minilm: TeacherPeers,
    batch: int,
    length: int,
) -> None:
    config, tensors = random_student(*_SIZE)
    total = batch * length
    ids = _ids(batch, length).reshape(total).astype(np.int32)
    cu_seqlens = np.arange(0, total + 1, length, dtype=np.int32)
    peers, notes = _runtimes(mbert, batch, length, torch_too=True)
    peers |= _runtimes(minilm, batch, length, torch_too=False)[0]
    case = Case(
        group="against teachers",
        task="student, ids to logits",
        batch=batch,
        length=length,
        pieces=total,
        sizes={"E": _SIZE[0], "H": _SIZE[1]},
        threads=threads,
        aims={"float32": {PLAIN: _CLAIM}, "int8": {PLAIN: _CLAIM}} if batch == 32 else {},
        notes={
            PLAIN: "eager, as transformers runs it; all teachers have random weights, on which "
            "speed does not depend",
            **notes,
        },
        parameters={
            OURS: sum(value.size for value in tensors.values()),
            **{peer: (mbert if MBERT.name in peer else minilm).parameters for peer in peers},
        },
        headline=True,
    )
    ours = our_calls(config, tensors, threads, ids, cu_seqlens)
    duel(benchmark, case, ours, peers, _few(turns))
    if batch == 32:
        benchmark.extra_info["notes"][f"the paper's {_CLAIM:.0f}×"] = _claim(benchmark.extra_info)


@pytest.mark.parametrize("batch", [_TEXTS, 1], ids=["many", "one"])
def bench_text(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    model: ModelFolder,
    mbert: TeacherPeers,
    texts: Texts,
    batch: int,
) -> None:
    if batch == 1:  # of middling length
        sample = [sorted(texts.sample(_TEXTS), key=len)[_TEXTS // 2]]
    else:
        sample = texts.sample(_TEXTS)
    ours = taggers(model, threads)
    tokenizer_json = model.tokenizer.to_str()
    teacher = onnx_settings(
        mbert.onnx_file(int8=True), tokenizer_json, model.config.labels, threads, time_major=False
    )
    student = onnx_taggers(model, threads, texts.sample(_TEXTS))[STUDENT_INT8]
    pipelines = hf_pipeline(mbert.model, hf_tokenizer(tokenizer_json))
    if batch == 1:
        pipelines = {"": next(iter(pipelines.values()))}
    pieces = ours["float32"].tag_batch(sample).pieces
    for tag in (next(iter(teacher.values())), next(iter(pipelines.values()))):
        assert [list(row) for row in tag(sample)] == [[]] * batch
    case = Case(
        group="against teachers",
        task=f"text to entities, {texts.name}",
        batch=batch,
        length=None,
        pieces=pieces,
        sizes={"E": model.config.embedding_size, "H": model.config.hidden_size},
        threads=threads,
        aims={"int8": {PIPELINE: 500.0, ONNX_INT8_TEXT: 300.0}},
        notes={
            PIPELINE: "float32; the teachers' heads say O everywhere, so that they spend no time "
            "on entities; they read the student's word pieces, so that all sides read as many",
        },
        headline=True,
    )
    duel(
        benchmark,
        case,
        _settings(ours, sample),
        {
            STUDENT_INT8: _settings(student, sample),
            PIPELINE: _settings(pipelines, sample),
            ONNX_INT8_TEXT: _settings(teacher, sample),
        },
        _few(turns),
    )


def _claim(info: dict[str, Any]) -> str:
    """The claim's ratio here: against the plain teacher, and against its fastest runtime."""
    parts = []
    for precision, ratios in info["ratios"].items():
        medians = {peer: q[1] for peer, q in ratios.items() if peer.startswith(MBERT.name)}
        best = min(medians, key=medians.__getitem__)
        parts.append(
            f"{precision} {medians[PLAIN]:.0f}× against {PLAIN}, {medians[best]:.0f}× against the "
            f"fastest runtime, {best}"
        )
    return "; ".join(parts)


def _settings(
    taggers: Mapping[str, Callable[[list[str]], object]], sample: list[str]
) -> dict[str, Callable[[], object]]:
    def call(tag: Callable[[list[str]], object]) -> Callable[[], object]:
        return lambda: tag(sample)

    return {name: call(tag) for name, tag in taggers.items()}
