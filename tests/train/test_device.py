"""Training on a GPU, as far as it shows without one: torch's fake tensors compute nothing, but they
know their device, and refuse to be mixed with those of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xdistil_fast import _backend
from xdistil_fast.cli import main
from xdistil_fast.train import student as students
from xdistil_fast.train.cache import Batch
from xdistil_fast.train.classification import Classification
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.distributed import joined
from xdistil_fast.train.student import Student, student_device
from xdistil_fast.train.tagging import Tagging
from xdistil_fast.train.teacher import Teacher
from xdistil_fast.train.trainer import Trainer
from xdistil_fast.train.vocabulary import Vocabulary, cut_vocabulary

GPU = torch.device("cuda:0")
WIDTH = 6


@pytest.fixture
def fake() -> Iterator[None]:
    """A GPU of fake tensors, which has no gradients: they would look for a real one."""
    environment = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def teacher(inputs: dict[str, Any]) -> Teacher:
    return Teacher.from_pretrained(inputs["teacher"], "cpu")


@pytest.fixture(scope="module")
def vocabulary(teacher: Teacher) -> Vocabulary:
    counts = np.ones(len(teacher.word_piece_embeddings()), np.int64)
    counts[-2:] = 0
    return cut_vocabulary(teacher.tokenizer, counts, 1)


def settings(**changes: Any) -> DistillConfig:
    return DistillConfig(
        teacher="t", train=("a",), dev=("b",), output="o", student="5x4", dropout=0.2, **changes
    )


def batch(rows: int, pieces: int = 9) -> Batch:
    """Outputs of the teacher for each piece, or for each of three texts."""
    random = np.random.default_rng(0)
    return Batch(
        ids=random.integers(4, 20, pieces).astype(np.int32),
        cu_seqlens=np.array([0, 4, 4, pieces], np.int32),
        targets=np.arange(rows) % 2,
        logits=random.normal(size=(rows, 5)).astype(np.float32),
        representation=random.normal(size=(rows, WIDTH)).astype(np.float32),
    )


def check(task: Any, rows: int, vocabulary: Vocabulary) -> None:
    with unset_fake_temporarily():
        student = task.build(np.zeros((len(vocabulary), 5), np.float32))
    student.to(GPU)
    assert task.student.device == GPU
    # A CRF's loss of labels takes as many sentences as have some: no size that fake tensors know.
    wanted = ["hard", "soft", "representation"][task.student.crf is not None :]
    for generator in (None, np.random.default_rng(0)):
        found = task.losses(batch(rows), wanted, generator)
        assert {name: loss.device for name, loss in found.items()} == dict.fromkeys(wanted, GPU)


CHOICES: list[dict[str, Any]] = [
    {},
    {"logit_loss": "kl", "temperature": 2.0, "representation_loss": "cosine"},
    {"head": "crf", "representation_loss": "kld", "representation_size": 0},
    {"head": "crf", "logit_loss": "kl"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_losses_of_words_are_where_the_student_is(
    choice: dict[str, Any], teacher: Teacher, vocabulary: Vocabulary, fake: None
) -> None:
    check(Tagging(settings(**choice), teacher.labels, vocabulary, [], WIDTH), 9, vocabulary)


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("logit_loss", ["mse", "kl", "hard"])
def test_losses_of_texts_are_where_the_student_is(
    pooling: str, logit_loss: str, vocabulary: Vocabulary, fake: None
) -> None:
    config = settings(task="classification", pooling=pooling, logit_loss=logit_loss)
    check(Classification(config, list("abcde"), vocabulary, [], WIDTH), 3, vocabulary)


def test_fake_tensors_refuse_another_device(vocabulary: Vocabulary, fake: None) -> None:
    """Else the tests above could not fail."""
    with unset_fake_temporarily():
        student = Student(np.zeros((5, 3), np.float32), 4, 2)
    student.to(GPU)
    with pytest.raises(ValueError, match="ids is on device cpu but table is on cuda:0"):
        student(torch.zeros(3, dtype=torch.int32), student.on_device(np.array([0, 3], np.int32)))
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        student.output.bias + torch.zeros(2)


def test_a_checkpoint_goes_on_on_another_device(
    tmp_path: Path, fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's moments come back where the student is trained now."""
    # Copies from one device to another, which fake tensors have not.
    monkeypatch.setattr(Student, "load", lambda self, tensors: None)
    config = settings(head="crf", epochs=3)
    cache: Any = SimpleNamespace(labelled=np.ones(4, bool), sentences=4)

    class Task:
        metric = "f1"

        def build(self, embeddings: Any) -> Student:
            with unset_fake_temporarily():
                return Student(embeddings, 4, 3, head="crf")

    def trainer(device: torch.device | None) -> Trainer:
        return Trainer(config, Task(), cache, tmp_path, device=device)  # type: ignore[arg-type]

    def start() -> Any:
        return np.ones((6, 5), np.float32)

    with unset_fake_temporarily():
        first = trainer(None)
        first.restore(6, 5, start)
        for parameter in first.trained.values():
            parameter.grad = torch.ones_like(parameter)
        first.optimizer.step()
        first.step = 7
        first.save()
    second = trainer(GPU)
    second.restore(6, 5, start)
    assert second.step == 7
    assert {p.device for p in second.student.parameters()} == {GPU}
    assert second.trained.keys() == first.trained.keys()
    slots = [slot for state in second.optimizer.state.values() for slot in state.values()]
    assert len(slots) == 3 * len(second.trained)
    assert {slot.device for slot in slots} == {GPU}


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, error: str = "") -> None:
    """A machine with so many of them, as torch sees it, and our extension or why not."""

    def device_info(device: int) -> dict[str, Any]:
        if error:
            raise _backend.DeviceError(error)
        return {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
    monkeypatch.setattr(students, "device_info", device_info)


def test_device_of_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cases: list[tuple[int, str, str, str | None]] = [
        # GPUs, what is wrong with the extension, processes; what is wrong with cuda
        (0, "", "1", "torch finds no GPU"),
        (1, "", "1", None),
        (4, "", "4", None),
        (2, "", "4", "4 processes train on 2 GPUs"),
        (1, "built without CUDA", "1", "built without CUDA"),
    ]
    for count, error, processes, message in cases:
        gpus(monkeypatch, count, error)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert student_device("cpu").type == "cpu"
        if message is None:
            own = torch.device("cuda", count - 1)
            assert student_device("auto") == student_device("cuda") == own
            continue
        assert student_device("auto").type == "cpu"
        with pytest.raises(_backend.DeviceError, match=message):
            student_device("cuda")


@pytest.mark.parametrize(
    ("count", "device", "backend", "own"),
    [
        (0, "auto", "gloo", None),
        (2, "cpu", "gloo", None),
        (2, "cuda", "cpu:gloo,cuda:nccl", 1),
        (1, "auto", "gloo", 0),  # teachers share the GPU, students are trained on the CPU
    ],
)
def test_processes_speak_by_what_their_tensors_need(
    count: int, device: str, backend: str, own: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    said: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: said.update(own=number))
    monkeypatch.setattr(torch.distributed, "init_process_group", said.update)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: said.update(ended=True))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with joined(device) as ranks:
        assert (ranks.rank, ranks.size) == (1, 2)
        assert "ended" not in said
    assert said.get("own") == own
    assert said["backend"] == backend
    assert said["ended"]


def test_no_gpu_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(monkeypatch, 0)
    config = settings(device="cuda")
    with pytest.raises(RuntimeError, match="device is 'cuda', but torch finds no GPU"):
        distill(config)
    files = ["--teacher", "none", "--train", "none", "--dev", "none", "-o", str(tmp_path / "out")]
    assert main(["distill", *files, "--device", "cuda"]) == 2
    assert "error: device is 'cuda', but torch finds no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_device_is_no_part_of_a_run() -> None:
    """So a run that was stopped on one may go on on another."""
    config = settings(device="cpu")
    assert dataclasses.replace(config, device="auto").identity() == config.identity()
    with pytest.raises(ValueError, match="device is 'tpu'; allowed: 'auto', 'cpu', 'cuda'"):
        settings(device="tpu")
