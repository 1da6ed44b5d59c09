"""`xdistil quantize`: a student with int8 weights, saved only with what it loses written beside."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xdistil_fast import __version__, _core
from xdistil_fast import labels as iob
from xdistil_fast.commands.eval import warn_of_types
from xdistil_fast.model_io import (
    CARD_FILE,
    FILES,
    ModelError,
    load_folder,
    resolve_model,
    save_folder,
)
from xdistil_fast.quantization import quantize_tensors
from xdistil_fast.scoring import Scores, score
from xdistil_fast.tagger import Tagger
from xdistil_fast.train.corpora import load_label_map, read_labelled

MAX_LOSS = 0.3
_TITLE = "## Quantisation"
_SECTION = re.compile(rf"^{_TITLE}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_STORED = re.compile(r"The table is stored in \w+\.")


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `quantize`."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a student with int8 weights, and measure what it loses",
        description="Write a student with int8 weights: a smaller folder that runs several times "
        "as fast. Its F1 on labelled dev sentences is measured before and after, stands in the "
        "model card, and nothing is written if it loses more than --max-loss.",
    )
    parser.add_argument("model", metavar="MODEL", help="student: folder, embedded name or Hub id")
    parser.add_argument(
        "--dev",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="labelled sentences (CoNLL, JSONL, Parquet; also gzipped); several are pooled",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FOLDER", help="where the model goes"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=MAX_LOSS,
        metavar="F1",
        help=f"most points of F1 (0..100) it may lose (default: {MAX_LOSS})",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE.json",
        help='renames types of the data, {"person": "PER", "product": null}',
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: every core")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    if not 0 <= args.max_loss <= 100:
        raise ValueError(f"--max-loss is {args.max_loss}; it must be from 0 to 100")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"-o {args.output} exists; choose another folder")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"-o {args.output}: {args.output.absolute().parent} is not a folder")
    folder = load_folder(resolve_model(args.model))
    if folder.config.precision != "float32":
        raise ModelError(f"{args.model} is of precision {folder.config.precision} already")
    label_map = load_label_map(args.label_map) if args.label_map else None
    corpora = [read_labelled(path, label_map) for path in args.dev]
    warn_of_types(corpora, folder.config.labels)
    sentences = [list(item.words or ()) for corpus in corpora for item in corpus.sentences]
    gold = [list(item.tags or ()) for corpus in corpora for item in corpus.sentences]

    config = replace(folder.config, precision="int8", library_version=__version__)
    tensors = quantize_tensors(folder.tensors)
    before = Tagger(folder.config, folder.tensors, folder.tokenizer, threads=args.threads)
    after = Tagger(config, tensors, folder.tokenizer, threads=args.threads)
    expected, found = before.tag_words(sentences), after.tag_words(sentences)
    scheme = iob.scheme_of(folder.config.labels)
    metrics = _measure(score(gold, expected, scheme), score(gold, found, scheme), expected, found)
    metrics["data"] = [
        {key: value for key, value in corpus.describe("dev").items() if key != "label_map"}
        for corpus in corpora
    ]
    metrics["source"] = folder.digest
    if not metrics["support"]:
        raise ValueError("--dev holds no entities; the loss cannot be measured on it")
    print(
        f"F1 on dev {metrics['f1_float32']:.2f} in float32, {metrics['f1_int8']:.2f} in int8 "
        f"({metrics['f1_int8'] - metrics['f1_float32']:+.2f}); "
        f"{metrics['agreement']:.3f} % of {metrics['words']:,} words have the same tag"
    )
    loss = metrics["f1_float32"] - metrics["f1_int8"]
    if loss > args.max_loss:
        raise ValueError(
            f"int8 loses {loss:.2f} F1, --max-loss allows {args.max_loss:g}: nothing was written"
        )
    config = replace(config, metrics={**config.metrics, "quantization": metrics})
    card = (folder.path / CARD_FILE).read_text("utf-8") if _has_card(folder.path) else ""
    save_folder(
        args.output, config, tensors, folder.tokenizer_json, with_quantization(card, metrics)
    )
    sizes = [_size(path) for path in (folder.path, args.output)]
    print(
        f"{args.output}: {sizes[1] / 1e6:.1f} MB (float32: {sizes[0] / 1e6:.1f} MB)",
        file=sys.stderr,
    )
    return 0


def _measure(
    before: Scores,
    after: Scores,
    expected: Sequence[Sequence[str]],
    found: Sequence[Sequence[str]],
) -> dict[str, Any]:
    pairs = [pair for a, b in zip(expected, found, strict=True) for pair in zip(a, b, strict=True)]
    same = sum(a == b for a, b in pairs)
    return {
        "f1_float32": before.f1,
        "f1_int8": after.f1,
        "agreement": 100 * same / max(len(pairs), 1),
        "words": len(pairs),
        "support": before.overall.gold,
        "isa": _core.active_isa(),
    }


def with_quantization(card: str, metrics: Mapping[str, Any]) -> str:
    """A model card with the section on quantisation, in place of one it may have already.

    Args:
        card: Markdown.
        metrics: what `config.json` holds as `metrics["quantization"]`.
    """
    files = ", ".join(f"{item['name']} (`{item['digest'][:16]}`)" for item in metrics["data"])
    lines = [
        _TITLE,
        "",
        "Weights are int8 with a scale for each output channel, the hidden state has seven bits; "
        "made by `xdistil quantize`, which measured, strict and at word level:",
        "",
        "| data | entities | F1 float32 | F1 int8 | difference | same tag |",
        "|---|---|---|---|---|---|",
        f"| {files} | {metrics['support']:,} | {metrics['f1_float32']:.2f} "
        f"| **{metrics['f1_int8']:.2f}** | {metrics['f1_int8'] - metrics['f1_float32']:+.2f} "
        f"| {metrics['agreement']:.3f} % |",
        "",
        f"Kernels: {metrics['isa']}. Float32 weights: `{metrics['source'][:16]}`.",
        "",
    ]
    kept = _STORED.sub("The weights are stored in int8.", _SECTION.sub("", card))
    kept = kept.replace("with the weights in this folder", "with the weights before int8")
    return kept.rstrip("\n") + "\n\n" + "\n".join(lines)


def _has_card(folder: Path) -> bool:
    return (folder / CARD_FILE).is_file()


def _size(folder: Path) -> int:
    return sum(os.path.getsize(folder / name) for name in FILES if (folder / name).is_file())
