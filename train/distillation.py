"""Distillation of a teacher into a BiLSTM(-CRF) student.

One pass over the texts labels them with the teacher (:mod:`~xdistil_fast.train.cache`). The pieces
they hold become the student's vocabulary, and the teacher's table of them, projected, its start.
Then the student learns from labels and logits, in steps of ``batch_size`` sentences drawn from all
texts alike; the epoch that is best on ``dev`` is kept.

Shuffles are drawn from the seed and the epoch, dropout from the seed and the step. So a run that
was killed and started again ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from xdistil_fast import _core
from xdistil_fast import student as serving
from xdistil_fast.labels import validate_labels
from xdistil_fast.model_io import (
    CARD_FILE,
    WEIGHTS_FILE,
    ModelConfig,
    file_digest,
    save_folder,
)
from xdistil_fast.scoring import Scores, score
from xdistil_fast.train import checkpoint, embeddings, losses, runs
from xdistil_fast.train.alignment import IGNORED, align, inside_of
from xdistil_fast.train.cache import Batch, Cache, Texts, build_cache
from xdistil_fast.train.card import model_card, teacher_on_dev
from xdistil_fast.train.config import EMBEDDING_STARTS, DistillConfig, parse_size
from xdistil_fast.train.corpora import Corpus, check_label_map, read_labelled
from xdistil_fast.train.student import Student, tag_words
from xdistil_fast.train.teacher import Teacher
from xdistil_fast.train.vocabulary import Vocabulary, cut_vocabulary

HISTORY_FILE = "history.json"
_CACHE_FOLDER = "cache"
_FINISHED = "finished"


def distill(config: DistillConfig, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """Distil a teacher into a student and write its model folder.

    Args:
        config: all settings.
        command: argv for the model card and ``run.json``.

    Returns:
        The content of ``run.json``. If the output is there already, made with the same settings
        from the same input, it is left as it is.

    Raises:
        ValueError: files, labels and settings that do not go together, before any work; an output
            or an unfinished run that is another one's; a loss that is not finite.
        OSError: a full disk, say. The same call goes on from the last checkpoint.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the state was saved.
    """
    out = Path(config.output)
    checkpoint.check_output(out)
    label_map = None if config.label_map is None else check_label_map(config.label_map)
    train = tuple(read_labelled(path, label_map) for path in config.train)
    dev = tuple(read_labelled(path, label_map) for path in config.dev)
    texts = Texts(train, () if config.keep_dev_sentences else dev, config.transfer)
    data = [
        *(corpus.describe("train") for corpus in train),
        *(corpus.describe("dev") for corpus in dev),
        *texts.describe(),
    ]
    from_file = config.embeddings not in EMBEDDING_STARTS
    embeddings_digest = file_digest(config.embeddings) if from_file else None
    teacher = Teacher.from_pretrained(config.teacher)
    check_labels(teacher.labels, train, dev)
    # A moved teacher or file is still the same one: their digests decide.
    paths = ("teacher", "train", "dev", "transfer")
    settings = {name: v for name, v in config.identity().items() if name not in paths}
    key = {
        "settings": settings,
        "teacher": teacher.digest(),
        "labels": teacher.labels,
        "data": [[entry["role"], entry["digest"]] for entry in data],
        "embeddings_file": embeddings_digest,
    }
    if (record := checkpoint.finished_before(out, key)) is not None:
        return record
    part = out.with_name(out.name + ".part")
    checkpoint.open_part(part, key)
    clock = time.perf_counter()
    cache, cache_key = build_cache(
        Path(config.cache) if config.cache else part / _CACHE_FOLDER,
        teacher,
        texts,
        [str(entry["digest"]) for entry in data] + [str(label_map), str(len(texts.dev))],
        max_length=config.max_length,
        pieces=config.pieces,
        soft=config.soft,
        batch_pieces=config.batch_pieces,
        expected=sum(int(entry["sentences"]) for entry in data if entry["role"] != "dev"),
        progress=config.progress,
    )
    label_seconds = time.perf_counter() - clock
    table = teacher.word_piece_embeddings()
    vocabulary = cut_vocabulary(
        teacher.tokenizer, cache.piece_counts(len(table)), config.min_piece_count
    )
    run = _Run(config, teacher.labels, vocabulary, cache, dev, part)
    run.restore(lambda: _start_values(config, vocabulary, table))
    run.seconds["labelling"] += label_seconds
    run.go()
    return _finish(run, out, key, teacher, data, cache_key, command)


def check_labels(labels: Sequence[str], train: Sequence[Corpus], dev: Sequence[Corpus]) -> None:
    """Refuse labelled text with entity types that the teacher does not know.

    Raises:
        ValueError: naming file and types; or the teacher's labels are not complete IOB2; or there
            is no entity at all in ``train``.
    """
    validate_labels(labels)
    known = {label[2:] for label in labels if label != "O"}
    for corpus in (*train, *dev):
        if unknown := sorted(corpus.types - known):
            raise ValueError(
                f"{corpus.path}: entity types {unknown} are not among the teacher's, which are "
                f"{sorted(known)}; a label map can rename or drop them"
            )
    if not any(corpus.types for corpus in train):
        raise ValueError(f"{train[0].path}: no entity in the training sentences")


def _start_values(
    config: DistillConfig, vocabulary: Vocabulary, table: embeddings.FloatArray
) -> embeddings.FloatArray:
    size, _ = parse_size(config.student)
    rows = vocabulary.teacher_ids
    if config.embeddings == "svd":
        return embeddings.svd_embeddings(table[rows], size)
    if config.embeddings == "random":
        return embeddings.random_embeddings(len(rows), size, config.seed)
    return embeddings.file_embeddings(
        config.embeddings, vocabulary.pieces(), rows, size, config.seed
    )


def rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Factor on the highest learning rate at ``step`` (from 0) of ``steps``."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    left = (steps - step) / max(1, steps - rising)
    return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class _Run:
    """One training run: student, optimiser, position, history."""

    def __init__(
        self,
        config: DistillConfig,
        labels: list[str],
        vocabulary: Vocabulary,
        cache: Cache,
        dev: Sequence[Corpus],
        part: Path,
    ) -> None:
        self.config, self.labels, self.vocabulary = config, labels, vocabulary
        self.cache, self.part = cache, part
        self.inside = inside_of(labels)
        sentences = [sentence for corpus in dev for sentence in corpus.sentences]
        self.dev_tags = [sentence.tags or () for sentence in sentences]
        self.dev = align(vocabulary.tokenizer(), [sentence.words or () for sentence in sentences])
        self.steps_per_epoch = math.ceil(cache.sentences / config.batch_size)
        # Position: epochs finished, steps of the one that goes on, their losses' sums.
        self.epoch = self.step = 0
        self.sums = {"loss": 0.0, "hard": 0.0, "soft": 0.0}
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, embeddings.FloatArray] = {}
        self.seconds = {"labelling": 0.0, "training": 0.0}

    def restore(self, start_values: Callable[[], embeddings.FloatArray]) -> None:
        """Make the student, from the checkpoint where there is one, else from start values."""
        config = self.config
        embedding_size, hidden_size = parse_size(config.student)
        saved = checkpoint.load_checkpoint(self.part)
        first = (
            start_values()
            if saved is None
            else np.zeros((len(self.vocabulary), embedding_size), np.float32)
        )
        self.student = Student(
            first,
            hidden_size,
            len(self.labels),
            head=config.head,
            dropout=config.dropout,
            seed=config.seed,
        )
        self.parameters = dict(self.student.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, fused=True)
        if saved is None:
            return
        tensors, state = saved
        self.student.load({name: tensors[f"weights/{name}"] for name in self.parameters})
        self.best = {
            name.removeprefix("best/"): value
            for name, value in tensors.items()
            if name.startswith("best/")
        }
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                slot: torch.from_numpy(tensors[f"{slot}/{name}"])
                for slot in ("step", "exp_avg", "exp_avg_sq")
            }
        for name in ("epoch", "step", "sums", "history", "seconds"):
            setattr(self, name, state[name])
        self._say(f"going on after epoch {self.epoch}, step {self.step}")

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {f"weights/{name}": value for name, value in self.student.tensors().items()}
        tensors.update({f"best/{name}": value for name, value in self.best.items()})
        for name, parameter in self.parameters.items():
            for slot, value in self.optimizer.state[parameter].items():
                tensors[f"{slot}/{name}"] = value.numpy()
        state = {
            name: getattr(self, name) for name in ("epoch", "step", "sums", "history", "seconds")
        }
        checkpoint.save_checkpoint(self.part, tensors, state)

    def go(self) -> None:
        """Train what is left, with a checkpoint after each epoch and every few minutes."""
        with checkpoint.StopRequest() as stop:
            while self.epoch < self.config.epochs:
                self._epoch(stop)
                scores = self.evaluate(self.stored())
                if scores.f1 > max((h["dev_f1"] for h in self.history), default=-1.0):
                    self.best = self.student.tensors()
                means = {name: total / self.steps_per_epoch for name, total in self.sums.items()}
                self.epoch, self.step = self.epoch + 1, 0
                self.sums = dict.fromkeys(self.sums, 0.0)
                self.history.append({"epoch": self.epoch, **means, "dev_f1": scores.f1})
                self.save()
                self._say(
                    f"epoch {self.epoch}/{self.config.epochs}: loss {means['loss']:.4f}, "
                    f"dev F1 {scores.f1:.2f}"
                )

    def _epoch(self, stop: checkpoint.StopRequest) -> None:
        config = self.config
        order = np.random.default_rng([config.seed, self.epoch]).permutation(self.cache.sentences)
        started = saved = time.perf_counter()
        self.student.train()
        with tqdm(
            total=self.cache.pieces,
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            unit="piece",
            unit_scale=True,
            disable=None if config.progress else True,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            if self.step:
                bar.update(self.cache.pieces * self.step // self.steps_per_epoch)
            while self.step < self.steps_per_epoch:
                chosen = order[self.step * config.batch_size :][: config.batch_size]
                batch = self.cache.batch(chosen)
                self._step(batch)
                self.step += 1
                bar.set_postfix(loss=f"{self.sums['loss'] / self.step:.4f}", refresh=False)
                bar.update(len(batch.ids))
                now = time.perf_counter()
                if stop.asked or now - saved > 60 * config.checkpoint_minutes:
                    self.seconds["training"] += now - started
                    self.save()
                    started = saved = time.perf_counter()
                    if stop.asked:
                        raise KeyboardInterrupt(f"stopped after step {self.step}")
        self.seconds["training"] += time.perf_counter() - started

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
            rest = np.full_like(targets, IGNORED)
            if self.config.pieces == "all":
                rest = np.where(targets == IGNORED, IGNORED, self.inside[np.maximum(targets, 0)])
            own = Batch(
                ids=ids,
                cu_seqlens=np.searchsorted(source, batch.cu_seqlens).astype(np.int32),
                first=batch.first[source] & heads,
                targets=np.where(heads, targets, rest),
                logits=batch.logits[source],
            )
        return own, own.first if self.config.pieces == "first" else heads

    def _losses(
        self, batch: Batch, said: npt.NDArray[np.bool_], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Hard and soft loss of a batch in the student's pieces."""
        offsets = torch.from_numpy(batch.cu_seqlens)
        emissions = self.student(torch.from_numpy(batch.ids), offsets, generator)
        hard = soft = emissions.new_zeros(())
        if self.config.hard_weight:
            targets = torch.from_numpy(batch.targets)
            if self.student.crf is None:
                hard = losses.hard_loss(emissions, targets)
            else:
                hard = losses.crf_loss(self.student.crf, emissions, targets, offsets)
        if self.config.soft:
            weights = None if said.all() else torch.from_numpy(said.astype(np.float32))
            soft = losses.logit_loss(emissions, torch.from_numpy(batch.logits), weights)
        return hard, soft

    def _step(self, batch: Batch) -> None:
        """One step of the optimiser."""
        config = self.config
        number = self.epoch * self.steps_per_epoch + self.step
        rate = config.lr * rate_factor(
            number, config.epochs * self.steps_per_epoch, config.warmup, config.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Three numbers, that no step shares its generator with the shuffle of an epoch.
        generator = np.random.default_rng([config.seed, number, 1])
        hard, soft = self._losses(*self._in_student_pieces(batch), generator)
        loss = config.hard_weight * hard + config.soft_weight * soft
        values = {"loss": loss.item(), "hard": hard.item(), "soft": soft.item()}
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss became {values['loss']} at step {self.step} of epoch {self.epoch + 1}; "
                f"a lower learning rate than {config.lr:g} may help"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        self.optimizer.step()
        for name, value in values.items():
            self.sums[name] += value

    def stored(self, tensors: dict[str, Any] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Weights as they are stored: the table perhaps in half precision."""
        tensors = dict(self.student.tensors() if tensors is None else tensors)
        tensors["embedding.weight"] = tensors["embedding.weight"].astype(
            self.config.embedding_dtype
        )
        return tensors

    def model_config(self, **more: Any) -> ModelConfig:
        """``config.json`` of the student."""
        embedding_size, hidden_size = parse_size(self.config.student)
        return ModelConfig(
            labels=tuple(self.labels),
            vocab_size=len(self.vocabulary),
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            head=self.config.head,
            **more,
        )

    def evaluate(self, tensors: dict[str, npt.NDArray[Any]]) -> Scores:
        """Strict word-level scores on ``dev``."""
        widened = {name: value.astype(np.float32) for name, value in tensors.items()}
        tagger = serving.Student(self.model_config(), widened)
        return score(self.dev_tags, tag_words(tagger, self.dev, self.labels))

    def _say(self, line: str) -> None:
        if self.config.progress:
            tqdm.write(line, file=sys.stderr)


def _finish(
    run: _Run,
    out: Path,
    key: dict[str, Any],
    teacher: Teacher,
    data: list[dict[str, Any]],
    cache_key: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """Write the model folder from the best epoch and move it to ``out``."""
    config = run.config
    tensors = run.stored(run.best)
    scores = run.evaluate(tensors)
    best_epoch = max(run.history, key=lambda entry: entry["dev_f1"])["epoch"]
    parameters = sum(value.size for value in tensors.values())
    metrics = {
        "dev": scores.to_dict(),
        "best_epoch": best_epoch,
        "parameters": parameters,
        "teacher_parameters": teacher.parameters,
        "training_pieces": run.cache.pieces,
        "training_sentences": run.cache.sentences,
        "vocabulary": len(run.vocabulary),
    }
    model_config = run.model_config(
        lineage={
            "teacher": {"name": Path(config.teacher).name, "digest": teacher.digest()},
            "data": data,
            "settings": key["settings"],
            "command": list(command),
        },
        metrics=metrics,
        library_version=_core.__version__,
    )
    folder = run.part / _FINISHED
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer_json = run.vocabulary.tokenizer_json
    save_folder(folder, model_config, tensors, tokenizer_json, "")
    record = runs.run_record(
        "student",
        command=command,
        settings={**key["settings"], "teacher": Path(config.teacher).name},
        metrics={**metrics, "bytes": sum(file.stat().st_size for file in folder.iterdir())},
        data=data,
        seconds=sum(run.seconds.values()),
        digest=file_digest(folder / WEIGHTS_FILE),
        threads=torch.get_num_threads(),
        labels=run.labels,
        history=run.history,
        stages={name: round(value, 3) for name, value in run.seconds.items()},
        pieces_per_second=round(config.epochs * run.cache.pieces / run.seconds["training"]),
        cache=cache_key,
        key=key,
    )
    card = model_card(out.name, model_config, record, teacher_on_dev(config.teacher, data))
    (folder / CARD_FILE).write_text(card, "utf-8")
    runs.write_json(folder / HISTORY_FILE, {"epochs": run.history})
    runs.write_run(folder, record)
    os.replace(folder, out)
    shutil.rmtree(run.part)
    return record
