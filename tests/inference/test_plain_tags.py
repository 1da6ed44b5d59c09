"""Students of plain tags, such as parts of speech, from their labels to the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdistil_fast.cli import main
from xdistil_fast.labels import (
    bio_constraints,
    label_types,
    outside_of,
    scheme_of,
    spans,
    validate_labels,
)
from xdistil_fast.scoring import score
from xdistil_fast.tagger import Tagger

LABELS = ("ADJ", "NOUN", "PUNCT", "VERB", "-LRB-")


@pytest.fixture(scope="module", params=["softmax", "crf"])
def folder(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: Any
) -> Path:
    path = tmp_path_factory.mktemp("pos") / "pos"
    return make_model(path, head=request.param, labels=LABELS)


def test_scheme_is_told_by_the_labels() -> None:
    assert scheme_of(LABELS) == "tags"
    assert scheme_of(["O", "B-X", "I-X"]) == "IOB2"
    validate_labels(LABELS)
    validate_labels(["O", "PER"])
    assert label_types(["O", "PER", "LOC"]) == ["LOC", "PER"]
    assert (outside_of(LABELS), outside_of(["O", "PER"])) == ("_", "O")
    start, transitions = bio_constraints(LABELS)
    assert not start.any()
    assert not transitions.any()
    for labels, message in (
        (["NOUN", "NOUN"], "stands twice"),
        (["NOUN", ""], "must be a non-empty string"),
        (["NOUN", "A B"], "without white space"),
        (["NOUN", "B-X"], "is not IOB2"),
        ([], "no entity type and no tag"),
    ):
        with pytest.raises(ValueError, match=message):
            validate_labels(labels)


def test_score_counts_words() -> None:
    gold = [["NOUN", "VERB"], ["NOUN", "PUNCT", "O"]]
    pred = [["NOUN", "NOUN"], ["NOUN", "PUNCT", "VERB"]]
    scores = score(gold, pred, "tags")
    assert scores.accuracy == 60.0
    assert (scores.overall.gold, scores.overall.predicted, scores.overall.correct) == (4, 5, 3)
    assert scores.per_type["NOUN"].precision == pytest.approx(200 / 3)
    assert scores.per_type["NOUN"].recall == 100.0
    assert list(scores.per_type) == ["NOUN", "PUNCT", "VERB"]
    full = [["NOUN", "VERB", "ADJ"]], [["NOUN", "ADJ", "ADJ"]]
    assert score(*full, "tags").f1 == pytest.approx(score(*full, "tags").accuracy)
    assert [span.type for span in spans(["NOUN", "O", "NOUN"], "tags")] == ["NOUN", "NOUN"]


def test_every_word_is_an_entity(folder: Path, sentences: tuple[str, ...]) -> None:
    tagger = Tagger.from_pretrained(folder)
    assert tagger.labels == list(LABELS)
    assert "ADJ, NOUN" in repr(tagger)
    seen: set[str] = set()
    for text, entities in zip(sentences, tagger(list(sentences)), strict=True):
        words = tagger.words([text], tagger.tag_batch([text]))[0]
        assert [(e["word"], e["entity_group"]) for e in entities] == words
        assert all(text[e["start"] : e["end"]] == e["word"] for e in entities)
        assert all(0 < e["score"] <= 1 for e in entities)
        seen |= {e["entity_group"] for e in entities}
    assert len(seen) > 2


def test_softmax_takes_the_best_tag_of_the_first_piece(
    make_model: Callable[..., Path], tmp_path: Path, sentences: tuple[str, ...]
) -> None:
    tagger = Tagger.from_pretrained(make_model(tmp_path / "m", labels=LABELS))
    encoded = tagger._encoder.encode_texts(list(sentences))
    logits = tagger._logits(encoded, 16_384)
    tagged = tagger.tag_batch(list(sentences))
    assert np.array_equal(tagged.tags, logits[encoded.first].argmax(1))
    exp = np.exp(logits[encoded.first].astype(np.float64))
    expected = exp.max(1) / exp.sum(1)
    np.testing.assert_allclose(tagged.probabilities, expected, rtol=1e-5)


def test_words_without_pieces(folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder)
    (tags,) = tagger.tag_words([["Ada", "\u0007", "wrote"]])
    assert tags[1] == "_"
    assert tags[0] in LABELS
    assert tags[2] in LABELS


def test_commands(folder: Path, tmp_path: Path, capfdbinary: Any) -> None:
    data = tmp_path / "test.conll"
    data.write_text("Ada\tNOUN\nwrote\tVERB\n\nLondon\tNOUN\n")
    tagger = Tagger.from_pretrained(folder)
    tags = tagger.tag_words([["Ada", "wrote"], ["London"]])
    arguments = ["tag", str(data), "--model", str(folder), "--format", "conll", "-q"]
    assert main(arguments) == 0
    out = capfdbinary.readouterr().out.decode()
    assert out == "".join(
        "".join(f"{w}\t{t}\n" for w, t in zip(*row, strict=True)) + "\n"
        for row in zip([["Ada", "wrote"], ["London"]], tags, strict=True)
    )
    arguments = [
        "eval",
        str(folder),
        "--data",
        f"en={data}",
        f"de={data}",
        "--teacher",
        str(folder),
    ]
    assert main(arguments) == 0
    out = capfdbinary.readouterr().out.decode()
    assert "word accuracy" in out
    assert "macro mean" in out
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capfdbinary.readouterr().out)
    gold = [["NOUN", "VERB"], ["NOUN"]]
    accuracy = score(gold, tags, "tags").accuracy
    assert record["metrics"]["accuracy"] == pytest.approx(accuracy)
    assert record["metrics"]["f1"] == pytest.approx(accuracy)
    assert record["metrics"]["macro"]["f1"] == pytest.approx(accuracy)
    assert list(record["metrics"]["languages"]) == ["de", "en"]
    assert record["metrics"]["kept"] == (pytest.approx(100.0) if accuracy else None)
    data.write_text("Ada\tB-PER\n")
    assert main(["eval", str(folder), "--data", str(data)]) == 2
    assert "the model plain tags of words" in capfdbinary.readouterr().err.decode()
