from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdistil_fast.scoring import score
from xdistil_fast.train.corpora import read_labelled, read_transfer, split_language
from xdistil_fast.train.languages import (
    check_languages,
    chosen_by,
    epoch_order,
    language_report,
    language_table,
    languages_of,
    macro,
    sample_counts,
    score_languages,
)

GOLD = [["B-PER", "O"], ["B-LOC"], ["B-LOC", "I-LOC"]]
PRED = [["B-PER", "O"], ["O"], ["B-LOC", "O"]]


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("de=a.conll", ("de", "a.conll")),
        ("zh-Hant=x/y=z.txt", ("zh-Hant", "x/y=z.txt")),
        ("a.conll", ("", "a.conll")),
        ("./de=a.conll", ("", "./de=a.conll")),
        ("x/de=a.conll", ("", "x/de=a.conll")),
        ("d=a", ("", "d=a")),
        ("de=", ("", "de=")),
    ],
)
def test_split_language(argument: str, parts: tuple[str, str]) -> None:
    assert split_language(argument) == (parts[0], Path(parts[1]))
    assert split_language(Path(argument)) == ("", Path(argument))


def test_sentences_know_their_language(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Mara\tB-PER\n\nx\tO\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    german = read_labelled(f"de={tmp_path}/a.conll")
    none = read_labelled(tmp_path / "a.conll")
    assert [s.language for s in german.sentences] == ["de", "de"]
    assert german.describe("dev")["language"] == "de"
    assert "language" not in none.describe("dev")
    texts = [f"fi={tmp_path}/b.txt", str(tmp_path / "b.txt")]
    assert [s.language for s in read_transfer(texts)] == ["fi", "fi", "", ""]
    assert languages_of([german]) == ["de", "de"]
    assert languages_of([none]) == []
    check_languages([german], "dev")
    check_languages([none], "dev")
    with pytest.raises(ValueError, match=r"dev: .*a\.conll has no language and other files have"):
        check_languages([german, none], "dev")


def test_report() -> None:
    found = score_languages(["fi", "de", "de"], GOLD, PRED)
    assert list(found) == ["de", "fi"]
    assert found["de"].f1 == 0.0
    assert found["fi"].f1 == 100.0
    pooled = score(GOLD, PRED)
    assert pooled.f1 == pytest.approx(40.0)
    assert chosen_by(pooled, found) == 50.0
    assert chosen_by(pooled, {}) == pooled.f1
    report = language_report(found, score_languages(["fi", "de", "de"], GOLD, GOLD))
    assert report["macro"] == {
        "f1": 50.0, "sd": 50.0, "teacher_f1": 100.0, "teacher_sd": 0.0, "kept": 50.0,
    }  # fmt: skip
    assert report["languages"]["de"]["kept"] == 0.0
    assert report["languages"]["fi"]["support"] == 1
    table = language_table(report).splitlines()
    assert table[0].split() == ["language", "support", "F1", "teacher", "kept", "%"]
    assert table[1].split() == ["de", "2", "0.00", "100.00", "0.0"]
    assert table[3].split() == ["macro", "mean", "50.00", "100.00", "50.0"]
    assert table[4].split() == ["sd", "(of", "n)", "50.00", "0.00"]
    alone = language_report(found)
    assert "teacher" not in language_table(alone)
    assert language_report(found, found)["languages"]["de"]["kept"] is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_macro_is_of_the_population(values: list[float]) -> None:
    mean, deviation = macro(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert deviation == pytest.approx(statistics.pstdev(values), abs=1e-6)


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=9).filter(any),
    st.floats(0, 1),
)
def test_sample_counts(sizes: list[int], alpha: float) -> None:
    array = np.array(sizes)
    counts = sample_counts(array, alpha)
    assert counts.sum() == array.sum()
    assert ((counts == 0) | (array > 0)).all()
    shares = np.where(array > 0, np.maximum(array, 1.0) ** alpha, 0)
    assert np.abs(counts - shares / shares.sum() * array.sum()).max() <= 1 + 1e-6
    assert sample_counts(array, 1.0).tolist() == sizes


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_epoch_order(alpha: float) -> None:
    languages = np.repeat([0, 1, 2], [700, 290, 10])
    order = epoch_order(languages, alpha, np.random.default_rng([3, 1]))
    assert len(order) == 1000
    counts = np.bincount(languages[order], minlength=3)
    assert counts.tolist() == sample_counts(np.array([700, 290, 10]), alpha).tolist()
    times = np.bincount(order, minlength=1000)
    for language in range(3):
        mine = times[languages == language]
        assert mine.max() - mine.min() <= 1  # all of a language come before any comes again
    again = epoch_order(languages, alpha, np.random.default_rng([3, 1]))
    assert np.array_equal(order, again)
    if alpha == 1.0:
        assert np.array_equal(order, np.random.default_rng([3, 1]).permutation(1000))
