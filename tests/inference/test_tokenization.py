from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast import _core
from xdistil_fast.tokenization import TextEncoder, plan_windows


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
    starts, ends = _core.finish_words(
        [text], encoded.cu_words, encoded.word_starts, encoded.word_ends
    )
    words = [text[start:end] for start, end in zip(starts, ends, strict=True)]
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
