"""`xdistil eval`: strict word-level F1 of a student or a teacher on labelled files.

Text classifiers go on to `eval_classes`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from xdistil_fast import labels as iob
from xdistil_fast.commands import eval_classes
from xdistil_fast.commands.eval_models import (
    about_student,
    about_teacher,
    read_config,
    teacher_precision,
)
from xdistil_fast.commands.stream import add_runtime_arguments, runtime_options
from xdistil_fast.model_io import ModelError, load_folder, resolve_model
from xdistil_fast.scoring import score
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import runs
from xdistil_fast.train.corpora import Corpus, labelling_of, read_labelled
from xdistil_fast.train.label_maps import load_label_map
from xdistil_fast.train.languages import (
    check_languages,
    language_report,
    language_table,
    languages_of,
    score_languages,
)

Words: TypeAlias = Sequence[Sequence[str]]
Progress: TypeAlias = Callable[[int], object]


@dataclass(frozen=True)
class Model:
    """Either kind of model.

    Attributes:
        about: what a record says of it: name, digest, kind, parameters, ...
        labels: IOB2 labels by tag id.
        tag: one tag for each word of sentences; tells how many it has finished since the last call.
        tagger: the student itself; None for a teacher.
    """

    about: dict[str, Any]
    labels: list[str]
    tag: Callable[[Words, Progress | None], list[list[str]]]
    tagger: Tagger | None = None


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="score a student or a teacher on labelled text",
        description="Strict word-level precision, recall and F1 (0..100): an entity counts when "
        "its type and both borders are right. Of plain tags (parts of speech) a word counts when "
        "its tag is right. Files with languages (LANG=FILE) are also scored by language. Of a text "
        "classifier accuracy, macro F1 and those of each class, on texts (JSONL with text and "
        "label, TSV, Parquet). Teachers take --precision float32 or bfloat16.",
    )
    parser.add_argument("model", metavar="MODEL", help="student or teacher: folder, name, Hub id")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="[LANG=]FILE",
        help="labelled sentences (CoNLL, JSONL, Parquet; also gzipped); several are pooled, and "
        "with languages also scored by each",
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="a student's teacher: says how much of its F1 the student keeps",
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
    options = runtime_options(args)
    if eval_classes.classifies_texts(folder := resolve_model(args.model)):
        return eval_classes.run(args, folder, options)
    label_map = load_label_map(args.label_map) if args.label_map else None
    corpora = [read_labelled(path, label_map) for path in args.data]
    check_languages(corpora, "--data")
    model = load_model(args.model, options)
    warn_of_types(corpora, model.labels)
    teacher = None
    if args.teacher is not None:
        teacher = load_model(args.teacher, {})
        warn_of_types(corpora, teacher.labels)
    record, _ = evaluate(model, corpora, runs.command_line(args), args.threads, teacher=teacher)
    if args.json == "-":
        json.dump(record, sys.stdout, ensure_ascii=False, indent=2)
        print()
        return 0
    if args.json is not None:
        runs.write_json(Path(args.json), record)
    print(_table(record["metrics"], record["data"], labelling_of(corpora)))
    return 0


def evaluate(
    model: Model,
    corpora: Sequence[Corpus],
    command: Sequence[str],
    threads: int = 0,
    progress: Progress | None = None,
    teacher: Model | None = None,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Scores a model on labelled files, pooled, and by language where they have languages.

    Args:
        model: see `load_model`.
        corpora: the files.
        command: for the record.
        threads: kernel threads that it runs on; 0 is every core.
        progress: called with the number of sentences tagged since the last call.
        teacher: to say how much of its F1 the model keeps; may also be a larger student.

    Returns:
        The record that `xdistil eval --json` writes, and the tags of all sentences.
    """
    scheme = labelling_of(corpora)
    gold = [sentence.tags or () for corpus in corpora for sentence in corpus.sentences]
    entries: list[dict[str, Any]] = []
    pred: list[list[str]] = []
    began = time.perf_counter()
    for corpus in corpora:
        tags = model.tag(_words(corpus), progress)
        entry = {key: value for key, value in corpus.describe("").items() if key != "role"}
        if len(corpora) > 1:
            rows = gold[len(pred) : len(pred) + len(tags)]
            entry["f1"] = score(rows, tags, corpus.labelling).f1
        entries.append(entry)
        pred += tags
    seconds = time.perf_counter() - began
    scores = score(gold, pred, scheme)
    metrics: dict[str, Any] = scores.to_dict()
    languages = languages_of(corpora)
    by_language = score_languages(languages, gold, pred, scheme)
    of_teacher = None
    if teacher is not None:
        found = [tags for corpus in corpora for tags in teacher.tag(_words(corpus), None)]
        of_teacher = score_languages(languages, gold, found, scheme)
        f1 = score(gold, found, scheme).f1
        metrics |= {"teacher_f1": f1, "kept": 100.0 * scores.f1 / f1 if f1 else None}
    if by_language:
        metrics |= language_report(by_language, of_teacher)
    record = {
        "kind": "eval",
        "model": model.about,
        "data": entries,
        "metrics": metrics,
        "command": list(command),
        "machine": runs.machine_info(threads or None),
        "seconds": round(seconds, 3),
    }
    return record, pred


def _words(corpus: Corpus) -> list[Sequence[str]]:
    return [sentence.words or () for sentence in corpus.sentences]


def load_model(name: str, options: Mapping[str, Any]) -> Model:
    """Loads a student or a teacher.

    Args:
        name: folder, embedded name or Hub id.
        options: of `Tagger`, see `runtime_options`; of a teacher the precision alone.

    Raises:
        ValueError: an option that a teacher does not have, or torch is needed and missing.
        ModelError: not found, or not a model this version can run.
    """
    folder = resolve_model(name)
    if not _is_teacher(folder):
        return _load_student(name, folder, options)
    precision = teacher_precision(options)
    try:
        from xdistil_fast.train.teacher import Teacher
    except ImportError as error:
        raise ValueError(
            f'{name} is a teacher, which needs {error.name}: pip install "xdistil-fast[train]"'
        ) from error
    # A Hub id goes on to transformers: resolve_model fetched a student's files only.
    source = folder if Path(name).is_dir() else name
    teacher = Teacher.from_pretrained(source, precision=precision)
    return Model(about_teacher(name, teacher), teacher.labels, teacher.tag_words)


def _load_student(name: str, folder: Path, options: Mapping[str, Any]) -> Model:
    content = load_folder(folder)
    tagger = Tagger(content.config, content.tensors, content.tokenizer, **options)

    def tag(words: Words, progress: Progress | None) -> list[list[str]]:
        tags = tagger.tag_words(list(words))
        if progress is not None:
            progress(len(words))
        return tags

    return Model(about_student(name, content, tagger), tagger.labels, tag, tagger)


def _is_teacher(folder: Path) -> bool:
    """Whether the folder's configuration is one of transformers."""
    config = read_config(folder)
    return "format_version" not in config and ("model_type" in config or "architectures" in config)


def warn_of_types(corpora: Sequence[Corpus], labels: Sequence[str]) -> None:
    """Warns of entity types of the data that the model does not know.

    Raises:
        ModelError: it knows none of them, or the data has plain tags and the model entities, or
            the other way round.
    """
    kinds = {"IOB2": "entities in IOB2", "tags": "plain tags of words"}
    scheme, own = labelling_of(corpora), iob.scheme_of(labels)
    if scheme != own:
        raise ModelError(f"the data has {kinds[scheme]}, the model {kinds[own]}")
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


def _table(metrics: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], scheme: str) -> str:
    per_type = metrics["per_type"]
    width = max([7, *map(len, per_type)])
    lines = [f"{'':{width}}  precision  recall      F1  support"]

    def row(name: str, counts: Mapping[str, Any]) -> str:
        return (
            f"{name:{width}}  {counts['precision']:9.2f}  {counts['recall']:6.2f}  "
            f"{counts['f1']:6.2f}  {counts['support']:7d}"
        )

    lines += [row(name, counts) for name, counts in per_type.items()]
    lines.append(row("overall", metrics))
    if len(entries) > 1 and "languages" not in metrics:
        lines += [f"{entry['name']}: F1 {entry['f1']:.2f}" for entry in entries]
    lines.append(f"{metrics['sentences']} sentences, {metrics['words']} words")
    if "teacher_f1" in metrics:
        kept = "" if metrics["kept"] is None else f", {metrics['kept']:.1f} % of it kept"
        lines.append(f"teacher: F1 {metrics['teacher_f1']:.2f}{kept}")
    if scheme == "tags":
        lines.append(f"word accuracy {metrics['accuracy']:.2f}")
    if "languages" in metrics:
        lines.append(language_table(metrics))
    return "\n".join(lines)
