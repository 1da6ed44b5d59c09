"""Reading labelled sentences and transfer text.

Labelled files (``--train``, ``--dev``): CoNLL columns (word first, tag last), JSONL or Parquet
with ``tokens`` and ``tags`` (or ``ner_tags``). Transfer text: the same, or plain text with one
sentence a line, JSONL or Parquet with ``text``. Any file but Parquet may be gzipped, which is
seen from its first bytes.

Tags of entities come out as IOB2, whatever scheme the file uses. Where no tag is ``O`` or begins
with one letter and a hyphen (``B-``, ``I-``, ...), they are plain tags, such as parts of speech,
and stay as they are.

Wherever a file is named, its language may stand before it: ``de=train.conll``. A file whose own
name looks like that is written ``./de=train.conll``.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast

from xdistil_fast.labels import OUTSIDE, Scheme
from xdistil_fast.model_io import file_digest
from xdistil_fast.train.label_maps import LabelMap, check_label_map
from xdistil_fast.train.runs import portable

Format: TypeAlias = Literal["conll", "jsonl", "parquet", "text"]

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_SUFFIXES: dict[str, Format] = {
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".tsv": "conll",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
_TAG_COLUMNS = ("tags", "ner_tags")
_TAG = re.compile(r"O|[BIESLU]-\S+")
_ENTITY_TAG = re.compile(r"O|[A-Za-z]-.*")  # or what was meant to be one
_BLANKS = re.compile(r"[ \t]+")
_LANGUAGE = re.compile(r"([A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8})*)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence: ``words`` (with ``tags`` where labelled), or running ``text``.

    ``language`` is what stood before the file's name, "" where nothing did.
    """

    words: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    text: str | None = None
    language: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """One labelled file.

    Attributes:
        path: the file.
        sentences: in the file's order; tags are IOB2 or plain, and the label map is applied.
        scheme: tag scheme found: ``IOB1``, ``IOB2`` or ``BIOES`` (BILOU counts as that), or
            ``tags`` for plain ones.
        repaired: tags ``I-X`` of an IOB2 or BIOES file that no open X preceded, now ``B-X``.
        digest: see :func:`file_digest`.
        label_map: the one that was applied.
        language: of the file, "" if not given.
    """

    path: Path
    sentences: tuple[Sentence, ...]
    scheme: str
    repaired: int
    digest: str
    label_map: LabelMap | None = None
    language: str = ""

    @property
    def words(self) -> int:
        """Number of words in all sentences."""
        return sum(len(s.words or ()) for s in self.sentences)

    @property
    def labelling(self) -> Scheme:
        """Scheme of the tags as they are here."""
        return "tags" if self.scheme == "tags" else "IOB2"

    @property
    def types(self) -> frozenset[str]:
        """Entity types that occur; of plain tags those but ``O``."""
        begin = 0 if self.scheme == "tags" else 2
        return frozenset(t[begin:] for s in self.sentences for t in s.tags or () if t != OUTSIDE)

    def describe(self, role: str) -> dict[str, object]:
        """Entry of ``run.json``'s ``data``: name, digest, format, counts; ``role`` as given."""
        entry: dict[str, object] = {
            "role": role,
            "name": portable(str(self.path)),
            "digest": self.digest,
            "format": detect_format(self.path, labelled=True),
            "sentences": len(self.sentences),
            "words": self.words,
        }
        if self.label_map is not None:
            entry["label_map"] = dict(self.label_map)
        if self.language:
            entry["language"] = self.language
        return entry


def split_language(argument: Path | str) -> tuple[str, Path]:
    """Language and file of ``LANG=FILE``; of a plain ``FILE`` the language is "".

    A language is a tag of letters like ``de`` or ``zh-Hant``. Only a string can have one: a Path is
    the file.
    """
    found = None if isinstance(argument, Path) else _LANGUAGE.fullmatch(argument)
    return (found[1], Path(found[2])) if found else ("", Path(argument))


def labelling_of(corpora: Sequence[Corpus]) -> Scheme:
    """The one scheme of several labelled files.

    Raises:
        ValueError: some hold tags of entities and others plain tags.
    """
    for corpus in corpora[1:]:
        if corpus.labelling != corpora[0].labelling:
            kinds = {"IOB2": "tags of entities", "tags": "plain tags of words"}
            raise ValueError(
                f"{corpora[0].path} holds {kinds[corpora[0].labelling]}, {corpus.path} "
                f"{kinds[corpus.labelling]}; one model takes one of the two"
            )
    return corpora[0].labelling if corpora else "IOB2"


def detect_format(path: Path, *, labelled: bool) -> Format:
    """Format of a file, from its first bytes (Parquet) and its name without ``.gz``.

    Args:
        path: the file.
        labelled: read for its tags. A name that tells nothing then means CoNLL columns.

    Raises:
        ValueError: the name tells nothing and the file is transfer text.
        OSError: it cannot be opened.
    """
    if starts_as_parquet(path):
        return "parquet"
    name = path.name.lower().removesuffix(".gz")
    found = _SUFFIXES.get(Path(name).suffix)
    if labelled:
        return "conll" if found is None or found == "text" else found
    if found is None:
        raise ValueError(
            f"{path}: cannot tell the format of this transfer text from its name; allowed "
            f"endings: {', '.join(_SUFFIXES)}, each also with .gz"
        )
    return found


def starts_as_parquet(path: Path) -> bool:
    """Whether a file's first bytes are those of Parquet."""
    with path.open("rb") as stream:
        return stream.read(4) == _PARQUET_MAGIC


def read_labelled(path: Path | str, label_map: LabelMap | None = None) -> Corpus:
    """Read one labelled file completely.

    Args:
        path: CoNLL, JSONL or Parquet; may have its language before it (``de=FILE``).
        label_map: types renamed or dropped after the tags became IOB2; plain tags are renamed as
            a whole, dropped ones become ``O``.

    Raises:
        ValueError: the file holds no sentence, is not UTF-8, is a damaged gzip file, has one
            column or rows of unequal column counts, or a tag that is none; file and line are
            named.
        OSError: it cannot be read.
    """
    language, path = split_language(path)
    if label_map is not None:
        label_map = check_label_map(label_map)
    kind = detect_format(path, labelled=True)
    readers = {"conll": _conll_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows}
    sentences: list[tuple[tuple[str, ...], list[str]]] = []
    prefixes: dict[str, str] = {}
    strange: tuple[str, str] | None = None  # the first tag that is none of an entity, and where
    for where, words, _, tags in readers[kind](path, labelled=True):
        if words is None or tags is None:
            raise ValueError(f"{where(0)}: no tags; {_LABELLED_KEYS}")
        for position, tag in enumerate(tags):
            if not tag or re.search(r"\s", tag):
                raise ValueError(
                    f"{where(position)}: the tag {tag!r} is empty or has white space in it"
                )
            if _TAG.fullmatch(tag):
                prefixes.setdefault(tag[0], where(position))
            elif strange is None or _ENTITY_TAG.fullmatch(tag):
                strange = tag, where(position)
        sentences.append((words, tags))
    if not sentences:
        raise ValueError(f"{path}: no sentence in this file")
    if strange is not None and (prefixes or _ENTITY_TAG.fullmatch(strange[0])):
        raise ValueError(
            f"{strange[1]}: {strange[0]!r} is no IOB tag; allowed: O, B-TYPE, I-TYPE (IOB1, IOB2), "
            "and E-, S- (BIOES) or L-, U- (BILOU); or only plain tags, none of them O"
        )
    if strange is not None:
        return _plain_corpus(path, sentences, label_map, language)
    if prefixes.keys() & {"E", "S"} and prefixes.keys() & {"L", "U"}:
        mixed = [prefixes[p] for p in ("E", "S", "L", "U") if p in prefixes]
        raise ValueError(f"{path}: tags mix BIOES and BILOU (see {mixed[0]} and {mixed[-1]})")
    return _to_corpus(path, sentences, bool(prefixes.keys() & set("ESLU")), label_map, language)


def _plain_corpus(
    path: Path,
    sentences: Sequence[tuple[tuple[str, ...], list[str]]],
    label_map: LabelMap | None,
    language: str,
) -> Corpus:
    """Plain tags, with the label map applied to the whole tag."""
    known: dict[str, str] = {}
    return Corpus(
        path=path,
        sentences=tuple(
            Sentence(
                words,
                tuple(known.setdefault(t, _mapped_type(t, label_map) or OUTSIDE) for t in tags),
                language=language,
            )
            for words, tags in sentences
        ),
        scheme="tags",
        repaired=0,
        digest=file_digest(path),
        label_map=label_map,
        language=language,
    )


def _to_corpus(
    path: Path,
    sentences: Sequence[tuple[tuple[str, ...], list[str]]],
    bioes: bool,
    label_map: LabelMap | None,
    language: str,
) -> Corpus:
    """Bring the tags of a whole file to IOB2 and apply the label map."""
    stray = plain_begin = 0
    converted: list[list[str]] = []
    for _, tags in sentences:
        out: list[str] = []
        open_kind = last_kind = ""
        for tag in tags:
            prefix, kind = tag[0], tag[2:]
            if tag == "O":
                open_kind = last_kind = ""
                out.append("O")
                continue
            begins = prefix in "BSU" or kind != open_kind
            if begins and prefix not in "BSU":
                stray += 1
            elif begins and kind != last_kind:
                # IOB1 writes B- only right after another entity of the same type.
                plain_begin += 1
            out.append(("B-" if begins else "I-") + kind)
            open_kind = "" if prefix in "ESLU" else kind
            last_kind = kind
        converted.append(out)
    scheme = "BIOES" if bioes else "IOB1" if stray and not plain_begin else "IOB2"
    known: dict[str, str] = {}
    return Corpus(
        path=path,
        sentences=tuple(
            Sentence(
                words,
                tuple(known.setdefault(t, _mapped(t, label_map)) for t in tags),
                language=language,
            )
            for (words, _), tags in zip(sentences, converted, strict=True)
        ),
        scheme=scheme,
        repaired=0 if scheme == "IOB1" else stray,
        digest=file_digest(path),
        label_map=label_map,
        language=language,
    )


def _mapped(tag: str, label_map: LabelMap | None) -> str:
    if tag == "O" or label_map is None:
        return sys.intern(tag)
    target = _mapped_type(tag[2:], label_map)
    return "O" if target is None else sys.intern(tag[:2] + target)


def _mapped_type(kind: str, label_map: LabelMap | None) -> str | None:
    if label_map is None:
        return sys.intern(kind)
    return label_map[kind] if kind in label_map else label_map.get("*", kind)


def read_transfer(paths: Iterable[Path | str]) -> Iterator[Sentence]:
    """Sentences of transfer text, file after file, in constant memory.

    CoNLL files give ``words`` (whatever their last column holds), plain text gives ``text``
    (blank lines skipped, outer white space stripped), JSONL and Parquet what they have. Each path
    may have its language before it (``de=FILE``).

    Raises:
        ValueError: as :func:`read_labelled`, or a ``.txt`` file that holds CoNLL columns. All
            paths are checked to exist and to be of a known format before the first sentence.
    """
    plan = [
        (language, path, detect_format(path, labelled=False))
        for language, path in map(split_language, paths)
    ]
    return _stream(plan)


def _stream(plan: Sequence[tuple[str, Path, Format]]) -> Iterator[Sentence]:
    for language, path, kind in plan:
        count = 0
        if kind == "text":
            for text in _text_lines(path):
                count += 1
                yield Sentence(text=text, language=language)
        else:
            readers = {"conll": _conll_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows}
            for _, words, text_or_none, _ in readers[kind](path, labelled=False):
                count += 1
                yield Sentence(words=words, text=text_or_none, language=language)
        if not count:
            raise ValueError(f"{path}: no sentence in this file")


# One sentence as read: where word i stands (for messages), words, text, tags.
class _Where:
    """Names the place of a word: the file and a line or row."""

    __slots__ = ("first", "path", "step", "unit")

    def __init__(self, path: Path, unit: str, first: int, step: int) -> None:
        self.path, self.unit, self.first, self.step = path, unit, first, step

    def __call__(self, position: int) -> str:
        return f"{self.path}, {self.unit} {self.first + self.step * position}"


_Row: TypeAlias = tuple[_Where, "tuple[str, ...] | None", "str | None", "list[str] | None"]
_LABELLED_KEYS = 'labelled rows need "tokens" and "tags" (or "ner_tags") as lists of strings'


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, gzipped or not, without their ends.

    Raises:
        ValueError: NUL bytes, bytes that are not UTF-8, a damaged gzip file.
    """
    with path.open("rb") as probe:
        zipped = probe.read(2) == _GZIP_MAGIC
    offset = 0
    number = 0
    with cast("IO[bytes]", gzip.open(path, "rb")) if zipped else path.open("rb") as stream:
        try:
            for number, raw in enumerate(stream, 1):
                if b"\x00" in raw:
                    raise ValueError(
                        f"{path}, line {number}: a NUL byte at offset {offset + raw.index(0)}; "
                        "the file must be text in UTF-8 (is it UTF-16?)"
                    )
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: byte 0x{raw[error.start]:02x} at offset "
                        f"{offset + error.start} is not UTF-8"
                    ) from None
                offset += len(raw)
                yield number, line.removeprefix("\ufeff").rstrip("\r\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged or truncated gzip file after line {number} ({error})"
            ) from None


def _text_lines(path: Path) -> Iterator[str]:
    for index, (number, line) in enumerate(read_lines(path)):
        if index == 0:
            columns = _BLANKS.split(line.strip(" \t"))
            if columns[0] == "-DOCSTART-" or ("\t" in line and _TAG.fullmatch(columns[-1])):
                raise ValueError(
                    f"{path}, line {number}: a .txt file is read as one sentence a line, but "
                    "this one holds CoNLL columns; name it .conll"
                )
        if text := line.strip():
            yield text


def _conll_rows(path: Path, *, labelled: bool) -> Iterator[_Row]:
    words: list[str] = []
    tags: list[str] = []
    first = 0
    separator: str | None = None
    width = 0
    for number, line in read_lines(path):
        if not line.strip(" \t") or line.startswith("-DOCSTART-"):
            if words:
                yield _Where(path, "line", first, 1), tuple(words), None, tags
                words, tags = [], []
            continue
        if separator is None:
            separator = "\t" if "\t" in line else " "
        row = line.split("\t") if separator == "\t" else _BLANKS.split(line.strip(" \t"))
        if not width:
            width = len(row)
            if width == 1:
                raise ValueError(
                    f"{path}, line {number}: one column only ({line!r:.60}); CoNLL lines have "
                    "the word first and the tag last, with tabs or spaces between"
                )
        if len(row) != width:
            raise ValueError(
                f"{path}, line {number}: {len(row)} columns where the file began with {width}"
            )
        if not row[0].strip():
            raise ValueError(f"{path}, line {number}: the first column, the word, is empty")
        if not words:
            first = number
        words.append(row[0])
        tags.append(row[-1].strip())
    if words:
        yield _Where(path, "line", first, 1), tuple(words), None, tags


def _jsonl_rows(path: Path, *, labelled: bool) -> Iterator[_Row]:
    for number, record in _json_objects(path):
        yield from _record_row(record, _Where(path, "line", number, 0), labelled)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place for messages.

    Raises:
        ValueError: as :func:`read_labelled`.
    """
    for number, record in _json_objects(path):
        yield f"{path}, line {number}", record


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if "\\u" in line and not _encodable(record):
            raise ValueError(f"{where}: a lone surrogate, which no UTF-8 text can hold")
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON object is needed, not {type(record).__name__}")
        yield number, record


def _encodable(record: object) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path, *, labelled: bool) -> Iterator[_Row]:
    for number, record in _parquet_records(path, ("tokens", *_TAG_COLUMNS, "text")):
        yield from _record_row(record, _Where(path, "row", number, 0), labelled)


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, those of the columns that it has, each with its place.

    Raises:
        ValueError: pyarrow is missing, or the file is damaged.
    """
    for number, record in _parquet_records(path, columns):
        yield f"{path}, row {number}", record


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in columns if name in file.schema_arrow.names]
        batches = file.iter_batches(batch_size=1024, columns=names)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged Parquet file ({error})") from None
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged Parquet file ({error})") from None
        if batch is None:
            return
        for record in batch.to_pylist():
            number += 1
            yield number, record


def _record_row(record: dict[str, Any], where: _Where, labelled: bool) -> Iterator[_Row]:
    """One JSON object or Parquet row as a sentence; an empty one gives none."""
    tokens, text = record.get("tokens"), record.get("text")
    if tokens is None:
        if labelled:
            raise ValueError(f'{where(0)}: no "tokens"; {_LABELLED_KEYS}')
        if not isinstance(text, str):
            raise ValueError(
                f'{where(0)}: neither "tokens" (a list of strings) nor "text" (a string)'
            )
        if text := text.strip():
            yield where, None, text, None
        return
    words = _strings(tokens, "tokens", where)
    if not all(word.strip() for word in words):
        raise ValueError(f'{where(0)}: "tokens" holds an empty word')
    if not labelled:
        if words:
            yield where, tuple(words), None, None
        return
    key = next((k for k in _TAG_COLUMNS if record.get(k) is not None), None)
    if key is None:
        raise ValueError(f"{where(0)}: no tags; {_LABELLED_KEYS}")
    tags = _strings(record[key], key, where)
    if len(tags) != len(words):
        raise ValueError(f'{where(0)}: {len(words)} "tokens" but {len(tags)} "{key}"')
    if words:
        yield where, tuple(words), None, tags


def _strings(value: object, key: str, where: _Where) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        hint = ""
        if isinstance(value, list) and any(isinstance(item, int) for item in value):
            hint = "; numbers cannot be read without their names, write the tags out"
        raise ValueError(f'{where(0)}: "{key}" must be a list of strings{hint}')
    return value
