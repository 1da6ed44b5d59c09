"""The task of classifying texts: its input, student, losses and scores.

The student pools the BiLSTM's states of a text into one (max, mean or last) and puts the output
layer on that; nothing else differs from the student that tags. Its losses are those of
:mod:`~xdistil_fast.train.losses` with texts in place of pieces. Logits are compared as they are:
the code of Mukherjee and Hassan Awadallah (2019) regresses on log(p / (1 - p)) of the teacher's
probabilities, which for two classes is the difference of their logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from xdistil_fast import nn, torch_ops
from xdistil_fast.class_scoring import score_classes
from xdistil_fast.classifier import Classifier
from xdistil_fast.model_config import TEXT_CLASSIFICATION
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.train import losses
from xdistil_fast.train.cache import Batch, Cache
from xdistil_fast.train.config import DistillConfig, parse_size
from xdistil_fast.train.distributed import Ranks
from xdistil_fast.train.document_cache import DocumentCache, LabelledTexts, build_document_cache
from xdistil_fast.train.document_teacher import DocumentTeacher
from xdistil_fast.train.documents import Documents, read_documents
from xdistil_fast.train.label_maps import check_label_map
from xdistil_fast.train.representation import kept_components, projection_width
from xdistil_fast.train.student import Dropout, FloatArray, Student
from xdistil_fast.train.tagging import REPRESENTATION_LOSSES
from xdistil_fast.train.vocabulary import Vocabulary


class DocumentStudent(Student):
    """A student whose states are pooled: one row for each text.

    Args:
        embeddings: as for :class:`Student`.
        hidden_size: as for :class:`Student`.
        num_labels: as for :class:`Student`.
        pooling: ``max``, ``mean`` or ``last``.
        **more: as for :class:`Student`.
    """

    def __init__(
        self,
        embeddings: FloatArray,
        hidden_size: int,
        num_labels: int,
        *,
        pooling: str,
        **more: Any,
    ) -> None:
        super().__init__(embeddings, hidden_size, num_labels, **more)
        self.pool = nn.Pool(pooling)

    def encode(self, ids: Tensor, cu_seqlens: Tensor, generator: Dropout | None = None) -> Tensor:
        """Pooled states, [B, 2H]; arguments as for :meth:`Student.encode`.

        Dropout comes after pooling: a maximum over states of which some are dropped and the others
        made larger would not be that of the student as it is served.
        """
        values = torch_ops.embedding(self.embedding.weight, ids)
        values = self._drop(values, generator)
        pooled: Tensor = self.pool(self._states(values, cu_seqlens), cu_seqlens)
        return self._drop(pooled, generator)


class Classification:
    """Classes for texts; :class:`~xdistil_fast.train.trainer.Task` for what its methods are.

    Attributes:
        labels: C class names.
        vocabulary: the student's.
        student: set by :meth:`build`.
    """

    metric = "accuracy"
    student: DocumentStudent

    def __init__(
        self,
        config: DistillConfig,
        labels: Sequence[str],
        vocabulary: Vocabulary,
        dev: Sequence[Documents],
        representation_width: int = 0,
    ) -> None:
        """Set up.

        Args:
            config: all settings.
            labels: C class names.
            vocabulary: the student's.
            dev: labelled texts to score on.
            representation_width: R of the cache's representations; 0 where it has none.
        """
        self.config, self.labels, self.vocabulary = config, list(labels), vocabulary
        self.projection_width = projection_width(config, representation_width)
        self.tokenizer = vocabulary.tokenizer()
        self.dev_texts = [text for documents in dev for text in documents.texts]
        self.dev_labels = [label for documents in dev for label in documents.labels]

    def build(self, embeddings: FloatArray) -> Student:
        """Make the student from the start [V, E] of its table."""
        config = self.config
        self.student = DocumentStudent(
            embeddings,
            parse_size(config.student)[1],
            len(self.labels),
            pooling=config.pooling,
            projection_size=self.projection_width,
            projected=config.projected,
            dropout=config.dropout,
            precision=config.precision,
            seed=config.seed,
        )
        return self.student

    def size(self, batch: Batch) -> int:
        """Number of texts."""
        return len(batch.targets)

    def losses(
        self, batch: Batch, wanted: Collection[str], generator: Dropout | None
    ) -> dict[str, Tensor]:
        """Losses of a batch, see :mod:`~xdistil_fast.train.losses`."""
        ids, source = self.vocabulary.respell(batch.ids)
        offsets = np.searchsorted(source, batch.cu_seqlens).astype(np.int32)
        on_device = self.student.on_device
        states = self.student.encode(on_device(ids), on_device(offsets), generator)
        found = {}
        if {"hard", "soft"} & set(wanted):
            emissions = self.student.emissions(states)
        if "hard" in wanted:
            found["hard"] = losses.hard_loss(emissions, on_device(batch.targets))
        if "soft" in wanted:
            logits = on_device(batch.logits)
            if self.config.logit_loss == "mse":
                found["soft"] = losses.logit_loss(emissions, logits)
            elif self.config.logit_loss == "hard":
                found["soft"] = losses.hard_loss(emissions, losses.best_labels(logits))
            else:
                temperature = self.config.temperature
                found["soft"] = losses.kl_loss(emissions, logits, temperature=temperature)
        if "representation" in wanted:
            assert self.student.projection is not None
            compare = REPRESENTATION_LOSSES[self.config.representation_loss]
            targets = on_device(batch.representation)
            found["representation"] = compare(self.student.projection(states), targets, None)
        return found

    def evaluate(self, tensors: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        """Accuracy and F1 on dev, by the code that users run."""
        widened = {name: value.astype(np.float32) for name, value in tensors.items()}
        classifier = Classifier(self.model_config(), widened, self.tokenizer)
        found = [prediction["label"] for prediction in classifier.pipe(self.dev_texts)]
        return score_classes(self.dev_labels, found).to_dict()

    def model_config(self, **more: Any) -> ModelConfig:
        """``config.json`` of the student."""
        embedding_size, hidden_size = parse_size(self.config.student)
        return ModelConfig(
            labels=tuple(self.labels),
            vocab_size=len(self.vocabulary),
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            projection_size=self.projection_width if self.config.projected else 0,
            task=TEXT_CLASSIFICATION,
            pooling=self.config.pooling,
            **more,
        )


class ClassificationJob:
    """Input of a distillation: labelled and unlabelled texts, and their teacher.

    Attributes:
        teacher: a sequence classifier.
        data: entries of ``run.json`` for all files.

    Raises:
        ValueError: files and teacher that do not go together.
    """

    def __init__(self, config: DistillConfig) -> None:
        for name, plain in (("augment", ""), ("language_sampling", 1)):
            if (value := getattr(config, name)) != plain:
                raise ValueError(
                    f"{name} is {value!r}; task 'classification' allows {plain!r} only"
                )
        self.config = config
        self.label_map = (
            None if config.label_map is None else check_label_map(config.label_map, classes=True)
        )
        train = tuple(read_documents(path, self.label_map) for path in config.train)
        self.dev = tuple(read_documents(path, self.label_map) for path in config.dev)
        hidden = () if config.keep_dev_sentences else self.dev
        self.texts = LabelledTexts(train, hidden, config.transfer)
        self.data = [
            *(documents.describe("train") for documents in train),
            *(documents.describe("dev") for documents in self.dev),
            *self.texts.describe(),
        ]
        self.teacher = DocumentTeacher.from_pretrained(
            config.teacher, config.device, precision=config.teacher_precision
        )
        for documents in (*train, *self.dev):
            if unknown := sorted(documents.classes - set(self.teacher.labels)):
                raise ValueError(
                    f"{documents.path}: classes {unknown} are not among the teacher's, which are "
                    f"{self.teacher.labels}; a label map can rename or drop them"
                )
        self._layer, self._components = None, 0
        if config.representation:
            last = -1 if config.teacher_layer is None else config.teacher_layer
            self._layer = self.teacher.resolve_layer(last)
            self._components = kept_components(config, self.teacher)

    def build_cache(self, root: Path, ranks: Ranks) -> tuple[DocumentCache, str]:
        """Have the teacher label all texts."""
        config = self.config
        content = [] if self.label_map is None else [str(self.label_map)]
        cache, key = build_document_cache(
            root,
            self.teacher,
            self.texts,
            [{**entry, "content": content} for entry in self.data if entry["role"] != "dev"],
            max_length=config.max_length,
            soft=config.soft,
            layer=self._layer,
            batch_pieces=config.batch_pieces,
            progress=config.progress,
            ranks=ranks,
        )
        if self._components:
            cache.reduce(self._components)
        return cache, key

    def task(self, vocabulary: Vocabulary, cache: Cache) -> Classification:
        """What the student learns."""
        return Classification(self.config, self.teacher.labels, vocabulary, self.dev, cache.width)
