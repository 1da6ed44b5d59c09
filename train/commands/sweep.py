"""``xdistil sweep``: students of many sizes from one teacher, and which of them to take."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from xdistil_fast.train import runs
from xdistil_fast.train.commands import distill as distilling
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.distributed import one_process_only
from xdistil_fast.train.sweep import TEACHER_FILE, parse_sizes, summary, sweep


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command ``sweep``."""
    parser = subparsers.add_parser(
        "sweep",
        help="distil students of many sizes and compare them",
        description="Distil one teacher into students of many sizes, each a run of 'xdistil "
        "distill' in a folder of its own, all from one cache of the teacher's logits; write a "
        "table of sizes, scores and speeds, and a plot. All other options are those of 'xdistil "
        "distill'. Killed, the same command goes on where it was.",
        conflict_handler="resolve",
    )
    distilling.add_arguments(parser)
    # Of distill's own arguments these mean nothing, or something else, here.
    for name in ("--task", "--pooling"):
        default = parser.get_default(name.removeprefix("--"))
        parser.add_argument(name, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--student", action=_NoStudent, help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="of the sweep; may be there already"
    )
    parser.add_argument(
        "--sizes",
        required=True,
        metavar="SIZES",
        help="ExH,ExH,... (embedding size x hidden size of each direction), or 'paper': E of 50, "
        "100, 200, 300 with H of 100, 200, 400, 600",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="PERCENT",
        help="stop at the smallest student, by number of parameters, that keeps so much of the "
        "teacher's dev F1",
    )
    parser.set_defaults(run=run)


class _NoStudent(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: object, **more: object) -> NoReturn:
        parser.error("--student is for distill; a sweep takes --sizes")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    sizes = parse_sizes(args.sizes)
    args.student = sizes[0]
    one_process_only("xdistil sweep")
    base = distilling.config_of(args)
    if base.task != "tagging":
        raise ValueError(f"task is {base.task!r}; a sweep allows 'tagging'")
    command = runs.command_line(args)
    bar = tqdm(
        desc="teacher on dev", unit="sentence", file=sys.stderr, leave=False,
        disable=None if base.progress else True,
    )  # fmt: skip

    def distil(config: DistillConfig) -> Mapping[str, Any]:
        bar.close()
        made = command_of_one(args.argv, config)
        record = distill(config, command=made)
        if args.report:
            teacher = str(Path(base.output) / TEACHER_FILE)
            distilling.write_dev_report(config, made, teacher)
        return record

    with bar:
        content = sweep(
            base,
            sizes,
            keep=args.keep,
            command=command,
            distil=distil,
            say=(lambda line: tqdm.write(line, file=sys.stderr)) if base.progress else None,
            progress=bar.update,
        )
    print(f"{args.output}: {summary(content, sizes)}")
    return 0


def command_of_one(argv: Sequence[str], config: DistillConfig) -> list[str]:
    """The command of ``xdistil distill`` that makes one student of a sweep."""
    kept: list[str] = []
    words = iter(argv[1:])
    for word in words:
        name = "-o" if re.match("-o.", word) else word.partition("=")[0]
        if name not in ("--sizes", "--keep", "-o", "--output", "--cache"):
            kept.append(word)
        elif name == word:
            next(words, None)  # its value
    own = ["--student", config.student, "--cache", str(config.cache), "-o", config.output]
    return ["xdistil", "distill", *map(runs.portable, [*kept, *own])]
