"""Reading texts with a class each, for text classification.

Formats: JSONL with ``text`` and ``label``, Parquet with columns of these names, and TSV: with a
header line that names ``text`` (or ``sentence``) and ``label`` among its columns, as GLUE's files
have it, or without one and then of two columns, the text and the class. Any but Parquet may be
gzipped, which is seen from the first bytes. Classes may be numbers, which stand for their digits;
a label map can give them names.

Unlabelled text is read by :func:`~xdistil_fast.train.corpora.read_transfer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xdistil_fast.model_io import file_digest
from xdistil_fast.train.corpora import (
    read_columns,
    read_json_lines,
    read_lines,
    split_language,
    starts_as_parquet,
)
from xdistil_fast.train.label_maps import LabelMap, check_label_map
from xdistil_fast.train.runs import portable

_NEEDED = 'labelled texts need "text" (a string) and "label" (a string or a whole number)'
_TEXT_COLUMNS = ("text", "sentence")


@dataclass(frozen=True, slots=True)
class Documents:
    """One file of labelled texts.

    Attributes:
        path: the file.
        texts: in the file's order, outer white space stripped.
        labels: class of each, the label map applied.
        digest: SHA-256 of the file.
        label_map: the one that was applied.
    """

    path: Path
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    digest: str
    label_map: LabelMap | None = None

    @property
    def classes(self) -> frozenset[str]:
        """Classes that occur."""
        return frozenset(self.labels)

    @property
    def language(self) -> str | None:
        """None: files of texts are not told apart by language."""
        return None

    def describe(self, role: str) -> dict[str, object]:
        """Entry of ``run.json``'s ``data``: name, digest and counts; ``role`` as given."""
        entry: dict[str, object] = {
            "role": role,
            "name": portable(str(self.path)),
            "digest": self.digest,
            "format": _format_of(self.path),
            "sentences": len(self.texts),
            "words": sum(len(text.split()) for text in self.texts),
        }
        if self.label_map is not None:
            entry["label_map"] = dict(self.label_map)
        return entry


def read_documents(path: Path | str, label_map: LabelMap | None = None) -> Documents:
    """Read one file of labelled texts completely.

    Args:
        path: JSONL, TSV or Parquet, by its name (and for Parquet its first bytes).
        label_map: classes renamed, or their texts left out (None); ``"*"`` stands for all others.

    Raises:
        ValueError: another format, no text at all, a row without text or class, bytes that are not
            UTF-8, a damaged file; file and line are named.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists() and split_language(str(path))[0]:
        raise ValueError(f"{path}: files of texts take no language; allowed: FILE")
    if label_map is not None:
        label_map = check_label_map(label_map, classes=True)
    texts: list[str] = []
    labels: list[str] = []
    for where, text, label in _rows(path):
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if not isinstance(text, str) or not isinstance(label, str) or not label.strip():
            raise ValueError(f"{where}: {_NEEDED}")
        name: str | None = label.strip()
        if label_map is not None and name is not None:
            name = label_map[name] if name in label_map else label_map.get("*", name)
        if name is not None:
            texts.append(text.strip())
            labels.append(name)
    if not texts:
        raise ValueError(f"{path}: no labelled text in this file")
    return Documents(path, tuple(texts), tuple(labels), file_digest(path), label_map)


def _rows(path: Path) -> Iterator[tuple[str, object, object]]:
    """Place, text and class of every row."""
    kind = _format_of(path)
    if kind == "tsv":
        yield from _tsv_rows(path)
        return
    columns = ("text", "label")
    for where, record in (
        read_columns(path, columns) if kind == "parquet" else read_json_lines(path)
    ):
        yield where, record.get("text"), record.get("label")


def _format_of(path: Path) -> Literal["parquet", "jsonl", "tsv"]:
    if starts_as_parquet(path):
        return "parquet"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".tsv":
        return "tsv"
    raise ValueError(
        f"{path}: cannot tell the format from its name; allowed endings of labelled texts: "
        ".jsonl, .ndjson, .tsv, each also with .gz, and .parquet"
    )


def _tsv_rows(path: Path) -> Iterator[tuple[str, object, object]]:
    columns: Mapping[str, int] | None = None
    width = 2
    for number, line in read_lines(path):
        if not line.strip():
            continue
        cells = line.split("\t")
        where = f"{path}, line {number}"
        if columns is None:
            columns, is_header = _columns_of(cells)
            width = len(cells) if is_header else 2
            if is_header:
                continue
        if len(cells) != width:
            raise ValueError(
                f"{where}: {len(cells)} columns, must be {width}"
                + ("" if width > 2 else ", the text and the class (or name them in a header line)")
            )
        yield where, cells[columns["text"]], cells[columns["label"]]


def _columns_of(cells: list[str]) -> tuple[Mapping[str, int], bool]:
    """Where text and class stand, and whether the first line is a header that says so."""
    names = [cell.strip().lower() for cell in cells]
    text = next((name for name in _TEXT_COLUMNS if name in names), None)
    if text is not None and "label" in names:
        return {"text": names.index(text), "label": names.index("label")}, True
    return {"text": 0, "label": 1}, False
