"""`Classifier`: a class for every text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, overload

import numpy as np

from xdistil_fast import _core
from xdistil_fast.model_config import TEXT_CLASSIFICATION
from xdistil_fast.student import MAX_PIECES, Floats
from xdistil_fast.text_model import (
    TextModel,
    batches,
    check_stream,
    check_texts,
    check_truncation,
)
from xdistil_fast.tokenization import Encoded, Windows, read_in_windows


class Prediction(TypedDict):
    """A class with its probability, as transformers' pipeline gives it."""

    label: str
    score: float


# "best", or so many of the most probable classes, or None for all of them.
TopK: TypeAlias = int | Literal["best"] | None


@dataclass(frozen=True)
class Classified:
    """Results of one batch of texts.

    Attributes:
        encoded: pieces of the texts.
        probabilities: float32 [N, C], the softmax of each text's scores.
    """

    encoded: Encoded
    probabilities: Floats

    @property
    def pieces(self) -> int:
        """Number of pieces of all texts."""
        return len(self.encoded.ids)


class Classifier(TextModel):
    """Classifies texts with a distilled student.

    Use `Classifier.from_pretrained`. One object serves any number of Python threads. Results are
    the same, bit for bit, whether a text comes alone or among others and whatever `threads` is.

    A text without any piece (an empty one, say) gets the classes' start values, the model's bias.
    """

    task = TEXT_CLASSIFICATION

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Classifier({self.name!r}, labels=[{', '.join(config.labels)}], "
            f"{config.embedding_size}x{config.hidden_size} {config.pooling}, "
            f"{config.vocab_size} pieces, {self.precision}, threads={self.threads})"
        )

    @overload
    def __call__(
        self, texts: str, *, top_k: TopK = ..., truncation: str = ...
    ) -> list[Prediction]: ...
    @overload
    def __call__(
        self,
        texts: list[str] | tuple[str, ...],
        *,
        top_k: Literal["best"] = ...,
        truncation: str = ...,
    ) -> list[Prediction]: ...
    @overload
    def __call__(
        self, texts: list[str] | tuple[str, ...], *, top_k: int | None, truncation: str = ...
    ) -> list[list[Prediction]]: ...
    def __call__(
        self,
        texts: str | list[str] | tuple[str, ...],
        *,
        top_k: TopK = "best",
        truncation: str = "window",
    ) -> list[Prediction] | list[list[Prediction]]:
        """Classifies a text or each of several texts.

        Args:
            texts: one string, or a list of strings.
            top_k: so many of the most probable classes for each text, None for all. "best", the
                default, is the most probable one without a list around it.
            truncation: what to do with a text of more pieces than `config.window`: "window" reads
                it in overlapping windows, nothing is cut; "error" refuses it. Max and mean pooling
                then go over all pieces, each as it was read in the window in whose core it lies;
                with the last states the probabilities of the windows are averaged.

        Returns:
            As transformers' pipeline("text-classification"): for a string a list of dicts with
            `label` and `score` (the probability), the most probable first; for a list of texts
            one dict each, or one list of dicts each if `top_k` is given.

        Raises:
            TypeError: anything but strings, or `top_k` of another type.
            ValueError: another `truncation`, `top_k` below 1, or a text too long for "error".
        """
        _check_top_k(top_k)
        if isinstance(texts, str):
            check_truncation(truncation)
            found = self.predictions(self.classify_batch([texts], truncation), top_k)[0]
            return found if isinstance(found, list) else [found]
        check_texts(texts)
        results: Iterator[Any] = self.pipe(texts, top_k=top_k, truncation=truncation)
        return list(results)

    @overload
    def pipe(
        self,
        texts: Iterable[str],
        batch_tokens: int = ...,
        *,
        top_k: Literal["best"] = ...,
        truncation: str = ...,
    ) -> Iterator[Prediction]: ...
    @overload
    def pipe(
        self,
        texts: Iterable[str],
        batch_tokens: int = ...,
        *,
        top_k: int | None,
        truncation: str = ...,
    ) -> Iterator[list[Prediction]]: ...
    @overload
    def pipe(
        self,
        texts: Iterable[str],
        batch_tokens: int = ...,
        *,
        top_k: TopK = ...,
        truncation: str = ...,
    ) -> Iterator[Prediction] | Iterator[list[Prediction]]: ...
    def pipe(
        self,
        texts: Iterable[str],
        batch_tokens: int = MAX_PIECES,
        *,
        top_k: TopK = "best",
        truncation: str = "window",
    ) -> Iterator[Any]:
        """Classifies a stream of texts, in constant memory.

        Args:
            texts: any iterable of strings; read on only as results are taken, by about
                `batch_tokens` pieces at a time.
            batch_tokens: about how many pieces are gathered before they are classified. Changes
                speed and memory, never a result.
            top_k: as for a call.
            truncation: as for a call.

        Returns:
            An iterator: for each text a dict, or a list of dicts if `top_k` is given, in the order
            of `texts`.

        Raises:
            TypeError, ValueError: as for a call; for a text when its turn comes.
        """
        check_stream(texts, batch_tokens, truncation)
        _check_top_k(top_k)
        return self._pipe(texts, batch_tokens, top_k, truncation)

    def _pipe(
        self, texts: Iterable[str], batch_tokens: int, top_k: TopK, truncation: str
    ) -> Iterator[Any]:
        for batch, offset in batches(texts, batch_tokens):
            yield from self.predictions(
                self.classify_batch(batch, truncation, offset=offset), top_k
            )

    def classify_batch(
        self, texts: Sequence[str], truncation: str = "window", *, offset: int = 0
    ) -> Classified:
        """Probabilities of all classes: what the other methods are made of.

        Args:
            texts: strings.
            truncation: as for a call.
            offset: added to a text's index in errors.
        """
        encoded = self._encoder.encode_texts(texts)
        if truncation == "error":
            self._check_lengths(encoded, offset)
        return Classified(encoded, self._probabilities(encoded))

    @overload
    def predictions(
        self, classified: Classified, top_k: Literal["best"] = ...
    ) -> list[Prediction]: ...
    @overload
    def predictions(self, classified: Classified, top_k: int | None) -> list[list[Prediction]]: ...
    @overload
    def predictions(
        self, classified: Classified, top_k: TopK
    ) -> list[Prediction] | list[list[Prediction]]: ...
    def predictions(
        self, classified: Classified, top_k: TopK = "best"
    ) -> list[Prediction] | list[list[Prediction]]:
        """The results of `classify_batch` as dicts, or lists of dicts if `top_k` is given."""
        shares, names = classified.probabilities, self.config.labels
        if top_k == "best":
            best = shares.argmax(axis=1)
            scores = shares[np.arange(len(best)), best].tolist()
            return [
                Prediction(label=names[k], score=score)
                for k, score in zip(best.tolist(), scores, strict=True)
            ]
        # Stable: of equal ones the first label is first.
        order = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
        sorted_shares = np.take_along_axis(shares, order, axis=1)
        return [
            [Prediction(label=names[k], score=score) for k, score in zip(row, scores, strict=True)]
            for row, scores in zip(order.tolist(), sorted_shares.tolist(), strict=True)
        ]

    def _probabilities(self, encoded: Encoded) -> Floats:
        if not (np.diff(encoded.cu_pieces) > self.config.window).any():
            return self._softmax(self._student.class_logits(encoded.ids, encoded.cu_pieces))
        windows = read_in_windows(encoded, self.config.window, self.config.stride)
        ids = encoded.ids[windows.read]
        if self.config.pooling != "last":
            return self._softmax(
                self._student.class_logits(
                    ids, windows.cu_seqlens, windows.cu_windows, windows.cores
                )
            )
        shares = self._softmax(self._student.class_logits(ids, windows.cu_seqlens))
        return self._averaged(shares, windows)

    def _averaged(self, shares: Floats, windows: Windows) -> Floats:
        """The mean of the probabilities of each text's windows."""
        counts = np.diff(windows.cu_windows)
        out = np.empty((len(counts), shares.shape[1]), np.float32)
        single = counts == 1
        out[single] = shares[windows.cu_windows[:-1][single]]
        if not counts.all():  # texts without pieces
            nothing, bounds = np.empty(0, np.int32), np.zeros(2, np.int32)
            out[counts == 0] = self._softmax(self._student.class_logits(nothing, bounds))
        for text in np.flatnonzero(counts > 1).tolist():
            own = shares[windows.cu_windows[text] : windows.cu_windows[text + 1]]
            out[text] = own.mean(axis=0, dtype=np.float64)
        return out

    def _softmax(self, logits: Floats) -> Floats:
        if not np.isfinite(logits).all():
            raise ValueError("the model's scores are not finite: its weights overflow float32")
        shares = np.empty_like(logits)
        _core.softmax(logits, shares, self.threads)
        return shares


def _check_top_k(top_k: object) -> None:
    if top_k is None or top_k == "best":
        return
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k is {top_k!r}; it must be an int, None for all, or 'best'")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1 (None is all classes)")
