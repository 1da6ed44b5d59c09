"""The task of tagging words: its losses, its scores and what its model folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xdistil_fast import student as serving
from xdistil_fast.labels import scheme_of
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.scoring import Scores, score
from xdistil_fast.train import losses
from xdistil_fast.train.alignment import IGNORED, align, inside_of
from xdistil_fast.train.cache import Batch
from xdistil_fast.train.config import DistillConfig, parse_size
from xdistil_fast.train.corpora import Corpus
from xdistil_fast.train.languages import language_report, languages_of, score_languages
from xdistil_fast.train.representation import projection_width
from xdistil_fast.train.student import Dropout, FloatArray, Student, tag_words
from xdistil_fast.train.teacher import Teacher
from xdistil_fast.train.vocabulary import Vocabulary

REPRESENTATION_LOSSES = {
    "mse": losses.representation_mse,
    "cosine": losses.representation_cosine,
    "kld": losses.representation_kld,
}


class Tagging:
    """Labels for pieces; :class:`~xdistil_fast.train.trainer.Task` for what its methods are.

    Attributes:
        metric: ``f1``, or its mean over languages where the files of ``dev`` have one.
        labels: C labels.
        vocabulary: the student's.
        student: set by :meth:`build`.
    """

    student: Student

    def __init__(
        self,
        config: DistillConfig,
        labels: Sequence[str],
        vocabulary: Vocabulary,
        dev: Sequence[Corpus],
        representation_width: int = 0,
    ) -> None:
        """Align the sentences of ``dev`` to the student's vocabulary.

        Args:
            config: all settings.
            labels: C labels, IOB2 or plain tags.
            vocabulary: the student's.
            dev: labelled sentences to score on.
            representation_width: R of the cache's representations; 0 where it has none.
        """
        self.config, self.labels, self.vocabulary = config, list(labels), vocabulary
        self.projection_width = projection_width(config, representation_width)
        self.inside = inside_of(self.labels)
        self.scheme = scheme_of(self.labels)
        self.dev_languages = languages_of(dev)
        self.metric = "macro_f1" if self.dev_languages else "f1"
        sentences = [sentence for corpus in dev for sentence in corpus.sentences]
        self.dev_tags = [sentence.tags or () for sentence in sentences]
        self.dev_words = [sentence.words or () for sentence in sentences]
        self.dev = align(vocabulary.tokenizer(), self.dev_words)

    def build(self, embeddings: FloatArray) -> Student:
        """Make the student from the start [V, E] of its table."""
        config = self.config
        self.student = Student(
            embeddings,
            parse_size(config.student)[1],
            len(self.labels),
            head=config.head,
            projection_size=self.projection_width,
            projected=config.projected,
            dropout=config.dropout,
            precision=config.precision,
            seed=config.seed,
        )
        return self.student

    def size(self, batch: Batch) -> int:
        """Number of pieces of the student."""
        return len(self.vocabulary.respell(batch.ids)[0])

    def losses(
        self, batch: Batch, wanted: Collection[str], generator: Dropout | None
    ) -> dict[str, Tensor]:
        """Losses of a batch, see :mod:`~xdistil_fast.train.losses`."""
        own, said = self._in_student_pieces(batch)
        on_device = self.student.on_device
        offsets = on_device(own.cu_seqlens)
        weights = None if said.all() else on_device(said.astype(np.float32))
        states = self.student.encode(on_device(own.ids), offsets, generator)
        found = {}
        if {"hard", "soft"} & set(wanted):
            emissions = self.student.emissions(states)
        if "hard" in wanted:
            found["hard"] = self._label_loss(emissions, on_device(own.targets), offsets)
        if "soft" in wanted:
            logits = on_device(own.logits)
            found["soft"] = self._soft_loss(emissions, logits, offsets, weights)
        if "representation" in wanted:
            assert self.student.projection is not None
            compare = REPRESENTATION_LOSSES[self.config.representation_loss]
            projected = self.student.projection(states)
            targets = on_device(own.representation)
            found["representation"] = compare(projected, targets, weights)
        return found

    def _label_loss(self, emissions: Tensor, targets: Tensor, offsets: Tensor) -> Tensor:
        if self.student.crf is None:
            return losses.hard_loss(emissions, targets)
        return losses.crf_loss(self.student.crf, emissions, targets, offsets)

    def _soft_loss(
        self, emissions: Tensor, logits: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        temperature = self.config.temperature
        if self.config.logit_loss == "mse":
            return losses.logit_loss(emissions, logits, weights)
        if self.config.logit_loss == "kl":
            return losses.kl_loss(emissions, logits, weights, temperature=temperature)
        if self.config.logit_loss == "hard":
            best = losses.best_labels(logits, weights)
            if self.student.crf is not None and weights is not None:
                # It needs a label everywhere: further spellings of a piece go on with its entity.
                inside = self.student.on_device(self.inside)[losses.best_labels(logits)]
                best = torch.where(weights > 0, best, inside)
            return self._label_loss(emissions, best, offsets)
        assert self.student.crf is not None
        return losses.crf_marginal_loss(
            self.student.crf, emissions, logits, offsets, weights, temperature=temperature
        )

    def _in_student_pieces(self, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        """A batch in the student's pieces, and on which of them the teacher has a say.

        Where a teacher's piece is spelled with several, its logits are those of the first.
        """
        ids, source = self.vocabulary.respell(batch.ids)
        heads = np.ones(len(ids), bool)
        heads[1:] = source[1:] != source[:-1]
        if heads.all():
            own = dataclasses.replace(batch, ids=ids)
        else:
            targets = batch.targets[source]
            rest = np.where(targets == IGNORED, IGNORED, self.inside[np.maximum(targets, 0)])
            own = Batch(
                ids=ids,
                cu_seqlens=np.searchsorted(source, batch.cu_seqlens).astype(np.int32),
                targets=np.where(heads, targets, rest),
                logits=batch.logits[source],
                representation=batch.representation[source],
            )
        return own, heads

    def evaluate(self, tensors: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        """Strict word-level scores on dev, by the code that users run; also by language."""
        found = self._tags(tensors)
        scores: dict[str, Any] = score(self.dev_tags, found, self.scheme).to_dict()
        if self.dev_languages:
            scores |= language_report(self._by_language(found))
            scores["macro_f1"] = scores["macro"]["f1"]
        return scores

    def against_teacher(
        self, tensors: dict[str, npt.NDArray[Any]], teacher: Teacher
    ) -> dict[str, Any]:
        """Scores on dev by language beside the teacher's, see ``languages.language_report``."""
        of_teacher = self._by_language(teacher.tag_words(self.dev_words))
        return language_report(self._by_language(self._tags(tensors)), of_teacher)

    def _tags(self, tensors: dict[str, npt.NDArray[Any]]) -> list[list[str]]:
        widened = {name: value.astype(np.float32) for name, value in tensors.items()}
        tagger = serving.Student(self.model_config(), widened)
        return tag_words(tagger, self.dev, self.labels)

    def _by_language(self, found: list[list[str]]) -> dict[str, Scores]:
        return score_languages(self.dev_languages, self.dev_tags, found, self.scheme)

    def model_config(self, **more: Any) -> ModelConfig:
        """``config.json`` of the student."""
        embedding_size, hidden_size = parse_size(self.config.student)
        return ModelConfig(
            labels=tuple(self.labels),
            vocab_size=len(self.vocabulary),
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            projection_size=self.projection_width if self.config.projected else 0,
            head=self.config.head,
            **more,
        )
