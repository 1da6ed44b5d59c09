"""Models whose output layer reads a projection: folders, precisions, and values refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdistil_fast import Classifier, Tagger
from xdistil_fast.model_config import ModelError
from xdistil_fast.model_io import load_folder, save_folder
from xdistil_fast.quantization import as_bytes, as_floats, quantize_tensors
from xdistil_fast.reference import student as oracle
from xdistil_fast.student import Student

MakeModel = Callable[..., Path]
IDS = np.arange(2, 40, dtype=np.int32)
CU_SEQLENS = np.array([0, 9, 9, 38], np.int32)


def expected(folder: Any, precision: str) -> Any:
    tensors = folder.tensors
    weight = as_bytes if precision == "int8" else as_floats
    bilstm: list[Any] = []
    for end in ("", "_reverse"):
        bias = tensors[f"bilstm.bias_ih_l0{end}"] + tensors[f"bilstm.bias_hh_l0{end}"]
        bilstm += [
            as_floats(tensors, f"bilstm.weight_ih_l0{end}"),
            weight(tensors, f"bilstm.weight_hh_l0{end}"),
            bias,
        ]
    layers = [
        (weight(tensors, f"{name}.weight"), tensors[f"{name}.bias"])
        for name in ("output", "projection")
    ]
    embedding = as_floats(tensors, "embedding.weight")
    return oracle.student_scores(
        IDS, CU_SEQLENS, embedding, bilstm, layers[0], precision, projection=layers[1]
    )


@pytest.mark.parametrize("head", ["softmax", "crf"])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_scores_are_the_oracle_s(
    make_model: MakeModel, tmp_path: Path, head: str, size: int
) -> None:
    folder = load_folder(make_model(tmp_path / "m", head=head, projection_size=size))
    assert folder.config.projection_size == size
    got = Student(folder.config, folder.tensors).logits(IDS, CU_SEQLENS)
    np.testing.assert_allclose(got, expected(folder, "float32"), rtol=1e-5, atol=1e-5)
    tagger = Tagger.from_pretrained(tmp_path / "m")
    assert tagger("Ada Lovelace wrote to Charles Babbage from London in 1843.") is not None
    assert tagger.parameters == sum(value.size for value in folder.tensors.values())


def test_int8_folder(make_model: MakeModel, tmp_path: Path) -> None:
    folder = load_folder(make_model(tmp_path / "m", projection_size=24))
    config = dataclasses.replace(folder.config, precision="int8")
    tensors = quantize_tensors(folder.tensors)
    assert tensors["projection.weight"].dtype == np.int8
    stored = load_folder(save_folder(tmp_path / "q", config, tensors, folder.tokenizer_json, ""))
    student = Student(stored.config, stored.tensors)
    got, want = student.logits(IDS, CU_SEQLENS), expected(stored, "int8")
    # A hidden state beside a tie may go to either side; most are the oracle's.
    assert np.median(np.abs(got - want)) < 1e-3
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
    # Quantised as it is loaded, it is the same.
    there = Student(folder.config, folder.tensors, precision="int8").logits(IDS, CU_SEQLENS)
    assert np.median(np.abs(got - there)) < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_classifier(make_model: MakeModel, tmp_path: Path, pooling: str, precision: str) -> None:
    labels = ("bad", "good")
    task = {"task": "text-classification", "pooling": pooling, "labels": labels}
    make_model(tmp_path / "m", projection_size=9, **task)
    texts = ["Ada Lovelace wrote to Charles Babbage.", "", "Oslo " * 60]
    exact = Classifier.from_pretrained(tmp_path / "m", threads=1)(texts)
    found = Classifier.from_pretrained(tmp_path / "m", threads=1, precision=precision)(texts)
    tolerance = {"float32": 1e-6, "bfloat16": 0.02, "int8": 0.2}[precision]
    for row, other in zip(found, exact, strict=True):
        if row["label"] == other["label"]:
            assert row["score"] == pytest.approx(other["score"], abs=tolerance)
        else:
            assert row["score"] == pytest.approx(1 - other["score"], abs=tolerance)


def test_config_says_it_only_where_there_is_one(make_model: MakeModel, tmp_path: Path) -> None:
    for size in (0, 3):
        path = make_model(tmp_path / str(size), projection_size=size) / "config.json"
        assert json.loads(path.read_text("utf-8")).get("projection_size", 0) == size
        assert ("projection_size" in path.read_text("utf-8")) == bool(size)


@pytest.mark.parametrize("value", [-1, True, "8", 1.0, None, 16_385, 10**30])
def test_sizes_refused(make_model: MakeModel, tmp_path: Path, value: Any) -> None:
    folder = make_model(tmp_path / "m", projection_size=8)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "projection_size": value}))
    with pytest.raises(ModelError, match=r"projection_size is .*an integer from 0 to 16384"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "'projection.bias' is unknown"), (9, r"'projection.weight' has shape \[8, 20\]")],
)
def test_tensors_of_another_size(
    make_model: MakeModel, tmp_path: Path, value: int, message: str
) -> None:
    folder = make_model(tmp_path / "m", projection_size=8)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "projection_size": value}))
    with pytest.raises(ModelError, match=message):
        load_folder(folder)
