"""Arguments that the student's kernels refuse, by name and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xdistil_fast import _core

V, E, H, C = 11, 5, 17, 4
PRECISIONS = ("float32", "bfloat16", "int8")

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Any], Any]
Refusal = tuple[Change, type[Exception], str]


def make_arguments(precision: str) -> dict[str, Any]:
    """Arguments of StudentWeights that are all in order, in lists and thus easily changed."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    def matrix(*shape: int) -> Any:
        weight = floats(*shape)
        if precision != "int8":
            return weight
        levels, scales = np.empty(shape, np.int8), np.empty(shape[0], np.float32)
        _core.quantize_rows(weight, levels, scales)
        return [levels, scales]

    def direction() -> list[Any]:
        return [floats(4 * H, E), matrix(4 * H, H), floats(4 * H)]

    return {
        "precision": precision,
        "embedding": floats(V, E),
        "bilstm": direction() + direction(),
        "output": [matrix(C, 2 * H), floats(C)],
        "table_ids": np.arange(0, V, 2, dtype=np.int32),
        "threads": 1,
    }


def refuse(arguments: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        _core.StudentWeights(**arguments)


def changed(items: list[Any], at: int, change: Change) -> list[Any]:
    return [*items[:at], change(items[at]), *items[at + 1 :]]


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def strided(array: Array) -> Array:
    every_other: Array = np.repeat(array, 2, axis=-1)[..., ::2]
    return every_other


FLOAT_ARRAY: list[Refusal] = [
    (lambda a: a[:-4].copy(), ValueError, "has shape"),
    (lambda a: a[None], ValueError, "has shape"),
    (strided, ValueError, "C-contiguous"),
    (lambda a: a.astype(np.float64), TypeError, "dtype float64, must be float32"),
    (lambda a: a.astype(np.float16), TypeError, "dtype float16, must be float32"),
    (lambda a: a.astype(">f4"), TypeError, "dtype >f4, must be float32"),
    (lambda a: a.tolist(), TypeError, "got list, must be a NumPy array"),
    (lambda a: None, TypeError, "got NoneType, must be a NumPy array"),
]


def test_what_is_in_order_is_taken() -> None:
    for precision in PRECISIONS:
        assert _core.StudentWeights(**make_arguments(precision)).precision == precision


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("precision", lambda _: "float16", ValueError, "precision: got 'float16', must be 'float3"),
        ("precision", lambda _: "", ValueError, "precision: got ''"),
        ("precision", lambda _: None, TypeError, "incompatible"),
        ("embedding", lambda a: a[0], ValueError, r"embedding: .*\[5\].*\[\*, \*\]"),
        ("embedding", lambda a: a[:0].copy(), ValueError, r"embedding: .*\[0, 5\]"),
        ("embedding", lambda a: a[:, :0].copy(), ValueError, r"embedding: .*\[11, 0\]"),
        ("embedding", lambda a: a[:, :-1].copy(), ValueError, r"w_ih: .*\[68, 5\].*\[\*, 4\]"),
        ("embedding", strided, ValueError, "embedding: .*contiguous"),
        ("embedding", lambda a: a.astype(np.float16), TypeError, "embedding: .*float16.*float32"),
        ("embedding", lambda a: a.tolist(), TypeError, "embedding: .*list"),
        ("bilstm", lambda a: a[:3], ValueError, "bilstm: got 3 arrays, must be 6"),
        ("bilstm", lambda a: [*a, a[0]], ValueError, "bilstm: got 7 arrays, must be 6"),
        ("bilstm", lambda a: [], ValueError, "bilstm: got 0 arrays, must be 6"),
        ("bilstm", lambda a: None, TypeError, "incompatible"),
        ("output", lambda a: a[:1], ValueError, "output: got 1 arrays, must be 2"),
        ("output", lambda a: [*a, a[1]], ValueError, "output: got 3 arrays, must be 2"),
        ("output", lambda a: a[1], ValueError, "output: got 4 arrays, must be 2"),
        ("table_ids", lambda _: ints(0, V), ValueError, "table_ids: has 11 at position 1.*0 to 10"),
        ("table_ids", lambda _: ints(-1, 0), ValueError, "table_ids: has -1 at position 0"),
        ("table_ids", lambda _: ints(3, 1, 3), ValueError, "table_ids: has 3 twice"),
        ("table_ids", lambda a: a.astype(np.int64), TypeError, "table_ids: .*int64.*int32"),
        ("table_ids", lambda a: a[None], ValueError, "table_ids: "),
        ("table_ids", strided, ValueError, "table_ids: .*contiguous"),
        ("table_ids", lambda a: a.tolist(), TypeError, "table_ids: .*list"),
        ("table_ids", lambda _: None, TypeError, "table_ids: .*NoneType"),
        ("threads", lambda _: -1, ValueError, "threads: got -1"),
        ("threads", lambda _: 1 << 20, ValueError, "threads: got 1048576"),
        ("threads", lambda _: 1.5, TypeError, "incompatible"),
    ],
)
def test_bad_weights(
    precision: str, name: str, change: Change, exception: type[Exception], message: str
) -> None:
    arguments = make_arguments(precision)
    arguments[name] = change(arguments[name])
    refuse(arguments, exception, message)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("at", "name"), [(2, "bias"), (3, "w_ih"), (5, "bias")])
@pytest.mark.parametrize(("change", "exception", "message"), FLOAT_ARRAY)
def test_bad_float_arrays_of_the_bilstm(
    precision: str, at: int, name: str, change: Change, exception: type[Exception], message: str
) -> None:
    arguments = make_arguments(precision)
    arguments["bilstm"] = changed(arguments["bilstm"], at, change)
    refuse(arguments, exception, f"^{name}: .*{message}")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("change", "exception", "message"), FLOAT_ARRAY)
@pytest.mark.parametrize(
    ("argument", "at", "name"),
    [("bilstm", 1, "w_hh"), ("bilstm", 4, "w_hh"), ("output", 0, "output weight")],
)
def test_bad_float_matrices(
    precision: str,
    argument: str,
    at: int,
    name: str,
    change: Change,
    exception: type[Exception],
    message: str,
) -> None:
    arguments = make_arguments(precision)
    arguments[argument] = changed(arguments[argument], at, change)
    refuse(arguments, exception, f"^{name}: .*{message}")


def filled(value: int, columns: list[int]) -> Change:
    """Sets columns of the last row of a matrix of zeros."""

    def change(pair: list[Array]) -> list[Array]:
        levels = np.zeros_like(pair[0])
        levels[-1, columns] = value
        return [levels, pair[1]]

    return change


BYTES: list[Refusal] = [
    (lambda p: p[0], ValueError, "must be a pair of int8 values and float32 scales"),
    (lambda p: p[:1], ValueError, "must be a pair"),
    (lambda p: [*p, p[1]], ValueError, "must be a pair"),
    (lambda p: None, ValueError, "must be a pair"),
    (lambda p: "ab", TypeError, "got str"),
    (lambda p: [p[0].astype(np.float32), p[1]], TypeError, "float32, must be int8"),
    (lambda p: [p[0].astype(np.uint8), p[1]], TypeError, "uint8, must be int8"),
    (lambda p: [p[0][:-1].copy(), p[1]], ValueError, "has shape"),
    (lambda p: [p[0][:, :-1].copy(), p[1]], ValueError, "has shape"),
    (lambda p: [strided(p[0]), p[1]], ValueError, "C-contiguous"),
    (lambda p: [p[0].tolist(), p[1]], TypeError, "got list"),
    (lambda p: [p[0], p[1][:-1].copy()], ValueError, "scales: has shape"),
    (lambda p: [p[0], p[1][:, None].copy()], ValueError, "scales: has shape"),
    (lambda p: [p[0], p[1].astype(np.float64)], TypeError, "scales: .*float64.*float32"),
    (lambda p: [p[0], strided(p[1])], ValueError, "scales: .*contiguous"),
    (lambda p: [p[0], None], TypeError, "scales: got NoneType"),
    (filled(-128, [3]), ValueError, "could overflow"),
    # Columns 0, 1 and 4 are of one set: 258 is its limit.
    (filled(87, [0, 1, 4]), ValueError, "could overflow"),
    (filled(-87, [0, 1, 4]), ValueError, "could overflow"),
    (filled(127, [8, 9, 12]), ValueError, "could overflow"),
]


@pytest.mark.parametrize(("change", "exception", "message"), BYTES)
@pytest.mark.parametrize(
    ("argument", "at", "name"),
    [("bilstm", 1, "w_hh"), ("bilstm", 4, "w_hh"), ("output", 0, "output weight")],
)
def test_bad_int8_matrices(
    argument: str,
    at: int,
    name: str,
    change: Change,
    exception: type[Exception],
    message: str,
) -> None:
    arguments = make_arguments("int8")
    arguments[argument] = changed(arguments[argument], at, change)
    refuse(arguments, exception, f"^{name}.*({message})")


@pytest.mark.parametrize("change", [filled(86, [0, 1, 4]), filled(127, [0, 1, 2, 3, 16])])
def test_bytes_at_their_limit_are_taken(change: Change) -> None:
    for argument, at in (("bilstm", 1), ("bilstm", 4), ("output", 0)):
        arguments = make_arguments("int8")
        arguments[argument] = changed(arguments[argument], at, change)
        _core.StudentWeights(**arguments)


@pytest.mark.parametrize(("change", "exception", "message"), FLOAT_ARRAY[1:])
def test_bad_first_array(change: Change, exception: type[Exception], message: str) -> None:
    """The one that hidden_size is read from."""
    arguments = make_arguments("float32")
    arguments["bilstm"] = changed(arguments["bilstm"], 0, change)
    refuse(arguments, exception, f"^w_ih: .*{message}")


@pytest.mark.parametrize("rows", [0, 4 * H - 1, 4 * H + 2])
def test_rows_that_are_no_four_gates(rows: int) -> None:
    arguments = make_arguments("float32")
    arguments["bilstm"][0] = np.zeros((rows, E), np.float32)
    refuse(arguments, ValueError, f"w_ih: has {rows} rows, must be 4")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_output_without_tags(precision: str) -> None:
    arguments = make_arguments(precision)
    arguments["output"][1] = np.empty(0, np.float32)
    refuse(arguments, ValueError, "output bias: has 0 values")


@pytest.mark.parametrize("precision", ["float16", "Int8", ""])
def test_row_size_of_an_unknown_precision(precision: str) -> None:
    with pytest.raises(ValueError, match=f"precision: got '{precision}'"):
        _core.StudentWeights.table_row_nbytes(precision, 8)


@pytest.mark.parametrize("hidden_size", [0, -1, 1 << 21, 1 << 40])
def test_row_size_of_an_impossible_student(hidden_size: int) -> None:
    with pytest.raises(ValueError, match=f"hidden_size: got {hidden_size}"):
        _core.StudentWeights.table_row_nbytes("int8", hidden_size)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("weights", lambda _: None, TypeError, "incompatible"),
        ("weights", lambda _: object(), TypeError, "incompatible"),
        ("ids", lambda a: a[:-1].copy(), ValueError, "cu_seqlens: .*12.*11"),
        ("ids", lambda a: np.where(a == a[3], V, a), ValueError, "ids: has 11 at .*0 to 10"),
        ("ids", lambda a: a - 100, ValueError, "ids: has -"),
        ("ids", lambda a: a.astype(np.int64), TypeError, "ids: .*int64.*int32"),
        ("ids", lambda a: a.astype(np.float32), TypeError, "ids: .*float32.*int32"),
        ("ids", lambda a: a[None], ValueError, "ids: "),
        ("ids", strided, ValueError, "ids: .*contiguous"),
        ("ids", lambda a: a.tolist(), TypeError, "ids: .*list"),
        ("cu_seqlens", lambda a: a.astype(np.int64), TypeError, "cu_seqlens: .*int64.*int32"),
        ("cu_seqlens", lambda _: ints(), ValueError, "cu_seqlens: .*empty"),
        ("cu_seqlens", lambda _: ints(1, 12), ValueError, "cu_seqlens: .*start with 0"),
        ("cu_seqlens", lambda _: ints(0, 9, 4, 12), ValueError, r"cu_seqlens: .*9 to 4.*ascend"),
        ("cu_seqlens", lambda _: ints(0, 4, 13), ValueError, "cu_seqlens: .*13.*12"),
        ("cu_seqlens", lambda a: a[None], ValueError, "cu_seqlens: "),
        ("cu_seqlens", strided, ValueError, "cu_seqlens: .*contiguous"),
        ("out", lambda a: a[:-1].copy(), ValueError, r"out: .*\[11, 4\].*\[12, 4\]"),
        ("out", lambda a: a[:, :-1].copy(), ValueError, r"out: .*\[12, 3\].*\[12, 4\]"),
        ("out", lambda a: a.astype(np.float64), TypeError, "out: .*float64"),
        ("out", lambda a: np.broadcast_to(a, a.shape), ValueError, "out: .*writeable"),
        ("out", strided, ValueError, "out: .*contiguous"),
        ("threads", lambda _: -1, ValueError, "threads: .*-1"),
    ],
)
def test_bad_calls(
    precision: str, name: str, change: Change, exception: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "weights": _core.StudentWeights(**make_arguments(precision)),
        "ids": np.random.default_rng(0).integers(0, V, 12, dtype=np.int32),
        "cu_seqlens": ints(0, 4, 9, 12),
        "out": np.full((12, C), 7.0, np.float32),
        "threads": 1,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        _core.student_scores(**arguments)
    assert (arguments["out"] == 7.0).all(), "the output was written before the check"


def test_output_must_not_overlap_the_embedding() -> None:
    """It may still be looked up in when the scores of other texts are written."""
    arguments = make_arguments("float32")
    arguments["embedding"] = np.ones((12, C), np.float32)
    arguments["bilstm"] = [a[:, :C].copy() if a.shape[-1] == E else a for a in arguments["bilstm"]]
    weights = _core.StudentWeights(**arguments)
    with pytest.raises(ValueError, match=r"out: .*share memory.*embedding"):
        _core.student_scores(weights, np.zeros(12, np.int32), ints(0, 12), arguments["embedding"])
