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
from xdistil_fast.class_scoring import score_classes
from xdistil_fast.classifier import Classifier
from xdistil_fast.commands.eval import warn_of_types
from xdistil_fast.commands.eval_classes import check_classes, classify_all, read_all
from xdistil_fast.model_config import TEXT_CLASSIFICATION
from xdistil_fast.model_io import (
    CARD_FILE,
    FILES,
    ModelError,
    ModelFolder,
    load_folder,
    resolve_model,
    save_folder,
)
from xdistil_fast.quantization import quantize_tensors
from xdistil_fast.scoring import score
from xdistil_fast.tagger import Tagger
from xdistil_fast.train.corpora import Corpus, read_labelled
from xdistil_fast.train.documents import Documents
from xdistil_fast.train.label_maps import load_label_map

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
        "as fast. Its F1 on labelled dev sentences, or a text classifier's accuracy on dev texts, "
        "is measured before and after, stands in the model card, and nothing is written if it "
        "loses more than --max-loss.",
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
        help=f"most points of F1 or accuracy (0..100) it may lose (default: {MAX_LOSS})",
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
    config = replace(folder.config, precision="int8", library_version=__version__)
    tensors = quantize_tensors(folder.tensors)
    quantised = replace(folder, config=config, tensors=tensors)
    classes = config.task == TEXT_CLASSIFICATION
    metrics = (_measure_classes if classes else _measure_tags)(args, folder, quantised)
    metrics["source"] = folder.digest
    metrics["isa"] = _core.active_isa()
    name, key, unit = ("accuracy", "accuracy", "texts") if classes else ("F1", "f1", "words")
    before, after = metrics[f"{key}_float32"], metrics[f"{key}_int8"]
    print(
        f"{name} on dev {before:.2f} in float32, {after:.2f} in int8 ({after - before:+.2f}); "
        f"{metrics['agreement']:.3f} % of {metrics[unit]:,} {unit} have the same "
        f"{'class' if classes else 'tag'}"
    )
    loss = before - after
    if loss > args.max_loss:
        raise ValueError(
            f"int8 loses {loss:.2f} {name}, --max-loss allows {args.max_loss:g}: nothing was "
            "written"
        )
    config = replace(config, metrics={**config.metrics, "quantization": metrics})
    card = (folder.path / CARD_FILE).read_text("utf-8") if _has_card(folder.path) else ""
    card = renamed(card, folder.path.name, args.output.absolute().name)
    save_folder(
        args.output, config, tensors, folder.tokenizer_json, with_quantization(card, metrics)
    )
    sizes = [_size(path) for path in (folder.path, args.output)]
    print(
        f"{args.output}: {sizes[1] / 1e6:.1f} MB (float32: {sizes[0] / 1e6:.1f} MB)",
        file=sys.stderr,
    )
    return 0


def _tagger(folder: ModelFolder, threads: int) -> Tagger:
    return Tagger(folder.config, folder.tensors, folder.tokenizer, threads=threads)


def _measure_tags(
    args: argparse.Namespace, folder: ModelFolder, quantised: ModelFolder
) -> dict[str, Any]:
    """F1 on dev of a tagger before and after."""
    label_map = load_label_map(args.label_map) if args.label_map else None
    corpora = [read_labelled(path, label_map) for path in args.dev]
    warn_of_types(corpora, folder.config.labels)
    sentences = [list(item.words or ()) for corpus in corpora for item in corpus.sentences]
    gold = [list(item.tags or ()) for corpus in corpora for item in corpus.sentences]
    expected = _tagger(folder, args.threads).tag_words(sentences)
    found = _tagger(quantised, args.threads).tag_words(sentences)
    scheme = iob.scheme_of(folder.config.labels)
    before, after = score(gold, expected, scheme), score(gold, found, scheme)
    if not before.overall.gold:
        raise ValueError("--dev holds no entities; the loss cannot be measured on it")
    pairs = [pair for a, b in zip(expected, found, strict=True) for pair in zip(a, b, strict=True)]
    return {
        "f1_float32": before.f1,
        "f1_int8": after.f1,
        "agreement": 100 * sum(a == b for a, b in pairs) / max(len(pairs), 1),
        "words": len(pairs),
        "support": before.overall.gold,
        "data": _described(corpora),
    }


def _measure_classes(
    args: argparse.Namespace, folder: ModelFolder, quantised: ModelFolder
) -> dict[str, Any]:
    """Accuracy on dev of a text classifier before and after."""
    corpora = read_all(args.dev, args.label_map)
    check_classes(corpora, folder.config.labels)
    texts = [text for documents in corpora for text in documents.texts]
    gold = [label for documents in corpora for label in documents.labels]
    expected, found = (
        classify_all(
            Classifier(item.config, item.tensors, item.tokenizer, threads=args.threads), texts
        )
        for item in (folder, quantised)
    )
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    return {
        "accuracy_float32": score_classes(gold, expected).accuracy,
        "accuracy_int8": score_classes(gold, found).accuracy,
        "agreement": 100 * same / len(texts),
        "texts": len(texts),
        "data": _described(corpora),
    }


def _described(corpora: Sequence[Corpus] | Sequence[Documents]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in corpus.describe("dev").items() if key != "label_map"}
        for corpus in corpora
    ]


def renamed(card: str, old: str, new: str) -> str:
    """A model card with another name in its title and in the line that loads the model."""
    return card.replace(f"\n# {old}\n", f"\n# {new}\n", 1).replace(
        f'from_pretrained("{old}")', f'from_pretrained("{new}")'
    )


def with_quantization(card: str, metrics: Mapping[str, Any]) -> str:
    """A model card with the section on quantisation, in place of one it may have already.

    Args:
        card: Markdown.
        metrics: what `config.json` holds as `metrics["quantization"]`.
    """
    files = ", ".join(f"{item['name']} (`{item['digest'][:16]}`)" for item in metrics["data"])
    classes = "accuracy_int8" in metrics
    key, name = ("accuracy", "accuracy") if classes else ("f1", "F1")
    before, after = metrics[f"{key}_float32"], metrics[f"{key}_int8"]
    unit, result = ("texts", "class") if classes else ("entities", "tag")
    lines = [
        _TITLE,
        "",
        "Weights are int8 with a scale for each output channel, the hidden state has seven bits; "
        "made by `xdistil quantize`, which measured"
        + (":" if classes else ", strict and at word level:"),
        "",
        f"| data | {unit} | {name} float32 | {name} int8 | difference | same {result} |",
        "|---|---|---|---|---|---|",
        f"| {files} | {metrics['texts' if classes else 'support']:,} | {before:.2f} "
        f"| **{after:.2f}** | {after - before:+.2f} | {metrics['agreement']:.3f} % |",
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
