"""Text to entities by whole libraries: transformers' pipeline, spaCy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer

from bench.corpus import Tagged
from bench.onnx_tagger import Entity

Tag = Callable[[Sequence[str]], list[list[Entity]]]

_BATCH = 32
_SPACY_SECONDS = 20.0


def hf_tokenizer(tokenizer_json: str) -> Any:
    """A tokenizer as a transformers object, adding no special tokens."""
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(
        tokenizer_object=Tokenizer.from_str(tokenizer_json), unk_token="[UNK]", pad_token="[PAD]"
    )


def hf_pipeline(model: Any, tokenizer: Any) -> dict[str, Tag]:
    """Transformers' pipeline in several batch sizes."""
    pipeline = transformers.pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        device="cpu",
    )

    def tag(size: int) -> Tag:
        return lambda texts: pipeline(list(texts), batch_size=size)

    return {f"batches of {size}": tag(size) for size in (1, 8, 32)}


def same_entities(
    a: Sequence[Sequence[Mapping[str, Any]]], b: Sequence[Sequence[Mapping[str, Any]]]
) -> float:
    """Share of texts with the same types and borders."""

    def key(entities: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
        return [(e["entity_group"], e["start"], e["end"]) for e in entities]

    return float(np.mean([key(x) == key(y) for x, y in zip(a, b, strict=True)]))


def spacy_tagger(sentences: Sequence[Tagged]) -> Tag:
    """SpaCy's CPU recogniser, trained for a moment: speed depends on its size, not on its skill.

    Args:
        sentences: words and IOB2 tags.
    """
    import spacy
    from spacy.training import Example, iob_to_biluo

    nlp = spacy.blank("en")
    nlp.add_pipe("ner")
    examples = []
    for words, tags in sentences:
        document = spacy.tokens.Doc(nlp.vocab, words=list(words))
        examples.append(Example.from_dict(document, {"entities": iob_to_biluo(list(tags))}))
    shuffled = random.Random(0)
    optimizer = nlp.initialize(lambda: examples)
    end = time.perf_counter() + _SPACY_SECONDS
    while time.perf_counter() < end:
        shuffled.shuffle(examples)
        for begin in range(0, len(examples), _BATCH):
            nlp.update(examples[begin : begin + _BATCH], sgd=optimizer, drop=0.2)

    def tag(texts: Sequence[str]) -> list[list[Entity]]:
        return [
            [
                {"entity_group": e.label_, "word": e.text, "start": e.start_char, "end": e.end_char}
                for e in document.ents
            ]
            for document in nlp.pipe(texts, batch_size=256)
        ]

    return tag
