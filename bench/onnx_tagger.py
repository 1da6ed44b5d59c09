"""Text to entities by tokenizers and ONNX Runtime: what one writes around an ONNX model.

Imports nothing else of weight, so that its memory is that of those two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from bench.onnx_sessions import onnx_session

FloatArray = npt.NDArray[np.float32]
Entity = dict[str, Any]

_BATCHES = (8, 32)


def load_onnx(
    model: str, tokenizer: str, labels: list[str], threads: int, time_major: bool
) -> Callable[[list[str]], object]:
    """A `footprint.Factory` of tokenizers + ONNX Runtime; arguments as of `OnnxTagger`."""
    return OnnxTagger(Path(model), Tokenizer.from_file(tokenizer), labels, threads, time_major)


def onnx_settings(
    model: bytes | Path, tokenizer_json: str, labels: Sequence[str], threads: int, time_major: bool
) -> dict[str, Callable[[Sequence[str]], list[list[Entity]]]]:
    """Taggers in batches of several sizes, with workers that spin or not."""
    out: dict[str, Callable[[Sequence[str]], list[list[Entity]]]] = {}
    for name, spinning in (("spinning", True), ("not spinning", False)):
        tokenizer = Tokenizer.from_str(tokenizer_json)
        tagger = OnnxTagger(model, tokenizer, labels, threads, time_major, spinning)
        for batch in _BATCHES:
            out[f"batches of {batch}, {name}"] = functools.partial(tagger, batch=batch)
    return out


class OnnxTagger:
    """Tokenises, sorts, pads, runs, groups in Python.

    Args:
        model: serialised model or file of one; "logits" of piece ids.
        tokenizer: without truncation and padding; a copy of its own.
        labels: IOB2 labels by id.
        threads: of ONNX Runtime.
        time_major: whether ids and logits are [T, B] (a student), with int32 "lengths", or [B, T]
            (a teacher), with an int32 "mask".
        spinning: whether idle workers spin.
        max_pieces: longer texts are cut.
    """

    def __init__(
        self,
        model: bytes | Path,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        threads: int,
        time_major: bool,
        spinning: bool = True,
        max_pieces: int = 512,
    ) -> None:
        self._session = onnx_session(model, threads, spinning)
        self._tokenizer = tokenizer
        self._labels = list(labels)
        self._time_major = time_major
        self._max_pieces = max_pieces

    def __call__(self, texts: Sequence[str], batch: int = 32) -> list[list[Entity]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        lengths = np.array([min(len(e), self._max_pieces) for e in encodings])
        order = np.argsort(lengths, kind="stable")
        out: list[list[Entity]] = [[] for _ in texts]
        order = order[np.searchsorted(lengths[order], 1) :]
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
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
