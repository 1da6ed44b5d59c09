"""``xdistil teacher``: fine-tune a Hugging Face encoder on labelled sentences."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from xdistil_fast.train import runs
from xdistil_fast.train.config import TASKS
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.distributed import one_process_only
from xdistil_fast.train.document_teacher import fine_tune_classifier
from xdistil_fast.train.documents import read_documents
from xdistil_fast.train.finetune import TeacherSettings, fine_tune
from xdistil_fast.train.label_maps import load_label_map
from xdistil_fast.train.languages import language_table

_DEFAULTS = TeacherSettings()


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command ``teacher``."""
    parser = subparsers.add_parser(
        "teacher",
        help="fine-tune a teacher on labelled text",
        description="Fine-tune a Hugging Face encoder for entities, or for classes of texts. "
        "Killed, the same command goes on after the last finished epoch.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument(
        "--task",
        choices=TASKS,
        default=TASKS[0],
        help="tagging: entities in sentences; classification: classes of texts (JSONL with text "
        "and label, TSV, Parquet; also gzipped) (default: %(default)s)",
    )
    parser.add_argument(
        "--model", required=True, metavar="BASE", help="base encoder: a local folder or Hub id"
    )
    parser.add_argument(
        "--train",
        required=True,
        nargs="+",
        action="extend",
        metavar="[LANG=]FILE",
        help="labelled sentences (CoNLL, JSONL, Parquet; also gzipped)",
    )
    parser.add_argument(
        "--dev",
        required=True,
        nargs="+",
        action="extend",
        metavar="[LANG=]FILE",
        help="labelled sentences that choose the best epoch; with languages, by the mean over them",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE.json",
        help='renames types, {"person": "PER", "product": null}; null drops a type; "*" stands '
        "for all others",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FOLDER", help="folder to make"
    )
    for name, kind, default, meaning in (
        ("--epochs", int, _DEFAULTS.epochs, "passes over the labelled text"),
        ("--lr", float, _DEFAULTS.learning_rate, "highest learning rate"),
        ("--batch-size", int, _DEFAULTS.batch_size, "sequences a step"),
        ("--seed", int, _DEFAULTS.seed, "of the new output layer, the order and the dropout"),
    ):
        shown = f"{meaning} (default: %(default)s)"
        parser.add_argument(name, type=kind, default=default, help=shown)
    parser.add_argument(
        "--max-length",
        type=int,
        default=_DEFAULTS.max_length,
        help="longest training sequence in pieces; longer sentences are split between words "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pieces",
        choices=("all", "first"),
        default=_DEFAULTS.pieces,
        help="train all pieces of a word or its first only (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default=_DEFAULTS.device, help="auto, cpu or cuda (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    one_process_only("xdistil teacher")
    settings = TeacherSettings(
        epochs=args.epochs,
        learning_rate=args.lr,
        batch_size=args.batch_size,
        seed=args.seed,
        max_length=args.max_length,
        pieces=args.pieces,
        device=args.device,
    )
    classes = args.task == "classification"
    label_map = load_label_map(args.label_map, classes=classes) if args.label_map else None
    command = runs.command_line(args)
    if classes:
        if args.pieces != _DEFAULTS.pieces:
            raise ValueError(f"pieces is {args.pieces!r}; task 'classification' has no such choice")
        train, dev = (
            [read_documents(path, label_map) for path in paths] for paths in (args.train, args.dev)
        )
        record = fine_tune_classifier(
            args.model, train, dev, args.output, settings, command=command
        )
        metric, name = "accuracy", "accuracy"
    else:
        record = fine_tune(
            args.model,
            [read_labelled(path, label_map) for path in args.train],
            [read_labelled(path, label_map) for path in args.dev],
            args.output,
            settings,
            command=command,
        )
        metric, name = "f1", "F1"
    metrics = record["metrics"]
    if "languages" in metrics["dev"]:
        print(language_table(metrics["dev"]))
    print(
        f"{args.output}: dev {name} {metrics['dev'][metric]:.2f} after epoch "
        f"{metrics['best_epoch']}, {record['seconds']:.0f} s of training"
    )
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="xdistil teacher")
    add_arguments(_parser)
    _args = _parser.parse_args()
    _args.argv = ["teacher", *sys.argv[1:]]
    sys.exit(run(_args))
