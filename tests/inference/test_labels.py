from __future__ import annotations

import itertools

import numpy as np
import pytest

from xdistil_fast.labels import (
    Span,
    bio_constraints,
    label_types,
    make_labels,
    repair,
    spans,
    split_label,
    validate_labels,
)

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_make_labels_order() -> None:
    assert make_labels(["PER", "LOC", "PER"]) == LABELS
    assert label_types(LABELS) == ["LOC", "PER"]
    validate_labels(LABELS)


@pytest.mark.parametrize(
    ("label", "parts"),
    [("O", ("O", "")), ("B-PER", ("B", "PER")), ("I-A-B", ("I", "A-B")), ("I--", ("I", "-"))],
)
def test_split_label(label: str, parts: tuple[str, str]) -> None:
    assert split_label(label) == parts


@pytest.mark.parametrize("label", ["", "o", "B", "B-", "E-PER", "S-PER", "BPER", "-PER", "O-PER"])
def test_split_label_refuses(label: str) -> None:
    with pytest.raises(ValueError, match="is not IOB2"):
        split_label(label)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["B-A", "I-A"], "do not hold 'O'"),
        (["O"], "no entity type"),
        (["O", "B-A"], "lack 'I-A'"),
        (["O", "I-A"], "lack 'B-A'"),
        (["O", "B-A", "I-A", "B-A"], r"labels\[3\] 'B-A' stands twice"),
        (["O", "B-A", "I-A", "O"], "stands twice"),
        (["O", "B-A", "I-A", "E-A"], "'E-A' is not IOB2"),
        (["O", "B-A B", "I-A B"], "without white space"),
        (["O", 3], r"labels\[1\] is 3"),
    ],
)
def test_validate_labels_refuses(labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_labels(labels)


@pytest.mark.parametrize("types", [[], [""], ["A B"], ["A\n"]])
def test_make_labels_refuses(types: list[str]) -> None:
    with pytest.raises(ValueError, match="type"):
        make_labels(types)


def valid(tags: tuple[str, ...]) -> bool:
    """IOB2 by its definition: an I-X follows a B-X or an I-X."""
    return all(
        tag[0] != "I" or (place > 0 and tags[place - 1] in ("B" + tag[1:], tag))
        for place, tag in enumerate(tags)
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::17])
def test_constraints_are_iob2(order: tuple[int, ...]) -> None:
    labels = [LABELS[index] for index in order]
    start, transitions = bio_constraints(labels)
    assert start.dtype == transitions.dtype == np.float32
    for path in itertools.product(range(5), repeat=3):
        cost = start[path[0]] + transitions[path[0], path[1]] + transitions[path[1], path[2]]
        assert cost == (0 if valid(tuple(labels[tag] for tag in path)) else -np.inf)


def test_repair_is_valid_and_keeps_spans() -> None:
    for tags in itertools.product(LABELS, repeat=4):
        fixed = repair(tags)
        assert valid(tuple(fixed))
        assert spans(fixed) == spans(tags)
        assert fixed == list(tags) or not valid(tags)


def test_spans() -> None:
    tags = ["B-A", "I-A", "B-A", "O", "I-B", "I-A", "I-A"]
    assert spans(tags) == [Span("A", 0, 2), Span("A", 2, 3), Span("B", 4, 5), Span("A", 5, 7)]
    assert spans([]) == []
    with pytest.raises(ValueError, match="is not IOB2"):
        spans(["O", "X"])
