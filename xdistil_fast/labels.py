"""IOB2 labels: names, the moves they allow, and the spans they spell; names of classes.

A label is `O`, `B-X` (first word of an entity of type X) or `I-X` (a later one). A label list
holds `O` once and both `B-X` and `I-X` for every type, so that every entity can be spelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "O"


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
    """Checks that a label list can be decoded under IOB2.

    Args:
        labels: label of each tag id, in any order.

    Raises:
        ValueError: an item that is no IOB2 label, a repeat, no `O`, no type at all, or a type
            that has only one of its `B-` and `I-` labels.
    """
    prefixes: dict[str, set[str]] = {}
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"labels[{index}] is {label!r}; it must be a string")
        if label in seen:
            raise ValueError(f"labels[{index}] {label!r} stands twice; labels must be distinct")
        seen.add(label)
        prefix, name = split_label(label)
        if prefix != OUTSIDE:
            _check_type(name)
            prefixes.setdefault(name, set()).add(prefix)
    if OUTSIDE not in seen:
        raise ValueError("labels do not hold 'O'; it is needed for words outside any entity")
    if not prefixes:
        raise ValueError("labels hold no entity type; at least one 'B-<type>' is needed")
    for name, found in prefixes.items():
        for prefix in ("B", "I"):
            if prefix not in found:
                raise ValueError(f"labels lack '{prefix}-{name}'; every type needs both B- and I-")


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
        if any("\ud800" <= char <= "\udfff" for char in label):
            raise ValueError(f"labels[{index}] is {label!r}; lone surrogates are not allowed")
        if label in seen:
            raise ValueError(f"labels[{index}] {label!r} stands twice; labels must be distinct")
        seen.add(label)
    if len(seen) < 2:
        raise ValueError(f"labels hold {len(seen)} class names; at least 2 are needed")


def label_types(labels: Sequence[str]) -> list[str]:
    """Returns the sorted entity types of a list of IOB2 labels."""
    return sorted({name for prefix, name in map(split_label, labels) if prefix != OUTSIDE})


def bio_constraints(labels: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The moves IOB2 allows, as additive scores.

    `I-X` may only follow `B-X` or `I-X`, and may not come first.

    Args:
        labels: C IOB2 labels, see `validate_labels`.

    Returns:
        `start` [C] and `transitions` [C(from), C(to)], float32, 0 where allowed and -inf where not.

    Raises:
        ValueError: from `validate_labels`.
    """
    validate_labels(labels)
    parts = [split_label(label) for label in labels]
    start = np.zeros(len(parts), np.float32)
    transitions = np.zeros((len(parts), len(parts)), np.float32)
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


def spans(tags: Sequence[str]) -> list[Span]:
    """Reads the entities of one tagged sentence.

    A stray `I-X` (after `O`, at the start, or after another type) opens an entity, as conlleval
    does, so nothing that was tagged is dropped.

    Args:
        tags: IOB2 tags of one sentence.

    Returns:
        Spans over word positions, in order.

    Raises:
        ValueError: a tag that is not `O`, `B-<type>` or `I-<type>`.
    """
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
