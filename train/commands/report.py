"""``xdistil report``: the results page from records of runs, or one student's page in HTML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xdistil_fast.commands.eval import load_model, warn_of_types
from xdistil_fast.model_config import CONFIG_FILE, PRECISIONS, parse_config
from xdistil_fast.model_io import CARD_FILE, WEIGHTS_FILE, file_digest
from xdistil_fast.train import runs
from xdistil_fast.train.card import with_test_scores
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.evaluation import Evaluation, teacher_evaluation
from xdistil_fast.train.html_report import EXAMPLES, html_report
from xdistil_fast.train.label_maps import load_label_map
from xdistil_fast.train.plots import need_matplotlib
from xdistil_fast.train.report import build_report, check_output, load_runs, write_report

_HTML_ONLY = ("data", "label_map", "teacher", "precision", "threads", "examples")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="write the results page from run records, or a student's report in HTML",
        description="Write a Markdown page of tables from the records that 'xdistil teacher', "
        "'xdistil distill' and 'xdistil eval --json FILE' left. With --html: score a student on "
        "labelled sentences and write one self-contained page on it, with its mistakes, learning "
        "curves, speed and settings.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folder of a teacher or student, or JSON file of an evaluation",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="page to write"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE.md", help="Markdown that stands before the tables"
    )
    parser.add_argument(
        "--card",
        type=Path,
        metavar="FOLDER",
        help="student whose model card shall show its and its teacher's scores among RUN",
    )
    parser.add_argument("--html", metavar="STUDENT", help="student: folder, name or Hub id")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="[LANG=]FILE",
        help="labelled sentences for --html (CoNLL, JSONL, Parquet; also gzipped)",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE.json",
        help='renames types of the data, {"person": "PER", "product": null}',
    )
    parser.add_argument(
        "--teacher",
        metavar="T",
        help="teacher to compare with: folder, Hub id, or what 'xdistil eval T --json FILE' wrote "
        "about it on the same data",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the student's kernels")
    parser.add_argument("--threads", type=int, metavar="N", help="of the student; 0: every core")
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help=f"mistakes shown of each kind (default: {EXAMPLES})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    check_output(args.output)
    if args.html is not None:
        return _run_html(args)
    for name in _HTML_ONLY:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --html STUDENT alone")
    loaded = load_runs(args.runs)
    page = build_report(loaded, args.text.read_text("utf-8") if args.text else "")
    if args.card is not None:
        card = args.card / CARD_FILE
        evaluations = [run.record for run in loaded if run.kind == "eval"]
        digest = file_digest(args.card / WEIGHTS_FILE)
        config = parse_config((args.card / CONFIG_FILE).read_text("utf-8"), args.card / CONFIG_FILE)
        made_of = config.lineage.get("data", [])
        write_report(with_test_scores(card.read_text("utf-8"), digest, evaluations, made_of), card)
    write_report(page, args.output)
    print(f"{args.output}: {len(loaded)} runs")
    return 0


def _run_html(args: argparse.Namespace) -> int:
    if args.runs or args.card or args.text:
        raise ValueError(
            "--html makes the page of one student; it takes no RUN, no --card and no --text"
        )
    if not args.data:
        raise ValueError("--html needs labelled sentences: --data FILE")
    examples = EXAMPLES if args.examples is None else args.examples
    if examples < 0:
        raise ValueError(f"--examples is {examples}; allowed: 0 or more")
    record = write_html(
        args.html,
        args.data,
        args.output,
        label_map=load_label_map(args.label_map) if args.label_map else None,
        teacher=args.teacher,
        options={"threads": args.threads or 0, "precision": args.precision},
        examples=examples,
        command=runs.command_line(args),
    )
    kept = f", {record['kept']:.1f} % of the teacher's" if "kept" in record else ""
    print(
        f"{args.output}: F1 {record['metrics']['f1']:.2f}{kept}, "
        f"{record['tokens_per_second']:,} tokens/s"
    )
    return 0


def write_html(
    student: str,
    data: Sequence[Path | str],
    output: Path,
    *,
    label_map: Any = None,
    teacher: str | None = None,
    options: dict[str, Any] | None = None,
    examples: int = EXAMPLES,
    command: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Score a student, and its teacher if one is given, with a progress bar; write the page.

    Args:
        student: folder, embedded name or Hub id.
        data: labelled files.
        output: the page.
        label_map: types of the data renamed or dropped.
        teacher: see :func:`~xdistil_fast.train.evaluation.teacher_evaluation`; None for none.
        options: of the student's tagger.
        examples: mistakes shown of each kind.
        command: that makes the page.
        progress: show a bar.

    Returns:
        See :func:`~xdistil_fast.train.html_report.html_report`.
    """
    need_matplotlib("a report in HTML")
    corpora = [read_labelled(path, label_map) for path in data]
    model = load_model(student, options or {})
    warn_of_types(corpora, model.labels)
    sides = 1 if teacher is None else 2
    total = sides * sum(len(corpus.sentences) for corpus in corpora)
    hidden = None if progress else True
    with tqdm(total=total, desc="scoring", unit="sentence", file=sys.stderr, disable=hidden) as bar:
        update: Callable[[int], object] = bar.update
        scores: Evaluation | None = None
        if teacher is not None:
            scores = teacher_evaluation(teacher, corpora, progress=update)
        return html_report(
            student,
            model,
            corpora,
            output,
            teacher=scores,
            examples=examples,
            command=command,
            progress=update,
        )
