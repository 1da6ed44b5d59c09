from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from xdistil_fast.train.augmentation import Augmentation, Augmenter, parse_augmentation
from xdistil_fast.train.corpora import Corpus, Sentence, read_labelled
from xdistil_fast.train.texts import Texts

ROWS = (
    "Mara\tB-PER\nLind\tI-PER\nmet\tO\nTom\tB-PER\nin\tO\nOslo\tB-LOC\n\nBergen\tB-LOC\nsleeps\tO\n"
)
TAGS = "the\tDET\nold\tADJ\ndog\tNOUN\nsaw\tVERB\na\tDET\nbig\tADJ\ncat\tNOUN\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "a.conll").write_text(ROWS)
    return read_labelled(tmp_path / "a.conll")


def test_parse() -> None:
    rates = parse_augmentation("swap=1, dropout=0.5")
    assert rates == Augmentation(swap=1, dropout=0.5)
    assert str(rates) == "swap=1,dropout=0.5"
    assert parse_augmentation(str(rates)) == rates
    assert rates
    assert not parse_augmentation("")
    assert str(Augmentation()) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rot=1", "names 'rot'; allowed: swap, dropout, mask, crop, join, each once"),
        ("swap=1,swap=2", "names 'swap' twice"),
        ("swap", "'swap' has no number; write it like swap=1"),
        ("swap=x", "has no number"),
        ("swap=-1", "swap is -1.0; allowed: copies a sentence, 0 to 100"),
        ("crop=nan", "crop is nan"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_augmentation(text)


def copies(corpus: Corpus, rates: str, seed: int = 0) -> list[list[Sentence]]:
    augmenter = Augmenter(parse_augmentation(rates), [corpus], seed, "[MASK]")
    return [list(augmenter.copies(sentence)) for sentence in corpus.sentences]


def test_swap_keeps_the_rest_and_takes_mentions_of_the_type(corpus: Corpus) -> None:
    people, places = [("Mara", "Lind"), ("Tom",)], ["Oslo", "Bergen"]
    expected = {
        (*first, "met", *second, "in", place)
        for first in people for second in people for place in places
    }  # fmt: skip
    found = [sentence for made in copies(corpus, "swap=60")[:1] for sentence in made]
    assert all(s.tags is None and s.text is None for s in found)  # the teacher labels them
    own = corpus.sentences[0].words
    assert {s.words for s in found} == expected - {own}


def test_dropout_mask_and_crop(corpus: Corpus) -> None:
    words = corpus.sentences[0].words or ()
    for kind in ("dropout", "mask", "crop"):
        found = [s.words or () for s in copies(corpus, f"{kind}=50")[0]]
        assert len(found) == 50
        for made in found:
            if kind == "mask":
                assert len(made) == len(words)
                assert "[MASK]" in made
                assert all(a in (b, "[MASK]") for a, b in zip(made, words, strict=True))
            else:
                assert 0 < len(made) < len(words)
                places = [words.index(word) for word in made]
                assert places == sorted(places)
            if kind == "crop":
                assert places == list(range(places[0], places[0] + len(places)))
                assert len(made) >= len(words) / 2
        assert len(set(found)) > 5
    assert copies(corpus, "crop=5")[1] == []  # two words are too few


def test_join_is_of_one_language_and_kind() -> None:
    rows = [
        Sentence(("a", "b"), language="de"),
        Sentence(("c",), language="fi"),
        Sentence(("d",), language="de"),
        Sentence(text="e f", language="de"),
        Sentence(text="g  h", language="de"),
    ]
    augmenter = Augmenter(Augmentation(join=1), [], 0)
    assert [list(augmenter.copies(row)) for row in rows] == [
        [], [], [Sentence(("a", "b", "d"), language="de")], [],
        [Sentence(text="e f g  h", language="de")],
    ]  # fmt: skip


def test_running_text_stays_running_text() -> None:
    augmenter = Augmenter(Augmentation(dropout=3), [], 0)
    made = list(augmenter.copies(Sentence(text="one  two three")))
    assert made
    assert all(s.words is None and "  " not in (s.text or "") for s in made)


def test_plain_tags_swap_words_of_a_tag(tmp_path: Path) -> None:
    (tmp_path / "t.conll").write_text(TAGS)
    corpus = read_labelled(tmp_path / "t.conll")
    kinds = {"the": "D", "a": "D", "old": "A", "big": "A", "dog": "N", "cat": "N", "saw": "V"}
    pattern = [kinds[word] for word in corpus.sentences[0].words or ()]
    found = copies(corpus, "swap=40")[0]
    assert found
    assert all([kinds[word] for word in s.words or ()] == pattern for s in found)


def test_fractions_and_seeds(corpus: Corpus) -> None:
    many = Augmenter(Augmentation(dropout=1.25), [corpus], 1)
    counts = Counter(len(list(many.copies(corpus.sentences[0]))) for _ in range(400))
    assert set(counts) == {1, 2}
    assert 60 < counts[2] < 140
    assert copies(corpus, "dropout=3,swap=2") == copies(corpus, "dropout=3,swap=2")
    assert copies(corpus, "dropout=3,swap=2") != copies(corpus, "dropout=3,swap=2", seed=1)
    with pytest.raises(ValueError, match="a mask piece"):
        Augmenter(Augmentation(mask=1), [corpus], 0, None)


def test_texts_stream_copies_and_drop_known_ones(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("one two three four five\none two three four five\n")
    rates = parse_augmentation("swap=30,crop=2")
    texts = Texts(
        (corpus,),
        transfer=(str(tmp_path / "raw.txt"),),
        augmenter=lambda: Augmenter(rates, [corpus], 0),
    )
    rows = [row for stream in texts.streams() for row in stream()]
    assert rows == [row for stream in texts.streams() for row in stream()]
    assert [row for row in rows if row.tags] == list(corpus.sentences)
    joined = ["".join(row.words or (row.text or "").split()) for row in rows]
    assert len(joined) == len(set(joined))
    assert len(rows) > 8
    assert sum(row.text == "one two three four five" for row in rows) == 1


def test_no_copy_shows_a_sentence_of_dev(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "dev.conll").write_text("".join(f"{w}\tO\n" for w in "abcdef"))
    (tmp_path / "raw.txt").write_text("a b c d e f\none two three four five\nsix seven\n")
    for rates in ("dropout=5", "crop=5", "join=1", "mask=5"):
        kinds = parse_augmentation(rates)
        texts = Texts(
            (),
            (read_labelled(tmp_path / "dev.conll"),),
            (str(tmp_path / "raw.txt"),),
            lambda kinds=kinds: Augmenter(kinds, [corpus], 0, "[MASK]"),  # type: ignore[misc]
        )
        rows = [row.text or "" for stream in texts.streams() for row in stream()]
        assert len(rows) > 3
        assert [row for row in rows if {"a", "f"} & set(row.split())] == ["a b c d e f"]
