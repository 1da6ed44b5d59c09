"""`xdistil eval` of text classifiers, students and teachers: accuracy, macro F1, F1 by class."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdistil_fast.class_scoring import ClassScores, score_classes
from xdistil_fast.classifier import Classifier
from xdistil_fast.commands.eval_models import (
    about_student,
    about_teacher,
    read_config,
    teacher_precision,
)
from xdistil_fast.model_config import TEXT_CLASSIFICATION
from xdistil_fast.model_io import ModelError, load_folder
from xdistil_fast.scoring import Counts
from xdistil_fast.train import runs
from xdistil_fast.train.documents import Documents, read_documents
from xdistil_fast.train.label_maps import load_label_map


@dataclass(frozen=True)
class _Model:
    about: dict[str, Any]
    labels: list[str]
    classify: Callable[[Sequence[str]], list[str]]


def classifies_texts(folder: Path) -> bool:
    """Whether a folder's `config.json` is a text classifier's, ours or transformers'."""
    config = read_config(folder)
    if "format_version" in config:
        return config.get("task") == TEXT_CLASSIFICATION
    kinds = config.get("architectures")
    return isinstance(kinds, list) and any(
        isinstance(kind, str) and kind.endswith("ForSequenceClassification") for kind in kinds
    )


def run(args: argparse.Namespace, folder: Path, options: Mapping[str, Any]) -> int:
    """Evaluates a model; the arguments are those of `xdistil eval`, options of `Classifier`."""
    if args.teacher is not None:
        raise ValueError("--teacher is for taggers; of a classifier evaluate the teacher by itself")
    corpora = read_all(args.data, args.label_map)
    model = _load(args.model, folder, options)
    check_classes(corpora, model.labels)
    gold: list[str] = []
    pred: list[str] = []
    entries: list[dict[str, Any]] = []
    began = time.perf_counter()
    for documents in corpora:
        found = model.classify(documents.texts)
        entry = {key: value for key, value in documents.describe("").items() if key != "role"}
        if len(corpora) > 1:
            entry["accuracy"] = score_classes(documents.labels, found).accuracy
        entries.append(entry)
        gold += documents.labels
        pred += found
    seconds = time.perf_counter() - began
    scores = score_classes(gold, pred)
    record = {
        "kind": "eval",
        "model": model.about,
        "data": entries,
        "metrics": scores.to_dict(),
        "command": runs.command_line(args),
        "machine": runs.machine_info(args.threads or None),
        "seconds": round(seconds, 3),
    }
    if args.json == "-":
        json.dump(record, sys.stdout, ensure_ascii=False, indent=2)
        print()
        return 0
    if args.json is not None:
        runs.write_json(Path(args.json), record)
    print(_table(scores, entries))
    return 0


def read_all(paths: Iterable[Path], label_map: Path | None) -> list[Documents]:
    """Reads files of labelled texts, with the label map of a file if one is given."""
    mapping = load_label_map(label_map, classes=True) if label_map else None
    return [read_documents(path, mapping) for path in paths]


def check_classes(corpora: Sequence[Documents], labels: Sequence[str]) -> None:
    """Warns of classes of the data that the model does not know.

    Raises:
        ModelError: it knows none of them.
    """
    found = {label for documents in corpora for label in documents.labels}
    if not found & set(labels):
        raise ModelError(
            f"the data has classes {', '.join(sorted(found))}, the model {', '.join(labels)}: none "
            "in common; rename the data's with --label-map"
        )
    if strange := sorted(found - set(labels)):
        print(
            f"xdistil: warning: the model does not know {', '.join(strange)}; every such text "
            "counts as wrong (rename or drop classes with --label-map)",
            file=sys.stderr,
        )


def classify_all(classifier: Classifier, texts: Iterable[str]) -> list[str]:
    """The most probable class of each text."""
    return [prediction["label"] for prediction in classifier.pipe(texts)]


def _load(name: str, folder: Path, options: Mapping[str, Any]) -> _Model:
    if "format_version" in read_config(folder):
        content = load_folder(folder)
        student = Classifier(content.config, content.tensors, content.tokenizer, **options)
        about = about_student(name, content, student)
        return _Model(about, student.labels, lambda texts: classify_all(student, texts))
    precision = teacher_precision(options)
    try:
        from xdistil_fast.train.document_teacher import DocumentTeacher
    except ImportError as error:
        raise ValueError(
            f'{name} is a teacher, which needs {error.name}: pip install "xdistil-fast[train]"'
        ) from error
    source = folder if Path(name).is_dir() else name
    teacher = DocumentTeacher.from_pretrained(source, precision=precision)
    return _Model(about_teacher(name, teacher), teacher.labels, teacher.classify)


def _table(scores: ClassScores, entries: Sequence[dict[str, Any]]) -> str:
    width = max(map(len, scores.per_class))
    lines = [f"{'':{width}}  precision  recall      F1  texts"]

    def row(name: str, counts: Counts) -> str:
        return (
            f"{name:{width}}  {counts.precision:9.2f}  {counts.recall:6.2f}  {counts.f1:6.2f}  "
            f"{counts.gold:5d}"
        )

    lines += [row(name, counts) for name, counts in scores.per_class.items()]
    lines.append(f"accuracy {scores.accuracy:.2f}, macro F1 {scores.macro_f1:.2f}")
    if len(entries) > 1:
        lines += [f"{entry['name']}: accuracy {entry['accuracy']:.2f}" for entry in entries]
    lines.append(f"{scores.texts} texts")
    return "\n".join(lines)
