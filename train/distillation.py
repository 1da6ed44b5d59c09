"""Distillation of a teacher into a BiLSTM(-CRF) student.

One pass over the texts labels them with the teacher (:mod:`~xdistil_fast.train.cache`). The pieces
they hold become the student's vocabulary, and the teacher's table of them, projected, its start.
Then the student is trained (:mod:`~xdistil_fast.train.trainer`) as the schedule says
(:mod:`~xdistil_fast.train.schedules`); the epoch that is best on ``dev`` is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdistil_fast import _core
from xdistil_fast.labels import label_types, scheme_of, validate_labels
from xdistil_fast.model_io import (
    CARD_FILE,
    WEIGHTS_FILE,
    file_digest,
    save_folder,
)
from xdistil_fast.train import checkpoint, distributed, embeddings, runs
from xdistil_fast.train.augmentation import Augmenter, parse_augmentation
from xdistil_fast.train.cache import Cache, build_cache
from xdistil_fast.train.card import model_card, teacher_on_dev
from xdistil_fast.train.classification import Classification, ClassificationJob
from xdistil_fast.train.config import EMBEDDING_STARTS, DistillConfig, parse_size
from xdistil_fast.train.corpora import Corpus, labelling_of, read_labelled
from xdistil_fast.train.label_maps import check_label_map
from xdistil_fast.train.languages import check_languages
from xdistil_fast.train.representation import Representation, kept_components
from xdistil_fast.train.student import student_device
from xdistil_fast.train.tagging import Tagging
from xdistil_fast.train.teacher import Teacher
from xdistil_fast.train.texts import Texts
from xdistil_fast.train.trainer import Trainer
from xdistil_fast.train.vocabulary import Vocabulary, check_cut, cut_vocabulary

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
        DeviceError: (a RuntimeError) there is no ``device`` to train on, before any work.
        ValueError: files, labels and settings that do not go together, before any work; an output
            or an unfinished run that is another one's; a loss that is not finite.
        OSError: a full disk, say. The same call goes on from the last checkpoint.
        BlockingIOError: another process is making this output.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the state was saved.
    """
    with distributed.joined(config.device) as ranks, contextlib.ExitStack() as held:
        if not ranks.first:
            config = dataclasses.replace(config, progress=False)
        return _distill(config, command, ranks, held)


def _distill(
    config: DistillConfig,
    command: Sequence[str],
    ranks: distributed.Ranks,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    device = student_device(config.device)
    config = _with_precision(config, device)
    out = Path(config.output)
    checkpoint.check_output(out)
    from_file = config.embeddings not in EMBEDDING_STARTS
    embeddings_digest = file_digest(config.embeddings) if from_file else None
    job = (ClassificationJob if config.task == "classification" else TaggingJob)(config)
    teacher, data = job.teacher, job.data
    # A moved teacher or file is still the same one: their digests decide.
    paths = ("teacher", "train", "dev", "transfer")
    settings = {name: v for name, v in config.identity().items() if name not in paths}
    key = {
        "settings": settings,
        "teacher": teacher.digest(),
        "labels": teacher.labels,
        "data": [
            [entry[name] for name in ("role", "digest", "format", "language") if name in entry]
            for entry in data
        ],
        "embeddings_file": embeddings_digest,
    }
    check_cut(teacher.tokenizer, config.min_piece_count)
    if from_file:
        settings["embeddings"] = runs.portable(config.embeddings)
        _check_start_file(config, teacher)
    part = out.with_name(out.name + ".part")
    if (record := checkpoint.finished_before(out, key)) is not None:
        if ranks.first and checkpoint.key_of(part) == key:  # killed as it cleaned up
            shutil.rmtree(part)
        return record
    ranks.first_goes_ahead(lambda: checkpoint.open_part(part, key))
    if ranks.first:
        held.enter_context(checkpoint.alone(part))
    clock = time.perf_counter()
    root = Path(config.cache) if config.cache else part / _CACHE_FOLDER
    cache, cache_key = job.build_cache(root, ranks)
    label_seconds = time.perf_counter() - clock
    table = teacher.word_piece_embeddings()
    vocabulary = cut_vocabulary(
        teacher.tokenizer, cache.piece_counts(len(table)), config.min_piece_count
    )
    task = job.task(vocabulary, cache)
    trainer = Trainer(config, task, cache, part, ranks, device)
    size, _ = parse_size(config.student)
    trainer.restore(len(vocabulary), size, lambda: _start_values(config, vocabulary, table))
    trainer.seconds["labelling"] += label_seconds
    trainer.go()
    ranks.wait()  # nobody reads in the working folder any more
    if ranks.first:
        _finish(trainer, task, out, key, teacher, vocabulary, data, cache_key, command)
    ranks.wait()
    return runs.read_run(out)


def _with_precision(config: DistillConfig, device: torch.device) -> DistillConfig:
    """Settings with the precision that ``auto`` stands for there.

    Raises:
        ValueError: bfloat16 is asked for on a GPU, where students are trained in float32.
    """
    if device.type == "cuda" and config.precision == "bfloat16":
        raise ValueError(
            "precision is 'bfloat16' and device is 'cuda', where students are trained in float32; "
            "allowed: 'auto', 'float32'"
        )
    if config.precision != "auto":
        return config
    narrow = device.type == "cpu" and _core.multiplies_bfloat16()
    return dataclasses.replace(config, precision="bfloat16" if narrow else "float32")


class TaggingJob:
    """Input of a distillation: labelled sentences, transfer text, and their teacher.

    Attributes:
        teacher: a token classifier.
        data: entries of ``run.json`` for all files.

    Raises:
        ValueError: files, settings and teacher that do not go together.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.label_map = None if config.label_map is None else check_label_map(config.label_map)
        train = tuple(read_labelled(path, self.label_map) for path in config.train)
        self.dev = tuple(read_labelled(path, self.label_map) for path in config.dev)
        check_languages(self.dev, "dev")
        hidden = () if config.keep_dev_sentences else self.dev
        self.texts = Texts(train, hidden, config.transfer)
        languages = self.texts.languages
        if config.language_sampling != 1 and (not languages or "" in languages):
            raise ValueError(
                f"language_sampling is {config.language_sampling:g}; it needs the language of all "
                "files of train and transfer (LANG=FILE)"
            )
        self.data = [
            *(corpus.describe("train") for corpus in train),
            *(corpus.describe("dev") for corpus in self.dev),
            *self.texts.describe(),
        ]
        self.teacher = Teacher.from_pretrained(
            config.teacher, config.device, precision=config.teacher_precision
        )
        check_labels(self.teacher.labels, train, self.dev)
        if rates := parse_augmentation(config.augment):
            mask = getattr(self.teacher.hf_tokenizer, "mask_token", None)
            make = functools.partial(Augmenter, rates, train, config.seed, mask)
            make()  # refuses what cannot be before any work
            self.texts = dataclasses.replace(self.texts, augmenter=make)
        self._representation = _representation(config, self.teacher)

    def build_cache(self, root: Path, ranks: distributed.Ranks) -> tuple[Cache, str]:
        """Have the teacher label all sentences."""
        config = self.config
        return build_cache(
            root,
            self.teacher,
            self.texts,
            [
                {**entry, "content": self._content(entry["role"])}
                for entry in self.data
                if entry["role"] != "dev"
            ],
            max_length=config.max_length,
            soft=config.soft,
            representation=self._representation,
            batch_pieces=config.batch_pieces,
            progress=config.progress,
            ranks=ranks,
        )

    def _content(self, role: str) -> list[str]:
        """What decides the sentences of a file beside its bytes, for the key of the cache."""
        content = [] if self.label_map is None else [str(self.label_map)]
        rates = parse_augmentation(self.config.augment)
        if role == "transfer":
            rates = dataclasses.replace(rates, swap=0.0)  # it changes sentences with labels only
        if copies := str(rates):
            # They are made with what the labelled files mention.
            content += [copies, str(self.config.seed)]
            content += [str(e["digest"]) for e in self.data if e["role"] == "train"]
            # And not of what stands in dev.
            content += [corpus.digest for corpus in self.texts.dev]
            content += [str(entry.get("language", "")) for entry in self.data]
        return content

    def task(self, vocabulary: Vocabulary, cache: Cache) -> Tagging:
        """What the student learns."""
        return Tagging(self.config, self.teacher.labels, vocabulary, self.dev, cache.width)


def check_labels(labels: Sequence[str], train: Sequence[Corpus], dev: Sequence[Corpus]) -> None:
    """Refuse labelled text with entity types that the teacher does not know.

    Raises:
        ValueError: naming file and types; or the teacher's labels are of another scheme or not
            complete; or there is no entity at all in ``train``.
    """
    validate_labels(labels)
    scheme = scheme_of(labels)
    if labelling_of([*train, *dev]) != scheme:
        kinds = {"IOB2": "entities in IOB2", "tags": "plain tags of words"}
        raise ValueError(
            f"{train[0].path} does not go with the teacher, whose labels are {kinds[scheme]}"
        )
    if scheme == "tags" and "O" not in labels:
        for corpus in (*train, *dev):
            if any("O" in (sentence.tags or ()) for sentence in corpus.sentences):
                raise ValueError(
                    f"{corpus.path}: words without a tag (O), perhaps by the label map; the "
                    "teacher gives each word one"
                )
    known = set(label_types(labels))
    for corpus in (*train, *dev):
        if unknown := sorted(corpus.types - known):
            raise ValueError(
                f"{corpus.path}: entity types {unknown} are not among the teacher's, which are "
                f"{sorted(known)}; a label map can rename or drop them"
            )
    if not any(corpus.types for corpus in train):
        raise ValueError(f"{train[0].path}: no entity in the training sentences")


def _representation(config: DistillConfig, teacher: Teacher) -> Representation | None:
    """The hidden states that the schedule needs.

    Raises:
        ValueError: the teacher has no such layer, or fewer elements than are to be kept.
    """
    if not config.representation:
        return None
    size = kept_components(config, teacher)
    return Representation(teacher.resolve_layer(config.teacher_layer), size)


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


def _check_start_file(config: DistillConfig, teacher: Teacher) -> None:
    """Refuse a file of start values that does not go with size and teacher (ValueError)."""
    pieces = {i: p for p, i in teacher.tokenizer.get_vocab(with_added_tokens=True).items()}
    ids = np.array(sorted(pieces))
    names = [pieces[i] for i in ids.tolist()]
    size, _ = parse_size(config.student)
    embeddings.file_embeddings(config.embeddings, names, ids, size, config.seed)


def _finish(
    trainer: Trainer,
    task: Tagging | Classification,
    out: Path,
    key: dict[str, Any],
    teacher: Teacher,
    vocabulary: Vocabulary,
    data: list[dict[str, Any]],
    cache_key: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """Write the model folder from the best epoch and move it to ``out``."""
    config, cache = trainer.config, trainer.cache
    tensors = trainer.stored(trainer.best)
    parameters = sum(value.size for value in tensors.values())
    dev = task.evaluate(tensors)
    if isinstance(task, Tagging) and task.dev_languages:
        dev |= task.against_teacher(tensors, teacher)
    metrics = {
        "dev": dev,
        "best_epoch": trainer.best_epoch,
        "parameters": parameters,
        "teacher_parameters": teacher.parameters,
        "training_pieces": cache.pieces,
        "training_sentences": cache.sentences,
        "vocabulary": len(vocabulary),
    }
    model_config = task.model_config(
        lineage={
            "teacher": {"name": Path(config.teacher).name, "digest": teacher.digest()},
            "data": data,
            "settings": key["settings"],
            "command": list(command),
        },
        metrics=metrics,
        library_version=_core.__version__,
    )
    folder = trainer.part / _FINISHED
    shutil.rmtree(folder, ignore_errors=True)
    save_folder(folder, model_config, tensors, vocabulary.tokenizer_json, "")
    record = runs.run_record(
        "student",
        command=command,
        settings={**key["settings"], "teacher": Path(config.teacher).name},
        metrics={**metrics, "bytes": sum(file.stat().st_size for file in folder.iterdir())},
        data=data,
        seconds=sum(trainer.seconds.values()),
        digest=file_digest(folder / WEIGHTS_FILE),
        threads=torch.get_num_threads(),
        device=trainer.device_name,
        labels=teacher.labels,
        history=trainer.history,
        stages={name: round(value, 3) for name, value in trainer.seconds.items()},
        pieces_per_second=round(trainer.pieces / trainer.seconds["training"]),
        cache=cache_key,
        key=key,
    )
    card = model_card(out.name, model_config, record, teacher_on_dev(config.teacher, data))
    (folder / CARD_FILE).write_text(card, "utf-8")
    runs.write_json(folder / HISTORY_FILE, {"epochs": trainer.history})
    runs.write_run(folder, record)
    os.replace(folder, out)
    shutil.rmtree(trainer.part)
    return record
