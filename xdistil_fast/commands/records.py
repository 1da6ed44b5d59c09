"""Texts of a file, one by one, with the exact place that reading has come to.

Formats: `txt` (one text a line), `jsonl` (an object a line, with `text`, or `tokens` for text that
is already split), `conll` (one word a line in the first column, a blank line after a sentence).
Any of them may be gzipped, which is seen from the first bytes. Positions count decompressed bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

FORMATS = ("txt", "jsonl", "conll")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".tsv": "conll",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Record:
    """One text to tag.

    Attributes:
        line: where it stands, for messages.
        text: running text, or None.
        words: words of text that is already split, or None.
        fields: the JSON object it came from, or empty.
    """

    line: int
    text: str | None
    words: list[str] | None
    fields: dict[str, Any]


@dataclass(frozen=True)
class Position:
    """How much of an input has been read, in whole records.

    Attributes:
        records: texts.
        lines: lines.
        input_bytes: decompressed bytes.
        input_sha256: SHA-256 of those bytes, in hex.
    """

    records: int
    lines: int
    input_bytes: int
    input_sha256: str


def is_tsv(name: str) -> bool:
    """Whether a file is named as columns: words of a tagger, or texts of a classifier."""
    return Path(name.lower().removesuffix(".gz")).suffix == ".tsv"


def guess_format(name: str) -> str:
    """Format of a file by its name, without a final `.gz`; `txt` where it tells nothing."""
    return _SUFFIXES.get(Path(name.lower().removesuffix(".gz")).suffix, "txt")


class RecordReader:
    """Iterates over the records of one input.

    Args:
        path: a file, or None for standard input.
        kind: one of `FORMATS`.
        errors: "strict" refuses bytes that are not UTF-8, "replace" reads them as U+FFFD.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path | None, kind: str, errors: str = "strict") -> None:
        self.name = "standard input" if path is None else str(path)
        self.interactive = path is None and sys.stdin.isatty()
        self._errors = errors
        self._file: IO[bytes] = sys.stdin.buffer if path is None else path.open("rb")
        self.size = None
        if path is not None:
            status = os.fstat(self._file.fileno())
            self.size = status.st_size if path.is_file() else None
        buffered = cast("io.BufferedReader", self._file)
        self._zipped = not self.interactive and buffered.peek(2)[:2] == b"\x1f\x8b"
        self._stream: IO[bytes] = (
            cast("IO[bytes]", gzip.GzipFile(fileobj=self._file)) if self._zipped else self._file
        )
        self._hash = hashlib.sha256()
        self._lines = self._bytes = 0
        self._behind = Position(0, 0, 0, self._hash.hexdigest())
        self._behind_hash = self._hash.copy()
        readers = {"txt": self._texts, "jsonl": self._objects, "conll": self._sentences}
        self._source = readers[kind]()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
        self._file.close()

    def position(self) -> Position:
        """The place right behind the last record that was given out."""
        return replace(self._behind, input_sha256=self._behind_hash.hexdigest())

    def raw_position(self) -> int:
        """Bytes of the file itself that have been read, for progress."""
        return self._file.tell() if self._zipped and self.size is not None else self._bytes

    def skip(self, position: Position) -> None:
        """Goes to a position, checking that the input before it is what it was.

        Args:
            position: from `position()` of an earlier reader; this one must be at its beginning.

        Raises:
            ValueError: the input is shorter, or other bytes stand there.
        """
        left = position.input_bytes
        while left and (block := self._read(min(left, _BLOCK))):
            self._hash.update(block)
            left -= len(block)
        if left or self._hash.hexdigest() != position.input_sha256:
            raise ValueError(
                f"{self.name} is not what it was when this was begun; use --restart to begin anew"
            )
        self._lines, self._bytes = position.lines, position.input_bytes
        self._behind, self._behind_hash = position, self._hash.copy()

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        """The next record.

        Raises:
            ValueError: bytes that are not UTF-8, a damaged gzip file, a line that is not JSON or
                lacks its keys; file, line and byte are named.
        """
        record = next(self._source)
        # Whenever a source gives out a record, it has read that one's lines and no more.
        self._behind = Position(self._behind.records + 1, self._lines, self._bytes, "")
        self._behind_hash = self._hash.copy()
        return record

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.name}: damaged or truncated gzip data after line {self._lines} ({error})"
        )

    def _next_line(self) -> str | None:
        """The next line without its end; None at the end of the input."""
        try:
            raw = self._stream.readline()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(error) from None
        if not raw:
            return None
        try:
            text = raw.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name}, line {self._lines + 1}: byte 0x{raw[error.start]:02x} at offset "
                f"{self._bytes + error.start} is not UTF-8 (--errors replace reads on)"
            ) from None
        if self._bytes == 0:
            text = text.removeprefix("\ufeff")
        self._hash.update(raw)
        self._bytes += len(raw)
        self._lines += 1
        return text.removesuffix("\n").removesuffix("\r")

    def _texts(self) -> Iterator[Record]:
        while (line := self._next_line()) is not None:
            yield Record(self._lines, line, None, {})

    def _objects(self) -> Iterator[Record]:
        while (line := self._next_line()) is not None:
            if line.strip():
                yield self._object(line)

    def _object(self, line: str) -> Record:
        where = f"{self.name}, line {self._lines}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a JSON object is needed, not {type(fields).__name__}")
        text, words = fields.get("text"), fields.get("tokens")
        if isinstance(text, str):
            return Record(self._lines, text, None, fields)
        if text is None and isinstance(words, list) and all(isinstance(w, str) for w in words):
            return Record(self._lines, None, words, fields)
        raise ValueError(f'{where}: needs "text" (a string) or "tokens" (a list of strings)')

    def _sentences(self) -> Iterator[Record]:
        words: list[str] = []
        first = 0
        while (line := self._next_line()) is not None:
            if line.strip(" \t") and not line.startswith("-DOCSTART-"):
                row = line.split("\t") if "\t" in line else line.strip(" ").split(" ")
                if not row[0].strip():
                    raise ValueError(
                        f"{self.name}, line {self._lines}: the first column, the word, is empty"
                    )
                first = first if words else self._lines
                words.append(row[0])
            elif words:
                yield Record(first, None, words, {})
                words = []
        if words:
            yield Record(first, None, words, {})
