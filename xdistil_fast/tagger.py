"""`Tagger`: entities in running text, one tag a word in text that is already split."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, overload

import numpy as np

from xdistil_fast import _core
from xdistil_fast import labels as iob
from xdistil_fast.model_config import TOKEN_CLASSIFICATION
from xdistil_fast.student import MAX_PIECES, Floats, Ints
from xdistil_fast.text_model import (
    TextModel,
    batches,
    check_stream,
    check_texts,
    check_truncation,
)
from xdistil_fast.tokenization import Encoded, read_in_windows

_PIECES_PER_WORD = 2


class Entity(TypedDict):
    """An entity as transformers' pipeline gives it under aggregation_strategy="simple"."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Tagged:
    """Results of one batch of texts.

    Attributes:
        encoded: pieces and words of the texts.
        tags: int32 [W], tag id of every word.
        probabilities: float32 [W], of those tags, 0 for `O`; empty where nobody needs them.
    """

    encoded: Encoded
    tags: Ints
    probabilities: Floats

    @property
    def pieces(self) -> int:
        """Number of pieces of all texts."""
        return len(self.encoded.ids)


class Tagger(TextModel):
    """Finds entities with a distilled student.

    Use `Tagger.from_pretrained`. One object serves any number of Python threads. Results are the
    same, bit for bit, whether a text comes alone or among others and whatever `threads` is.
    """

    task = TOKEN_CLASSIFICATION

    @functools.cached_property
    def _plain(self) -> bool:
        """Whether the labels are plain tags of words."""
        return iob.scheme_of(self.config.labels) == "tags"

    @functools.cached_property
    def _groups(self) -> tuple[str, ...]:
        """Labels by which words are joined: a plain tag is an entity of its own, as B- says."""
        return tuple(
            f"B-{name}" if self._plain and name != iob.OUTSIDE else name
            for name in self.config.labels
        )

    def __repr__(self) -> str:
        config = self.config
        types = ", ".join(iob.label_types(config.labels))
        return (
            f"Tagger({self.name!r}, types=[{types}], {config.embedding_size}x{config.hidden_size} "
            f"{config.head}, {config.vocab_size} pieces, {self.precision}, threads={self.threads})"
        )

    @overload
    def __call__(self, texts: str, *, truncation: str = ...) -> list[Entity]: ...
    @overload
    def __call__(
        self, texts: list[str] | tuple[str, ...], *, truncation: str = ...
    ) -> list[list[Entity]]: ...
    def __call__(
        self, texts: str | list[str] | tuple[str, ...], *, truncation: str = "window"
    ) -> list[Entity] | list[list[Entity]]:
        """Finds the entities of a text or of each of several texts.

        Args:
            texts: one string, or a list of strings.
            truncation: what to do with a text of more pieces than `config.window`: "window" reads
                it in overlapping windows, nothing is cut; "error" refuses it.

        Returns:
            Entities in order, as dicts: `entity_group` (the type), `score` (mean over its words of
            the probability of their tags), `word`, `start`, `end`; `text[start:end] == word`,
            counted in code points. For a list of texts one such list each. With a model of plain
            tags (parts of speech) every word is an entity by itself, its tag the type.

        Raises:
            TypeError: anything but strings.
            ValueError: another `truncation`, or a text too long for "error".
        """
        if isinstance(texts, str):
            check_truncation(truncation)
            return self.entities([texts], self.tag_batch([texts], truncation=truncation))[0]
        check_texts(texts)
        return list(self.pipe(texts, truncation=truncation))

    def pipe(
        self,
        texts: Iterable[str],
        batch_tokens: int = MAX_PIECES,
        *,
        truncation: str = "window",
    ) -> Iterator[list[Entity]]:
        """Finds the entities of a stream of texts, in constant memory.

        Args:
            texts: any iterable of strings; read on only as results are taken, by about
                `batch_tokens` pieces at a time.
            batch_tokens: about how many pieces go through the kernels at once. Changes speed and
                memory, never a result.
            truncation: as for a call.

        Returns:
            An iterator: for each text a list of entities, in the order of `texts`.

        Raises:
            TypeError, ValueError: as for a call; for a text when its turn comes.
        """
        check_stream(texts, batch_tokens, truncation)
        return self._pipe(texts, batch_tokens, truncation)

    def _pipe(
        self, texts: Iterable[str], batch_tokens: int, truncation: str
    ) -> Iterator[list[Entity]]:
        for batch, offset in batches(texts, batch_tokens):
            tagged = self.tag_batch(batch, truncation, batch_tokens, offset=offset)
            yield from self.entities(batch, tagged)

    def tag_words(
        self, sentences: Sequence[Sequence[str]], *, truncation: str = "window"
    ) -> list[list[str]]:
        """Tags text that is already split into words.

        Args:
            sentences: lists of words.
            truncation: as for a call.

        Returns:
            For each sentence one tag a word; a word without any piece (a lone control character,
            say) is `O`, or `_` of a model of plain tags without `O`.

        Raises:
            TypeError: anything but lists of lists of strings.
            ValueError: as for a call.
        """
        check_truncation(truncation)
        _check_sentences(sentences)
        out: list[list[str]] = []
        begin = size = 0
        for index, words in enumerate(sentences):
            size += 1 + len(words) * _PIECES_PER_WORD
            if size >= MAX_PIECES or index + 1 == len(sentences):
                batch = sentences[begin : index + 1]
                out += self.split_tags(batch, self.tag_split_batch(batch, truncation, offset=begin))
                begin, size = index + 1, 0
        return out

    def word_probabilities(self, sentences: Sequence[Sequence[str]]) -> list[Floats]:
        """How probable the model holds each tag of each word, in text that is already split.

        Args:
            sentences: lists of words.

        Returns:
            For each sentence float32 [words, C] in the order of `labels`, at each word's first
            piece: the softmax, or the CRF's marginals. A word without any piece is `O`, or where
            there is no such label has only zeros.

        Raises:
            TypeError: anything but lists of lists of strings.
        """
        _check_sentences(sentences)
        encoded = self._encoder.encode_words(sentences)
        pieces = self._student.probabilities(self._logits(encoded, MAX_PIECES), encoded.cu_pieces)
        certain = np.zeros(len(self.config.labels), np.float32)
        if iob.OUTSIDE in self.config.labels:
            certain[self.config.labels.index(iob.OUTSIDE)] = 1
        out = []
        for index, words in enumerate(sentences):
            begin, stop = encoded.cu_words[index], encoded.cu_words[index + 1]
            rows = np.tile(certain, (len(words), 1))
            rows[encoded.positions[begin:stop]] = pieces[encoded.first[begin:stop]]
            out.append(rows)
        return out

    def tag_batch(
        self,
        texts: Sequence[str],
        truncation: str = "window",
        max_pieces: int = MAX_PIECES,
        *,
        offset: int = 0,
    ) -> Tagged:
        """Tags every word of running texts: what the other methods are made of.

        Args:
            texts: strings.
            truncation: as for a call.
            max_pieces: about how many pieces go through the kernels at once.
            offset: added to a text's index in errors.

        Returns:
            Words with tags and probabilities.
        """
        encoded = self._encoder.encode_texts(texts)
        return self._tag(encoded, truncation, max_pieces, offset, probabilities=True)

    def tag_split_batch(
        self,
        sentences: Sequence[Sequence[str]],
        truncation: str = "window",
        max_pieces: int = MAX_PIECES,
        *,
        offset: int = 0,
    ) -> Tagged:
        """The same for sentences that are already split into words; no probabilities."""
        encoded = self._encoder.encode_words(sentences)
        return self._tag(encoded, truncation, max_pieces, offset, probabilities=False)

    def _tag(
        self,
        encoded: Encoded,
        truncation: str,
        max_pieces: int,
        offset: int,
        *,
        probabilities: bool,
    ) -> Tagged:
        if truncation == "error":
            self._check_lengths(encoded, offset)
        student, cu_pieces, first = self._student, encoded.cu_pieces, encoded.first
        logits = self._logits(encoded, max_pieces)
        tags, shares = student.decode_words(
            logits, cu_pieces, first, encoded.cu_words, probabilities=probabilities
        )
        return Tagged(encoded, tags, shares)

    def entities(self, texts: Sequence[str], tagged: Tagged) -> list[list[Entity]]:
        """Groups the tags of `tag_batch` into entities, one list a text."""
        encoded = tagged.encoded
        entities: list[list[Entity]] = _core.join_entities(
            texts,
            encoded.cu_words,
            encoded.word_starts,
            encoded.word_ends,
            tagged.tags,
            tagged.probabilities,
            self._groups,
        )
        return entities

    def words(self, texts: Sequence[str], tagged: Tagged) -> list[list[tuple[str, str]]]:
        """The words of `tag_batch` with their tags, one list a text."""
        encoded = tagged.encoded
        starts, ends = _core.finish_words(
            texts, encoded.cu_words, encoded.word_starts, encoded.word_ends
        )
        words = list(zip(starts.tolist(), ends.tolist(), tagged.tags.tolist(), strict=True))
        out: list[list[tuple[str, str]]] = []
        names = self.config.labels
        for index, text in enumerate(texts):
            mine = words[encoded.cu_words[index] : encoded.cu_words[index + 1]]
            row = [(text[start:end], names[tag]) for start, end, tag in mine if start < end]
            if not self._plain:
                repaired = iob.repair([tag for _, tag in row])
                row = [(word, tag) for (word, _), tag in zip(row, repaired, strict=True)]
            out.append(row)
        return out

    def split_tags(self, sentences: Sequence[Sequence[str]], tagged: Tagged) -> list[list[str]]:
        """The tags of `tag_split_batch`, one a word of each sentence."""
        tags, positions = tagged.tags.tolist(), tagged.encoded.positions.tolist()
        cu_words = tagged.encoded.cu_words.tolist()
        out: list[list[str]] = []
        for index, words in enumerate(sentences):
            begin, stop = cu_words[index], cu_words[index + 1]
            row = [iob.outside_of(self.config.labels)] * len(words)
            for at in range(begin, stop):
                row[positions[at]] = self.config.labels[tags[at]]
            # A word without pieces is `O` between its neighbours, which may cut an entity.
            whole = self._plain or stop - begin == len(words)
            out.append(row if whole else iob.repair(row))
        return out

    def _logits(self, encoded: Encoded, max_pieces: int) -> Floats:
        """Scores of every piece; long texts are read in windows, each piece from its core."""
        cu_pieces, window = encoded.cu_pieces, self.config.window
        if not (np.diff(cu_pieces) > window).any():
            return self._student.logits(encoded.ids, cu_pieces, max_pieces)
        windows = read_in_windows(encoded, window, self.config.stride)
        logits = self._student.logits(encoded.ids[windows.read], windows.cu_seqlens, max_pieces)
        keep = np.zeros(len(logits), bool)
        for start, stop in windows.cores.tolist():
            keep[start:stop] = True
        return logits[keep]


def _check_sentences(sentences: object) -> None:
    if not isinstance(sentences, (list, tuple)):
        kind = type(sentences).__name__
        raise TypeError(f"sentences is {kind}; it must be a list of lists of words")
    for index, words in enumerate(sentences):
        if not isinstance(words, (list, tuple)):
            kind = type(words).__name__
            raise TypeError(f"sentences[{index}] is {kind}; it must be a list of words")
        for place, word in enumerate(words):
            if not isinstance(word, str):
                kind = type(word).__name__
                raise TypeError(f"sentences[{index}][{place}] is {kind}; it must be a string")
