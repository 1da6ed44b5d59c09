"""``xdistil distill``: distil a teacher into a small student."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdistil_fast.model_config import POOLINGS
from xdistil_fast.train import runs
from xdistil_fast.train.commands.report import write_html
from xdistil_fast.train.config import (
    DECAYS,
    DEVICES,
    HEADS,
    LOGIT_LOSSES,
    PRECISIONS,
    REPRESENTATION_LOSSES,
    STORED,
    TASKS,
    DistillConfig,
)
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.label_maps import load_label_map
from xdistil_fast.train.languages import language_table
from xdistil_fast.train.plots import need_matplotlib
from xdistil_fast.train.schedules import SCHEDULES

REPORT_FILE = "report.html"
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DistillConfig)}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command ``distill``."""
    parser = subparsers.add_parser(
        "distill",
        help="distil a teacher into a small student",
        description="Distil a fine-tuned token or text classifier into a BiLSTM(-CRF) student. "
        "Killed, the same command goes on where it was.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    files: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "[LANG=]FILE"}
    parser.add_argument(
        "--teacher", required=True, metavar="FOLDER", help="fine-tuned teacher: folder or Hub id"
    )
    parser.add_argument(
        "--train", required=True, help="labelled sentences (CoNLL, JSONL, Parquet; also gzipped)",
        **files,
    )  # fmt: skip
    parser.add_argument(
        "--dev", required=True, help="labelled sentences that choose the best epoch", **files
    )
    parser.add_argument(
        "--transfer", default=[], help="unlabelled text: the same, or one sentence a line", **files
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE.json",
        help='renames types, {"person": "PER", "product": null}; null drops a type; "*" stands '
        "for all others",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    _add(
        parser, "--task", str,
        "tagging of words, or classification of texts (JSONL with text and label, TSV, Parquet)",
        choices=TASKS,
    )  # fmt: skip
    _add(parser, "--pooling", str, "of the states of a text to classify", choices=POOLINGS)
    _add(parser, "--student", str, "embedding size x hidden size of each direction", metavar="ExH")
    _add(parser, "--head", str, "output layer", choices=HEADS)
    parser.add_argument(
        "--projected", action="store_true",
        help="the output layer reads a projection of the states, with GELU, which also learns the "
        "teacher's hidden states: better, and a little slower",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", choices=tuple(SCHEDULES),
        help="recipe: stages of training (default: d4.1 for tagging, joint-labels for "
        "classification)",
    )  # fmt: skip
    _add(parser, "--epochs", int, "passes over the sentences of each fit of the schedule")
    parser.add_argument(
        "--patience", type=int, metavar="EPOCHS",
        help="end a fit after so many epochs without a better dev score, 0 for never (default: "
        "what the schedule says)",
    )  # fmt: skip
    _add(parser, "--lr", float, "highest learning rate")
    _add(parser, "--batch-size", int, "sentences a step")
    _add(parser, "--warmup", float, "share of the steps in which the rate rises")
    _add(parser, "--decay", str, "how the rate falls", choices=DECAYS)
    _add(parser, "--dropout", float, "share of embedding and BiLSTM outputs dropped")
    _add(parser, "--clip", float, "largest gradient norm, 0 for none")
    _add(
        parser, "--precision", str,
        "what the BiLSTM's products take in training; auto: bfloat16 where the processor "
        "multiplies it (AVX-512 BF16)",
        choices=PRECISIONS,
    )  # fmt: skip
    _add(parser, "--hard-weight", float, "factor of the loss on labels")
    _add(parser, "--soft-weight", float, "factor of the loss on the teacher's logits")
    _add(
        parser, "--logit-loss", str,
        "how logits are compared; hard: the teacher's best label is learned as if it were gold",
        choices=LOGIT_LOSSES,
    )  # fmt: skip
    _add(parser, "--temperature", float, "divides the logits in kl and marginals")
    _add(
        parser, "--representation-weight", float,
        "factor of the loss on the teacher's hidden states, in schedules from d2",
    )  # fmt: skip
    _add(
        parser, "--representation-loss", str, "how hidden states are compared",
        choices=REPRESENTATION_LOSSES,
    )  # fmt: skip
    parser.add_argument(
        "--representation-size", type=int, metavar="N",
        help="principal components of the hidden states that are kept, 0 for the states as they "
        "are (default: 128, or all there are)",
    )  # fmt: skip
    parser.add_argument(
        "--teacher-layer", type=int, metavar="N",
        help="encoder layer of the hidden states, -1 the last (default: 7 of 12, or the one in its "
        "place; of a classifier the last)",
    )  # fmt: skip
    _add(
        parser, "--labelled-share", float,
        "share of each batch drawn from labelled text, 0 to take sentences as they come",
    )  # fmt: skip
    _add(
        parser, "--embeddings", str,
        "start of the embedding table: svd (of the teacher's), random, or a file",
        metavar="START",
    )  # fmt: skip
    _add(parser, "--embedding-dtype", str, "how the table is stored", choices=STORED)
    _add(parser, "--min-piece-count", int, "spell pieces seen less often with shorter ones")
    _add(parser, "--max-length", int, "pieces after which a sentence is cut between words")
    parser.add_argument(
        "--augment", default="", metavar="KIND=N,...",
        help="changed copies a sentence, labelled by the teacher: swap (entities), dropout, mask "
        "(words), crop, join; for example swap=1,dropout=0.5",
    )  # fmt: skip
    _add(
        parser, "--language-sampling", float,
        "languages are drawn by their sentences to this power, 1: as they are, 0: all alike",
        metavar="ALPHA",
    )  # fmt: skip
    parser.add_argument(
        "--keep-dev-sentences", action="store_true",
        help="keep transfer sentences that also stand in dev",
    )  # fmt: skip
    parser.add_argument(
        "--cache", metavar="FOLDER",
        help="keep the teacher's logits there, for further runs; else they go in the end",
    )  # fmt: skip
    _add(
        parser, "--device", str,
        "of teacher and student; auto: a GPU where there is one and the student's extension for it",
        choices=DEVICES,
    )  # fmt: skip
    _add(parser, "--batch-pieces", int, "pieces the teacher labels at once")
    _add(
        parser, "--teacher-precision", str,
        "the teacher labels in float32, in bfloat16, or auto: in bfloat16 where there are "
        "instructions for it, which halves the time",
        choices=PRECISIONS,
    )  # fmt: skip
    _add(parser, "--checkpoint-minutes", float, "time between checkpoints")
    _add(parser, "--seed", int, "of start values, shuffles and dropout")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--report", action="store_true",
        help="also write report.html, on dev and beside the teacher, into the student's folder",
    )  # fmt: skip


def _add(parser: argparse.ArgumentParser, flag: str, kind: type, text: str, **more: Any) -> None:
    default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
    parser.add_argument(
        flag, type=kind, default=default, help=f"{text} (default: %(default)s)", **more
    )


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    config = config_of(args)
    command = runs.command_line(args)
    if args.report:
        if config.task != "tagging":
            raise ValueError(f"--report: task is {config.task!r}; a report is for task 'tagging'")
        need_matplotlib("--report")
    record = distill(config, command=command)
    if os.environ.get("RANK", "0") != "0":  # torchrun started several, and one prints
        return 0
    if args.report:
        write_dev_report(config, command, config.teacher)
    metrics = record["metrics"]
    if "languages" in metrics["dev"]:
        print(language_table(metrics["dev"]))
    classes = config.task == "classification"
    name, score = ("accuracy", "accuracy") if classes else ("F1", "f1")
    print(
        f"{args.output}: dev {name} {metrics['dev'][score]:.2f} after epoch "
        f"{metrics['best_epoch']}, "
        f"{metrics['parameters']:,} parameters, {metrics['bytes'] / 1e6:.1f} MB, "
        f"{record['seconds']:.0f} s of labelling and training"
    )
    return 0


def config_of(args: argparse.Namespace) -> DistillConfig:
    """The settings that the arguments say."""
    settings = {name: getattr(args, name) for name in _DEFAULTS if hasattr(args, name)}
    classes = args.task == "classification"
    settings["label_map"] = (
        load_label_map(args.label_map, classes=classes) if args.label_map else None
    )
    return DistillConfig(**settings, progress=not args.quiet)


def write_dev_report(config: DistillConfig, command: Sequence[str], teacher: str) -> None:
    """Write ``report.html`` on dev into a finished student's folder.

    Args:
        config: of the student.
        command: that made it.
        teacher: to compare with, or the record of its scores on dev.
    """
    write_html(
        config.output,
        config.dev,
        Path(config.output) / REPORT_FILE,
        label_map=config.label_map,
        teacher=teacher,
        command=command,
        progress=config.progress,
    )


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="xdistil distill")
    add_arguments(_parser)
    _args = _parser.parse_args()
    _args.argv = ["distill", *sys.argv[1:]]
    sys.exit(run(_args))
