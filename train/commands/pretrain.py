"""``xdistil pretrain``: train an encoder on unlabelled text, before it becomes a teacher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from xdistil_fast.train import runs
from xdistil_fast.train.distributed import one_process_only
from xdistil_fast.train.pretrain import PretrainSettings, pretrain

_DEFAULTS = PretrainSettings()


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command ``pretrain``."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train an encoder on unlabelled text",
        description="Go on with the masked-language-model training of a Hugging Face encoder on "
        "text of your domain; 'xdistil teacher --model' takes the result. Killed, the same command "
        "goes on where it was.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument(
        "--model", required=True, metavar="BASE", help="base encoder: a local folder or Hub id"
    )
    parser.add_argument(
        "--text", required=True, nargs="+", action="extend", metavar="FILE",
        help="unlabelled text: one sentence a line, JSONL, Parquet, CoNLL; also gzipped",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER")
    _add(parser, "--epochs", int, "passes over the text")
    _add(parser, "--lr", float, "peak learning rate", "learning_rate")
    _add(parser, "--batch-size", int, "sequences a step")
    _add(parser, "--length", int, "tokens of a sequence")
    _add(parser, "--mask", float, "share of the pieces to be guessed")
    _add(parser, "--warmup", float, "share of the steps in which the rate rises")
    _add(parser, "--seed", int, "of everything random")
    _add(parser, "--checkpoint-minutes", float, "time between checkpoints")
    _add(parser, "--device", str, "auto, cpu or cuda")


def _add(
    parser: argparse.ArgumentParser, flag: str, kind: type, text: str, name: str | None = None
) -> None:
    name = name or flag.removeprefix("--").replace("-", "_")
    default: Any = getattr(_DEFAULTS, name)
    parser.add_argument(
        flag, dest=name, type=kind, default=default, help=f"{text} (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    one_process_only("xdistil pretrain")
    names = PretrainSettings.__dataclass_fields__
    settings = PretrainSettings(**{k: v for k, v in vars(args).items() if k in names})
    record = pretrain(args.model, args.text, args.output, settings, command=runs.command_line(args))
    metrics = record["metrics"]
    head = "; its head for masked pieces is new, tied to the embeddings" * metrics["new_head"]
    print(
        f"{args.output}: held-out perplexity {metrics['perplexity_before']:.2f} before, "
        f"{metrics['perplexity']:.2f} after, {record['seconds']:.0f} s of training{head}"
    )
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="xdistil pretrain")
    add_arguments(_parser)
    _args = _parser.parse_args()
    _args.argv = ["pretrain", *sys.argv[1:]]
    sys.exit(run(_args))
