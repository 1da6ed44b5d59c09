from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast.labels import Span
from xdistil_fast.scoring import score
from xdistil_fast.train.errors import (
    KINDS,
    Pair,
    confusion,
    count_kinds,
    pair_entities,
    partial_scores,
)

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG"]


def valid_iob2(tags: list[str]) -> list[str]:
    out: list[str] = []
    for tag in tags:
        follows = out and out[-1] != "O" and out[-1][2:] == tag[2:]
        out.append(tag if tag[0] != "I" or follows else "B" + tag[1:])
    return out


def side(width: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(TAGS), min_size=width, max_size=width).map(valid_iob2)


pairs_of_sides = st.lists(
    st.integers(0, 8).flatmap(lambda width: st.tuples(side(width), side(width))), max_size=4
)


def test_one_of_each_kind() -> None:
    gold = ["B-PER", "I-PER", "O", "B-PER", "I-PER", "O", "B-PER", "O", "B-PER", "I-PER", "O",
            "B-ORG", "O", "O"]  # fmt: skip
    mine = ["B-PER", "I-PER", "O", "B-PER", "O", "O", "B-ORG", "O", "B-ORG", "O", "O",
            "O", "O", "B-PER"]  # fmt: skip
    pairs = pair_entities([gold], [mine])
    assert [pair.kind for pair in pairs] == list(KINDS)
    assert pairs[1] == Pair(0, Span("PER", 3, 5), Span("PER", 3, 4))
    assert pairs[-1] == Pair(0, None, Span("PER", 13, 14))
    assert confusion(pairs) == {
        "ORG": {"ORG": 0, "PER": 0, "borders wrong": 0, "missed": 1},
        "PER": {"ORG": 2, "PER": 1, "borders wrong": 1, "missed": 0},
        "spurious": {"ORG": 0, "PER": 1, "borders wrong": 0, "missed": 0},
    }
    scores = partial_scores(count_kinds(pairs))
    assert scores["strict"].f1 == pytest.approx(20.0)  # 1 of 5 and 5
    assert scores["exact"].f1 == pytest.approx(40.0)
    assert scores["partial"].f1 == pytest.approx(60.0)  # 2 and two halves
    assert scores["type"].f1 == pytest.approx(40.0)


def test_the_better_partner_wins() -> None:
    # One long prediction over three entities: the one of its type, not the first.
    gold = ["B-ORG", "B-PER", "B-ORG"]
    mine = ["B-PER", "I-PER", "I-PER"]
    assert [pair.kind for pair in pair_entities([gold], [mine])] == [
        "missed", "borders wrong", "missed",
    ]  # fmt: skip
    # One long entity, two predictions: the larger share; the other is spurious.
    pairs = pair_entities([["B-PER", "I-PER", "I-PER"]], [["B-PER", "B-PER", "I-PER"]])
    assert pairs[0].predicted == Span("PER", 1, 3)
    assert pairs[1].kind == "spurious"


@settings(max_examples=60, deadline=None)
@given(pairs_of_sides)
def test_every_entity_is_in_one_pair(sentences: list[tuple[list[str], list[str]]]) -> None:
    gold, mine = [a for a, _ in sentences], [b for _, b in sentences]
    pairs = pair_entities(gold, mine)
    kinds, scores = count_kinds(pairs), score(gold, mine).overall
    assert kinds["exact"] == scores.correct
    assert sum(kinds.values()) - kinds["spurious"] == scores.gold
    assert sum(kinds.values()) - kinds["missed"] == scores.predicted
    assert partial_scores(kinds)["strict"].f1 == pytest.approx(scores.f1)
    table = confusion(pairs)
    assert sum(sum(row.values()) for row in table.values()) == len(pairs)


# Blocks with at most one entity on each side: where pairing leaves no choice.
block = st.tuples(st.sampled_from(["PER", "ORG"]), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(block, block), min_size=1, max_size=6))
def test_agrees_with_nervaluate(
    blocks: list[tuple[tuple[str, int, int], tuple[str, int, int]]],
) -> None:
    nervaluate = pytest.importorskip("nervaluate")

    def tags(kind: str, begin: int, length: int) -> list[str]:
        inner = [f"B-{kind}", *[f"I-{kind}"] * (length - 1)] if length else []
        return (["O"] * begin + inner + ["O"] * 8)[:8]

    gold, mine = ([tag for pair in blocks for tag in tags(*pair[i])] for i in (0, 1))
    if not any(tag != "O" for tag in gold):
        return
    ours = partial_scores(count_kinds(pair_entities([gold], [mine])))
    evaluator = nervaluate.Evaluator([gold], [mine], tags=["PER", "ORG"], loader="list")
    other = evaluator.evaluate()["overall"]
    for name, theirs in (("strict", "strict"), ("exact", "exact"), ("partial", "partial"),
                         ("type", "ent_type")):  # fmt: skip
        result, mine_ = other[theirs], ours[name]
        assert (mine_.correct, mine_.incorrect, mine_.partial, mine_.missed, mine_.spurious) == (
            result.correct, result.incorrect, result.partial, result.missed, result.spurious,
        ), name  # fmt: skip
        assert mine_.precision == pytest.approx(100 * result.precision)
        assert mine_.recall == pytest.approx(100 * result.recall)


@pytest.mark.parametrize(("gold", "mine"), [([["O"]], []), ([["O"]], [["O", "O"]])])
def test_refuses_unequal_sides(gold: list[list[str]], mine: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="predicted"):
        pair_entities(gold, mine)
