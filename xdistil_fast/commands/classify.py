"""`xdistil classify`: the class of a string, or of each text of standard input or of a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from xdistil_fast.classifier import Classifier
from xdistil_fast.commands.records import Record, is_tsv
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
from xdistil_fast.text_model import TextModel

DEFAULT_MODEL = "en-sentiment"


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `classify`."""
    parser = subparsers.add_parser(
        "classify",
        help="find the class of texts",
        description="Classify a string, standard input or a file (plain text with one text a line, "
        "JSON lines with text or tokens; also gzipped) into JSON lines: the input's fields with "
        "prediction and score, or predictions with --top-k. "
        "With -o, a run that was stopped goes on when the same command is typed again.",
    )
    parser.add_argument(
        "input", nargs="?", metavar="FILE", help="file to classify; - or nothing is standard input"
    )
    parser.add_argument("--text", metavar="STR", help="classify this string and print its class")
    add_model_argument(parser, DEFAULT_MODEL)
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="so many of the most probable classes of each text, 0 for all (default: the best)",
    )
    add_stream_arguments(parser)
    add_runtime_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    if args.text is not None and args.input is not None:
        raise ValueError("FILE and --text were both given; allowed is one of them")
    if args.top_k is not None and args.top_k < 0:
        raise ValueError(f"--top-k is {args.top_k}; it must be 0 (all classes) or more")
    if args.text is not None:
        return _classify_string(args)
    if args.input_format is None and args.input is not None and is_tsv(args.input):
        raise ValueError(
            f"{args.input}: of .tsv this command cannot tell whether it holds texts or words; "
            "--input-format conll reads words in columns; for texts make it .jsonl or .txt"
        )
    return run_stream(args, lambda: _load(args), {"--top-k": args.top_k})


def _classify_string(args: argparse.Namespace) -> int:
    refuse_stream_arguments(args)
    classifier = Classifier.from_pretrained(
        model_or(args.model, DEFAULT_MODEL), **runtime_options(args)
    )
    found = classifier(args.text, top_k=_top_k(args) or None, truncation=args.truncation)
    rows = found if args.top_k is not None else found[:1]
    body = ",\n".join(f"  {to_json(dict(row))}" for row in rows)
    sys.stdout.buffer.write(f"[\n{body}\n]\n".encode())
    return 0


def _load(args: argparse.Namespace) -> tuple[TextModel, Path, Work]:
    options = runtime_options(args)
    folder = resolve_model(model_or(args.model, DEFAULT_MODEL))
    classifier = Classifier.from_pretrained(folder, **options)
    return classifier, folder, lambda records, name: _classify(args, classifier, records, name)


def _top_k(args: argparse.Namespace) -> int:
    """How many classes are asked for; 0 is all."""
    return 1 if args.top_k is None else int(args.top_k)


def _classify(
    args: argparse.Namespace, classifier: Classifier, records: list[Record], name: str
) -> tuple[bytes, int]:
    """Result lines of a batch, and how many pieces it had."""
    texts = [record.text if record.words is None else " ".join(record.words) for record in records]
    classified = classifier.classify_batch([text or "" for text in texts])
    if args.truncation == "error":
        check_lengths(classifier, records, classified.encoded, name)
    out: list[bytes] = []
    found = classifier.predictions(classified, _top_k(args) or None)
    for record, text, predictions in zip(records, texts, found, strict=True):
        fields = dict(record.fields)
        if record.words is None:
            fields["text"] = text
        else:
            fields["tokens"] = record.words
        if args.top_k is None:
            best = predictions[0]
            out.append(
                line({**fields, "prediction": best["label"], "score": best["score"]}, args.no_text)
            )
        else:
            out.append(line({**fields, "predictions": predictions}, args.no_text))
    return b"".join(out), classified.pieces
