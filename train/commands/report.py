"""``xdistil report``: the results page from the records of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from xdistil_fast.model_io import CARD_FILE, WEIGHTS_FILE, file_digest
from xdistil_fast.train.card import with_test_scores
from xdistil_fast.train.report import build_report, load_runs, write_report


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="write the results page from run records",
        description="Write a Markdown page of tables from the records that 'xdistil teacher', "
        "'xdistil distill' and 'xdistil eval --json FILE' left.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a teacher or student, or JSON file of an evaluation",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE.md", help="page to write"
    )
    parser.add_argument(
        "--card",
        type=Path,
        metavar="FOLDER",
        help="student whose model card shall show its and its teacher's scores among RUN",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    loaded = load_runs(args.runs)
    page = build_report(loaded)
    if args.card is not None:
        card = args.card / CARD_FILE
        evaluations = [run.record for run in loaded if run.kind == "eval"]
        digest = file_digest(args.card / WEIGHTS_FILE)
        write_report(with_test_scores(card.read_text("utf-8"), digest, evaluations), card)
    write_report(page, args.output)
    print(f"{args.output}: {len(loaded)} runs")
    return 0
