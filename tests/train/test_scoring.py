from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast.scoring import Counts, score

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-creative-work", "I-creative-work"]


def conlleval_chunks(tags: list[str]) -> set[tuple[str, int, int]]:
    """Second implementation: by the border rules of conlleval, word against previous word."""

    def split(tag: str) -> tuple[str, str]:
        return ("O", "") if tag == "O" else (tag[0], tag[2:])

    padded = [("O", ""), *map(split, tags), ("O", "")]
    starts, ends = [], []
    for position, ((prefix, kind), (next_prefix, next_kind)) in enumerate(pairwise(padded)):
        differs = kind != next_kind
        if prefix != "O" and (next_prefix in "BO" or differs):
            ends.append((kind, position))
        if next_prefix != "O" and (next_prefix == "B" or prefix == "O" or differs):
            starts.append((next_kind, position))
    return {(k, s, e) for (k, s), (_, e) in zip(starts, ends, strict=True)}


@st.composite
def tagged_pairs(draw: st.DrawFn, tags: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    lengths = draw(st.lists(st.integers(0, 12), max_size=6))
    side = [st.lists(st.sampled_from(tags), min_size=n, max_size=n) for n in lengths]
    return [draw(s) for s in side], [draw(s) for s in side]


@given(tagged_pairs(TAGS))
def test_agrees_with_second_implementation(
    pair: tuple[list[list[str]], list[list[str]]],
) -> None:
    gold, pred = pair
    scores = score(gold, pred)
    in_gold = {(i, *c) for i, tags in enumerate(gold) for c in conlleval_chunks(tags)}
    in_pred = {(i, *c) for i, tags in enumerate(pred) for c in conlleval_chunks(tags)}
    assert scores.overall == Counts(len(in_gold), len(in_pred), len(in_gold & in_pred))
    for kind in {c[1] for c in in_gold | in_pred}:
        of_kind = [{c for c in chunks if c[1] == kind} for chunks in (in_gold, in_pred)]
        assert scores.per_type[kind] == Counts(
            len(of_kind[0]), len(of_kind[1]), len(of_kind[0] & of_kind[1])
        )
    assert set(scores.per_type) == {c[1] for c in in_gold | in_pred}
    words = [g == p for a, b in zip(gold, pred, strict=True) for g, p in zip(a, b, strict=True)]
    assert scores.words == len(words)
    assert scores.accuracy == pytest.approx(100 * sum(words) / len(words) if words else 0)


def valid_iob2(tags: list[str]) -> list[str]:
    out: list[str] = []
    for tag in tags:
        follows = out and out[-1] != "O" and out[-1][2:] == tag[2:]
        out.append(tag if tag[0] != "I" or follows else "B" + tag[1:])
    return out


@settings(max_examples=40, deadline=None)
@given(tagged_pairs(["O", "B-PER", "I-PER", "B-ORG", "I-ORG"]))
def test_agrees_with_nervaluate_on_valid_iob2(
    pair: tuple[list[list[str]], list[list[str]]],
) -> None:
    nervaluate = pytest.importorskip("nervaluate")
    gold, pred = ([valid_iob2(tags) for tags in side] for side in pair)
    if not any(gold):
        return
    scores = score(gold, pred)
    other = nervaluate.Evaluator(gold, pred, tags=["PER", "ORG"], loader="list").evaluate()
    strict = other["overall"]["strict"]
    assert scores.overall.correct == strict.correct
    assert scores.overall.gold == strict.possible
    assert scores.overall.predicted == strict.actual
    assert scores.precision == pytest.approx(100 * strict.precision)
    assert scores.recall == pytest.approx(100 * strict.recall)


def test_counts_by_hand() -> None:
    gold = [["B-PER", "I-PER", "O", "B-ORG"], ["B-PER", "B-PER", "O"]]
    pred = [["B-PER", "I-PER", "O", "B-PER"], ["B-PER", "I-PER", "O"]]
    scores = score(gold, pred)
    assert scores.overall == Counts(gold=4, predicted=3, correct=1)
    assert scores.precision == pytest.approx(100 / 3)
    assert scores.recall == 25.0
    assert scores.f1 == pytest.approx(200 / 7)
    assert scores.per_type == {"ORG": Counts(1, 0, 0), "PER": Counts(3, 3, 1)}
    assert scores.accuracy == pytest.approx(100 * 5 / 7)


@pytest.mark.parametrize(
    ("pred", "correct"),
    [
        (["I-PER", "I-PER", "O"], 1),  # a stray I- opens an entity
        (["B-PER", "I-ORG", "O"], 0),  # another type ends the entity before
        (["B-PER", "O", "O"], 0),  # half an entity is none
        (["B-PER", "I-PER", "I-PER"], 0),
    ],
)
def test_borders_and_stray_tags(pred: list[str], correct: int) -> None:
    assert score([["B-PER", "I-PER", "O"]], [pred]).overall.correct == correct


def test_dict_is_plain_and_complete() -> None:
    content = score([["B-PER", "O"]], [["B-PER", "O"]]).to_dict()
    assert content == {
        "f1": 100.0,
        "precision": 100.0,
        "recall": 100.0,
        "support": 1,
        "predicted": 1,
        "correct": 1,
        "accuracy": 100.0,
        "sentences": 1,
        "words": 2,
        "per_type": {
            "PER": {
                "f1": 100.0,
                "precision": 100.0,
                "recall": 100.0,
                "support": 1,
                "predicted": 1,
                "correct": 1,
            }
        },
    }


def test_nothing_to_score_is_zero() -> None:
    assert score([], []).to_dict()["f1"] == 0.0
    assert score([["O"]], [["O"]]).f1 == 0.0


@pytest.mark.parametrize(
    ("gold", "pred", "message"),
    [
        ([["O"]], [], "gold has 1 sentences and pred 0"),
        ([["O"], ["O", "O"]], [["O"], ["O"]], "sentence 1 has 2 gold tags and 1"),
        ([["O"]], [["PER"]], "sentence 0.*'PER'"),
        ([["S-PER"]], [["O"]], "sentence 0.*'S-PER'"),
        ([["B-"]], [["O"]], "'B-'"),
    ],
)
def test_refuses(gold: list[list[str]], pred: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(gold, pred)
