from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from xdistil_fast.train.vocabulary import cut_vocabulary

SEEN = [
    "The harbour master of Lindesund counted forty boats before breakfast.",
    "Nobody in Quarne had expected the orchestra to play until midnight!",
    "Two engineers, Ilsabet Vore and Tam Okkonen, repaired the old lighthouse.",
    "Prices at the market in Brellmouth rose by 12 per cent, the council said.",
    "« Where is the ferry to Aalwick? » asked a boy with a café sign.",
]
UNSEEN = "Lighthouses harboured counters; Okkonens breakfasted marketwide, 21 boys."
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words_of(text: str) -> list[str]:
    return [w for w, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


def wordpiece() -> tokenizers.Tokenizer:
    """Half of all pieces of up to five letters, in a fixed pseudo-random choice."""
    rng = np.random.default_rng(3)
    found: Counter[str] = Counter()
    for text in [*SEEN, UNSEEN]:
        for word in words_of(text):
            for start in range(len(word)):
                for length in range(1, 6):
                    piece = ("##" if start else "") + word[start : start + length]
                    if length == 1 or rng.random() < 0.5:
                        found[piece] += 1
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *sorted(found)])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "<unk>", "<mask>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([*SEEN, UNSEEN] * 3, trainer)
    return tokenizer


def pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return list(tokenizer.encode(text, add_special_tokens=False).tokens)


def plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def counts_of(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    counts = np.zeros(tokenizer.get_vocab_size() + 7, np.int64)  # models pad their tables
    for text in texts:
        np.add.at(counts, tokenizer.encode(text, add_special_tokens=False).ids, 1)
    return counts


KINDS = {"wordpiece": wordpiece, "unigram": unigram}


@pytest.fixture(params=KINDS)
def teacher(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return KINDS[request.param]()


def test_text_seen_keeps_its_pieces(teacher: tokenizers.Tokenizer) -> None:
    bare = plain(teacher)
    cut = cut_vocabulary(teacher, counts_of(bare, SEEN))
    assert len(cut) <= teacher.get_vocab_size() - 8
    for text in SEEN:
        assert pieces(cut.tokenizer(), text) == pieces(bare, text)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_text_keeps_its_pieces_once_seen(data: st.DataObject, kind: str) -> None:
    bare = plain(KINDS[kind]())
    letters = sorted(set("".join([*SEEN, UNSEEN])))
    texts = data.draw(st.lists(st.text(st.sampled_from([*letters, "Ω", "漢"])), max_size=6))
    cut = cut_vocabulary(bare, counts_of(bare, texts)).tokenizer()
    for text in texts:
        assert pieces(cut, text) == pieces(bare, text)


def test_rows_follow_the_pieces(teacher: tokenizers.Tokenizer) -> None:
    cut = cut_vocabulary(teacher, counts_of(plain(teacher), SEEN))
    names = cut.pieces()
    assert len(names) == len(cut) == len(set(names))
    assert [teacher.token_to_id(name) for name in names] == cut.teacher_ids.tolist()
    assert sorted(cut.tokenizer().get_vocab().values()) == list(range(len(cut)))


def test_special_tokens_stay_special(teacher: tokenizers.Tokenizer) -> None:
    cut = cut_vocabulary(teacher, counts_of(plain(teacher), SEEN[:1])).tokenizer()
    before = {t.content: t.special for t in teacher.get_added_tokens_decoder().values()}
    after = {t.content: t.special for t in cut.get_added_tokens_decoder().values()}
    assert after == before
    assert len(before) >= 3


def test_unseen_words_are_spelled_not_unknown(teacher: tokenizers.Tokenizer) -> None:
    cut = cut_vocabulary(teacher, counts_of(plain(teacher), SEEN)).tokenizer()
    found = pieces(cut, UNSEEN)
    assert "[UNK]" not in found
    assert "<unk>" not in found
    joined = "".join(piece.removeprefix("##") for piece in found).replace("▁", "")
    assert joined == UNSEEN.replace(" ", "")


def test_nothing_wraps_or_cuts_the_input() -> None:
    cut = cut_vocabulary(wordpiece(), counts_of(plain(wordpiece()), SEEN)).tokenizer()
    long = " ".join(SEEN)
    assert len(cut.encode(long).ids) == len(pieces(plain(wordpiece()), long)) > 8
    assert "[CLS]" not in cut.encode(long).tokens


def test_rare_pieces_are_spelled_with_kept_ones(teacher: tokenizers.Tokenizer) -> None:
    bare = plain(teacher)
    counts = counts_of(bare, [*SEEN, SEEN[0]])
    cut = cut_vocabulary(teacher, counts, min_count=2)
    ids = np.array(bare.encode(SEEN[1], add_special_tokens=False).ids)
    new, source = cut.respell(ids)
    names, old_names = cut.pieces(), bare.encode(SEEN[1], add_special_tokens=False).tokens
    assert len(new) > len(ids)
    for position, old in enumerate(old_names):
        spelled = [names[i].removeprefix("##") for i in new[source == position]]
        assert "".join(spelled) == old.removeprefix("##")
        # What begins a word still does, what goes on in one still does.
        assert names[new[source == position][0]].startswith("##") == old.startswith("##")


def test_kept_pieces_are_respelled_one_for_one() -> None:
    bare = plain(wordpiece())
    cut = cut_vocabulary(bare, counts_of(bare, SEEN))
    ids = np.array(bare.encode(SEEN[2], add_special_tokens=False).ids)
    new, source = cut.respell(ids)
    np.testing.assert_array_equal(source, np.arange(len(ids)))
    np.testing.assert_array_equal(cut.teacher_ids[new], ids)
    assert cut.respell(ids[:0])[0].shape == (0,)


def test_a_piece_that_cannot_be_spelled_is_unknown() -> None:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "##bc": 3, "abc": 4}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    cut = cut_vocabulary(tokenizer, np.array([0, 5, 5, 1, 1]), min_count=2)
    assert cut.pieces() == ["[UNK]", "a", "##b"]  # no piece for c
    assert cut.respell(np.array([4, 1, 3]))[0].tolist() == [0, 1, 0]


def test_merges_are_not_cut() -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SEEN, trainer)
    counts = counts_of(tokenizer, SEEN[:1])
    cut = cut_vocabulary(tokenizer, counts)
    assert cut.tokenizer().get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"min_piece_count is 3.*BPE is not cut"):
        cut_vocabulary(tokenizer, counts, min_count=3)


def test_counts_must_cover_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="counts has 10 entries"):
        cut_vocabulary(wordpiece(), np.ones(10, np.int64))


def test_unknown_penalty_stays() -> None:
    # The lowest score sets how dear an unknown character is; here it decides between two readings.
    vocab = [("<unk>", 0.0), ("a", -1.0), ("ΩΩ", -14.0), ("zzz", -20.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, 0, False))
    counts = np.zeros(4, np.int64)
    counts[[1, 2]] = 1
    assert pieces(tokenizer, "aΩΩ") == ["a", "ΩΩ"]
    cut = cut_vocabulary(tokenizer, counts)
    assert "zzz" in cut.pieces()
    assert pieces(cut.tokenizer(), "aΩΩ") == ["a", "ΩΩ"]


def test_everything_else_is_kept() -> None:
    teacher = wordpiece()
    before, after = (
        json.loads(text)
        for text in (
            teacher.to_str(),
            cut_vocabulary(teacher, counts_of(plain(teacher), SEEN)).tokenizer_json,
        )
    )
    for part in ("normalizer", "pre_tokenizer", "decoder", "version"):
        assert after[part] == before[part]
    assert after["post_processor"] is after["truncation"] is after["padding"] is None
    del before["model"]["vocab"], after["model"]["vocab"]
    assert after["model"] == before["model"]
