"""The training loop: a schedule's fits one after the other, for any task.

What is trained on and how it is scored is the task's (:class:`Task`); what is trained when is the
schedule's (:mod:`~xdistil_fast.train.schedules`).

Shuffles are drawn from the seed and the epoch, dropout from the seed and the step, both counted
over all fits. So a run that was killed and started again ends with the same bytes as one that was
not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from xdistil_fast.model_io import ModelConfig
from xdistil_fast.train import checkpoint
from xdistil_fast.train.cache import Batch, Cache
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.distributed import Ranks, SharedGenerator
from xdistil_fast.train.languages import epoch_order
from xdistil_fast.train.learning_rate import rate_factor
from xdistil_fast.train.schedules import LOSSES, Fit, Stage, fits_of, layers_of
from xdistil_fast.train.student import Dropout, FloatArray, Student, stored_tensors

Sentences: TypeAlias = "npt.NDArray[np.int64]"

_HELD_OUT = 1000  # sentences, at most: a tenth of a stage's text, to stop early by
_STATE = (
    "fit", "epoch", "step", "steps_before", "stale", "best_score", "best_epoch",
    "sums", "history", "pieces", "seconds",
)  # fmt: skip


class Task(Protocol):
    """What a task is to the training loop: its student, losses, scores and configuration.

    Attributes:
        metric: the figure of :meth:`evaluate` that chooses epochs, higher is better.
    """

    metric: str

    def build(self, embeddings: FloatArray) -> Student:
        """Make the student from the start [V, E] of its table; the task keeps it."""

    def size(self, batch: Batch) -> int:
        """Of how many things the losses of a batch are the mean: its weight among other parts."""

    def losses(
        self, batch: Batch, wanted: Collection[str], generator: Dropout | None
    ) -> dict[str, Tensor]:
        """Losses of a batch in the teacher's pieces.

        Args:
            batch: from the cache.
            wanted: names of ``schedules.LOSSES``.
            generator: source of dropout; without it nothing is dropped.

        Returns:
            A scalar for each loss wanted.
        """

    def evaluate(self, tensors: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        """Scores on dev of weights as they are stored; ``metric`` is among them."""

    def model_config(self, **more: Any) -> ModelConfig:
        """``config.json`` of the student."""


class Trainer:
    """One training run: student, optimiser, position, history.

    Attributes:
        best: weights of the best epoch so far of the fit that goes on, or of the last one.
        best_epoch: its number, counted over all fits from 1.
        history: one entry an epoch: ``epoch``, ``stage``, ``fit``, mean ``loss`` and its parts,
            and the score on dev, as ``dev_`` with the task's metric, or ``heldout_loss`` where
            the output layer is not trained.
        pieces: the teacher's pieces trained on so far.
        seconds: time spent, by kind of work.
    """

    def __init__(
        self,
        config: DistillConfig,
        task: Task,
        cache: Cache,
        part: Path,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Plan a run.

        Args:
            config: all settings.
            task: what is learned.
            cache: sentences with the teacher's outputs.
            part: working folder, for checkpoints.
            ranks: the processes that train together; this one alone if None.
            device: where the student is trained; the CPU if None.

        Raises:
            ValueError: a stage has no sentence to train on.
        """
        self.config, self.task, self.cache, self.part = config, task, cache, part
        self.ranks = ranks or Ranks()
        self.device = device or torch.device("cpu")
        self.metric = f"dev_{task.metric}"
        self.fits = [
            fit
            for stage in config.stages
            for fit in fits_of(stage, layers_of(config.weights(stage), config.projected))
        ]
        self.labelled = cache.labelled
        self.sentences = [self._split(fit.stage) for fit in self.fits]
        # Position: fits finished, epochs finished of the one that goes on, steps of the epoch.
        self.fit = self.epoch = self.step = 0
        self.steps_before = 0  # steps of all finished fits
        self.sums = dict.fromkeys(("loss", *LOSSES), 0.0)
        self.history: list[dict[str, Any]] = []
        self.stale = 0  # epochs of this fit since the best one
        self.best_score = [-math.inf, -math.inf]
        self.best_epoch = 0
        self.best: dict[str, FloatArray] = {}
        self.pieces = 0
        self.seconds = {"labelling": 0.0, "training": 0.0}

    def _split(self, stage: Stage) -> tuple[Sentences, Sentences]:
        """Sentences of a stage: trained on, and held out where dev cannot score it."""
        sentences = np.arange(self.cache.sentences)
        if stage.data != "all":
            sentences = sentences[self.labelled == (stage.data == "labelled")]
        if not len(sentences):
            raise ValueError(f"stage {stage.name}: there is no {stage.data} text to train on")
        if self._on_dev(stage):
            return sentences, sentences[:0]
        # Two numbers that are no epoch's, and the same for all stages.
        order = np.random.default_rng([self.config.seed, 2**32 - 1]).permutation(len(sentences))
        count = min(_HELD_OUT, math.ceil(len(sentences) / 10))
        held_out, rest = sentences[order[:count]], sentences[np.sort(order[count:])]
        return (rest if len(rest) else held_out), held_out

    def _on_dev(self, stage: Stage) -> bool:
        """Whether a stage trains the output layer, so that dev can tell its epochs apart."""
        return "output" in layers_of(self.config.weights(stage))

    def restore(self, rows: int, size: int, start_values: Callable[[], FloatArray]) -> None:
        """Make the student, from the checkpoint where there is one, else from start values.

        Args:
            rows: V.
            size: E.
            start_values: gives the start [V, E] of the table.
        """
        saved = checkpoint.load_checkpoint(self.part)
        self.ranks.wait()  # nobody writes one before all have read it
        first = start_values() if saved is None else np.zeros((rows, size), np.float32)
        self.student = self.task.build(first).to(self.device)
        if saved is None:
            self.ranks.copy_first(list(self.student.parameters()))
            self._begin_fit()
            return
        tensors, state = saved
        for name in _STATE:
            setattr(self, name, state[name])
        names = [name for name, _ in self.student.named_parameters()]
        self.student.load({name: tensors[f"weights/{name}"] for name in names})
        self.best = {
            name.removeprefix("best/"): value
            for name, value in tensors.items()
            if name.startswith("best/")
        }
        self._begin_fit()
        for name, parameter in self.trained.items():
            if f"step/{name}" in tensors:
                self.optimizer.state[parameter] = {
                    slot: torch.from_numpy(tensors[f"{slot}/{name}"]).to(self.device)
                    for slot in ("step", "exp_avg", "exp_avg_sq")
                }
        self._say(f"going on after {self._title(self.epoch)}, step {self.step}")

    def save(self) -> None:
        """Write a checkpoint; that of rank 0 is everybody's."""
        if not self.ranks.first:
            return
        tensors = {f"weights/{name}": value for name, value in self.student.tensors().items()}
        tensors.update({f"best/{name}": value for name, value in self.best.items()})
        for name, parameter in self.trained.items():
            # A parameter that no loss has reached yet has no state.
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{slot}/{name}"] = value.cpu().numpy()
        state = {name: getattr(self, name) for name in _STATE}
        checkpoint.save_checkpoint(self.part, tensors, state)

    def go(self) -> None:
        """Train what is left, with a checkpoint after each epoch and every few minutes."""
        with checkpoint.StopRequest() as stop:
            while self.fit < len(self.fits):
                patience = self.config.patience_of(self._fit.stage)
                while self.epoch < self._epochs and not 0 < patience <= self.stale:
                    self._epoch(stop)
                    self._end_epoch()
                    self.save()
                self._end_fit()

    @property
    def device_name(self) -> str:
        """What the record says of the device."""
        if self.device.type == "cpu":
            return "cpu"
        return f"{self.device.type} ({torch.cuda.get_device_name(self.device)})"

    @property
    def _fit(self) -> Fit:
        return self.fits[self.fit]

    @property
    def _epochs(self) -> int:
        return self._fit.stage.epochs or self.config.epochs

    def _shares(self) -> tuple[int, int]:
        """Labelled sentences of each batch, 0 for as they come; and steps of an epoch."""
        size, share = self.config.batch_size, self.config.labelled_share
        chosen = self.labelled[self.sentences[self.fit][0]]
        others = len(chosen) - int(chosen.sum())
        if not share or "hard" not in self.weights or not 0 < others < len(chosen):
            return 0, math.ceil(len(chosen) / size)
        count = min(max(1, round(share * size)), size - 1)
        return count, math.ceil(others / (size - count))

    def _begin_fit(self) -> None:
        """Freeze what the fit does not train, and make it an optimiser."""
        groups = self.student.groups()
        names = {name for group in self._fit.groups for name in groups[group]}
        self.trained = {}
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = None
            if name in names:
                self.trained[name] = parameter
        self.weights = self.config.weights(self._fit.stage)
        self.labelled_per_batch, self.steps = self._shares()
        self.lr = self._fit.stage.lr or self.config.lr
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=self.lr, fused=True)

    def _end_fit(self) -> None:
        """Hand the best weights to the next fit."""
        self.steps_before += self.epoch * self.steps
        self.student.load(self.best)
        self.fit, self.epoch, self.stale = self.fit + 1, 0, 0
        # The next fit must not be worse on dev, else its weights are dropped. Losses of different
        # fits are not compared.
        self.best_score[1] = -math.inf
        if self.fit < len(self.fits):
            self._begin_fit()
            self.save()

    def _end_epoch(self) -> None:
        """Score the epoch, keep its weights if they are the best, enter it into the history."""
        means = {name: total / self.step for name, total in self.sums.items()}
        tensors = self.student.tensors()
        if self._on_dev(self._fit.stage):
            shown = self.metric
            value = self.ranks.first_does(
                lambda: float(self.task.evaluate(self.stored(tensors))[self.task.metric])
            )
            # The score on dev may stand still, at 0 as a rule while the output layer alone is
            # trained. What further fits build upon must get better all the same: the loss tells
            # equal epochs apart. A single fit keeps the first of them.
            score = [value, -means["loss"] if len(self.fits) > 1 else 0.0]
        else:
            shown, value = "heldout_loss", self.ranks.first_does(self._held_out_loss)
            score = [-1.0, -value]  # any score on dev is better
        if score > self.best_score:
            self.best, self.best_score = tensors, score
            self.best_epoch, self.stale = len(self.history) + 1, 0
        else:
            self.stale += 1
        line = f"{self._title(self.epoch + 1)}: loss {means['loss']:.4f}, "
        self._say(line + f"{shown.replace('_', ' ')} {value:.4g}")
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                "stage": self._fit.stage.name,
                "fit": self._fit.name,
                **means,
                shown: value,
            }
        )

    def _epoch(self, stop: checkpoint.StopRequest) -> None:
        config, steps = self.config, self.steps
        order = self._order()
        pieces = round(self.cache.pieces * len(order) / self.cache.sentences)
        started = saved = time.perf_counter()
        self.student.train()
        with tqdm(
            total=pieces,
            desc=self._title(self.epoch + 1),
            unit="piece",
            unit_scale=True,
            disable=None if config.progress else True,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            if self.step:
                bar.update(pieces * self.step // steps)
            while self.step < steps:
                chosen = order[self.step * config.batch_size :][: config.batch_size]
                batch = self.cache.batch(self.ranks.part(chosen))
                # A signal may come to one rank before another; all must stop after the same step.
                asked, sizes, pieces_of = self.ranks.gather(
                    [stop.asked, self._share(batch), len(batch.ids)]
                ).T
                whole = len(chosen) < self.ranks.size  # the batch, on every rank
                self._step(batch, sizes.tolist(), whole)
                done = int(pieces_of[0] if whole else pieces_of.sum())
                self.step += 1
                self.pieces += done
                bar.set_postfix(loss=f"{self.sums['loss'] / self.step:.4f}", refresh=False)
                bar.update(done)
                now = time.perf_counter()
                stopping = bool(asked.any()) or (stop.asked and self.ranks.size == 1)
                if stopping or now - saved > 60 * config.checkpoint_minutes:
                    self.seconds["training"] += now - started
                    self.save()
                    started = saved = time.perf_counter()
                    if stopping:
                        raise KeyboardInterrupt(f"stopped after step {self.step}")
        self.seconds["training"] += time.perf_counter() - started

    def _order(self) -> Sentences:
        """Sentences of this epoch, batch after batch."""
        generator = np.random.default_rng([self.config.seed, len(self.history)])
        sentences = self.sentences[self.fit][0]
        count = self.labelled_per_batch
        if self.config.language_sampling != 1:
            languages = self.cache.languages[sentences]
            return sentences[epoch_order(languages, self.config.language_sampling, generator)]
        if not count:
            return sentences[generator.permutation(len(sentences))]
        chosen = self.labelled[sentences]
        labelled, others = sentences[chosen], generator.permutation(sentences[~chosen])
        # The unlabelled text once; the labelled as often as it takes.
        needed = count * self.steps
        rounds = [generator.permutation(labelled) for _ in range(-(-needed // len(labelled)))]
        borders = np.arange(1, self.steps)
        batches = zip(
            np.split(np.concatenate(rounds)[:needed], borders * count),
            np.split(others, borders * (self.config.batch_size - count)),
            strict=True,
        )
        return np.concatenate([part for batch in batches for part in batch])

    def stored(self, tensors: Mapping[str, FloatArray]) -> dict[str, npt.NDArray[Any]]:
        """Weights as the student's folder holds them; see :func:`student.stored_tensors`."""
        return stored_tensors(tensors, self.config.embedding_dtype, self.config.projected)

    def _share(self, batch: Batch) -> int:
        """The weight of this rank's part; what it is means nothing to one rank alone."""
        return self.task.size(batch) if self.ranks.size > 1 else 1

    def _held_out_loss(self) -> float:
        """Mean loss of the sentences held out, without dropout."""
        held_out = self.sentences[self.fit][1]
        total = sizes = 0.0
        self.student.eval()
        with torch.no_grad():
            for start in range(0, len(held_out), self.config.batch_size):
                batch = self.cache.batch(held_out[start : start + self.config.batch_size])
                parts = self.task.losses(batch, self.weights.keys(), None)
                loss = sum(self.weights[name] * part.item() for name, part in parts.items())
                size = self.task.size(batch)
                total += loss * size
                sizes += size
        return total / sizes

    def _step(self, batch: Batch, sizes: list[int], whole: bool) -> None:
        """One step of the optimiser.

        Args:
            batch: this rank's part.
            sizes: of the parts of all ranks, see :meth:`Task.size`.
            whole: every rank has the same, whole batch.
        """
        config = self.config
        number = self.epoch * self.steps + self.step
        rate = self.lr * rate_factor(number, self._epochs * self.steps, config.warmup, config.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Three numbers, that no step shares its generator with the shuffle of an epoch.
        generator = np.random.default_rng([config.seed, self.steps_before + number, 1])
        dropout = (
            generator if whole or self.ranks.size == 1 else SharedGenerator(generator, self.ranks)
        )
        parts = self.task.losses(batch, self.weights.keys(), dropout)
        nothing = torch.zeros((), device=self.device)
        loss = sum((self.weights[name] * part for name, part in parts.items()), nothing)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        # All at once: to read a number of a GPU is to wait for it.
        found = torch.stack([loss, *parts.values()]).detach().tolist()
        share = sizes[self.ranks.rank] / sum(sizes)
        found = self.ranks.average(share, list(self.trained.values()), found)
        values = dict(zip(("loss", *parts), found, strict=True))
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss became {values['loss']} at step {self.step} of "
                f"{self._title(self.epoch + 1)}; a lower learning rate than {self.lr:g} may help"
            )
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), config.clip)
        self.optimizer.step()
        for name, value in values.items():
            self.sums[name] += value

    def _title(self, epoch: int) -> str:
        """Names an epoch of the fit that goes on."""
        where = f"epoch {epoch}/{self._epochs}"
        return where if len(self.fits) == 1 else f"{self._fit.stage.name}/{self._fit.name} {where}"

    def _say(self, line: str) -> None:
        if self.config.progress:
            tqdm.write(line, file=sys.stderr)
