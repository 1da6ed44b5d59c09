"""Word pieces against the `tokenizers` library: ids, offsets and words, over all of Unicode."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast import _core

SPECIAL = ("[PAD]", "[UNK]", "[SEP]", "[MASK]")
OPTIONS = (
    {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": False},
    {"clean_text": False, "handle_chinese_chars": False, "strip_accents": True, "lowercase": False},
    {"clean_text": False, "handle_chinese_chars": True, "strip_accents": False, "lowercase": True},
)
TEXTS = (
    "Ada Lovelace's letter (of 1843) to [SEP] Charles Babbage[MASK].",
    "Zo\u0308e Müller İstanbul ǅ ß ﬁ ½ Straße Ångström ≠ \u226e; ΑΣΣ",
    "東京で田中さん。北京 김민수는 서울에서 \u1112\u1161\u11ab 한",
    "\x00a\x07b\x7f\ufffd c\u00ad\u200b\u200d\ufeff\ue000\U000e0001\U0010fffe d\u2028e\u3000f\x1cg",
    "a\u0315\u0300\u05ae\u0062 \u0344 \u0f73\u0f71 e\u0301\u0323 \u1e69",
    "\U0001d15e\U0001d165\u0323\U0001d16d\u1b05\u1b35\u1b44\u302e\u302f\u0345\u0301x",
    "\u0301\u1b44\u0300 \u1b44\u0334\u0300a",
    "[UNK][PAD] [SEP [[SEP]] [sep] [SE\u0301P] [S\x07EP]",
)


def make_tokenizer(options: dict[str, Any], limit: int = 100, prefix: str = "##") -> Tokenizer:
    """A vocabulary of most letters of the texts, alone and inside words, and of some words."""
    normalizer = normalizers.BertNormalizer(**options)
    text = normalizer.normalize_str(" ".join(TEXTS)) + "abcdefghij ,.'[]"
    letters = sorted(set(text) - set(" qvxz"))
    words = sorted(set(text.split()))
    vocabulary = dict.fromkeys([*SPECIAL, *letters, *(prefix + letter for letter in letters)])
    vocabulary |= dict.fromkeys([*words[::2], *(prefix + word[1:3] for word in words), "ab", "abc"])
    vocabulary |= dict.fromkeys([prefix + "bcd", prefix, ""])
    tokenizer = Tokenizer(
        models.WordPiece(
            {piece: index for index, piece in enumerate(vocabulary)},
            unk_token="[UNK]",
            max_input_chars_per_word=limit,
            continuing_subword_prefix=prefix,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def make_wordpiece(
    tokenizer: Tokenizer, options: dict[str, Any], limit: int = 100, prefix: str = "##"
) -> _core.WordPiece:
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    accents = options["strip_accents"]
    return _core.WordPiece(
        vocabulary,
        {token: vocabulary[token] for token in SPECIAL},
        unk_token="[UNK]",
        continuing_subword_prefix=prefix,
        max_input_chars_per_word=limit,
        **(options | {"strip_accents": options["lowercase"] if accents is None else accents}),
    )


class Pair(NamedTuple):
    theirs: Tokenizer
    ours: _core.WordPiece

    def check(self, texts: list[str], threads: int = 1) -> None:
        """Ids, offsets and words of running text."""
        encodings = self.theirs.encode_batch(texts, add_special_tokens=False)
        self.compare(self.ours.encode_texts(texts, threads), encodings, repr(texts))

    def check_words(self, sentences: list[list[str]], threads: int = 1) -> None:
        """The same of text that is split into words."""
        encodings = self.theirs.encode_batch(
            sentences, is_pretokenized=True, add_special_tokens=False
        )
        self.compare(self.ours.encode_words(sentences, threads), encodings, repr(sentences))

    @staticmethod
    def compare(ours: tuple[Any, ...], encodings: list[Any], shown: str) -> None:
        ids, cu_pieces, first, cu_words, positions, starts, ends = ours
        for n, encoding in enumerate(encodings):
            part = slice(cu_pieces[n], cu_pieces[n + 1])
            assert ids[part].tolist() == encoding.ids, shown
            spans = list(zip(starts[part].tolist(), ends[part].tolist(), strict=True))
            assert spans == encoding.offsets, shown
            word_ids = encoding.word_ids
            begins = [
                (cu_pieces[n] + at, word)
                for at, word in enumerate(word_ids)
                if at == 0 or word != word_ids[at - 1]
            ]
            words = slice(cu_words[n], cu_words[n + 1])
            got = list(zip(first[words].tolist(), positions[words].tolist(), strict=True))
            assert got == begins, shown
        assert cu_pieces[-1] == len(ids) == len(starts) == len(ends)
        assert cu_words[-1] == len(first) == len(positions)


def make_pair(options: dict[str, Any], **changes: Any) -> Pair:
    tokenizer = make_tokenizer(options, **changes)
    return Pair(tokenizer, make_wordpiece(tokenizer, options, **changes))


@pytest.fixture(scope="module", params=range(len(OPTIONS)), ids=lambda n: f"options{n}")
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(OPTIONS[request.param])


def test_sentences(pair: Pair) -> None:
    pair.check(list(TEXTS))
    pair.check_words([text.split(" ") for text in TEXTS])
    for text in TEXTS:
        pair.check([text])


def test_every_code_point(pair: Pair) -> None:
    # Planes 4 to 13 are empty, 15 and 16 are private use and all alike.
    points = [*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0400)]
    points += [plane + last for plane in range(0x30000, 0x110000, 0x10000) for last in (0, 0xFFFF)]
    # In a word, alone, before and after marks that change places.
    pieces = [f"a{chr(c)}b {chr(c)} \u0323{chr(c)}\u0301a" for c in points]
    for at in range(0, len(pieces), 8192):
        pair.check([" ".join(pieces[n : n + 512]) for n in range(at, at + 8192, 512)])


MARKS = "\u0300\u0301\u0323\u0315\u0334\u0345\u0344\u0f71\u0f73\u05b0\u064b\u093c\u094d\u1b44\u302e"
CHARS = (
    st.sampled_from("abcdeABCDE ,.'#[]\u00e9\u0130\u01c5\u00df")
    | st.sampled_from(MARKS + "\U0001d165\U0001d15e\U0001d16d\U00016ff0")
    | st.sampled_from("東京\uf900\U0002f800\uac00\uac01\u1100\u1161\u11a8")
    | st.sampled_from("\x00\x07\t\n\x85\xa0\xad\u200b\u200d\u2028\u3000\ufffd\ufeff\ue000\uffff")
    | st.characters(exclude_categories=["Cs"])
)
STRINGS = st.lists(CHARS | st.sampled_from([*SPECIAL, "[SEP", "abc", "##b"]), max_size=30).map(
    "".join
)


@given(texts=st.lists(STRINGS, max_size=4), threads=st.sampled_from([1, 2, 3]))
@settings(max_examples=300, deadline=None)
@example(texts=[], threads=2)
@example(texts=["", " ", "\x07"], threads=2)
def test_any_text(pair: Pair, texts: list[str], threads: int) -> None:
    pair.check(texts, threads)


@given(sentences=st.lists(st.lists(STRINGS, max_size=5), max_size=3))
@settings(deadline=None)
def test_any_words(pair: Pair, sentences: list[list[str]]) -> None:
    pair.check_words(sentences)


@given(text=st.text(st.sampled_from(MARKS + "\U0001d165\U0001d15ea\x07\u00e9"), max_size=12))
@settings(max_examples=500, deadline=None)
def test_marks_that_change_places(pair: Pair, text: str) -> None:
    pair.check([text])


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("prefix", ["##", "", "a", "\u0301#"])
def test_limits_and_prefixes(limit: int, prefix: str) -> None:
    pair = make_pair(OPTIONS[0], limit=limit, prefix=prefix)
    pair.check([*TEXTS, "abcdeabcdeabcde", "a\u0301b" * 3, "東" * 3, "e" * 999, "e" * 1001])


def test_one_batch_is_its_single_texts(pair: Pair) -> None:
    texts = [text * n for n, text in enumerate(TEXTS * 60)]  # enough for several tasks
    whole = [pair.ours.encode_texts(texts, threads) for threads in (1, 2, 4)]
    for other in whole[1:]:
        for a, b in zip(whole[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    ids, cu_pieces, first, cu_words, positions, starts, ends = whole[0]
    for n, text in enumerate(texts):
        one = pair.ours.encode_texts([text])
        part, words = slice(*cu_pieces[n : n + 2]), slice(*cu_words[n : n + 2])
        expected = (ids[part], first[words] - cu_pieces[n], positions[words], starts[part])
        for a, b in zip((one[0], one[2], *one[4:]), (*expected, ends[part]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_lone_surrogates_are_replacement_characters(pair: Pair) -> None:
    texts = ["a\ud800b \udfff", "\ud83d\ude00 \udc00Ada[SEP]"]
    clean = ["a\ufffdb \ufffd", "\ufffd\ufffd \ufffdAda[SEP]"]
    for got, expected in zip(
        pair.ours.encode_texts(texts), pair.ours.encode_texts(clean), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    pair.check(clean)


def test_a_million_letters_without_a_space(pair: Pair) -> None:
    for text in ("a" * 1_000_000, "ab\u0301" * 300_000, "\u1b44\u0301" * 100_000, "東" * 300_000):
        pair.check([text])


def test_longest_of_nested_tokens() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2, "[a": 3, "[aa]": 4, "\ufffd!": 5}
    model = _core.WordPiece(
        vocabulary,
        {"[a": 3, "[aa]": 4, "\ufffd!": 5},
        unk_token="[UNK]",
        continuing_subword_prefix="##",
        max_input_chars_per_word=9,
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=True,
        lowercase=True,
    )
    ids, *_, starts, ends = model.encode_texts(["a[aa[aa]aaa\ud800!"])
    assert ids.tolist() == [1, 3, 1, 4, 1, 2, 2, 5]
    spans = [(0, 1), (1, 3), (3, 4), (4, 8), (8, 9), (9, 10), (10, 11), (11, 13)]
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == spans


def test_arguments_are_checked(pair: Pair) -> None:
    with pytest.raises(TypeError, match=r"texts is str; it must be a list or a tuple"):
        pair.ours.encode_texts("abc")
    with pytest.raises(TypeError, match=r"texts\[1\] is int; it must be a string"):
        pair.ours.encode_texts(["a", 1])
    with pytest.raises(TypeError, match=r"sentences\[0\] is str; it must be a list or a tuple"):
        pair.ours.encode_words(["abc"])
    with pytest.raises(TypeError, match=r"sentences\[0\]\[1\] is bytes; it must be a string"):
        pair.ours.encode_words([["a", b"b"]])
    with pytest.raises(ValueError, match="threads: got -1"):
        pair.ours.encode_texts(["a"], -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unk_token": "?"}, "unk_token: is not in the vocabulary"),
        ({"vocabulary": {"[UNK]": -1}}, "vocabulary: holds id -1"),
        ({"vocabulary": {"[UNK]": 1 << 28}}, "vocabulary: holds id 268435456"),
        ({"added_tokens": {"": 0}}, "added_tokens: holds the empty string"),
        ({"max_input_chars_per_word": -1}, "max_input_chars_per_word: got -1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "vocabulary": {"[UNK]": 0},
        "added_tokens": {},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": True,
        "lowercase": True,
    }
    with pytest.raises(ValueError, match=message):
        _core.WordPiece(**(arguments | changes))
