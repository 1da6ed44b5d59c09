"""Taggers that have learned to label the first pieces of words only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdistil_fast import Tagger
from xdistil_fast.labels import bio_constraints
from xdistil_fast.model_config import ModelError
from xdistil_fast.model_io import load_folder
from xdistil_fast.reference.crf import crf_viterbi

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("first") / "m", pieces="first")


def test_the_path_goes_through_first_pieces(
    folder: Path, softmax_folder: Path, sentences: tuple[str, ...]
) -> None:
    tagger, other = Tagger.from_pretrained(folder), Tagger.from_pretrained(softmax_folder)
    texts = [*sentences, "", "Zürich " * 40]  # the last one is read in windows
    tagged = tagger.tag_batch(texts)
    encoded = tagged.encoded
    emissions = tagger._logits(encoded, 16_384).astype(np.float64)[encoded.first]
    start, transitions = bio_constraints(tagger.labels)
    end = np.zeros(len(tagger.labels))
    path, _ = crf_viterbi(emissions, encoded.cu_words, start, end, transitions)
    assert tagged.tags.tolist() == path.tolist()
    shares = np.exp(emissions - emissions.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    at_tags = shares[np.arange(len(shares)), tagged.tags]
    inside = tagged.tags != tagger.labels.index("O")
    np.testing.assert_allclose(tagged.probabilities[inside], at_tags[inside], rtol=1e-5)
    # The weights are the same, and a path through all pieces is another one.
    assert tagged.tags.tolist() != other.tag_batch(texts).tags.tolist()


def test_words_without_pieces(folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder)
    (tags,) = tagger.tag_words([["Ada", "\u0007", "wrote"]])
    assert len(tags) == 3
    assert tags[1] == "O"
    assert tagger.tag_words([["\u0007"], []]) == [["O"], []]
    assert tagger("") == []


def test_config_says_it_only_where_it_is_so(folder: Path, softmax_folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text("utf-8"))["pieces"] == "first"
    assert load_folder(folder).config.pieces == "first"
    assert "pieces" not in json.loads((softmax_folder / "config.json").read_text("utf-8"))
    assert load_folder(softmax_folder).config.pieces == "all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": "last"}, r"pieces is 'last'; allowed: 'all', 'first'"),
        ({"pieces": None}, r"pieces is None; allowed: 'all', 'first'"),
        ({"pieces": ["first"]}, r"pieces is \['first'\]; allowed: 'all', 'first'"),
        ({"head": "crf"}, "pieces is 'first' of task 'token-classification' with head 'crf'"),
        (
            {"task": "text-classification", "pooling": "max", "labels": ["bad", "good"]},
            "pieces is 'first' of task 'text-classification'",
        ),
    ],
)
def test_refused(
    make_model: MakeModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make_model(tmp_path / "m", pieces="first")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    with pytest.raises(ModelError, match=message):
        load_folder(folder)
