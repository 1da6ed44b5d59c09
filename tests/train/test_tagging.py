"""What a tagger learns from a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xdistil_fast.train.alignment import IGNORED
from xdistil_fast.train.cache import Batch
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.tagging import Tagging
from xdistil_fast.train.teacher import Teacher
from xdistil_fast.train.vocabulary import cut_vocabulary

WIDTH = 6
TARGETS = np.array([1, 2, 2, 0, 0, IGNORED, IGNORED, IGNORED, IGNORED])


@pytest.fixture(scope="module")
def teacher(inputs: dict[str, Any]) -> Teacher:
    return Teacher.from_pretrained(inputs["teacher"], "cpu")


@pytest.mark.parametrize("min_count", [1, 8])
def test_losses_where_pieces_are_respelled(teacher: Teacher, min_count: int) -> None:
    random = np.random.default_rng(0)
    counts = np.full(len(teacher.word_piece_embeddings()), 9)
    names = {i: p for p, i in teacher.tokenizer.get_vocab().items()}
    rare = [i for i, p in names.items() if len(p) > 2 and p[0] not in "[#"][:2]
    counts[rare] = 1  # with min_count 8 they are spelled with others
    vocabulary = cut_vocabulary(teacher.tokenizer, counts, min_count)
    batch = Batch(
        ids=np.array([rare[0], 9, 17, 11, 12, rare[1], 19, 13, 9], np.int32),
        cu_seqlens=np.array([0, 5, 9], np.int32),
        targets=TARGETS,
        logits=random.normal(size=(9, len(teacher.labels))).astype(np.float32),
        representation=random.normal(size=(9, WIDTH)).astype(np.float32),
    )
    config = DistillConfig(
        teacher="t", train=("a",), dev=("b",), output="o", student="5x4", schedule="d4.1",
        min_piece_count=min_count,
    )  # fmt: skip
    task = Tagging(config, teacher.labels, vocabulary, [], WIDTH)
    student = task.build(random.normal(size=(len(vocabulary), 5)).astype(np.float32))
    with torch.no_grad():
        found = task.losses(batch, ["hard", "soft", "representation"], None)
        ids, source = vocabulary.respell(batch.ids)
        assert (len(ids) > 9) == (min_count > 1)
        offsets = np.searchsorted(source, batch.cu_seqlens).astype(np.int32)
        states = student.encode(student.on_device(ids), student.on_device(offsets), None)
        emissions = student.emissions(states).double().numpy()
        assert student.projection is not None
        projected = student.projection(states).double().numpy()
    head = np.r_[True, source[1:] != source[:-1]]  # the first spelling of the teacher's piece
    gold = TARGETS[source]
    gold = np.where(head, gold, np.where(gold == 1, 2, gold))  # B-X goes on as I-X
    log_p = emissions - np.log(np.exp(emissions).sum(1, keepdims=True))
    known = gold != IGNORED
    assert known.sum() == (TARGETS[source] != IGNORED).sum()
    total = len(ids)
    wanted = {
        "hard": -log_p[known, gold[known]].sum() / total,
        "soft": np.square(emissions - batch.logits[source])[head].sum() / emissions.size,
        "representation": np.square(projected - batch.representation[source])[head].sum()
        / projected.size,
    }
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name
