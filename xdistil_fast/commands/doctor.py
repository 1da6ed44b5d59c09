"""`xdistil doctor`: what is installed here, what this machine can run, and whether it computes."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdistil_fast import __version__, _core
from xdistil_fast._backend import cuda_report
from xdistil_fast.commands.stream import add_runtime_arguments, runtime_options
from xdistil_fast.cuda_student import student_on
from xdistil_fast.model_config import POOLINGS, PRECISIONS
from xdistil_fast.model_io import (
    FILES,
    ModelFolder,
    count_parameters,
    embedded_models,
    load_folder,
    resolve_model,
)
from xdistil_fast.reference.lstm import bilstm_forward
from xdistil_fast.reference.student import student_class_scores, student_scores
from xdistil_fast.train import runs

_PACKAGES = (
    "numpy", "tokenizers", "safetensors", "huggingface_hub", "tqdm", "torch", "transformers",
    "pyarrow",
)  # fmt: skip
Floats = NDArray[np.float32]
# float32 against float64, over sums this short.
_TOLERANCE = 1e-5
# Where a number next to the middle between two levels may be rounded to either side: of float16, or
# of a hidden state of int8 or bfloat16, which the next steps read. At least twice what the worst of
# 300 batches like this one had.
_TOLERANCES = {"bfloat16": 1e-3, "int8": 0.2}


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="show versions, instruction sets and models, and test the kernels",
        description="Show what is installed, what this machine can run and which models came "
        "along, and compare the kernels with their reference. Exit status 1 if they differ.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="also check and describe it")
    add_runtime_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; returns the exit status."""
    if args.model is None and any(value for value in runtime_options(args).values()):
        raise ValueError(
            "--threads, --precision, --max-memory and --device are for MODEL, and none was given"
        )
    machine = runs.machine_info()
    errors = self_test()
    report: dict[str, Any] = {
        "xdistil-fast": __version__,
        "python": machine["versions"]["python"],
        "system": machine["system"],
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "threads": _core.default_threads(),
        "isa": {
            "active": _core.active_isa(),
            "available": _core.isas_available(),
            "compiled": _core.isas_compiled(),
            "XDF_ISA": os.environ.get("XDF_ISA"),
        },
        "cuda": cuda_report(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "embedded models": {
            name: _describe(load_folder(resolve_model(name))) for name in embedded_models()
        },
        "self-test": {"ok": _within_tolerance(errors), "largest error": errors},
    }
    if args.model is not None:
        folder = load_folder(resolve_model(args.model))
        report["model"] = _describe(folder)
        report["model"]["runs as"] = _runtime(folder, args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["self-test"]["ok"] else 1


def self_test() -> dict[str, float]:
    """Runs every kernel of inference on a small ragged batch and again in float64 NumPy.

    Returns:
        Largest absolute difference by kernel; of Viterbi, the share of tags that differ.
    """
    random = np.random.default_rng(0)
    inputs, hidden, width, num_tags = 5, 11, 7, 4
    cu_seqlens = np.array([0, 3, 3, 8], np.int32)
    total = int(cu_seqlens[-1])

    def normal(*shape: int) -> Floats:
        return random.normal(size=shape).astype(np.float32)

    table, ids = normal(9, inputs), random.integers(0, 9, total).astype(np.int32)
    columns: tuple[tuple[int, ...], ...] = ((inputs,), (hidden,), (), ())
    weights = [normal(4 * hidden, *column) for _ in range(2) for column in columns]
    output, bias = normal(num_tags, 2 * hidden), normal(num_tags)
    # Of what the projection makes of rounded states the scores see a quarter, as of the states.
    narrow = normal(num_tags, width) / 4
    start, end, transitions = normal(num_tags), normal(num_tags), normal(num_tags, num_tags)
    transitions[0, 1] = -np.inf
    bilstm: list[Any] = []
    for w_ih, w_hh, b_ih, b_hh in (weights[:4], weights[4:]):
        bilstm += [w_ih, w_hh, b_ih + b_hh]

    x, states = np.empty((total, inputs), np.float32), np.empty((total, 2 * hidden), np.float32)
    emissions, shares, marginals = (np.empty((total, num_tags), np.float32) for _ in range(3))
    tags, scores = np.empty(total, np.int32), np.empty(len(cu_seqlens) - 1, np.float32)
    _core.embedding_gather(table, ids, x)
    _core.bilstm_forward(_core.BiLSTMWeights(weights), x, cu_seqlens, states)
    _core.linear(_core.LinearWeights(output, bias), states, emissions)
    _core.softmax(emissions, shares)
    _core.crf_marginals(emissions, cu_seqlens, start, end, transitions, marginals)
    _core.crf_viterbi(emissions, cu_seqlens, start, end, transitions, tags, scores)

    exponents = np.exp(emissions.astype(np.float64))
    expected = [
        _every_path(emissions[a:b], start, end, transitions)
        for a, b in itertools.pairwise(cu_seqlens.tolist())
    ]
    return {
        "embedding": _difference(x, table[ids]),
        "bilstm": _difference(states, bilstm_forward(table[ids], cu_seqlens, weights)),
        "linear": _difference(emissions, states.astype(np.float64) @ output.T + bias),
        "softmax": _difference(shares, exponents / exponents.sum(1, keepdims=True)),
        "crf marginals": _difference(marginals, np.concatenate([item[0] for item in expected])),
        "crf viterbi": float(np.mean(tags != np.concatenate([item[1] for item in expected]))),
        **{
            f"{kind} {precision}": _student_error(
                precision, table, bilstm, layer, ids, cu_seqlens, projection
            )
            for kind, layer, projection in (
                ("student", (output, bias), None),
                ("projected student", (narrow, bias), (normal(width, 2 * hidden), normal(width))),
            )
            for precision in PRECISIONS
        },
        **{
            f"classifier {pooling}": _classifier_error(
                pooling, table, bilstm, (output, bias), ids, cu_seqlens
            )
            for pooling in POOLINGS
        },
    }


def _within_tolerance(errors: dict[str, float]) -> bool:
    return all(
        error <= _TOLERANCES.get(name.rpartition(" ")[2], _TOLERANCE)
        for name, error in errors.items()
    )


def _student_error(
    precision: str,
    table: Floats,
    bilstm: list[Any],
    output: tuple[Any, Floats],
    ids: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
    projection: tuple[Any, Floats] | None,
) -> float:
    if precision == "int8":
        w_ih, w_hh, bias, w_ih_reverse, w_hh_reverse, bias_reverse = bilstm
        bilstm = [w_ih, _as_bytes(w_hh), bias, w_ih_reverse, _as_bytes(w_hh_reverse), bias_reverse]
        output = _as_bytes(output[0]), output[1]
        projection = None if projection is None else (_as_bytes(projection[0]), projection[1])
    weights = _core.StudentWeights(
        precision, table, bilstm, output, _every_other(table), projection=projection
    )
    scores = np.empty((len(ids), len(output[1])), np.float32)
    _core.student_scores(weights, ids, cu_seqlens, scores)
    products = _core.multiplies_bfloat16()
    expected = student_scores(
        ids, cu_seqlens, table, bilstm, output, precision, products, projection
    )
    return _difference(scores, expected)


def _classifier_error(
    pooling: str,
    table: Floats,
    bilstm: list[Any],
    output: tuple[Floats, Floats],
    ids: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
) -> float:
    weights = _core.StudentWeights(
        "float32", table, bilstm, output, _every_other(table), pooling=pooling
    )
    scores = np.empty((len(cu_seqlens) - 1, len(output[1])), np.float32)
    _core.student_class_scores(weights, ids, cu_seqlens, scores)
    expected = student_class_scores(ids, cu_seqlens, table, bilstm, output, pooling)
    return _difference(scores, expected)


def _every_other(table: Floats) -> NDArray[np.int32]:
    """Pieces whose rows are kept; the others are computed in the call."""
    return np.arange(0, len(table), 2, dtype=np.int32)


def _as_bytes(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    levels, scales = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    _core.quantize_rows(weight, levels, scales)
    return levels, scales


def _every_path(
    emissions: Floats, start: Floats, end: Floats, transitions: Floats
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Marginals and best tags of one sequence, from the sum over all tag sequences."""
    length, num_tags = emissions.shape
    marginals = np.zeros((length, num_tags))
    best, highest = np.empty(0, np.int64), -np.inf
    if length == 0:
        return marginals, best
    places = np.arange(length)
    for path in itertools.product(range(num_tags), repeat=length):
        tags = np.array(path)
        value = float(start[tags[0]]) + float(end[tags[-1]])
        value += float(emissions[places, tags].astype(np.float64).sum())
        value += float(transitions[tags[:-1], tags[1:]].astype(np.float64).sum())
        marginals[places, tags] += np.exp(value)
        if value > highest:
            best, highest = tags, value
    return marginals / marginals.sum(1, keepdims=True), best


def _difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.max(np.abs(a - b)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _runtime(folder: ModelFolder, args: argparse.Namespace) -> dict[str, Any]:
    """How the student would run with these options, and why."""
    options = runtime_options(args)
    student = student_on(options.pop("device", "cpu"), folder.config, folder.tensors, **options)
    pieces, rows = folder.config.vocab_size, student.table_rows
    needed = pieces * (student.table_nbytes // rows if rows else 0)
    table = (
        f"{rows:,} of {pieces:,} pieces in {student.table_nbytes / 1e6:.1f} MB; "
        f"{student.max_memory / 1e6:.0f} MB are allowed (--max-memory), "
    )
    table += "enough for all" if rows == pieces else "the rest is computed in every call"
    if 0 < rows < pieces:
        table += f" ({needed / 1e6:.0f} MB would hold all)"
    return {
        "precision": student.precision,
        "kernels": _core.active_isa() if student.device == "cpu" else student.device,
        "packed weights": f"{student.nbytes / 1e6:.1f} MB",
        "input table": table,
    }


def _describe(folder: ModelFolder) -> dict[str, Any]:
    config = folder.config
    return {
        "path": str(folder.path),
        "task": config.task,
        "labels": list(config.labels),
        "size": f"{config.embedding_size}x{config.hidden_size}",
        **({} if config.pooling is None else {"pooling": config.pooling}),
        **({"projected to": config.projection_size} if config.projection_size else {}),
        "head": config.head,
        "stored in": config.precision,
        "pieces": config.vocab_size,
        "parameters": count_parameters(folder.tensors),
        "bytes": sum(
            (folder.path / file).stat().st_size for file in FILES if (folder.path / file).is_file()
        ),
        "written by": config.library_version,
        "digest": folder.digest,
    }


def _print(report: dict[str, Any], indent: str = "") -> None:
    for key, value in report.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:" + ("" if value else " none"))
            _print(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key}: {', '.join(map(str, value)) or 'none'}")
        elif isinstance(value, bool):
            print(f"{indent}{key}: {'yes' if value else 'NO'}")
        elif isinstance(value, float):
            print(f"{indent}{key}: {value:.1e}")
        else:
            print(f"{indent}{key}: {'-' if value is None else value}")
