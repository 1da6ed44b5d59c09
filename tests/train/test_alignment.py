from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from xdistil_fast.train.alignment import (
    IGNORED,
    align,
    inside_of,
    piece_targets,
    plain_tokenizer,
    split_points,
    tag_ids,
    words_from_pieces,
)

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
NOTHING = "\u0007"  # a control character: cleaned away, so it yields no piece


def make_tokenizer() -> tokenizers.Tokenizer:
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "mara",
        "lin",
        "##d",
        "##en",
        "oslo",
        "u",
        ".",
        "s",
    ]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


TOKENIZER = make_tokenizer()
WORDS = st.lists(st.sampled_from(["Mara", "Linden", "U.S.", "Oslo", NOTHING, "qqq"]), max_size=7)


def pieces_of(tokenizer: tokenizers.Tokenizer, ids: object) -> list[str | None]:
    return [tokenizer.id_to_token(int(i)) for i in ids]  # type: ignore[attr-defined]


def test_pieces_words_and_first_pieces() -> None:
    sentences = [["Mara", "Linden"], [], ["U.S.", NOTHING, "Oslo"]]
    found = align(TOKENIZER, sentences)
    assert len(found) == 3
    assert pieces_of(TOKENIZER, found.ids) == [
        "mara", "lin", "##d", "##en", "u", ".", "s", ".", "oslo",
    ]  # fmt: skip
    assert found.cu_pieces.tolist() == [0, 4, 4, 9]
    assert found.cu_words.tolist() == [0, 2, 2, 5]
    assert found.word_of_piece.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 4]
    assert found.first_piece.tolist() == [0, 1, 4, -1, 8]
    assert pieces_of(TOKENIZER, found.pieces(2)) == ["u", ".", "s", ".", "oslo"]
    assert (found.ids.dtype, found.cu_pieces.dtype) == (np.int32, np.int64)


def test_no_sentences() -> None:
    found = align(TOKENIZER, [])
    assert len(found) == 0
    assert found.cu_pieces.tolist() == [0]
    assert len(found.ids) == 0


def test_truncation_and_padding_are_left_out() -> None:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=20)
    expected = align(TOKENIZER, [["Mara", "Linden"]])
    assert np.array_equal(align(tokenizer, [["Mara", "Linden"]]).ids, expected.ids)
    assert tokenizer.truncation is not None  # the caller's own is untouched
    copy = plain_tokenizer(tokenizer)
    assert copy.truncation is None
    assert copy.padding is None


def test_targets_by_hand() -> None:
    found = align(TOKENIZER, [["Linden", "U.S."], ["Linden", NOTHING, "U.S."]])
    tags = tag_ids([["B-PER", "O"], ["I-PER", "B-LOC", "I-LOC"]], LABELS)
    assert tags.tolist() == [3, 0, 4, 1, 2]
    all_pieces = piece_targets(found, tags, LABELS)
    assert all_pieces.tolist() == [3, 4, 4, 0, 0, 0, 0, 4, 4, 4, 2, 2, 2, 2]
    first = piece_targets(found, tags, LABELS, "first")
    x = IGNORED
    assert first.tolist() == [3, x, x, 0, x, x, x, 4, x, x, 2, x, x, x]


def test_prediction_is_that_of_the_first_piece() -> None:
    found = align(TOKENIZER, [["Linden", NOTHING], [], ["U.S."]])
    predicted = np.array([3, 0, 0, 1, 2, 2, 2])
    assert words_from_pieces(found, predicted, LABELS) == [["B-PER", "O"], [], ["B-LOC"]]


@given(st.lists(WORDS, max_size=6), st.data())
def test_batch_equals_single_and_targets_come_back(
    sentences: list[list[str]], data: st.DataObject
) -> None:
    together = align(TOKENIZER, sentences)
    for index, words in enumerate(sentences):
        alone = align(TOKENIZER, [words])
        assert np.array_equal(alone.ids, together.pieces(index))
        shifted = together.first_piece[together.cu_words[index] : together.cu_words[index + 1]]
        shifted = np.where(shifted < 0, -1, shifted - together.cu_pieces[index])
        assert np.array_equal(alone.first_piece, shifted)
    tags = [[data.draw(st.sampled_from(LABELS)) for _ in words] for words in sentences]
    targets = piece_targets(together, tag_ids(tags, LABELS), LABELS)
    expected = [
        ["O" if word == NOTHING else tag for word, tag in zip(words, row, strict=True)]
        for words, row in zip(sentences, tags, strict=True)
    ]
    assert words_from_pieces(together, targets, LABELS) == expected
    assert [len(part) for part in together.split(targets)] == np.diff(together.cu_pieces).tolist()


@given(WORDS, st.integers(1, 9))
def test_split_loses_nothing_and_cuts_between_words(words: list[str], limit: int) -> None:
    found = align(TOKENIZER, [["Oslo"], words])
    runs = split_points(found, 1, limit)
    covered = [i for start, stop in runs for i in range(start, stop)]
    assert covered == list(range(int(found.cu_pieces[1]), int(found.cu_pieces[2])))
    sizes = np.bincount(found.word_of_piece, minlength=len(words) + 1)
    for start, stop in runs:
        assert 0 < stop - start <= limit
        inside = (
            stop < len(found.ids) and found.word_of_piece[stop] == found.word_of_piece[stop - 1]
        )
        if inside:
            assert sizes[found.word_of_piece[stop]] > limit


def test_split_of_a_long_word() -> None:
    found = align(TOKENIZER, [["Oslo", "U.S.U.S.U.S.", "Oslo"]])
    assert split_points(found, 0, 5) == [(0, 1), (1, 6), (6, 11), (11, 14)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: tag_ids([["B-ORG"]], LABELS), "'B-ORG' is not among the labels"),
        (lambda f: inside_of(["O", "B-PER"]), "lack 'I-PER'"),
        (lambda f: piece_targets(f, np.zeros(3, np.int64), LABELS), "has 1 words"),
        (lambda f: piece_targets(f, np.zeros(1, np.int64), LABELS, "some"), "allowed: 'all'"),
        (lambda f: words_from_pieces(f, np.zeros(2, np.int64), LABELS), "has 1 pieces"),
        (lambda f: split_points(f, 0, 0), "max_pieces is 0"),
    ],
)
def test_refuses(call: object, message: str) -> None:
    found = align(TOKENIZER, [["Mara"]])
    with pytest.raises(ValueError, match=message):
        call(found)  # type: ignore[operator]
