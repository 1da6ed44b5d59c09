"""Classifiers of texts on a GPU, and its emulation, against the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdistil_fast import Classifier
from xdistil_fast.cuda_student import CudaStudent
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.student import Student

POOLINGS = ("max", "mean", "last")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
# Texts of windows of pieces; the cores overlap no window's border.
WINDOWS = np.array([0, 1, 1, 4, 5, 7, 7], np.int32)
LENGTHS = [5, 9, 9, 4, 1, 0, 7]
CORES = [(0, 5), (0, 7), (2, 7), (2, 4), (0, 1), (0, 0), (3, 3)]


def model(pooling: str, hidden: int = 7) -> Any:
    config = ModelConfig(
        labels=("good", "bad", "so so"),
        vocab_size=30,
        embedding_size=5,
        hidden_size=hidden,  # odd: rows of 56 bytes, which nothing may take for multiples of 16
        task="text-classification",
        pooling=pooling,
    )
    random = np.random.default_rng(3)
    tensors = {
        name: random.normal(0, 0.7, shape).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    return SimpleNamespace(config=config, tensors=tensors)


def batch() -> tuple[Any, Any, Any]:
    random = np.random.default_rng(0)
    cu_seqlens = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    ids = random.integers(0, 30, cu_seqlens[-1]).astype(np.int32)
    cores = (cu_seqlens[:-1, None] + np.array(CORES)).astype(np.int32)
    return ids, cu_seqlens, cores


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("max_memory", [0, 1 << 30])
def test_scores_are_those_of_the_cpu(
    device: Any, precision: str, pooling: str, max_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(pooling)
    here = Student(made.config, made.tensors, 1, "float32")
    there = CudaStudent(made.config, made.tensors, 1, precision, max_memory)
    ids, cu_seqlens, cores = batch()
    for windows in ((), (WINDOWS, cores)):
        expected = here.class_logits(ids, cu_seqlens, *windows)
        got = there.class_logits(ids, cu_seqlens, *windows)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[precision])
        # A text without pieces: the bias, to the bit. With windows it is the second and the last.
        empty = 5 if not windows else 1
        np.testing.assert_array_equal(got[empty], made.tensors["output.bias"])
        for pieces in (1, 10):  # its parts lie in several groups
            monkeypatch.setattr("xdistil_fast.cuda_student.MAX_PIECES", pieces)
            np.testing.assert_array_equal(there.class_logits(ids, cu_seqlens, *windows), got)
        monkeypatch.undo()
    nothing, bounds = np.empty(0, np.int32), np.zeros(2, np.int32)
    np.testing.assert_array_equal(
        there.class_logits(nothing, bounds)[0], made.tensors["output.bias"]
    )
    assert there.class_logits(nothing, bounds[:1]).shape == (0, 3)


def test_a_text_alone_is_the_text_among_others(device: Any) -> None:
    made = model("mean")
    student = CudaStudent(made.config, made.tensors, 1, "bfloat16")
    ids, cu_seqlens, _ = batch()
    whole = student.class_logits(ids, cu_seqlens)
    for text, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        alone = student.class_logits(ids[begin:end], np.array([0, end - begin], np.int32))
        np.testing.assert_array_equal(alone[0], whole[text])


def test_wrong_batches(device: Any) -> None:
    made = model("max")
    student = CudaStudent(made.config, made.tensors, 1, "float32")
    ids, cu_seqlens, cores = batch()
    for bad in (-1, 30):
        with pytest.raises(ValueError, match="ids must be 0 to 29"):
            student.class_logits(np.full_like(ids, bad), cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 35"):
        student.class_logits(ids, cu_seqlens[:-1])
    with pytest.raises(ValueError, match="cu_windows must be given with cores"):
        student.class_logits(ids, cu_seqlens, WINDOWS)
    with pytest.raises(ValueError, match="cu_windows must ascend from 0 to 7"):
        student.class_logits(ids, cu_seqlens, WINDOWS[:-2], cores)
    with pytest.raises(ValueError, match="cores must ascend within their windows"):
        student.class_logits(ids, cu_seqlens, WINDOWS, cores + 1)
    with pytest.raises(ValueError, match="class_logits has its scores"):
        student.logits(ids, cu_seqlens)


def test_embedded_classifier(device: Any) -> None:
    texts = ["A film to see twice.", "", "Dull, dull, dull. " * 90]
    here = Classifier.from_pretrained("en-sentiment", threads=1, precision="bfloat16")
    there = Classifier.from_pretrained("en-sentiment", threads=1, device="cuda", max_memory=0)
    assert there.device == "cuda:0"
    # The last text has several windows.
    assert there.config.window < there.classify_batch(texts[2:]).pieces
    for mine, theirs in zip(here(texts, top_k=None), there(texts, top_k=None), strict=True):
        shares = {row["label"]: row["score"] for row in theirs}
        assert {row["label"]: row["score"] for row in mine} == pytest.approx(shares, abs=0.02)
    copy = pickle.loads(pickle.dumps(there))
    assert copy(texts) == there(texts)


def test_tagger_has_no_class_scores(device: Any) -> None:
    made = model("max")
    config = dataclasses.replace(
        made.config, task="token-classification", labels=("O", "B-A", "I-A"), pooling=None
    )
    student = CudaStudent(config, made.tensors, 1, "float32")
    with pytest.raises(ValueError, match="logits has its scores"):
        student.class_logits(*batch()[:2])
