"""Which tokenizers the compiled WordPiece can stand in for.

`csrc/text/wordpiece.h` cuts text as the `tokenizers` library does, many times as fast, for the
tokenizers of BERT and its kin. What a tokenizer does is read from its own JSON. Anything there that
is not known to be the same leaves the text to the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from xdistil_fast import _core

# Cutting a word takes its length times that of the longest piece at worst; what the library itself
# is slow at is left to it.
_MAX_WORD_LIMIT = 1000
_MAX_TOKEN_LENGTH = 200
_MAX_ID = (1 << 28) - 1
# The trie has an edge for each, of some 50 bytes. Multilingual BERT has 0.8 million.
_MAX_VOCABULARY_CHARS = 1 << 24

_SECTIONS = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",  # says how ids become text again, which is not asked here
    "model",
}
_NORMALIZER = {"type", "clean_text", "handle_chinese_chars", "strip_accents", "lowercase"}
_MODEL = {"type", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"}
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_TOKEN = {"id", "content", "special", *_PLAIN_TOKEN}


def compile_wordpiece(tokenizer: Tokenizer) -> _core.WordPiece | None:
    """Builds the compiled equal of a tokenizer.

    Args:
        tokenizer: any; it is not changed.

    Returns:
        What gives the same pieces, offsets and words for every text, without special tokens around
        it; None if this tokenizer has no such equal.
    """
    spec = json.loads(tokenizer.to_str())
    if not _known(spec) or tokenizer.encode_special_tokens:
        return None
    # Not from the JSON, which leaves out one of two pieces that share an id.
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    everything = tokenizer.get_vocab(with_added_tokens=True)
    model, normalizer = spec["model"], spec["normalizer"]
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if (
        model["unk_token"] not in vocabulary
        or any(everything.get(content) != index for content, index in added.items())
        or max(everything.values()) > _MAX_ID
        or sum(map(len, vocabulary)) > _MAX_VOCABULARY_CHARS
    ):
        return None
    accents = normalizer["strip_accents"]
    return _core.WordPiece(
        vocabulary,
        added,
        unk_token=model["unk_token"],
        continuing_subword_prefix=model["continuing_subword_prefix"],
        max_input_chars_per_word=model["max_input_chars_per_word"],
        clean_text=normalizer["clean_text"],
        handle_chinese_chars=normalizer["handle_chinese_chars"],
        strip_accents=normalizer["lowercase"] if accents is None else accents,
        lowercase=normalizer["lowercase"],
    )


def _known(spec: Mapping[str, Any]) -> bool:
    return (
        set(spec) == _SECTIONS
        and spec["version"] == "1.0"
        and spec["truncation"] is None
        and spec["padding"] is None
        and all(map(_known_token, spec["added_tokens"]))
        and _known_normalizer(spec["normalizer"])
        and spec["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and _known_post_processor(spec["post_processor"])
        and _known_model(spec["model"])
    )


def _known_token(token: Mapping[str, Any]) -> bool:
    """A token that is found in a text as it is, whatever stands around it."""
    return (
        set(token) == _TOKEN
        and all(token[key] is value for key, value in _PLAIN_TOKEN.items())
        and 0 < len(token["content"]) <= _MAX_TOKEN_LENGTH
    )


def _known_normalizer(normalizer: Mapping[str, Any] | None) -> bool:
    return (
        normalizer is not None
        and set(normalizer) == _NORMALIZER
        and normalizer["type"] == "BertNormalizer"
        and normalizer["strip_accents"] in (None, True, False)
        and all(
            isinstance(normalizer[key], bool)
            for key in ("clean_text", "handle_chinese_chars", "lowercase")
        )
    )


def _known_post_processor(processor: Mapping[str, Any] | None) -> bool:
    """One that only puts special tokens around a text."""
    if processor is None or processor.get("type") == "BertProcessing":
        return True
    if processor.get("type") != "TemplateProcessing":
        return False
    names = [next(iter(item)) for item in processor["single"]]
    return names.count("Sequence") == 1 and set(names) <= {"Sequence", "SpecialToken"}


def _known_model(model: Mapping[str, Any]) -> bool:
    return (
        set(model) == _MODEL
        and model["type"] == "WordPiece"
        and isinstance(model["unk_token"], str)
        and isinstance(model["continuing_subword_prefix"], str)
        and 0 <= model["max_input_chars_per_word"] <= _MAX_WORD_LIMIT
    )
