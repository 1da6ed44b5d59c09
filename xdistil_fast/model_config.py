"""`config.json` of a model folder: its values, and what may stand there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from xdistil_fast import __version__
from xdistil_fast.labels import validate_classes, validate_labels

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"

# A label for every word, or a class for every text; the field's names, and the Hub's.
TOKEN_CLASSIFICATION = "token-classification"
TEXT_CLASSIFICATION = "text-classification"
TASKS = (TOKEN_CLASSIFICATION, TEXT_CLASSIFICATION)
HEADS = ("softmax", "crf")
# How a text classifier makes one state of the BiLSTM's states of a text.
POOLINGS = ("max", "mean", "last")
# How a student can run, and how its folder can store it.
PRECISIONS = ("float32", "bfloat16", "int8")
STORED_PRECISIONS = ("float32", "int8")
CRF_TENSORS = ("crf.start_transitions", "crf.end_transitions", "crf.transitions")

# Matrices that a folder of precision "int8" stores as bytes, each with `scales_name` beside it, and
# those of them that kernels multiply as bytes where they meet hidden states of seven bits: with a
# projection that is the projection, and the output layer is widened to floats.
MULTIPLIED_AS_BYTES = (
    "bilstm.weight_hh_l0",
    "bilstm.weight_hh_l0_reverse",
    "projection.weight",
    "output.weight",
)
QUANTIZED = (
    "embedding.weight",
    "bilstm.weight_ih_l0",
    "bilstm.weight_ih_l0_reverse",
    *MULTIPLIED_AS_BYTES,
)

# Far above any student, low enough that no product of two of them overflows or exhausts a machine.
_MAX = {
    "vocab_size": 10_000_000,
    "embedding_size": 16_384,
    "hidden_size": 16_384,
    "projection_size": 16_384,
    "window": 1_000_000,
    "stride": 1_000_000,
}
_MAX_LABELS = 1_024
_OPTIONAL = ("pooling", "projection_size")


class ModelError(ValueError):
    """A model that cannot be found, read or run; the message says which value is at fault."""


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` holds.

    Attributes:
        labels: C distinct labels, IOB2 or plain tags, or class names of a text classifier; position
            is the id.
        vocab_size: V, rows of the embedding table; every tokenizer id is below it.
        embedding_size: E, the BiLSTM's input size.
        hidden_size: H of each direction.
        head: "softmax" or "crf"; of a text classifier "softmax".
        window: most pieces of a text that the BiLSTM reads at once.
        stride: pieces that two neighbouring windows of a longer text share; at most half of
            `window`.
        precision: how the weights are stored: "float32" (the embedding table perhaps in half
            precision) or "int8". Says also how the student runs unless told otherwise.
        task: "token-classification" or "text-classification".
        pooling: "max", "mean" or "last" of a text classifier, else None, and then not in the file.
        projection_size: R, width of a projection of the hidden states whose GELU the output layer
            reads; 0, and then not in the file, where it reads the states themselves.
        lineage: where the model came from (teacher, data digests, seed, command); free.
        metrics: what was measured on it; free.
        library_version: version that wrote the folder.
        format_version: version of the folder's layout.

    Raises:
        ModelError: a value out of its range, naming it.
    """

    labels: tuple[str, ...]
    vocab_size: int
    embedding_size: int
    hidden_size: int
    head: str = "softmax"
    window: int = 512
    stride: int = 128
    precision: str = "float32"
    task: str = TOKEN_CLASSIFICATION
    pooling: str | None = None
    projection_size: int = 0
    lineage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Checks every value; lists of labels become tuples."""
        _check_values(self)
        object.__setattr__(self, "labels", tuple(self.labels))

    def to_json(self) -> str:
        """The text of `config.json`, the same bytes for the same values.

        Raises:
            ModelError: lineage or metrics hold what JSON cannot (NaN, objects).
        """
        values = asdict(self)
        if self.pooling is None:
            del values["pooling"]
        if not self.projection_size:
            del values["projection_size"]
        try:
            text = json.dumps(values, ensure_ascii=False, allow_nan=False, indent=2)
        except (TypeError, ValueError) as error:
            raise ModelError(f"lineage and metrics must be plain JSON values: {error}") from None
        return text + "\n"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor `model.safetensors` must hold."""
        size, hidden, tags = self.embedding_size, self.hidden_size, len(self.labels)
        rows = 4 * hidden
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, size)}
        for suffix in ("", "_reverse"):
            shapes[f"bilstm.weight_ih_l0{suffix}"] = (rows, size)
            shapes[f"bilstm.weight_hh_l0{suffix}"] = (rows, hidden)
            shapes[f"bilstm.bias_ih_l0{suffix}"] = (rows,)
            shapes[f"bilstm.bias_hh_l0{suffix}"] = (rows,)
        width = 2 * hidden
        if self.projection_size:
            shapes["projection.weight"] = (self.projection_size, width)
            shapes["projection.bias"] = (self.projection_size,)
            width = self.projection_size
        shapes["output.weight"] = (tags, width)
        shapes["output.bias"] = (tags,)
        if self.head == "crf":
            shapes.update(zip(CRF_TENSORS, ((tags,), (tags,), (tags, tags)), strict=True))
        if self.precision == "int8":
            shapes.update(
                {scales_name(name): shapes[name][:1] for name in QUANTIZED if name in shapes}
            )
        return shapes


def scales_name(name: str) -> str:
    """Name of the tensor with the scales of a quantised one's rows."""
    return f"{name}.scales"


def parse_config(text: str, where: str | os.PathLike[str] = CONFIG_FILE) -> ModelConfig:
    """Parses the text of a `config.json`.

    Args:
        text: untrusted JSON.
        where: named in errors.

    Raises:
        ModelError: not JSON, nested too deep, a key twice, missing or unknown, a value of the
            wrong type or out of range, a newer `format_version`.
    """
    raw = _parse_json(text, where)
    if not isinstance(raw, dict):
        fail(where, f"holds {type(raw).__name__}; it must be a JSON object")
    if "format_version" not in raw and "model_type" in raw:
        fail(where, "is of a transformers model; make a student of it first: xdistil distill")
    # Before anything else: of a newer format nothing else can be judged.
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        fail(where, f"format_version is {show(version)}; it must be a positive integer")
    if version > FORMAT_VERSION:
        fail(
            where,
            f"format_version is {show(version)}; this library reads up to {FORMAT_VERSION}: "
            "upgrade with pip install -U xdistil-fast",
        )
    known = [item.name for item in fields(ModelConfig)]
    if unknown := sorted(set(raw) - set(known)):
        fail(where, f"unknown key {show(unknown[0])}; allowed are {', '.join(known)}")
    if missing := [name for name in known if name not in raw and name not in _OPTIONAL]:
        fail(where, f"key {missing[0]!r} is missing")
    try:
        return ModelConfig(**raw)
    except ModelError as error:
        fail(where, str(error))


def fail(where: str | os.PathLike[str], what: str) -> NoReturn:
    """Refuses a model: raises a ModelError that says where and what."""
    raise ModelError(f"{os.fspath(where)}: {what}") from None


def show(value: object) -> str:
    """A short printable form of an untrusted value."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _parse_json(text: str, where: str | os.PathLike[str]) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                fail(where, f"key {show(key)} stands twice in one object")
            out[key] = value
        return out

    def no_constant(name: str) -> NoReturn:
        fail(where, f"holds {name}, which is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except ModelError:
        raise
    except RecursionError:
        fail(where, "is nested too deep")
    except ValueError as error:
        fail(where, f"is not valid JSON: {error}")


def _check_values(config: ModelConfig) -> None:
    def need(name: str, value: object, kind: type, allowed: str) -> None:
        if type(value) is not kind:
            raise ModelError(f"{name} is {show(value)}; it must be {allowed}")

    need("format_version", config.format_version, int, "an integer")
    if config.format_version != FORMAT_VERSION:
        raise ModelError(f"format_version is {config.format_version}; allowed is {FORMAT_VERSION}")
    for name, allowed in (("task", TASKS), ("head", HEADS), ("precision", STORED_PRECISIONS)):
        value = getattr(config, name)
        if type(value) is not str or value not in allowed:
            raise ModelError(f"{name} is {show(value)}; allowed: {', '.join(map(repr, allowed))}")
    if config.task == TEXT_CLASSIFICATION:
        if type(config.pooling) is not str or config.pooling not in POOLINGS:
            poolings = ", ".join(map(repr, POOLINGS))
            raise ModelError(f"pooling is {show(config.pooling)}; allowed: {poolings}")
        if config.head != "softmax":
            raise ModelError(f"head is {config.head!r}; of a text classifier allowed: 'softmax'")
    elif config.pooling is not None:
        raise ModelError(f"pooling is {show(config.pooling)}; only a text classifier has one")
    if not isinstance(config.labels, (list, tuple)):
        raise ModelError(f"labels is {show(config.labels)}; it must be a list of strings")
    if len(config.labels) > _MAX_LABELS:
        raise ModelError(f"labels has {len(config.labels)} items; at most {_MAX_LABELS} may be")
    try:
        if config.task == TEXT_CLASSIFICATION:
            validate_classes(config.labels)
        else:
            validate_labels(config.labels)
    except ValueError as error:
        raise ModelError(str(error)) from None
    for name, largest in _MAX.items():
        value = getattr(config, name)
        smallest = 0 if name in ("projection_size", "stride") else 1
        if type(value) is not int or not smallest <= value <= largest:
            raise ModelError(
                f"{name} is {show(value)}; it must be an integer from {smallest} to {largest}"
            )
    # Each piece of a long text is read window / (window - stride) times.
    if config.stride > config.window // 2:
        raise ModelError(
            f"stride is {config.stride}; it must be at most half of window {config.window}"
        )
    need("library_version", config.library_version, str, "a string")
    for name in ("lineage", "metrics"):
        need(name, getattr(config, name), dict, "an object")
