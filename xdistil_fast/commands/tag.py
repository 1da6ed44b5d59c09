"""`xdistil tag`: entities of a string, of standard input or of a file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xdistil_fast.commands.records import Record
from xdistil_fast.commands.stream import (
    Work,
    add_model_argument,
    add_runtime_arguments,
    add_stream_arguments,
    check_lengths,
    line,
    model_or,
    refuse_stream_arguments,
    run_stream,
    runtime_options,
    to_json,
)
from xdistil_fast.model_io import resolve_model
from xdistil_fast.tagger import Tagger
from xdistil_fast.text_model import TextModel

DEFAULT_MODEL = "en-ner"
_CONLL_BREAKS = re.compile(r"[ \t\r\n]")


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
    add_model_argument(parser, DEFAULT_MODEL)
    add_stream_arguments(parser)
    parser.add_argument(
        "--format", choices=("jsonl", "conll"), default="jsonl", help="of the results"
    )
    add_runtime_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    if args.text is not None and args.input is not None:
        raise ValueError("FILE and --text were both given; allowed is one of them")
    if args.text is not None:
        return _tag_string(args)
    if args.no_text and args.format == "conll":
        raise ValueError("--no-text is for --format jsonl; conll is the words and their tags")
    return run_stream(args, lambda: _load(args), {"--format": args.format})


def _load(args: argparse.Namespace) -> tuple[TextModel, Path, Work]:
    options = runtime_options(args)
    folder = resolve_model(model_or(args.model, DEFAULT_MODEL))
    tagger = Tagger.from_pretrained(folder, **options)
    return tagger, folder, lambda records, name: _tag_records(args, tagger, records, name)


def _tag_string(args: argparse.Namespace) -> int:
    refuse_stream_arguments(args)
    tagger = Tagger.from_pretrained(model_or(args.model, DEFAULT_MODEL), **runtime_options(args))
    text = args.text
    tagged = tagger.tag_batch([text], args.truncation)
    if args.format == "conll":
        sys.stdout.buffer.write(_conll(tagger.words([text], tagged)[0], "--text"))
        return 0
    lines = [to_json(dict(entity)) for entity in tagger.entities([text], tagged)[0]]
    body = ",\n".join(f"  {line}" for line in lines)
    sys.stdout.buffer.write((f"[\n{body}\n]\n" if lines else "[]\n").encode())
    return 0


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
            check_lengths(tagger, group, result.encoded, name)
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
                fields = {**record.fields, "tokens": record.words, "tags": row}
                out.append(line(fields, args.no_text))
        elif conll:
            out.append(_conll(next(words), where))
        else:
            fields = {**record.fields, "text": record.text, "entities": next(entities)}
            out.append(line(fields, args.no_text))
    return b"".join(out), tagged.pieces + tagged_split.pieces


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
