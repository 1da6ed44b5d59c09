"""Teachers of text classification: Hugging Face sequence classifiers, and their fine-tuning.

A text longer than the model takes is read in windows that overlap by a quarter, and its logits are
the mean of theirs, each weighing as many pieces as lie nearer to it than to its neighbours. In
training a long text is cut into runs of ``max_length`` pieces at word borders, each with the text's
class. So nothing of a text is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tqdm import tqdm

from xdistil_fast.class_scoring import ClassScores, score_classes
from xdistil_fast.labels import validate_classes
from xdistil_fast.train.alignment import align_text, split_points, windows_of
from xdistil_fast.train.documents import Documents
from xdistil_fast.train.finetune import TeacherSettings, TrainingRun, fine_tune
from xdistil_fast.train.teacher import FloatArray, Progress, Teacher, names_of_config

_CHUNK = 1024  # texts given to the tokeniser at once


class DocumentTeacher(Teacher):
    """A sequence classifier with its tokeniser; `labels` are class names."""

    auto_model = transformers.AutoModelForSequenceClassification
    task = "text classification"

    @classmethod
    def labels_of_config(cls, name: str, config: transformers.PretrainedConfig) -> list[str]:
        """Class names by id.

        Raises:
            ValueError: fewer than two, or not distinct; or texts have several of them, or none.
        """
        problem = getattr(config, "problem_type", None)
        if problem not in (None, "single_label_classification"):
            raise ValueError(
                f"{name}: problem_type is {problem!r}; allowed: 'single_label_classification', one "
                "class for each text"
            )
        labels = names_of_config(config)
        try:
            validate_classes(labels)
        except ValueError as error:
            raise ValueError(
                f"{name}: no class names ({error}); 'xdistil teacher --task classification' makes "
                "such a model"
            ) from None
        return labels

    def document_outputs(
        self,
        sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]],
        batch_tokens: int = 8192,
        progress: Progress | None = None,
        *,
        layer: int | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Logits of texts, and the state that a layer has at their first token ([CLS]).

        Args:
            sequences: piece ids of each of N texts; one may be empty.
            batch_tokens: as for :meth:`Teacher.logits`.
            progress: called with the number of texts finished since the last call.
            layer: as :meth:`Teacher.resolve_layer` gives it; None for no states.

        Returns:
            [N, C] and [N, D], the latter [N, 0] without a layer.

        Raises:
            ValueError: as for :meth:`Teacher.logits`.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; allowed: 1 or more")
        arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        self._check_ids(arrays)
        width = self.hidden_size if layer is not None else 0
        logits = np.zeros((len(arrays), len(self.labels)), np.float32)
        states = np.zeros((len(arrays), width), np.float32)
        windows = [
            (index, *window)
            for index, ids in enumerate(arrays)
            for window in windows_of(len(ids), self.max_pieces) or [(0, 0, 0, 0)]
        ]
        pending = np.bincount([window[0] for window in windows], minlength=len(arrays))
        windows.sort(key=lambda w: w[1] - w[2])
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches(windows, self.batch_limit(batch_tokens)):
                own = self._forward_documents([arrays[i][a:b] for i, a, b, _, _ in batch], layer)
                done = 0
                for row, (index, _, _, keep_from, keep_to) in enumerate(batch):
                    share = np.float32((keep_to - keep_from) / max(1, len(arrays[index])))
                    share = share if len(arrays[index]) else np.float32(1)
                    logits[index] += share * own[0][row]
                    states[index] += share * own[1][row]
                    pending[index] -= 1
                    done += int(pending[index] == 0)
                if progress is not None and done:
                    progress(done)
        finally:
            self.model.train(was_training)
        return logits, states

    def classify(self, texts: Sequence[str], progress: Progress | None = None) -> list[str]:
        """Most probable class of each text."""
        found: list[str] = []
        for start in range(0, len(texts), _CHUNK):
            aligned = align_text(self.tokenizer, texts[start : start + _CHUNK])
            sequences = [aligned.pieces(i) for i in range(len(aligned))]
            logits, _ = self.document_outputs(sequences, progress=progress)
            found += [self.labels[i] for i in logits.argmax(axis=1).tolist()]
        return found

    def _forward_documents(
        self, pieces: Sequence[npt.NDArray[np.int64]], layer: int | None
    ) -> tuple[FloatArray, FloatArray]:
        output = self.forward(pieces, layer)
        logits = output.logits.to("cpu", torch.float32).numpy()
        if layer is None:
            return logits, np.zeros((len(pieces), 0), np.float32)
        first = output.hidden_states[layer][:, 0]
        return logits, first.to("cpu", torch.float32).numpy()


class _DocumentRun(TrainingRun):
    kind = DocumentTeacher
    metric = "accuracy"
    metric_name = "accuracy"

    @staticmethod
    def labels_of(train: Sequence[Documents], dev: Sequence[Documents]) -> list[str]:
        if not train or not dev:
            raise ValueError("both train and dev need at least one file")
        labels = sorted(frozenset[str]().union(*(documents.classes for documents in train)))
        if len(labels) < 2:
            raise ValueError(f"{train[0].path}: only one class, {labels}; at least 2 are needed")
        for documents in dev:
            if unknown := sorted(documents.classes - set(labels)):
                raise ValueError(
                    f"{documents.path}: classes {unknown} do not occur in train, which has "
                    f"{labels}; a label map can rename or drop them"
                )
        return labels

    def _prepare(self, train: Sequence[Documents], dev: Sequence[Documents]) -> None:
        index = {label: number for number, label in enumerate(self.teacher.labels)}
        texts = [text for documents in train for text in documents.texts]
        classes = [index[label] for documents in train for label in documents.labels]
        aligned = align_text(self.teacher.tokenizer, texts)
        self.ids = aligned.ids.astype(np.int64)
        self.class_of: dict[tuple[int, int], int] = {}
        for number, own in enumerate(classes):
            for run in split_points(aligned, number, self.max_length):
                self.runs.append(run)
                self.class_of[run] = own
        self.dev_texts = [text for documents in dev for text in documents.texts]
        self.dev_labels = [label for documents in dev for label in documents.labels]

    def _targets(
        self, runs: Sequence[tuple[int, int]], input_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        return np.array([self.class_of[run] for run in runs], np.int64)

    def _evaluate(self) -> tuple[float, ClassScores, dict[str, Any]]:
        assert isinstance(self.teacher, DocumentTeacher)
        with tqdm(
            total=len(self.dev_texts),
            desc="dev",
            unit="text",
            disable=None if self.progress else True,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            found = self.teacher.classify(self.dev_texts, bar.update)
        scores = score_classes(self.dev_labels, found)
        return scores.accuracy, scores, scores.to_dict()


def fine_tune_classifier(
    base: Path | str,
    train: Sequence[Documents],
    dev: Sequence[Documents],
    out: Path | str,
    settings: TeacherSettings | None = None,
    *,
    command: Sequence[str] = (),
    progress: bool = True,
    on_epoch: Callable[[int, Any], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune an encoder for text classification; keep the epoch with the best dev accuracy.

    Arguments, files, resuming and errors are those of
    :func:`~xdistil_fast.train.finetune.fine_tune`; the setting ``pieces`` means nothing here.
    """
    return fine_tune(
        base, train, dev, out, settings,
        command=command, progress=progress, on_epoch=on_epoch, run_class=_DocumentRun,
    )  # fmt: skip
