"""`xdistil eval`: strict word-level F1 of a student or a teacher on labelled files.

Text classifiers go on to `eval_classes`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdistil_fast import labels as iob
from xdistil_fast.commands import eval_classes
from xdistil_fast.commands.stream import add_runtime_arguments, runtime_options
from xdistil_fast.model_io import CONFIG_FILE, ModelError, load_folder, resolve_model
from xdistil_fast.scoring import Counts, Scores, score
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import runs
from xdistil_fast.train.corpora import Corpus, load_label_map, read_labelled

_MAX_CONFIG_BYTES = 16 << 20
Words = Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Model:
    """Either kind of model: what to write about it, its labels, and how it tags."""

    about: dict[str, Any]
    labels: list[str]
    tag: Callable[[Words], list[list[str]]]


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="score a student or a teacher on labelled text",
        description="Strict word-level precision, recall and F1 (0..100): an entity counts when "
        "its type and both borders are right. Of a text classifier accuracy, macro F1 and those of "
        "each class, on texts (JSONL with text and label, TSV, Parquet).",
    )
    parser.add_argument("model", metavar="MODEL", help="student or teacher: folder, name, Hub id")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="labelled sentences (CoNLL, JSONL, Parquet; also gzipped); several are pooled",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE.json",
        help='renames types, {"person": "PER", "product": null}; null drops a type; "*" stands '
        "for all others",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the record as JSON to FILE (without FILE: print it instead of the table)",
    )
    add_runtime_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    if eval_classes.classifies_texts(folder := resolve_model(args.model)):
        return eval_classes.run(args, folder)
    label_map = load_label_map(args.label_map) if args.label_map else None
    corpora = [read_labelled(path, label_map) for path in args.data]
    model = _load(args)
    warn_of_types(corpora, model.labels)
    gold, pred, entries = [], [], []
    began = time.perf_counter()
    for corpus in corpora:
        tags = model.tag([sentence.words or () for sentence in corpus.sentences])
        rows = [sentence.tags or () for sentence in corpus.sentences]
        entry = {key: value for key, value in corpus.describe("").items() if key != "role"}
        if len(corpora) > 1:
            entry["f1"] = score(rows, tags).f1
        entries.append(entry)
        gold += rows
        pred += tags
    seconds = time.perf_counter() - began
    scores = score(gold, pred)
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


def _load(args: argparse.Namespace) -> _Model:
    name = args.model
    folder = resolve_model(name)
    if not _is_teacher(folder):
        return _load_student(name, folder, runtime_options(args))
    for option in ("threads", "precision", "max_memory"):
        if getattr(args, option):
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} is for students; a teacher runs as torch runs it")
    try:
        from xdistil_fast.train.teacher import Teacher
    except ImportError as error:
        raise ValueError(
            f'{name} is a teacher, which needs {error.name}: pip install "xdistil-fast[train]"'
        ) from error
    # A Hub id goes on to transformers: resolve_model fetched a student's files only.
    teacher = Teacher.from_pretrained(folder if Path(name).is_dir() else name)
    about = {
        "name": Path(name).name,
        "digest": teacher.digest(),
        "kind": "teacher",
        "parameters": teacher.parameters,
    }
    return _Model(about, teacher.labels, teacher.tag_words)


def _load_student(name: str, folder: Path, options: dict[str, Any]) -> _Model:
    content = load_folder(folder)
    tagger = Tagger(content.config, content.tensors, content.tokenizer, **options)
    about: dict[str, Any] = {
        "name": Path(name).name,
        "digest": content.digest,
        "kind": "student",
        "parameters": tagger.parameters,
        "precision": tagger.precision,
    }
    teacher = content.config.lineage.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("digest"), str):
        about["teacher_digest"] = teacher["digest"]
    return _Model(about, tagger.labels, lambda words: tagger.tag_words(list(words)))


def _is_teacher(folder: Path) -> bool:
    """Whether the folder's configuration is one of transformers."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            return False
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # the student's loader says what is wrong with it
    return (
        isinstance(config, dict)
        and "format_version" not in config
        and ("model_type" in config or "architectures" in config)
    )


def warn_of_types(corpora: Sequence[Corpus], labels: Sequence[str]) -> None:
    """Warns of entity types of the data that the model does not know.

    Raises:
        ModelError: it knows none of them.
    """
    known = set(iob.label_types(labels))
    found = {kind for corpus in corpora for kind in corpus.types}
    if found and not found & known:
        raise ModelError(
            f"the data has types {', '.join(sorted(found))}, the model {', '.join(sorted(known))}: "
            "none in common; rename the data's with --label-map"
        )
    if strange := sorted(found - known):
        print(
            f"xdistil: warning: the model does not know {', '.join(strange)}; every such entity "
            "counts as missed (rename or drop types with --label-map)",
            file=sys.stderr,
        )


def _table(scores: Scores, entries: Sequence[dict[str, Any]]) -> str:
    width = max([7, *map(len, scores.per_type)])
    lines = [f"{'':{width}}  precision  recall      F1  support"]

    def row(name: str, counts: Counts) -> str:
        return (
            f"{name:{width}}  {counts.precision:9.2f}  {counts.recall:6.2f}  {counts.f1:6.2f}  "
            f"{counts.gold:7d}"
        )

    lines += [row(name, counts) for name, counts in scores.per_type.items()]
    lines.append(row("overall", scores.overall))
    if len(entries) > 1:
        lines += [f"{entry['name']}: F1 {entry['f1']:.2f}" for entry in entries]
    lines.append(f"{scores.sentences} sentences, {scores.words} words")
    return "\n".join(lines)
