"""Which tokenizers run as compiled code; those that do not must give what the library gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import xdistil_fast
from xdistil_fast import _core
from xdistil_fast.tokenization import Encoded, TextEncoder
from xdistil_fast.wordpiece import compile_wordpiece

Spec = dict[str, Any]
TEXTS = [
    "Ada Lovelace[UNK] wrote \t to [UNK ] Charles Babbage, Zo\u0308e isn't unwritten.",
    "Мария поехала из Москвы 東京で田中さんが \u0130stanbul \x07\ufeffLondon",
]


@pytest.fixture
def spec(tokenizer_json: str) -> Spec:
    loaded: Spec = json.loads(tokenizer_json)
    return loaded | {"truncation": None, "padding": None}


def token(spec: Spec, content: str, **changes: Any) -> Spec:
    """An added token."""
    index = spec["model"]["vocab"].get(content, len(spec["model"]["vocab"]))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **plain, **changes}


def check(tokenizer: Tokenizer, *, words: bool = True) -> None:
    """The encoder's pieces, offsets and, if asked for, words are the library's."""
    encoder = TextEncoder(tokenizer, threads=1)
    sentences = [text.split(" ") for text in TEXTS]
    for ours, batch in (
        (encoder.encode_texts(TEXTS), TEXTS),
        (encoder.encode_words(sentences), sentences),
    ):
        compare(ours, tokenizer, batch, words)


def compare(ours: Encoded, tokenizer: Tokenizer, batch: list[Any], words: bool) -> None:
    for n, item in enumerate(batch):
        is_split = not isinstance(item, str)
        theirs = tokenizer.encode(item, is_pretokenized=is_split, add_special_tokens=False)
        part = slice(ours.cu_pieces[n], ours.cu_pieces[n + 1])
        assert ours.ids[part].tolist() == theirs.ids
        assert ours.starts[part].tolist() == [start for start, _ in theirs.offsets]
        assert ours.ends[part].tolist() == [end for _, end in theirs.offsets]
        positions = ours.positions[ours.cu_words[n] : ours.cu_words[n + 1]]
        assert not words or positions.tolist() == list(dict.fromkeys(theirs.word_ids))


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[UNK]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[UNK]": {"id": "[UNK]", "ids": [1], "tokens": ["[UNK]"]}},
}
COMPILED: dict[str, Callable[[Spec], object]] = {
    "as it is": lambda spec: None,
    "cased": lambda spec: spec["normalizer"].update(lowercase=False, strip_accents=None),
    "accents kept": lambda spec: spec["normalizer"].update(strip_accents=False),
    "special token": lambda spec: spec["added_tokens"].append(token(spec, "[UNK]")),
    "new token": lambda spec: spec["added_tokens"].append(token(spec, "Charles")),
    "another prefix": lambda spec: spec["model"].update(continuing_subword_prefix="@@"),
    "short words": lambda spec: spec["model"].update(max_input_chars_per_word=3),
    "template": lambda spec: spec.update(post_processor=TEMPLATE),
    "ids with gaps": lambda spec: spec["model"]["vocab"].update(ada=5000, wrote=4000),
    "odd pieces": lambda spec: spec["model"]["vocab"].update(
        {"": 900, "a b": 901, "\x00": 902, "##": 903, "\ufffd": 904}
    ),
}
LEFT_TO_THE_LIBRARY: dict[str, Callable[[Spec], object]] = {
    "no normaliser": lambda spec: spec.update(normalizer=None),
    "another normaliser": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "white space only": lambda spec: spec.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    "no pre-tokenizer": lambda spec: spec.update(pre_tokenizer=None),
    "single word": lambda spec: spec["added_tokens"].append(token(spec, "[UNK]", single_word=True)),
    "takes white space": lambda spec: spec["added_tokens"].append(
        token(spec, "[UNK]", lstrip=True)
    ),
    "normalised token": lambda spec: spec["added_tokens"].append(
        token(spec, "[UNK]", normalized=True)
    ),
    "long words": lambda spec: spec["model"].update(max_input_chars_per_word=1_000_000),
    "doubled text": lambda spec: spec.update(
        post_processor={**TEMPLATE, "single": TEMPLATE["single"] * 2}
    ),
    "large ids": lambda spec: spec["model"]["vocab"].update(ada=1 << 30),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(spec: Spec, name: str) -> None:
    COMPILED[name](spec)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert isinstance(compile_wordpiece(tokenizer), _core.WordPiece)
    check(tokenizer)


@pytest.mark.parametrize("name", LEFT_TO_THE_LIBRARY)
def test_left_to_the_library(spec: Spec, name: str) -> None:
    LEFT_TO_THE_LIBRARY[name](spec)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert compile_wordpiece(tokenizer) is None
    # The encoder has words of its own where the library leaves punctuation attached.
    check(tokenizer, words=False)


def test_what_the_file_does_not_say(spec: Spec) -> None:
    spec["added_tokens"].append(token(spec, "[UNK]"))
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    assert compile_wordpiece(tokenizer) is None
    check(tokenizer)


def test_two_pieces_of_one_id(spec: Spec) -> None:
    spec["model"]["vocab"]["ada"] = spec["model"]["vocab"]["wrote"]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert compile_wordpiece(tokenizer) is not None
    check(tokenizer)


def test_no_unknown_token(spec: Spec) -> None:
    del spec["model"]["vocab"]["[UNK]"]
    assert compile_wordpiece(Tokenizer.from_str(json.dumps(spec))) is None
    spec["model"]["vocab"] = {}
    assert compile_wordpiece(Tokenizer.from_str(json.dumps(spec))) is None


def test_a_huge_vocabulary_is_left_to_the_library(
    spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    size = sum(map(len, tokenizer.get_vocab(with_added_tokens=False)))
    monkeypatch.setattr("xdistil_fast.wordpiece._MAX_VOCABULARY_CHARS", size)
    assert compile_wordpiece(tokenizer) is not None
    monkeypatch.setattr("xdistil_fast.wordpiece._MAX_VOCABULARY_CHARS", size - 1)
    assert compile_wordpiece(tokenizer) is None


def test_the_embedded_model_is_compiled() -> None:
    folder = Path(xdistil_fast.__file__).parent / "models" / "en-ner"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert compile_wordpiece(tokenizer) is not None
    check(tokenizer)
