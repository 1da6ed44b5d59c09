"""Students and taggers on a GPU, and its emulation."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdistil_fast import Tagger
from xdistil_fast.cuda_student import CudaStudent, student_on
from xdistil_fast.model_io import load_folder, resolve_model
from xdistil_fast.quantization import as_floats
from xdistil_fast.student import Student

TEXTS = ["Angela Merkel met Tim Cook in Berlin.", "No name.", "", "Maersk moved to Nairobi. " * 9]
# Of scores of some units. In bfloat16 hidden states have 8 bits.
VOCABULARY = 40
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15, "int8": 0.6}


@pytest.fixture(scope="module")
def model() -> Any:
    """The embedded model, cut down to few pieces: the emulation takes its time."""
    folder = load_folder(resolve_model("en-ner"))
    tensors = dict(folder.tensors)
    for name in ("embedding.weight", "embedding.weight.scales"):
        tensors[name] = np.ascontiguousarray(tensors[name][:VOCABULARY])
    config = dataclasses.replace(folder.config, vocab_size=VOCABULARY)
    return SimpleNamespace(config=config, tensors=tensors)


def batch(vocab_size: int) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab_size, 60).astype(np.int32)
    return ids, np.array([0, 7, 7, 40, 41, 60], np.int32)


@pytest.fixture(scope="module")
def projected(model: Any) -> Any:
    """The same with a projection, of random weights in float32, before the output layer."""
    random = np.random.default_rng(0)
    config = dataclasses.replace(model.config, projection_size=20, precision="float32")
    tensors = {name: as_floats(model.tensors, name) for name in model.tensors}
    for name, shape in config.tensor_shapes().items():
        if name.startswith(("projection", "output")):
            tensors[name] = random.normal(0, 0.3, shape).astype(np.float32)
    tensors = {name: tensors[name] for name in config.tensor_shapes()}
    return SimpleNamespace(config=config, tensors=tensors)


@pytest.mark.parametrize("kind", ["model", "projected"])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("max_memory", [0, 1 << 30])
def test_scores_are_those_of_the_cpu(
    device: Any, kind: str, precision: str, max_memory: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    ids, cu_seqlens = batch(model.config.vocab_size)
    model_rows = model.config.vocab_size if max_memory else 0
    student = CudaStudent(model.config, model.tensors, 1, precision, max_memory)
    assert student.table_rows == model_rows
    # int8 rounds weights and states, and is compared with the same bytes.
    own = "int8" if precision == "int8" else "float32"
    expected = Student(model.config, model.tensors, 1, own).logits(ids, cu_seqlens)
    for max_pieces in (16_384, 10, 1):
        got = student.logits(ids, cu_seqlens, max_pieces)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[precision])
    assert np.array_equal(student.logits(ids, cu_seqlens), student.logits(ids, cu_seqlens))


def test_tagger_finds_the_same_entities(device: Any) -> None:
    here, there = (
        Tagger.from_pretrained("en-ner", threads=1),
        Tagger.from_pretrained("en-ner", threads=1, device="cuda", max_memory=0),
    )
    assert (here.device, there.device) == ("cpu", "cuda:0")
    assert there.precision == "int8"  # as the embedded model is stored
    for mine, theirs in zip(here(TEXTS), there(TEXTS), strict=True):
        assert [(e["word"], e["start"]) for e in mine] == [(e["word"], e["start"]) for e in theirs]
    copy = pickle.loads(pickle.dumps(there))
    assert copy.device == "cuda:0"
    assert copy(TEXTS) == there(TEXTS)


def test_wrong_devices(device: Any, model: Any) -> None:
    arguments = (model.config, model.tensors)
    for name in ("gpu", "cuda:", "cuda:-1", "CUDA", "cuda:٣", ""):
        with pytest.raises(ValueError, match="allowed: 'cpu', 'cuda', 'cuda:N'"):
            student_on(name, *arguments)
    with pytest.raises(TypeError, match="device is 0; it must be a string"):
        student_on(0, *arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: got 99, this machine has"):
        student_on("cuda:99", *arguments)
    with pytest.raises(ValueError, match="'float64'; allowed: 'float32', 'bfloat16', 'int8'"):
        student_on("cuda", *arguments, precision="float64")


def test_memory_that_does_not_suffice(device: Any) -> None:
    with pytest.raises(MemoryError, match="cannot have 70368744177664 bytes"):
        device.extension.Memory(1 << 46, 0)


def test_wrong_ids(device: Any, model: Any) -> None:
    student = CudaStudent(model.config, model.tensors, 1, "bfloat16", 0)
    size = model.config.vocab_size
    for bad in (-1, size):
        with pytest.raises(ValueError, match=f"ids must be 0 to {size - 1}"):
            student.logits(np.array([bad], np.int32), np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match="cu_seqlens"):
        student.logits(np.array([1, 1], np.int32), np.array([0, 3, 2], np.int32), 1 << 20)


def test_without_the_extension() -> None:
    code = """
import sys
sys.modules["xdistil_fast._cuda"] = None
from xdistil_fast import Tagger, _backend
print(_backend.cuda_report())
Tagger.from_pretrained("en-ner", threads=1, device="cuda")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'extension': 'no'" in result.stdout
    assert "DeviceError: this xdistil-fast was built without CUDA; build it" in result.stderr
