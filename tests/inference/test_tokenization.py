from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast.tokenization import TextEncoder, finish_span, plan_windows


@pytest.fixture(scope="module")
def encoder(tokenizer_json: str) -> TextEncoder:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextEncoder(tokenizer)


def sentencepiece_like() -> Tokenizer:
    """A Unigram tokenizer that cuts at white space only, as XLM-R's does."""
    pieces = ["<unk>", "\u2581", "\u2581Ber", "lin", ".", "\u2581Mo", "s", "kau", ",", "\u2581-"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def test_ragged_batch(encoder: TextEncoder) -> None:
    texts = ["Ada wrote.", "", "\x07", "London"]
    encoded = encoder.encode_texts(texts)
    assert encoded.ids.dtype == encoded.cu_pieces.dtype == encoded.cu_words.dtype == np.int32
    assert encoded.cu_pieces[0] == 0
    assert encoded.cu_pieces[-1] == len(encoded.ids)
    assert encoded.cu_words.tolist() == [0, 3, 3, 3, 4]
    found = [
        [
            texts[text][encoded.word_starts[word] : encoded.word_ends[word]]
            for word in range(encoded.cu_words[text], encoded.cu_words[text + 1])
        ]
        for text in range(4)
    ]
    assert found == [["Ada", "wrote", "."], [], [], ["London"]]


def test_empty_batch(encoder: TextEncoder) -> None:
    for encoded in (encoder.encode_texts([]), encoder.encode_words([])):
        assert encoded.cu_pieces.tolist() == encoded.cu_words.tolist() == [0]
        assert len(encoded.ids) == len(encoded.first) == 0


def test_one_thread_gives_the_same(encoder: TextEncoder, tokenizer_json: str) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = ["Ada wrote.", "", "東京で\ud800 a"]
    for method, batch in (("encode_texts", texts), ("encode_words", [["Ada", "\ud800x"], []])):
        one = getattr(TextEncoder(tokenizer, threads=1), method)(batch)
        many = getattr(encoder, method)(batch)
        for name in ("ids", "cu_pieces", "first", "cu_words", "positions", "starts", "ends"):
            np.testing.assert_array_equal(getattr(one, name), getattr(many, name))


def test_split_words_keep_their_places(encoder: TextEncoder) -> None:
    words = ["Ada", "\u200d", "", "isn't", " ", "東京"]
    encoded = encoder.encode_words([words, [], ["London"]])
    # One word each, even of several characters that running text would cut; none without pieces.
    assert encoded.positions.tolist() == [0, 3, 5, 0]
    assert encoded.cu_words.tolist() == [0, 3, 3, 4]


def test_surrogates_keep_offsets(encoder: TextEncoder) -> None:
    text = "a \ud83d\ude00 \udfffb London"  # a pair as two code points, and a stray one
    encoded = encoder.encode_texts([text])
    spans = zip(encoded.word_starts, encoded.word_ends, strict=True)
    # This tokenizer's normaliser drops U+FFFD.
    assert [text[start:end] for start, end in spans] == ["a", "b", "London"]


def test_punctuation_stands_alone_in_any_tokenizer() -> None:
    text = "Berlin, Moskau. -Berlin"
    encoded = TextEncoder(sentencepiece_like()).encode_texts([text])
    words = [
        text[slice(*finish_span(text, start, end))]
        for start, end in zip(encoded.word_starts, encoded.word_ends, strict=True)
    ]
    assert words == ["Berlin", ",", "Moskau", ".", "-", "Berlin"]
    # Text that is split already stays as it is.
    split = TextEncoder(sentencepiece_like()).encode_words([["Berlin,", "Moskau."]])
    assert split.positions.tolist() == [0, 1]


# Windows


@given(
    length=st.integers(0, 300),
    window=st.integers(1, 40),
    data=st.data(),
)
def test_windows_cover_every_piece_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(0, window - 1))
    words = data.draw(st.lists(st.integers(0, max(0, length - 1)), unique=True))
    starts = np.array(sorted({0, *words}) if length else [], np.int64)
    plan = plan_windows(length, window, stride, starts)
    assert [place for part in plan for place in range(part.core_start, part.core_stop)] == list(
        range(length)
    )
    for part in plan:
        assert 0 <= part.start <= part.core_start < part.core_stop <= part.stop <= length
        assert part.stop - part.start <= window
    if 0 < length <= window:
        assert len(plan) == 1


@given(length=st.integers(50, 400), size=st.integers(1, 4))
def test_windows_end_at_words_and_have_context(length: int, size: int) -> None:
    starts = np.arange(0, length, size)
    window, stride = 32, 12
    plan = plan_windows(length, window, stride, starts)
    for part in plan:
        for place in (part.start, part.stop, part.core_start, part.core_stop):
            assert place % size == 0 or place == length
        if part.start:
            assert part.core_start - part.start > stride // 2 - size
        if part.stop < length:
            assert part.stop - part.core_stop > stride // 2 - size


def test_a_word_longer_than_the_window_is_cut() -> None:
    plan = plan_windows(100, 10, 4, np.array([0]))
    assert [(part.core_start, part.core_stop) for part in plan][:2] == [(0, 8), (8, 14)]
    assert plan[-1].stop == 100


# Spans


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
def test_finish_span(text: str, span: tuple[int, int], expected: str) -> None:
    start, end = finish_span(text, *span)
    assert text[start:end] == expected


def test_finish_span_takes_nothing_twice() -> None:
    text = "e\u0301\u0323a"
    assert finish_span(text, 0, 1) == (0, 3)
    assert finish_span(text, 2, 4, floor=3) == (3, 4)
    assert finish_span(text, 1, 3, floor=3) == (3, 3)


CHARS = st.sampled_from("ae .'\u0301\u0308\u200d\ufe0f\u00a0\u0915\u093f\u064f\u05b8\u2003\x00") | (
    st.sampled_from("\U0001f468\U0001f469\U0001f3fd\U0001f1e9\U0001f1ea東\uac00\ud800\udfff")
)


@given(st.text(CHARS, max_size=12), st.data())
@example("e\u0301", None)
def test_finish_span_properties(text: str, data: st.DataObject | None) -> None:
    size = len(text)
    start = data.draw(st.integers(0, size)) if data else 0
    end = data.draw(st.integers(start, size)) if data else size
    floor = data.draw(st.integers(0, size)) if data else 0
    begin, stop = finish_span(text, start, end, floor)
    assert floor <= begin <= stop <= size or begin == stop
    if begin < stop:
        word = text[begin:stop]
        assert word == word.strip()
        assert unicodedata.category(word[0])[0] != "M"
        if stop < size:
            assert unicodedata.category(text[stop])[0] != "M"
