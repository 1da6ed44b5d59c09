"""`xdistil tag`: entities of a string, of standard input or of a file."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xdistil_fast import __version__
from xdistil_fast.commands.records import FORMATS, Position, Record, RecordReader, guess_format
from xdistil_fast.commands.sink import FileSink, StreamSink
from xdistil_fast.model_config import PRECISIONS
from xdistil_fast.model_io import FILES, embedded_models, file_digest, resolve_model
from xdistil_fast.student import MAX_PIECES
from xdistil_fast.tagger import TRUNCATIONS, Tagged, Tagger

DEFAULT_MODEL = "en-ner"
_CHARS_PER_BATCH = 4 * MAX_PIECES
_CONLL_BREAKS = re.compile(r"[ \t\r\n]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `tag`."""
    parser = subparsers.add_parser(
        "tag",
        help="find entities in text",
        description="Find entities in a string, in standard input or in a file (plain text with "
        "one text a line, JSON lines with text or tokens, CoNLL columns; also gzipped). "
        "With -o, a run that was stopped goes on when the same command is typed again.",
    )
    parser.add_argument(
        "input", nargs="?", metavar="FILE", help="file to tag; - or nothing is standard input"
    )
    parser.add_argument("--text", metavar="STR", help="tag this string and print its entities")
    add_model_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="result file (default: standard output); OUT.part while it grows",
    )
    parser.add_argument(
        "--format", choices=("jsonl", "conll"), default="jsonl", help="of the results"
    )
    parser.add_argument(
        "--input-format", choices=FORMATS, help="of the input (default: by the file's name)"
    )
    parser.add_argument(
        "--no-text", action="store_true", help="leave the text itself out of JSON results"
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: stop there, or read them as U+FFFD",
    )
    parser.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="window",
        help="texts longer than the model's window: read in overlapping windows, or refuse",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew where a stopped run could go on"
    )
    add_runtime_arguments(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    parser.set_defaults(run=run)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, shared by the commands that run a student."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"folder, embedded name or Hub id (default: the embedded {DEFAULT_MODEL})",
    )


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a student runs: `--threads`, `--precision`, `--max-memory`."""
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: every core")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the kernels (default: what the model is stored in); int8 is the fastest",
    )
    parser.add_argument(
        "--max-memory",
        type=int,
        metavar="MB",
        help="of the table of word pieces (default: 268); changes speed, no result",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_runtime_arguments` read, as arguments of `Tagger`."""
    memory = None if args.max_memory is None else args.max_memory * 1_000_000
    return {"threads": args.threads, "precision": args.precision, "max_memory": memory}


def default_model() -> str:
    """Name of the model used where none is given.

    Raises:
        ValueError: this installation has none.
    """
    if DEFAULT_MODEL not in embedded_models():
        raise ValueError(f"this installation has no embedded {DEFAULT_MODEL}; give a model")
    return DEFAULT_MODEL


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    if args.text is not None and args.input is not None:
        raise ValueError("FILE and --text were both given; allowed is one of them")
    if args.text is not None:
        return _tag_string(args)
    path = None if args.input in (None, "-") else Path(args.input)
    _check_output(args.output, path)
    kind = args.input_format or ("txt" if path is None else guess_format(path.name))
    model = resolve_model(args.model or default_model())
    tagger = Tagger.from_pretrained(model, **runtime_options(args))
    reader = RecordReader(path, kind, args.errors)
    try:
        sink = _open_sink(args, tagger, reader, kind, model)
        try:
            return _tag_all(args, tagger, reader, sink)
        finally:
            sink.close()
    finally:
        reader.close()


def _tag_string(args: argparse.Namespace) -> int:
    if args.output is not None:
        raise ValueError("-o is for FILE; the result of --text is printed")
    tagger = Tagger.from_pretrained(args.model or default_model(), **runtime_options(args))
    text = args.text
    tagged = tagger.tag_batch([text], args.truncation)
    if args.format == "conll":
        sys.stdout.buffer.write(_conll(tagger.words([text], tagged)[0], "--text"))
        return 0
    lines = [_json(dict(entity)) for entity in tagger.entities([text], tagged)[0]]
    body = ",\n".join(f"  {line}" for line in lines)
    sys.stdout.buffer.write((f"[\n{body}\n]\n" if lines else "[]\n").encode())
    return 0


def _check_output(output: Path | None, path: Path | None) -> None:
    if output is None:
        return
    if output.is_dir():
        raise ValueError(f"-o {output} is a folder; it must be a file")
    if output.suffix == ".gz":
        raise ValueError(f"-o {output}: results are not compressed here; write to another name")
    if path is not None and output.exists() and path.exists() and output.samefile(path):
        raise ValueError(f"-o {output} is the input itself; choose another file")


def _open_sink(
    args: argparse.Namespace, tagger: Tagger, reader: RecordReader, kind: str, model: Path
) -> StreamSink | FileSink:
    output: Path | None = args.output
    if output is None or (output.exists() and not output.is_file()):
        return StreamSink(output)
    # Everything that a byte of the result depends on. Threads and batches are not among it. Nor
    # are --errors and --truncation: they differ where a run stopped, not in what came before.
    settings = {
        "version": __version__,
        **{f"model {name}": file_digest(model / name) for name in FILES[:3]},
        "--precision": tagger.precision,
        "--input-format": kind,
        "--format": args.format,
        "--no-text": args.no_text,
    }
    sink = FileSink(output, settings, resumable=reader.size is not None, restart=args.restart)
    try:
        if sink.start is not None:
            reader.skip(sink.start)
        sink.begin(reader.position())
    except BaseException:
        sink.close()
        raise
    return sink


def _tag_all(
    args: argparse.Namespace, tagger: Tagger, reader: RecordReader, sink: StreamSink | FileSink
) -> int:
    began = time.perf_counter()
    before = reader.position().records
    pieces = 0
    bar = tqdm(
        total=reader.size,
        initial=reader.raw_position(),
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=args.quiet or reader.interactive or not sys.stderr.isatty(),
    )
    kept = "; what was tagged is kept, run the same command to go on" if sink.resumable else ""
    try:
        with bar:
            for records, position in _batches(reader):
                data, count = _tag_records(args, tagger, records, reader.name)
                sink.write(data, position)
                pieces += count
                bar.update(reader.raw_position() - bar.n)
            sink.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    except ValueError as error:
        raise ValueError(f"{error}{kept}") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        name = sink.name if error.filename is None else error.filename
        raise OSError(error.errno, f"{error.strerror}{kept}", name) from error
    seconds = time.perf_counter() - began
    if not args.quiet:
        done = reader.position().records
        earlier = f" (and {before} before)" if before else ""
        print(
            f"{done - before} texts{earlier}, {pieces} pieces in {seconds:.2f} s: "
            f"{pieces / max(seconds, 1e-9):.0f} pieces/s",
            file=sys.stderr,
        )
    return 0


def _batches(reader: RecordReader) -> Iterator[tuple[list[Record], Position]]:
    """Records in batches of bounded size, with the place behind each batch."""
    batch: list[Record] = []
    size = 0
    try:
        for record in reader:
            batch.append(record)
            words = record.words
            size += 16 + (len(record.text or "") if words is None else 8 * len(words))
            if size >= _CHARS_PER_BATCH or reader.interactive:
                yield batch, reader.position()
                batch, size = [], 0
    except ValueError:
        # Everything before a line that cannot be read is tagged and kept.
        if batch:
            yield batch, reader.position()
        raise
    if batch:
        yield batch, reader.position()


def _tag_records(
    args: argparse.Namespace, tagger: Tagger, records: list[Record], name: str
) -> tuple[bytes, int]:
    """Result lines of a batch, and how many pieces it had."""
    running = [record for record in records if record.text is not None]
    split = [record for record in records if record.words is not None]
    conll = args.format == "conll"
    texts = [record.text or "" for record in running]
    sentences = [record.words or [] for record in split]
    tagged = tagger.tag_batch(texts)
    tagged_split = tagger.tag_split_batch(sentences)
    if args.truncation == "error":
        for group, result in ((running, tagged), (split, tagged_split)):
            _check_lengths(tagger, group, result, name)
    tags = iter(tagger.split_tags(sentences, tagged_split))
    words = iter(tagger.words(texts, tagged) if conll else [])
    entities = iter([] if conll else tagger.entities(texts, tagged))
    out: list[bytes] = []
    for record in records:
        where = f"{name}, line {record.line}"
        if record.words is not None:
            row = next(tags)
            if conll:
                out.append(_conll(zip(record.words, row, strict=True), where))
            else:
                out.append(_line({**record.fields, "tokens": record.words, "tags": row}))
        elif conll:
            out.append(_conll(next(words), where))
        else:
            fields = {**record.fields, "text": record.text, "entities": next(entities)}
            if args.no_text:
                del fields["text"]
            out.append(_line(fields))
    return b"".join(out), tagged.pieces + tagged_split.pieces


def _check_lengths(tagger: Tagger, records: list[Record], tagged: Tagged, name: str) -> None:
    window = tagger.config.window
    lengths = np.diff(tagged.encoded.cu_pieces)
    for index in np.flatnonzero(lengths > window)[:1].tolist():
        raise ValueError(
            f"{name}, line {records[index].line}: {lengths[index]} pieces; --truncation error "
            f"allows at most {window}"
        )


def _line(value: dict[str, Any]) -> bytes:
    return _json(value).encode() + b"\n"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # A lone surrogate, which JSON can spell and UTF-8 cannot, keeps its escape.
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _conll(row: Iterable[tuple[str, str]], where: str) -> bytes:
    lines: list[str] = []
    for word, tag in row:
        if not word or _CONLL_BREAKS.search(word):
            raise ValueError(
                f"{where}: the word {word!r} cannot stand in a CoNLL column; use --format jsonl"
            )
        lines.append(f"{word}\t{tag}\n")
    # A text without words would be a stray blank line.
    return ("".join(lines) + "\n").encode("utf-8", "replace") if lines else b""
