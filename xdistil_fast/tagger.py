"""`Tagger`: entities in running text, one tag a word in text that is already split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from xdistil_fast import _core
from xdistil_fast import labels as iob
from xdistil_fast.cuda_student import student_on
from xdistil_fast.model_io import (
    ModelConfig,
    Tensors,
    count_parameters,
    load_folder,
    load_tokenizer,
    resolve_model,
)
from xdistil_fast.student import MAX_PIECES, Floats, Ints
from xdistil_fast.tokenization import Encoded, TextEncoder, plan_windows

# A word piece is about four characters long in most languages; only the size of a batch hangs on
# it, and the kernels take a batch in parts anyway.
_CHARS_PER_PIECE = 4
_PIECES_PER_WORD = 2
TRUNCATIONS = ("window", "error")


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


class Tagger:
    """Finds entities with a distilled student.

    Use `Tagger.from_pretrained`. One object serves any number of Python threads. Results are the
    same, bit for bit, whether a text comes alone or among others and whatever `threads` is.

    Args:
        config: of the model.
        tensors: arrays as `config.tensor_shapes()`.
        tokenizer: its ids below `config.vocab_size`; must not be changed afterwards.
        threads: kernel threads; 0 is every core the process may use, 1 stays in the caller's.
        precision: "float32", "bfloat16" or "int8"; None is what the model is stored in.
        max_memory: bytes that the input table may take; None is 256 MiB (see `Student`).
        device: "cpu", "cuda" or "cuda:N": where scores are computed (see `cuda_student`).
        name: shown by `repr`.
        digest: SHA-256 of the weights, "" if not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        tokenizer: Tokenizer,
        *,
        threads: int = 0,
        precision: str | None = None,
        max_memory: int | None = None,
        device: str = "cpu",
        name: str = "",
        digest: str = "",
    ) -> None:
        self.config = config
        self.name = name
        self.digest = digest
        self._tensors = tensors
        self._tokenizer = tokenizer
        self._student = student_on(device, config, tensors, threads, precision, max_memory)
        self._encoder = TextEncoder(tokenizer, threads)
        self._names = config.labels

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        threads: int = 0,
        revision: str | None = None,
        *,
        precision: str | None = None,
        max_memory: int | None = None,
        device: str = "cpu",
    ) -> Tagger:
        """Loads a model.

        Args:
            name_or_path: a model folder, the name of an embedded model ("en-ner"), or a Hub id
                ("owner/name"); looked for in that order.
            threads: kernel threads; 0 is every core the process may use.
            revision: branch, tag or commit of a Hub id.
            precision: "float32", "bfloat16" or "int8"; None is what the model is stored in. "int8"
                is the fastest and moves few tags; `xdistil quantize` measures how few.
            max_memory: bytes that the input table may take; None is 256 MiB. Changes speed and
                memory, never a result.
            device: "cpu"; "cuda" or "cuda:N" where the extension for GPUs was built, in "float32"
                or "bfloat16"; results are close to the CPU's, not its bits.

        Raises:
            ModelError: (a ValueError) not found, or not a model this version can run.
            TypeError: an argument of another type.
            ValueError: an argument out of its range.
            RuntimeError: there is no GPU, driver or extension for `device`; or it failed.
            MemoryError: the GPU's memory does not suffice.
        """
        folder = load_folder(resolve_model(name_or_path, revision))
        return cls(
            folder.config,
            folder.tensors,
            folder.tokenizer,
            threads=threads,
            precision=precision,
            max_memory=max_memory,
            device=device,
            name=os.fspath(name_or_path),
            digest=folder.digest,
        )

    @property
    def labels(self) -> list[str]:
        """IOB2 labels by tag id."""
        return list(self.config.labels)

    @property
    def threads(self) -> int:
        """Kernel threads; 0 is every core the process may use."""
        return self._student.threads

    @property
    def precision(self) -> str:
        """What the kernels compute in: "float32", "bfloat16" or "int8"."""
        return self._student.precision

    @property
    def device(self) -> str:
        """Where scores are computed: "cpu" or "cuda:N"."""
        return self._student.device

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return count_parameters(self._tensors)

    def __repr__(self) -> str:
        config = self.config
        types = ", ".join(iob.label_types(config.labels))
        return (
            f"Tagger({self.name!r}, types=[{types}], {config.embedding_size}x{config.hidden_size} "
            f"{config.head}, {config.vocab_size} pieces, {self.precision}, threads={self.threads})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by value, so that a worker on another machine needs no folder."""
        options = (self.threads, self.precision, self._student.max_memory, self.device)
        state = (self.config, self._tensors, self._tokenizer.to_str(), *options)
        return _rebuild, (*state, self.name, self.digest)

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
            counted in code points. For a list of texts one such list each.

        Raises:
            TypeError: anything but strings.
            ValueError: another `truncation`, or a text too long for "error".
        """
        if isinstance(texts, str):
            _check_truncation(truncation)
            return self.entities([texts], self.tag_batch([texts], truncation=truncation))[0]
        if not isinstance(texts, (list, tuple)):
            raise TypeError(
                f"texts is {type(texts).__name__}; it must be a string or a list of strings "
                "(use pipe for other iterables)"
            )
        for index, text in enumerate(texts):
            _check_text(text, index)
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
        if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
            kind = type(texts).__name__
            raise TypeError(f"texts is {kind}; pipe takes an iterable of strings")
        if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int):
            raise TypeError(f"batch_tokens is {batch_tokens!r}; it must be an int")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        _check_truncation(truncation)
        return self._pipe(texts, batch_tokens, truncation)

    def _pipe(
        self, texts: Iterable[str], batch_tokens: int, truncation: str
    ) -> Iterator[list[Entity]]:
        batch: list[str] = []
        size = done = 0
        for index, text in enumerate(texts):
            _check_text(text, index)
            batch.append(text)
            size += 1 + len(text) // _CHARS_PER_PIECE
            if size >= batch_tokens:
                tagged = self.tag_batch(batch, truncation, batch_tokens, offset=done)
                yield from self.entities(batch, tagged)
                done += len(batch)
                batch, size = [], 0
        if batch:
            tagged = self.tag_batch(batch, truncation, batch_tokens, offset=done)
            yield from self.entities(batch, tagged)

    def tag_words(
        self, sentences: Sequence[Sequence[str]], *, truncation: str = "window"
    ) -> list[list[str]]:
        """Tags text that is already split into words.

        Args:
            sentences: lists of words.
            truncation: as for a call.

        Returns:
            For each sentence one IOB2 tag a word; a word without any piece (a lone control
            character, say) is `O`.

        Raises:
            TypeError: anything but lists of lists of strings.
            ValueError: as for a call.
        """
        _check_truncation(truncation)
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
            self._names,
        )
        return entities

    def words(self, texts: Sequence[str], tagged: Tagged) -> list[list[tuple[str, str]]]:
        """The words of `tag_batch` with their IOB2 tags, one list a text."""
        encoded = tagged.encoded
        starts, ends = _core.finish_words(
            texts, encoded.cu_words, encoded.word_starts, encoded.word_ends
        )
        words = list(zip(starts.tolist(), ends.tolist(), tagged.tags.tolist(), strict=True))
        out: list[list[tuple[str, str]]] = []
        for index, text in enumerate(texts):
            mine = words[encoded.cu_words[index] : encoded.cu_words[index + 1]]
            row = [(text[start:end], self._names[tag]) for start, end, tag in mine if start < end]
            repaired = iob.repair([tag for _, tag in row])
            out.append([(word, tag) for (word, _), tag in zip(row, repaired, strict=True)])
        return out

    def split_tags(self, sentences: Sequence[Sequence[str]], tagged: Tagged) -> list[list[str]]:
        """The tags of `tag_split_batch`, one a word of each sentence."""
        tags, positions = tagged.tags.tolist(), tagged.encoded.positions.tolist()
        cu_words = tagged.encoded.cu_words.tolist()
        out: list[list[str]] = []
        for index, words in enumerate(sentences):
            begin, stop = cu_words[index], cu_words[index + 1]
            row = [iob.OUTSIDE] * len(words)
            for at in range(begin, stop):
                row[positions[at]] = self._names[tags[at]]
            # A word without pieces is `O` between its neighbours, which may cut an entity.
            out.append(row if stop - begin == len(words) else iob.repair(row))
        return out

    def _logits(self, encoded: Encoded, max_pieces: int) -> Floats:
        """Scores of every piece; long texts are read in windows, each piece from its core."""
        cu_pieces, window = encoded.cu_pieces, self.config.window
        if not (np.diff(cu_pieces) > window).any():
            return self._student.logits(encoded.ids, cu_pieces, max_pieces)
        read: list[NDArray[np.int64]] = []
        keep: list[NDArray[np.int64]] = []
        lengths: list[int] = []
        total = 0
        for index in range(len(cu_pieces) - 1):
            base = int(cu_pieces[index])
            starts = encoded.first[encoded.cu_words[index] : encoded.cu_words[index + 1]] - base
            length = int(cu_pieces[index + 1]) - base
            for part in plan_windows(length, window, self.config.stride, starts):
                read.append(np.arange(base + part.start, base + part.stop))
                keep.append(np.arange(part.core_start, part.core_stop) - part.start + total)
                lengths.append(part.stop - part.start)
                total += lengths[-1]
        cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        ids = encoded.ids[np.concatenate(read)]
        return self._student.logits(ids, cu_seqlens, max_pieces)[np.concatenate(keep)]

    def _check_lengths(self, encoded: Encoded, offset: int) -> None:
        lengths = np.diff(encoded.cu_pieces)
        for index in np.flatnonzero(lengths > self.config.window)[:1].tolist():
            raise ValueError(
                f"texts[{offset + index}] has {lengths[index]} pieces; truncation='error' allows "
                f"at most {self.config.window} (truncation='window' reads any length)"
            )


def _rebuild(
    config: ModelConfig,
    tensors: Tensors,
    tokenizer_json: str,
    threads: int,
    precision: str,
    max_memory: int,
    device: str,
    name: str,
    digest: str,
) -> Tagger:
    return Tagger(
        config,
        tensors,
        load_tokenizer(tokenizer_json, config.vocab_size),
        threads=threads,
        precision=precision,
        max_memory=max_memory,
        device=device,
        name=name,
        digest=digest,
    )


def _check_truncation(truncation: object) -> None:
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation is {truncation!r}; allowed: 'window', 'error'")


def _check_text(text: object, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] is {type(text).__name__}; it must be a string")


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
