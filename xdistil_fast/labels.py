"""Labels of words: their schemes, the moves they allow, the spans they spell; names of classes.

Two schemes are known, told apart by the labels themselves (`scheme_of`):

- IOB2. A label is `O`, `B-X` (first word of an entity of type X) or `I-X` (a later one). A label
  list holds `O` once and both `B-X` and `I-X` for every type, so that every entity can be spelled.
- Plain tags, such as parts of speech: no label begins with `B-` or `I-`. Every word with its tag is
  a span of its own, any tag may follow any other, and `O`, where there is one, means no tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "O"
# Tag of a word that got none where labels have no `O`; CoNLL-U's sign for an empty field.
BLANK = "_"

Scheme: TypeAlias = Literal["IOB2", "tags"]


class Span(NamedTuple):
    """One entity over positions `start` (inclusive) to `end` (exclusive)."""

    type: str
    start: int
    end: int


def split_label(label: str) -> tuple[str, str]:
    """Splits a label into prefix and type.

    Args:
        label: `O`, `B-X` or `I-X`; the type may itself hold hyphens (`B-MISC-LOC`).

    Returns:
        `("O", "")`, `("B", type)` or `("I", type)`.

    Raises:
        ValueError: any other string.
    """
    if label == OUTSIDE:
        return OUTSIDE, ""
    prefix, hyphen, name = label.partition("-")
    if prefix not in ("B", "I") or not hyphen or not name:
        raise ValueError(f"label {label!r} is not IOB2; allowed are 'O', 'B-<type>' and 'I-<type>'")
    return prefix, name


def make_labels(types: Iterable[str]) -> list[str]:
    """Builds the label list of a set of entity types in the library's order.

    Args:
        types: entity types, in any order, repeats allowed.

    Returns:
        `["O", "B-T1", "I-T1", "B-T2", ...]` with the types sorted.

    Raises:
        ValueError: no type given, or a type that is empty or has white space in it.
    """
    names = sorted(set(types))
    if not names:
        raise ValueError("types is empty; at least one entity type is needed")
    for name in names:
        _check_type(name)
    return [OUTSIDE, *(f"{prefix}-{name}" for name in names for prefix in ("B", "I"))]


def validate_labels(labels: Sequence[str]) -> None:
    """Checks that a label list can be decoded under its scheme.

    Args:
        labels: label of each tag id, in any order.

    Raises:
        ValueError: a repeat, or no type at all; under IOB2 an item that is no IOB2 label, no `O`,
            or a type that has only one of its `B-` and `I-` labels; of plain tags one that is
            empty or has white space in it.
    """
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"labels[{index}] is {label!r}; it must be a string")
        _check_encodable(index, label)
        if label in seen:
            raise ValueError(f"labels[{index}] {label!r} stands twice; labels must be distinct")
        seen.add(label)
    if scheme_of(labels) == "IOB2":
        _validate_iob2(labels)
        return
    for label in labels:
        _check_type(label)
    if not seen - {OUTSIDE}:
        raise ValueError("labels hold no entity type and no tag; at least one is needed")


def _validate_iob2(labels: Sequence[str]) -> None:
    prefixes: dict[str, set[str]] = {}
    for label in labels:
        prefix, name = split_label(label)
        if prefix != OUTSIDE:
            _check_type(name)
            prefixes.setdefault(name, set()).add(prefix)
    if OUTSIDE not in labels:
        raise ValueError("labels do not hold 'O'; it is needed for words outside any entity")
    for name, found in prefixes.items():
        for prefix in ("B", "I"):
            if prefix not in found:
                raise ValueError(f"labels lack '{prefix}-{name}'; every type needs both B- and I-")


def _check_encodable(index: int, label: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in label):
        raise ValueError(f"labels[{index}] is {label!r}; lone surrogates are not allowed")


def scheme_of(labels: Iterable[str]) -> Scheme:
    """Scheme of a list of labels, or of all tags of a text: IOB2 if one begins `B-` or `I-`."""
    return "IOB2" if any(label[:2] in ("B-", "I-") for label in labels) else "tags"


def validate_classes(labels: Sequence[str]) -> None:
    """Checks the class names of a text classifier: any strings, as long as they differ.

    Args:
        labels: name of each class id.

    Raises:
        ValueError: an item that is no string or only white space, one that UTF-8 cannot carry, a
            repeat, or fewer than two.
    """
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"labels[{index}] is {label!r}; it must be a non-empty string")
        _check_encodable(index, label)
        if label in seen:
            raise ValueError(f"labels[{index}] {label!r} stands twice; labels must be distinct")
        seen.add(label)
    if len(seen) < 2:
        raise ValueError(f"labels hold {len(seen)} class names; at least 2 are needed")


def label_types(labels: Sequence[str]) -> list[str]:
    """Returns the sorted entity types of a list of labels; of plain tags those but `O`."""
    if scheme_of(labels) == "tags":
        return sorted(set(labels) - {OUTSIDE})
    return sorted({name for prefix, name in map(split_label, labels) if prefix != OUTSIDE})


def outside_of(labels: Sequence[str]) -> str:
    """What a word gets that has no piece to tag: `O`, or `_` where labels have no `O`."""
    return OUTSIDE if OUTSIDE in labels else BLANK


def bio_constraints(labels: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The moves that the labels' scheme allows, as additive scores.

    Under IOB2 `I-X` may only follow `B-X` or `I-X`, and may not come first. Plain tags may come in
    any order.

    Args:
        labels: C labels, see `validate_labels`.

    Returns:
        `start` [C] and `transitions` [C(from), C(to)], float32, 0 where allowed and -inf where not.

    Raises:
        ValueError: from `validate_labels`.
    """
    validate_labels(labels)
    start = np.zeros(len(labels), np.float32)
    transitions = np.zeros((len(labels), len(labels)), np.float32)
    if scheme_of(labels) == "tags":
        return start, transitions
    parts = [split_label(label) for label in labels]
    for to, (prefix, name) in enumerate(parts):
        if prefix != "I":
            continue
        start[to] = -np.inf
        for source, (source_prefix, source_name) in enumerate(parts):
            if source_prefix == OUTSIDE or source_name != name:
                transitions[source, to] = -np.inf
    return start, transitions


def repair(tags: Sequence[str]) -> list[str]:
    """Turns every `I-X` that continues nothing into `B-X`, so that the result is valid IOB2.

    Args:
        tags: IOB2 or IOB1 tags of one sentence.

    Returns:
        One tag a word; spans are those that conlleval would read from `tags`.

    Raises:
        ValueError: a tag that is not `O`, `B-<type>` or `I-<type>`.
    """
    out: list[str] = []
    previous = ""
    for tag in tags:
        prefix, name = split_label(tag)
        out.append(f"B-{name}" if prefix == "I" and name != previous else tag)
        previous = name
    return out


def spans(tags: Sequence[str], scheme: Scheme = "IOB2") -> list[Span]:
    """Reads the entities of one tagged sentence.

    A stray `I-X` (after `O`, at the start, or after another type) opens an entity, as conlleval
    does, so nothing that was tagged is dropped. Of plain tags every word but `O` is one.

    Args:
        tags: tags of one sentence.
        scheme: of the tags.

    Returns:
        Spans over word positions, in order.

    Raises:
        ValueError: under IOB2 a tag that is not `O`, `B-<type>` or `I-<type>`.
    """
    if scheme == "tags":
        return [Span(tag, i, i + 1) for i, tag in enumerate(tags) if tag != OUTSIDE]
    found: list[Span] = []
    opened = -1
    current = ""
    for position, tag in enumerate(tags):
        prefix, name = split_label(tag)
        if prefix == "I" and name == current:
            continue
        if current:
            found.append(Span(current, opened, position))
        opened, current = position, name
    if current:
        found.append(Span(current, opened, len(tags)))
    return found


def _check_type(name: str) -> None:
    if not isinstance(name, str) or not name or any(char.isspace() for char in name):
        raise ValueError(f"entity type {name!r} must be a non-empty string without white space")
