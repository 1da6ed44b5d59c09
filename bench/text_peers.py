"""Text to entities by others: tokenizers + ONNX Runtime, transformers' pipeline, spaCy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from tokenizers import Encoding, Tokenizer

from bench.corpus import Tagged
from bench.peers import onnx_session

FloatArray = npt.NDArray[np.float32]
Entity = dict[str, Any]
Tag = Callable[[Sequence[str]], list[list[Entity]]]

_BATCH = 32
_SPACY_SECONDS = 40.0


class OnnxTagger:
    """What one writes around an ONNX model: tokenise, sort, pad, run, group in Python.

    Args:
        model: serialised model or file of one; "logits" of piece ids.
        tokenizer: without truncation and padding; a copy of its own.
        labels: IOB2 labels by id.
        threads: of ONNX Runtime.
        time_major: whether ids and logits are [T, B] (a student), with int32 "lengths", or [B, T]
            (a teacher), with an int32 "mask".
        max_pieces: longer texts are cut.
    """

    def __init__(
        self,
        model: bytes | Path,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        threads: int,
        time_major: bool,
        max_pieces: int = 512,
    ) -> None:
        self._session = onnx_session(model, threads, spinning=True)
        self._tokenizer = tokenizer
        self._labels = list(labels)
        self._time_major = time_major
        self._max_pieces = max_pieces

    def __call__(self, texts: Sequence[str]) -> list[list[Entity]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        lengths = np.array([min(len(e), self._max_pieces) for e in encodings])
        order = np.argsort(lengths, kind="stable")
        out: list[list[Entity]] = [[] for _ in texts]
        order = order[np.searchsorted(lengths[order], 1) :]
        for begin in range(0, len(order), _BATCH):
            chosen = order[begin : begin + _BATCH]
            logits = self._logits([encodings[i] for i in chosen], lengths[chosen])
            tags = logits.argmax(axis=2)
            for row in np.flatnonzero(tags.any(axis=1)):
                index = chosen[row]
                out[index] = self._entities(
                    texts[index], encodings[index], tags[row], logits[row], int(lengths[index])
                )
        return out

    def _logits(self, encodings: Sequence[Encoding], lengths: npt.NDArray[np.int64]) -> FloatArray:
        """Logits [B, T, C]; behind a sequence's end they say `O`."""
        width = int(lengths[-1])
        ids = np.zeros((len(encodings), width), np.int64)
        for row, (encoding, length) in enumerate(zip(encodings, lengths, strict=True)):
            ids[row, :length] = encoding.ids[:length]
        if self._time_major:
            feed = {"ids": np.ascontiguousarray(ids.T), "lengths": lengths.astype(np.int32)}
            logits = self._session.run(["logits"], feed)[0].transpose(1, 0, 2)
        else:
            mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
            feed = {"ids": ids.astype(np.int32), "mask": mask}
            logits = self._session.run(["logits"], feed)[0]
        logits[np.arange(width) >= lengths[:, None]] = (1.0, *([0.0] * (len(self._labels) - 1)))
        return logits  # type: ignore[no-any-return]

    def _entities(
        self,
        text: str,
        encoding: Encoding,
        tags: npt.NDArray[np.int64],
        logits: FloatArray,
        length: int,
    ) -> list[Entity]:
        """Groups the words' tags, those of their first pieces."""
        words, offsets = encoding.word_ids, encoding.offsets
        out: list[Entity] = []
        kind, start, end = "", 0, 0
        scores: list[float] = []
        previous = None
        inside = False

        def finish() -> None:
            score = sum(scores) / len(scores)
            entity = {"entity_group": kind, "score": score, "word": text[start:end]}
            out.append({**entity, "start": start, "end": end})

        for piece in range(length):
            if words[piece] == previous:
                if inside:
                    end = offsets[piece][1]
                continue
            previous = words[piece]
            label = self._labels[tags[piece]]
            if inside and label == f"I-{kind}":
                end = offsets[piece][1]
                scores.append(_softmax_of(logits[piece], tags[piece]))
                continue
            if inside:
                finish()
            inside = label != "O"
            if inside:
                kind, (start, end) = label[2:], offsets[piece]
                scores = [_softmax_of(logits[piece], tags[piece])]
        if inside:
            finish()
        return out


def _softmax_of(row: FloatArray, tag: int) -> float:
    exponents = np.exp(row - row.max())
    return float(exponents[tag] / exponents.sum())


def hf_tokenizer(tokenizer_json: str) -> Any:
    """A tokenizer as a transformers object, adding no special tokens."""
    return transformers.PreTrainedTokenizerFast(
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


def same_entities(a: Sequence[Sequence[Entity]], b: Sequence[Sequence[Entity]]) -> float:
    """Share of texts with the same types and borders."""

    def key(entities: Sequence[Entity]) -> list[tuple[str, int, int]]:
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
