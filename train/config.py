"""Settings of a distillation run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from xdistil_fast import _core
from xdistil_fast.model_config import POOLINGS
from xdistil_fast.train.augmentation import parse_augmentation
from xdistil_fast.train.schedules import LOSSES, SCHEDULES, Stage

PathLike: TypeAlias = "str | Path"

TASKS = ("tagging", "classification")
DEVICES = ("auto", "cpu", "cuda")
HEADS = ("softmax", "crf")
_POOLING = "max"
DECAYS = ("cosine", "linear")
STORED = ("float32", "float16")
PRECISIONS = ("auto", "float32", "bfloat16")
LOGIT_LOSSES = ("mse", "kl", "marginals", "hard")
REPRESENTATION_LOSSES = ("mse", "cosine", "kld")
EMBEDDING_STARTS = ("svd", "random")
_LABEL_SCHEDULES = ("d0", "d0-s")
_SCHEDULES = {"tagging": "d4.1", "classification": "joint-labels"}

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

# What may differ between the attempts of one run: where it works and how it reports, not what it
# computes.
_NOT_IDENTITY = ("output", "cache", "device", "checkpoint_minutes", "progress")


@dataclass(frozen=True)
class DistillConfig:
    """Settings of :func:`xdistil_fast.train.distill`.

    Attributes:
        teacher: folder or Hub id of a fine-tuned token or sequence classifier.
        train: labelled files: hard and soft loss. These, and those of ``dev`` and ``transfer``, may
            have their language before them: ``de=FILE``.
        dev: labelled files that choose the best epoch, by F1; where they have languages, by its
            mean over these.
        output: the student's folder; must not exist.
        transfer: unlabelled files: soft loss.
        teacher_precision: the teacher is asked in: ``float32``, ``bfloat16``, or ``auto``: the
            latter where it is done in hardware.
        label_map: entity types renamed (or dropped, None) in ``train`` and ``dev``.
        task: ``tagging`` of words, or ``classification`` of texts; of the latter ``train`` and
            ``dev`` are read by :mod:`~xdistil_fast.train.documents`, and a line of ``transfer``
            is a text.
        pooling: of a text's states: ``max``, ``mean`` or ``last``; for ``classification``.
        student: ``"ExH"``: embedding size and hidden size of each direction.
        head: ``softmax`` or ``crf``.
        projected: whether the output layer reads a projection of the states, with GELU: the one
            that learns the teacher's hidden states, as wide as these are kept.
        schedule: the recipe, a name of :data:`~xdistil_fast.train.schedules.SCHEDULES`; None for
            the best measured, ``d4.1`` for tagging and ``joint-labels`` for classification.
        epochs: passes over the text of each fit of the schedule, at most.
        patience: epochs without a better score on ``dev`` after which a fit ends; 0 for no limit,
            None for what the schedule says.
        lr: highest learning rate of Adam.
        batch_size: sentences a step.
        warmup: share of the steps of a fit in which the learning rate rises from 0.
        decay: how it falls to 0 afterwards, ``cosine`` or ``linear``.
        dropout: share of embedding and BiLSTM output elements set to 0 in training.
        clip: largest norm of the gradient of all parameters; 0 for no limit.
        precision: what the BiLSTM's products take in training: ``float32``, ``bfloat16`` on a
            processor that multiplies it, or ``auto``: the latter where it is to be had; weights,
            gradients and states are float32 in all.
        hard_weight: factor of the loss on labels.
        soft_weight: factor of the loss on the teacher's logits.
        logit_loss: how logits are compared: ``mse``, ``kl`` of their softmax, ``marginals``, kl of
            a CRF's marginals (head ``crf``), or ``hard``: the teacher's best label is learned.
        temperature: divides the logits in ``kl`` and ``marginals``.
        representation_weight: factor of the loss on the teacher's hidden states, in schedules that
            have it.
        representation_loss: how hidden states are compared: ``mse``, ``cosine``, or ``kld``, the
            paper's (on full width only).
        representation_size: principal components of the teacher's hidden states that are kept; 0
            for the states as they are, None for 128, or all where they have fewer elements, and 0
            for ``kld``.
        teacher_layer: encoder layer they are taken from, from 1; -1 is the last, -2 the one before.
            None for the paper's 7 of 12, in a teacher of another depth the one in its place; of a
            classifier the last.
        labelled_share: share of each batch that is drawn from labelled text in stages that train
            on labels and logits; 0 to take sentences as they come. The loss on labels is divided
            by all pieces of a batch, so a large transfer text weakens it; a share of, say, 0.25 or
            a larger ``hard_weight`` restores it.
        embeddings: start of the embedding table: ``svd`` of the teacher's, ``random``, or a file
            (.npy [V, E] in the order of the teacher's pieces, or text lines ``piece v1 ... vE``).
        embedding_dtype: how the table is stored, ``float32`` or ``float16``.
        min_piece_count: pieces seen less often are spelled with shorter ones.
        max_length: most pieces of a sentence; longer ones are cut at a word border and go on as
            a further sentence.
        augment: copies of sentences that the teacher labels as further transfer text, such as
            ``swap=1,dropout=0.5`` (:mod:`~xdistil_fast.train.augmentation`).
        language_sampling: languages are drawn in proportion to their number of sentences to this
            power, 0 to 1 (:mod:`~xdistil_fast.train.languages`).
        keep_dev_sentences: keep transfer sentences that also stand in ``dev``.
        cache: folder for the teacher's logits, to be used again by other runs; without it they
            lie with the unfinished output and go when it is done.
        device: where teacher and student compute: ``cpu``, ``cuda``, or ``auto``: a GPU where there
            is one (:func:`~xdistil_fast.train.student.student_device`). A run may be gone on with
            on another device where ``precision`` is named, as ``auto`` is another one there; the
            same bytes for the same seed are promised for the CPU.
        batch_pieces: pieces the teacher labels at once.
        checkpoint_minutes: time between checkpoints; one is also made after each epoch.
        seed: of initial values, shuffles and dropout.
        progress: show progress bars.

    Raises:
        ValueError: a value out of its range, naming it.
        TypeError: ``train``, ``dev`` or ``transfer`` is one string instead of several.
    """

    teacher: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    output: str
    transfer: tuple[str, ...] = ()
    teacher_precision: str = "auto"
    label_map: Mapping[str, str | None] | None = None
    task: str = "tagging"
    pooling: str = _POOLING
    student: str = "100x200"
    head: str = "softmax"
    projected: bool = False
    schedule: str | None = None
    epochs: int = 4
    patience: int | None = None
    lr: float = 3e-3
    batch_size: int = 64
    warmup: float = 0.05
    decay: str = "cosine"
    dropout: float = 0.1
    clip: float = 5.0
    precision: str = "auto"
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    logit_loss: str = "mse"
    temperature: float = 1.0
    representation_weight: float = 1.0
    representation_loss: str = "mse"
    representation_size: int | None = None
    teacher_layer: int | None = None
    labelled_share: float = 0.0
    embeddings: str = "svd"
    embedding_dtype: str = "float32"
    min_piece_count: int = 1
    max_length: int = 256
    augment: str = ""
    language_sampling: float = 1.0
    keep_dev_sentences: bool = False
    cache: str | None = None
    device: str = "auto"
    batch_pieces: int = 8192
    checkpoint_minutes: float = 2.0
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        """Checks every value; paths become strings, lists tuples."""
        for name in ("train", "dev", "transfer"):
            value = getattr(self, name)
            if isinstance(value, (str, Path)):
                raise TypeError(f"{name} is {str(value)!r}; it must be a list of paths")
            object.__setattr__(self, name, tuple(str(path) for path in value))
        for name in ("teacher", "output", "embeddings"):
            object.__setattr__(self, name, str(getattr(self, name)))
        if self.cache is not None:
            object.__setattr__(self, "cache", str(self.cache))
        for name in ("train", "dev"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; at least one labelled file is needed")
        _one_of("task", self.task, TASKS)
        if self.schedule is None:
            object.__setattr__(self, "schedule", _SCHEDULES[self.task])
        _one_of("schedule", self.schedule, tuple(SCHEDULES))
        if self.schedule in _LABEL_SCHEDULES and self.transfer:
            raise ValueError(
                f"schedule {self.schedule!r} trains on labels alone and takes no transfer text; "
                f"transfer is {list(self.transfer)}"
            )
        if self.schedule in _LABEL_SCHEDULES and self.augment:
            raise ValueError(
                f"augment is {self.augment!r}; its copies are labelled by the teacher, and what is "
                "trained on here are labels alone; allowed: ''"
            )
        if self.label_map is not None:
            object.__setattr__(self, "label_map", dict(self.label_map))
        parse_size(self.student)
        _one_of("device", self.device, DEVICES)
        _one_of("teacher_precision", self.teacher_precision, PRECISIONS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("head", self.head, HEADS)
        _one_of("logit_loss", self.logit_loss, LOGIT_LOSSES)
        _one_of("representation_loss", self.representation_loss, REPRESENTATION_LOSSES)
        _one_of("decay", self.decay, DECAYS)
        _one_of("embedding_dtype", self.embedding_dtype, STORED)
        _one_of("precision", self.precision, PRECISIONS)
        if self.precision == "bfloat16" and not _core.multiplies_bfloat16():
            raise ValueError(
                "precision is 'bfloat16', which the instruction set in use, "
                f"{_core.active_isa()}, does not multiply; allowed: 'auto', 'float32'"
            )
        _at_least("epochs", self.epochs, 1)
        if self.patience is not None:
            _at_least("patience", self.patience, 0)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("min_piece_count", self.min_piece_count, 1)
        _at_least("max_length", self.max_length, 8)
        _at_least("batch_pieces", self.batch_pieces, 1)
        _at_least("seed", self.seed, 0)
        _within("language_sampling", self.language_sampling, 0.0, 1.0)
        object.__setattr__(self, "augment", str(parse_augmentation(self.augment)))
        _within("lr", self.lr, 0.0, 1.0, open_low=True)
        _within("warmup", self.warmup, 0.0, 1.0)
        _within("dropout", self.dropout, 0.0, 0.95)
        _within("clip", self.clip, 0.0, math.inf)
        _within("hard_weight", self.hard_weight, 0.0, math.inf)
        _within("soft_weight", self.soft_weight, 0.0, math.inf)
        _within("representation_weight", self.representation_weight, 0.0, math.inf)
        _within("temperature", self.temperature, 0.0, math.inf, open_low=True)
        _within("labelled_share", self.labelled_share, 0.0, 0.95)
        if self.labelled_share and self.batch_size < 2:
            raise ValueError(
                f"labelled_share is {self.labelled_share!r} and batch_size is {self.batch_size}; "
                "allowed: a batch_size of 2 or more, to hold labelled and other sentences"
            )
        if self.labelled_share and not any(
            stage.data == "all" and "hard" in self.weights(stage) for stage in self.stages
        ):
            raise ValueError(
                f"labelled_share is {self.labelled_share:g} and schedule {self.schedule!r} has no "
                "stage that trains on labels among other text; allowed: 0, or a schedule with one"
            )
        if self.representation_size is not None:
            _at_least("representation_size", self.representation_size, 0)
            if self.projected and not self.representation:
                raise ValueError(
                    f"representation_size is {self.representation_size}, projected is True and "
                    f"schedule {self.schedule!r} has no hidden states: the projection then has "
                    "128 elements; allowed: None, or a schedule with hidden states"
                )
        if self.teacher_layer is not None and type(self.teacher_layer) is not int:
            raise ValueError(f"teacher_layer is {self.teacher_layer!r}; allowed: a whole number")
        if self.logit_loss == "marginals" and self.head != "crf":
            raise ValueError("logit_loss is 'marginals' and head is not 'crf'; only a CRF has them")
        if self.logit_loss in ("mse", "hard") and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature!r} and logit_loss is {self.logit_loss!r}, which "
                "has none; allowed: 1, or logit_loss 'kl' or 'marginals'"
            )
        if self.task == "tagging" and self.pooling != _POOLING:
            raise ValueError(
                f"pooling is {self.pooling!r} and task is 'tagging', which has none; "
                f"allowed: {_POOLING!r}, the default"
            )
        if self.task == "classification" and self.head != "softmax":
            raise ValueError(
                f"task is 'classification' and head is {self.head!r}; allowed: head 'softmax'"
            )
        if self.representation_loss == "kld" and self.representation_size:
            raise ValueError(
                "representation_loss is 'kld', which is defined on the teacher's own components, "
                f"and representation_size is {self.representation_size}; allowed: 0"
            )
        _within("checkpoint_minutes", self.checkpoint_minutes, 0.0, math.inf, open_low=True)
        if self.language_sampling != 1 and self.labelled_share:
            raise ValueError(
                f"language_sampling is {self.language_sampling:g} and labelled_share "
                f"{self.labelled_share:g}: each says what a batch is made of; allowed: one of them"
            )
        for stage in self.stages:
            if not self.weights(stage):
                zero = ", ".join(f"{name}_weight" for name in stage.losses)
                raise ValueError(
                    f"schedule {self.schedule!r}, stage {stage.name!r}: nothing to train on where "
                    f"{zero} is 0"
                )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the schedule."""
        assert self.schedule is not None
        return SCHEDULES[self.schedule]

    def weights(self, stage: Stage) -> dict[str, float]:
        """Factors of the losses that a stage trains on: those that are not 0, by name."""
        weights = {
            name: getattr(self, f"{name}_weight") * stage.losses.get(name, 0.0) for name in LOSSES
        }
        return {name: weight for name, weight in weights.items() if weight}

    def patience_of(self, stage: Stage) -> int:
        """Epochs without a better score after which a fit of a stage ends; 0 for no limit."""
        return stage.patience if self.patience is None else self.patience

    @property
    def soft(self) -> bool:
        """Whether the teacher's logits are trained on."""
        return any("soft" in self.weights(stage) for stage in self.stages)

    @property
    def representation(self) -> bool:
        """Whether the teacher's hidden states are trained on."""
        return any("representation" in self.weights(stage) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that an unfinished run must share to be continued."""
        return {key: value for key, value in self.to_dict().items() if key not in _NOT_IDENTITY}


def parse_size(text: str) -> tuple[int, int]:
    """Embedding size E and hidden size H of ``"ExH"``.

    Raises:
        ValueError: another form, or a size beyond 16384.
    """
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    sizes = tuple(map(int, found.groups())) if found else (0, 0)
    if not found or max(sizes) > 16384:
        raise ValueError(
            f"student is {text!r}; allowed: ExH, embedding size and hidden size of each direction "
            "(1 to 16384), for example 100x200"
        )
    return sizes[0], sizes[1]


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _at_least(name: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise ValueError(f"{name} is {value!r}; allowed: a whole number from {low}")


def _within(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and math.isfinite(value)  # type: ignore[arg-type]
    if not good or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        above = "above" if open_low else "from"
        limit = "" if math.isinf(high) else f" to {high:g}"
        raise ValueError(f"{name} is {value!r}; allowed: a number {above} {low:g}{limit}")
