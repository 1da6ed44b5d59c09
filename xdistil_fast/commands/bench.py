"""`xdistil bench`: speed, memory and load time of a student here, beside its teacher's."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from xdistil_fast import _core
from xdistil_fast.classifier import Classifier
from xdistil_fast.commands import footprint
from xdistil_fast.commands.records import RecordReader, guess_format, is_tsv
from xdistil_fast.model_config import PRECISIONS, TEXT_CLASSIFICATION
from xdistil_fast.model_io import FILES, ModelFolder, load_folder, resolve_model
from xdistil_fast.student import Student
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import runs

if TYPE_CHECKING:
    from xdistil_fast.commands.bench_teacher import TeacherBench

SENTENCES = (
    "Angela Merkel met Tim Cook in Berlin.",
    "The Danish shipping group Maersk moved its African headquarters from Lagos to Nairobi.",
    "Nothing in this sentence has a name, and the tagger should leave it alone.",
    "Marie Curie left Warsaw for Paris in 1891 and taught at the Sorbonne.",
    "Rain again.",
    "Toyota and Panasonic will build the plant near Osaka, said Akio Toyoda on Tuesday.",
    "Serena Williams beat Garbiñe Muguruza in Melbourne, the BBC reported.",
    "How long does it take from the station to the old harbour on foot?",
    "The University of Nairobi, the Free University of Brussels and two institutes in São Paulo "
    "will share the telescope, its data and, as far as their budgets allow, the people who look "
    "after both.",
    "She paid in cash.",
    "Last year the company sold its shares in Nokia, closed the office in Tallinn and moved most "
    "of its engineers to Kraków, where rents were lower and trains, at least then, still ran on "
    "time.",
    "According to the minister, talks between Ankara and Athens will go on in Geneva next week.",
)

TASKS = ("ids to logits", "text to entities")
CLASS_TASKS = ("ids to logits", "text to class")
# A teacher takes seconds for as many.
_TEACHER_TEXTS = 32
_LEAST_CALLS = 5


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """Texts of a file that have anything in them; split words are joined by spaces.

    Args:
        path: plain text, JSON lines or CoNLL columns, by its name; also gzipped.
        limit: at most so many.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what its name says, or holds no text.
    """
    reader = RecordReader(path, guess_format(path.name))
    try:
        found = (
            " ".join(record.words) if record.text is None and record.words else record.text or ""
            for record in reader
        )
        texts = list(itertools.islice(filter(str.strip, found), limit))
    finally:
        reader.close()
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


@dataclass(frozen=True)
class Latency:
    """How long calls took.

    Attributes:
        model: what ran, with runtime and precision.
        task: one of `TASKS` or `CLASS_TASKS`.
        texts: of one call.
        calls: that were timed.
        median: seconds.
        p99: seconds; None below 100 calls, of which it would be the slowest and nothing more.
        tokens_per_second: word pieces, over all calls.
    """

    model: str
    task: str
    texts: int
    calls: int
    median: float
    p99: float | None
    tokens_per_second: float


# What measuring gives out: figures, footprints, and in words what could not be measured.
Step: TypeAlias = "Latency | dict[str, Any] | str"


def latency(
    model: str,
    task: str,
    calls: Sequence[Callable[[], object]],
    pieces: Sequence[int],
    texts: int,
    seconds: float,
) -> Latency:
    """Times calls in turn, again and again, after a first round that warms up.

    Args:
        model: as in `Latency`.
        task: as in `Latency`.
        calls: what to time.
        pieces: word pieces of each call.
        texts: of each call.
        seconds: least time to measure; every call runs at least once.
    """
    warm = time.perf_counter() + seconds / 4
    for call in calls:
        call()
        if time.perf_counter() > warm:
            break
    times: list[float] = []
    done = 0
    begin = time.perf_counter()
    for call, count in itertools.cycle(zip(calls, pieces, strict=True)):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        times.append(end - start)
        done += count
        if end - begin >= seconds and len(times) >= min(_LEAST_CALLS, 5 * len(calls)):
            break
    p99 = float(np.quantile(times, 0.99)) if len(times) >= 100 else None
    return Latency(model, task, texts, len(times), statistics.median(times), p99, done / sum(times))


def load_tagger(model: str, threads: int, precision: str) -> Callable[[list[str]], object]:
    """A `footprint.Factory` of our tagger."""
    return Tagger.from_pretrained(model, threads=threads, precision=precision)


def load_classifier(model: str, threads: int, precision: str) -> Callable[[list[str]], object]:
    """A `footprint.Factory` of our text classifier."""
    return Classifier.from_pretrained(model, threads=threads, precision=precision)


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a student on this machine, beside its teacher",
        description="Latency, tokens per second, memory and load time of a student in each "
        "precision, from piece ids to logits and from text to entities, for many texts at once "
        "and for one; with --teacher the same of a Hugging Face model.",
    )
    parser.add_argument("model", metavar="MODEL", help="student: folder, embedded name or Hub id")
    parser.add_argument(
        "--teacher", metavar="T", help="Hugging Face token classifier: folder or Hub id"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="texts (one a line, JSON lines, CoNLL; also gzipped); default: a few of our own",
    )
    parser.add_argument(
        "--texts", type=int, default=256, metavar="N", help="texts to use (default: 256)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: every core")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="per figure (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    _check(args)
    folder = resolve_model(args.model)
    content = load_folder(folder)
    if content.config.task == TEXT_CLASSIFICATION and args.data and is_tsv(args.data.name):
        raise ValueError(f"--data {args.data}: of .tsv this command reads words, not texts")
    texts = _texts(args.data, args.texts)
    if args.teacher and content.config.task == TEXT_CLASSIFICATION:
        raise ValueError("--teacher is for students that tag; a text classifier is measured alone")
    teacher = _teacher(args.teacher, args.threads) if args.teacher else None
    steps: Iterator[Step] = _student_steps(args, folder, content, texts)
    count = 5 * len(PRECISIONS)
    if teacher is not None:
        steps = itertools.chain(steps, teacher.steps(texts[:_TEACHER_TEXTS], args.seconds))
        count += teacher.count
    latencies: list[Latency] = []
    footprints: list[dict[str, Any]] = []
    notes: list[str] = []
    bar = tqdm(total=count, file=sys.stderr, disable=args.quiet or not sys.stderr.isatty())
    with bar:
        for step in steps:
            if isinstance(step, Latency):
                latencies.append(step)
            elif isinstance(step, str):
                notes.append(step)
            else:
                footprints.append(step)
            bar.update()
    record = {
        "kind": "bench",
        "command": runs.command_line(args),
        "machine": runs.machine_info(args.threads or None),
        "model": {"name": Path(args.model).name, "digest": content.digest},
        "data": {
            "name": "built-in" if args.data is None else runs.portable(str(args.data)),
            "texts": len(texts),
        },
        "latencies": [asdict(row) for row in latencies],
        "footprints": footprints,
        "notes": notes,
    }
    print(_report(record))
    if args.json is not None:
        runs.write_json(args.json, record)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.texts < 1:
        raise ValueError(f"--texts is {args.texts}; it must be at least 1")
    if not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds is {args.seconds}; it must be above 0 and at most 3600")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json {args.json} is a folder; it must be a file")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}")


def _texts(data: Path | None, count: int) -> list[str]:
    if data is not None:
        return read_texts(data, count)
    return list(itertools.islice(itertools.cycle(SENTENCES), count))


def _teacher(name: str, threads: int) -> TeacherBench:
    try:
        from xdistil_fast.commands.bench_teacher import TeacherBench
    except ImportError as error:
        raise ValueError(
            f'--teacher needs {error.name}: pip install "xdistil-fast[train]"'
        ) from error
    return TeacherBench(name, threads or _core.default_threads())


def _student_steps(
    args: argparse.Namespace, folder: Path, content: ModelFolder, texts: list[str]
) -> Iterator[Step]:
    disk = sum((folder / name).stat().st_size for name in FILES[:3])
    classes = content.config.task == TEXT_CLASSIFICATION
    factory = "load_classifier" if classes else "load_tagger"
    for precision in PRECISIONS:
        name = f"student {precision}"
        model = (Classifier if classes else Tagger)(
            content.config,
            content.tensors,
            content.tokenizer,
            threads=args.threads,
            precision=precision,
        )
        student = Student(content.config, content.tensors, args.threads, precision=precision)
        yield from _student_latencies(name, model, student, texts, args.seconds)
        arguments = {"model": str(folder), "threads": args.threads, "precision": precision}
        costs = footprint.measure(f"{__name__}:{factory}", arguments, texts)
        yield {"model": name, "disk_bytes": disk, **asdict(costs)}


def _student_latencies(
    name: str, model: Tagger | Classifier, student: Student, texts: list[str], seconds: float
) -> Iterator[Latency]:
    run_ids: Callable[..., object]
    if isinstance(model, Tagger):
        encoded, run_ids, tasks = model.tag_batch(texts).encoded, student.logits, TASKS
    else:
        encoded, run_ids = model.classify_batch(texts).encoded, student.class_logits
        tasks = CLASS_TASKS
    ids, cu_pieces = encoded.ids, encoded.cu_pieces
    bounds = list(itertools.pairwise(cu_pieces.tolist()))

    def logits_of(start: int, stop: int) -> Callable[[], object]:
        piece_ids, ends = ids[start:stop], np.array([0, stop - start], np.int32)
        return lambda: run_ids(piece_ids, ends)

    def result_of(text: str) -> Callable[[], object]:
        return lambda: model(text)

    total, single = [len(ids)], [stop - start for start, stop in bounds]
    one_by_one = [logits_of(start, stop) for start, stop in bounds]
    many = [lambda: run_ids(ids, cu_pieces)]
    yield latency(name, tasks[0], many, total, len(texts), seconds)
    yield latency(name, tasks[0], one_by_one, single, 1, seconds)
    yield latency(name, tasks[1], [lambda: model(texts)], total, len(texts), seconds)
    yield latency(name, tasks[1], [result_of(text) for text in texts], single, 1, seconds)


def _report(record: dict[str, Any]) -> str:
    """The table that is printed."""
    machine, data = record["machine"], record["data"]
    threads = machine["threads"]
    lines = [
        f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}, instruction set "
        f"{machine['isa']}; {data['texts']} texts ({data['name']})",
        "",
    ]
    rows = [["", "texts", "median", "p99", "tokens/s"]]
    for task in dict.fromkeys(row["task"] for row in record["latencies"]):
        rows.append([f"{task}:", "", "", "", ""])
        rows += [
            [
                f"  {row['model']}",
                str(row["texts"]),
                _seconds(row["median"]),
                "-" if row["p99"] is None else _seconds(row["p99"]),
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in record["latencies"]
            if row["task"] == task
        ]
    lines += _aligned(rows)
    rows = [["", "loads in", "memory", "at most", "on disk"]]
    rows += [
        [
            f"  {entry['model']}",
            _seconds(entry["load_seconds"]),
            _megabytes(entry["loaded_bytes"]),
            _megabytes(entry["peak_bytes"]),
            _megabytes(entry["disk_bytes"]),
        ]
        for entry in record["footprints"]
    ]
    lines += ["", *_aligned(rows)]
    return "\n".join([*lines, *(f"note: {note}" for note in record["notes"])])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _megabytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e6:.1f} MB"
