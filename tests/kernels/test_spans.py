"""Ends of words and entities, against the rules written in Python."""

from __future__ import annotations

import itertools
import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xdistil_fast import _core

JOINER = "\u200d"
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]

# The rules


def continues(text: str, at: int) -> bool:
    char = text[at]
    if char < "\u0300":
        return False
    if unicodedata.category(char)[0] == "M" or char == JOINER or char in SKIN_TONES:
        return True
    return at > 0 and text[at - 1] == JOINER and not char.isspace()


def finished(text: str, start: int, end: int, floor: int = 0) -> tuple[int, int]:
    start = max(start, floor)
    end = max(start, end)
    while end > start and text[end - 1].isspace():
        end -= 1
    while end > start and end < len(text) and continues(text, end):
        end += 1
    letter = start
    while letter > floor and letter < end and continues(text, letter):
        letter -= 1
    if letter < end and not continues(text, letter) and not text[letter].isspace():
        start = letter
    while start < end and (text[start].isspace() or continues(text, start)):
        start += 1
    return start, end


def joined(
    text: str, spans: list[tuple[int, int]], tags: list[int], probabilities: list[float]
) -> list[dict[str, Any]]:
    """Entities of one text."""
    out: list[dict[str, Any]] = []
    floor = at = 0
    while at < len(tags):
        begin, at = at, at + 1
        if not LABELS[tags[begin]].startswith("B-"):
            continue
        while at < len(tags) and LABELS[tags[at]].startswith("I-"):
            at += 1
        start, end = finished(text, spans[begin][0], spans[at - 1][1], floor)
        if start == end:
            continue
        floor = end
        score = 0.0
        for probability in probabilities[begin:at]:
            score += probability
        out.append(
            {
                "entity_group": LABELS[tags[begin]][2:],
                "score": score / (at - begin),
                "word": text[start:end],
                "start": start,
                "end": end,
            }
        )
    return out


# The tests


def finish(texts: list[str], spans: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    cu_words, starts, ends = arrays(spans)
    got = zip(*(a.tolist() for a in _core.finish_words(texts, cu_words, starts, ends)), strict=True)
    return [list(itertools.islice(got, len(row))) for row in spans]


def arrays(spans: list[list[tuple[int, int]]]) -> tuple[Any, Any, Any]:
    cu_words = np.cumsum([0, *map(len, spans)], dtype=np.int32)
    flat = np.array([span for row in spans for span in row], np.int32).reshape(-1, 2)
    return cu_words, flat[:, 0].copy(), flat[:, 1].copy()


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("Zoe\u0308 x", (0, 3), "Zoe\u0308"),  # the tokenizer drops the accent
        ("e\u0301\u0323.", (0, 1), "e\u0301\u0323"),
        (" Ada ", (0, 5), "Ada"),
        ("\u00a0Ada\u2003", (0, 5), "Ada"),
        ("a \u0301b", (1, 4), "b"),  # a mark upon a space is nobody's
        ("\u0301a", (0, 2), "a"),
        ("\u0301", (0, 1), ""),
        ("   ", (0, 3), ""),
        ("नि", (0, 1), "नि"),  # a vowel sign
        ("क्ष x", (0, 1), "क्"),
        ("\U0001f469\u200d\U0001f4bb x", (0, 1), "\U0001f469\u200d\U0001f4bb"),
        ("\U0001f44d\U0001f3fd", (0, 1), "\U0001f44d\U0001f3fd"),
        ("\u2764\ufe0f!", (0, 1), "\u2764\ufe0f"),
        ("ne\u0301e", (2, 4), "e\u0301e"),  # begins inside a letter: moved back to it
        ("אָב", (0, 1), "אָ"),
        ("مُحمد", (0, 1), "مُ"),
    ],
)
def test_marks_and_white_space(text: str, span: tuple[int, int], expected: str) -> None:
    assert finished(text, *span) == finish([text], [[span]])[0][0]
    assert text[slice(*finished(text, *span))] == expected


def test_nothing_is_taken_twice() -> None:
    text = "e\u0301\u0323a"
    assert finish([text], [[(0, 1), (2, 4)]]) == [[(0, 3), (3, 4)]]
    assert finish([text, text], [[(0, 3), (1, 3)], [(1, 3)]]) == [[(0, 3), (3, 3)], [(0, 3)]]


CHARS = st.sampled_from(
    "ae .'\u0301\u0308\u200d\ufe0f\u00a0\u0915\u093f\u064f\u05b8\u2003\x00\x1c\x85"
    "\U0001f468\U0001f469\U0001f3fd\U0001f1e9\U0001f1ea東\uac00\ud800\udfff"
)


@st.composite
def tagged_texts(draw: st.DrawFn) -> tuple[list[str], list[list[tuple[int, int]]], list[list[int]]]:
    texts = draw(st.lists(st.text(CHARS, max_size=12), max_size=4))
    spans, tags = [], []
    for text in texts:
        ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
        spans.append(list(zip(ends[::2], ends[1::2], strict=False)))
        count = len(spans[-1])
        tags.append(draw(st.lists(st.sampled_from(range(5)), min_size=count, max_size=count)))
    return texts, spans, tags


@given(data=tagged_texts())
@settings(max_examples=400, deadline=None)
@example(data=([], [], []))
@example(data=(["", "e\u0301", ""], [[], [(0, 1)], []], [[], [1], []]))
def test_words_and_entities_follow_the_rules(data: Any) -> None:
    texts, spans, tags = data
    expected = []
    for text, row in zip(texts, spans, strict=True):
        floor = 0
        expected.append([])
        for start, end in row:
            start, end = finished(text, start, end, floor)
            expected[-1].append((start, end))
            floor = end if start < end else floor
    assert finish(texts, spans) == expected

    flat = np.array([tag for row in tags for tag in row], np.int32)
    probabilities = np.random.default_rng(len(flat)).random(len(flat), np.float32)
    cu_words, starts, ends = arrays(spans)
    got = _core.join_entities(texts, cu_words, starts, ends, flat, probabilities, LABELS)
    parts = np.split(probabilities, cu_words[1:-1]) if texts else []
    assert got == [
        joined(text, row, mine, part.tolist())
        for text, row, mine, part in zip(texts, spans, tags, parts, strict=True)
    ]
    for entity in itertools.chain.from_iterable(got):
        assert list(entity) == ["entity_group", "score", "word", "start", "end"]
        assert [type(value) for value in entity.values()] == [str, float, str, int, int]
        word = entity["word"]
        assert word == word.strip()
        assert not continues(word, 0)


def test_every_code_point_is_known() -> None:
    """A mark stays with its letter, white space goes; as this Python's unicodedata has it."""
    points = [chr(c) for c in range(sys.maxunicode + 1)]
    got = finish([f"a{c}" for c in points], [[(0, 1)]] * len(points))
    marks = {c for c, [(_, end)] in zip(points, got, strict=True) if end == 2}
    marks -= {JOINER, *SKIN_TONES}
    known = {c for c in points if unicodedata.category(c)[0] == "M"}
    # The table is of Unicode 14. An older Python has fewer marks, a newer one more.
    version = tuple(map(int, unicodedata.unidata_version.split(".")))
    if version == (14, 0, 0):
        assert marks == known
    assert {c for c in marks - known if unicodedata.category(c) != "Cn"} == set()
    if version < (14, 0, 0):
        assert known <= marks
    got = finish(points, [[(0, 1)]] * len(points))
    marks_or_white = {c for c, [(start, end)] in zip(points, got, strict=True) if start == end}
    assert marks_or_white - marks - {JOINER, *SKIN_TONES} == {c for c in points if c.isspace()}


def test_arguments_are_checked() -> None:
    def call(texts: Any = ("ab",), **changes: Any) -> None:
        arguments = {
            "cu_words": np.array([0, 1], np.int32),
            "word_starts": np.array([0], np.int32),
            "word_ends": np.array([1], np.int32),
            "tags": np.array([1], np.int32),
            "probabilities": np.array([0.5], np.float32),
            "labels": LABELS,
        }
        _core.join_entities(texts, **(arguments | changes))

    call()
    for value in (-1, 5):
        with pytest.raises(ValueError, match=rf"tags\[0\]: got {value}, must be 0 to 4"):
            call(tags=np.array([value], np.int32))
        with pytest.raises(ValueError, match=rf"word_starts\[0\]: got {value}, must be 0 to 2"):
            call(word_starts=np.array([value], np.int32))
        with pytest.raises(ValueError, match=rf"word_ends\[0\]: got {value}, must be 0 to 2"):
            call(word_ends=np.array([value], np.int32))
    with pytest.raises(TypeError, match=r"texts\[0\] is int; it must be a string"):
        call([1])
    with pytest.raises(ValueError, match="cu_words: has shape"):
        call(["a", "b"])
    with pytest.raises(ValueError, match="cu_words: ends with 2"):
        call(cu_words=np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match="cu_words: descends at position 2"):
        call(["a", "b"], cu_words=np.array([0, 2, 1], np.int32))
    with pytest.raises(TypeError, match="probabilities: has dtype float64"):
        call(probabilities=np.array([0.5]))
