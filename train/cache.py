"""The teacher's outputs on disk: made once, resumable, read at random.

A cache folder holds one folder a key, the SHA-256 of everything the logits depend on: the
teacher, the bytes of all texts, the settings of the cut into pieces. In it lie shards of about
4096 sentences (``shard-00000.safetensors``) and ``manifest.json``, which names each finished
shard with the digest of its bytes. A run that was killed goes on behind its last shard; a shard
that does not match its digest is made anew. Where several processes label, each makes every N-th
shard and has a manifest of its own, ``manifest-R.json``, until all are done and become one.

A shard of S sentences and P pieces:

    ids         [P] int32    the teacher's piece ids, no special tokens
    cu_seqlens  [S + 1] int32  where the sentences start; ends at P
    first       [P] uint8    1 for the first piece of a word
    targets     [P] int16    gold labels, IGNORED where there is none
    logits      [P, C] float16  the teacher's; C = 0 where only the labels are trained on
    languages   [S] int16    index into the sorted languages of the texts; only where they have any
    representation  [P, R] float16  of a hidden layer of the teacher; not there where none is asked

Beside shards with reduced representations lies ``components.safetensors``, the principal components
they are given in (:mod:`~xdistil_fast.train.representation`).

Memory does not grow with the text, but for the fingerprints of its sentences (64 bits each, in a
set: some 75 bytes a different sentence, while labels are made) and what the Trainer knows of each
sentence (some 20). A Parquet file is read by the row group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tqdm import tqdm

from xdistil_fast.train.alignment import (
    IGNORED,
    align,
    align_text,
    piece_targets,
    split_points,
    tag_ids,
)
from xdistil_fast.train.corpora import Sentence
from xdistil_fast.train.distributed import Ranks
from xdistil_fast.train.representation import (
    Components,
    Representation,
    principal_components,
    spread,
    stored_components,
)
from xdistil_fast.train.shards import Arrays, Shards, map_shard
from xdistil_fast.train.texts import Texts

_FORMAT = 1
_FLOAT16_MAX = float(np.finfo(np.float16).max)

Float32Array = npt.NDArray[np.float32]
# Sequences of pieces and a progress callback to logits and hidden states, the latter maybe empty.
Ask = Callable[
    [list[npt.NDArray[Any]], Callable[[int], object]],
    tuple[list[Float32Array], list[Float32Array]],
]


class Labeller(Protocol):
    """What a cache asks of a teacher; :class:`xdistil_fast.train.teacher.Teacher` has it."""

    labels: list[str]
    tokenizer: tokenizers.Tokenizer
    max_pieces: int

    def digest(self) -> str:
        """SHA-256 of the teacher."""

    def logits(
        self,
        sequences: Sequence[npt.NDArray[np.integer]],
        batch_tokens: int = ...,
        progress: Callable[[int], object] | None = ...,
    ) -> list[Float32Array]:
        """Logits [T_i, C] of each sequence of piece ids."""

    def outputs(
        self,
        sequences: Sequence[npt.NDArray[np.integer]],
        batch_tokens: int = ...,
        progress: Callable[[int], object] | None = ...,
        *,
        layer: int,
        reduce: Callable[[Float32Array], Float32Array] | None = ...,
    ) -> tuple[list[Float32Array], list[Float32Array]]:
        """Logits, and the states [T_i, R] of a layer after ``reduce``."""


@dataclass(frozen=True)
class Batch:
    """Sentences as they go into a step; B of them with P pieces.

    Attributes:
        ids: [P] int32, the teacher's pieces.
        cu_seqlens: [B + 1] int32.
        first: [P] bool, first pieces of words.
        targets: [P] int64, gold labels or IGNORED.
        logits: [P, C] float32, the teacher's.
        representation: [P, R] float32, of a hidden layer of the teacher; R = 0 where the cache has
            none.
    """

    ids: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int32]
    first: npt.NDArray[np.bool_]
    targets: npt.NDArray[np.int64]
    logits: Float32Array
    representation: Float32Array


class Cache:
    """Finished shards, memory-mapped: read at random, in memory only what is being read.

    Attributes:
        sentences: N.
        pieces: number of all pieces.
        width: R of the representations, 0 where there are none.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Mapping[str, Any]]) -> None:
        """Open the shards of a manifest, by name."""
        entries = {name: entry for name, entry in sorted(shards.items()) if entry["pieces"]}
        self._paths = [folder / name for name in entries]
        counts = [entry["sentences"] for entry in entries.values()]
        self._first = np.concatenate([[0], np.cumsum(counts)])  # first sentence of each shard
        self.sentences = int(self._first[-1])
        self.pieces = sum(entry["pieces"] for entry in entries.values())
        # Each open map holds a file descriptor, of which a process may have 1024 at worst.
        self._map = functools.lru_cache(maxsize=512)(map_shard)
        first = self._map(self._paths[0]) if self._paths else {}
        self.width = first["representation"].shape[1] if "representation" in first else 0

    def locate(self, sentences: npt.NDArray[np.integer]) -> Iterator[tuple[Arrays, int]]:
        """Shard of each sentence, and its number there."""
        homes = np.searchsorted(self._first, sentences, side="right") - 1
        for home, sentence in zip(homes, sentences, strict=True):
            yield self._map(self._paths[home]), int(sentence - self._first[home])

    def shards(self) -> Iterator[Arrays]:
        """The arrays of every shard."""
        return map(self._map, self._paths)

    def batch(self, sentences: npt.NDArray[np.integer]) -> Batch:
        """Sentences by number, in the order given."""
        names = ("ids", "first", "targets", "logits", *(["representation"] if self.width else []))
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        cu_seqlens = np.zeros(len(sentences) + 1, np.int32)
        for row, (shard, local) in enumerate(self.locate(sentences)):
            start, stop = shard["cu_seqlens"][local : local + 2]
            cu_seqlens[row + 1] = cu_seqlens[row] + stop - start
            for name, values in parts.items():
                values.append(shard[name][start:stop])
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        return Batch(
            ids=joined["ids"],
            cu_seqlens=cu_seqlens,
            first=joined["first"].astype(bool),
            targets=joined["targets"].astype(np.int64),
            logits=joined["logits"].astype(np.float32),
            representation=(
                joined["representation"].astype(np.float32)
                if self.width
                else np.zeros((len(joined["ids"]), 0), np.float32)
            ),
        )

    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which sentences have a target, [N]: those of the labelled text."""
        parts = [np.zeros(0, bool)]
        for shard in self.shards():
            # No sentence is empty, which reduceat would not stand.
            known = shard["targets"] != IGNORED
            parts.append(np.logical_or.reduceat(known, shard["cu_seqlens"][:-1]))
        return np.concatenate(parts)

    def languages(self) -> npt.NDArray[np.int16]:
        """Number of each sentence's language, [N], in the order of ``Texts.languages``."""
        parts = [np.zeros(0, np.int16)]
        for shard in self.shards():
            none = np.zeros(len(shard["cu_seqlens"]) - 1, np.int16)
            parts.append(shard.get("languages", none))
        return np.concatenate(parts)

    def piece_counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """How often each of the teacher's pieces occurs, [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for shard in self.shards():
            counts += np.bincount(shard["ids"], minlength=vocab_size)
        return counts


def build_cache(
    root: Path,
    teacher: Labeller,
    texts: Texts,
    digests: Sequence[str],
    *,
    max_length: int = 256,
    pieces: Literal["all", "first"] = "all",
    soft: bool = True,
    representation: Representation | None = None,
    batch_pieces: int = 8192,
    expected: int | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> tuple[Cache, str]:
    """Label all sentences with the teacher, or take up what was labelled before.

    Args:
        root: cache folder, made where missing.
        teacher: gives labels, tokeniser and logits.
        texts: sentences; streamed, never all in memory.
        digests: of the files of ``texts``, in order, and of whatever else decides their content.
        max_length: most pieces of a sentence; longer ones are cut at word borders.
        pieces: which pieces have targets.
        soft: whether the logits are wanted.
        representation: which hidden states are wanted; None for none. Logits come with them.
        batch_pieces: pieces the teacher is given at once.
        expected: number of sentences, about; lets the bar guess when it will be full.
        progress: show a bar, in pieces.
        ranks: the processes that do it together; this one alone if None.

    Returns:
        The cache and its key.

    Raises:
        ValueError: no sentence with pieces, a gold tag that is not among the teacher's labels, or
            logits that are not finite or exceed what float16 holds.
        OSError: a full disk, say; what is finished stays.
    """
    max_length = min(max_length, teacher.max_pieces)
    about = {
        "format": _FORMAT,
        "teacher": teacher.digest(),
        "texts": list(digests),
        "max_length": max_length,
        "pieces": pieces,
        "soft": soft,
    }
    if texts.languages:
        about["languages"] = texts.languages
    if representation is not None:
        about["representation"] = dataclasses.asdict(representation)
    shards = Shards(root, about, ranks)
    if shards.complete:
        return Cache(shards.folder, shards.done), shards.key
    extra: dict[str, Any] = {}
    reduce = None
    if representation is not None and representation.size:
        reduce, extra["components"] = shards.ranks.first_goes_ahead(
            lambda: stored_components(
                shards.folder,
                lambda: _components(teacher, texts, representation, max_length, batch_pieces),
            )
        )
        if extra["components"] != shards.manifest.get("components"):
            shards.done.clear()  # shards in other components are of no use beside these

    def ask(
        ids: list[npt.NDArray[Any]], bar: Callable[[int], object]
    ) -> tuple[list[Float32Array], list[Float32Array]]:
        if representation is None:
            return teacher.logits(ids, batch_pieces, bar), []
        return teacher.outputs(ids, batch_pieces, bar, layer=representation.layer, reduce=reduce)

    def label(chunk: list[Sentence], bar: tqdm[Any]) -> Arrays:
        arrays = _label(teacher, chunk, max_length, pieces, ask if asked else None, bar)
        order = arrays.pop("order")
        if texts.languages:
            arrays["languages"] = _languages(chunk, order, texts.languages)
        return arrays

    asked = soft or representation is not None
    shards.fill(
        texts,
        label,
        title="teacher labels" if asked else "pieces",
        extra=extra,
        expected=expected,
        progress=progress,
    )
    return Cache(shards.folder, shards.done), shards.key


def _label(
    teacher: Labeller,
    sentences: Sequence[Sentence],
    max_length: int,
    pieces: Literal["all", "first"],
    ask: Ask | None,
    bar: tqdm[Any],
) -> Arrays:
    """The arrays of one shard; ``order`` [S] says which of ``sentences`` each run is of."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []  # ids, first, targets of each run
    order: list[int] = []
    # Sentences of words and sentences of text are tokenised in different ways.
    worded = [i for i, s in enumerate(sentences) if s.words is not None]
    running = [i for i, s in enumerate(sentences) if s.words is None]
    labelled = [i for i in worded if sentences[i].tags is not None]
    plain = [i for i in worded if sentences[i].tags is None]
    for numbers, tags in ((labelled, True), (plain, False), (running, False)):
        if numbers is running:
            group = align_text(teacher.tokenizer, [sentences[i].text or "" for i in numbers])
        else:
            group = align(teacher.tokenizer, [sentences[i].words or () for i in numbers])
        targets = np.full(len(group.ids), IGNORED, np.int64)
        if tags:
            words = tag_ids([sentences[i].tags or () for i in numbers], teacher.labels)
            targets = piece_targets(group, words, teacher.labels, pieces)
        first = np.zeros(len(group.ids), np.uint8)
        first[group.first_piece[group.first_piece >= 0]] = 1
        for sentence in range(len(group)):
            for start, stop in split_points(group, sentence, max_length):
                run = slice(start, stop)
                parts.append((group.ids[run], first[run], targets[run]))
                order.append(numbers[sentence])
    ids = [part[0] for part in parts]
    total = sum(map(len, ids))
    logits = np.zeros((total, 0), np.float16)
    hidden = None
    if ask is not None and ids:
        lengths = total / len(ids)
        values, states = ask(ids, lambda n: bar.update(round(n * lengths)))
        logits = half("logits", values)
        hidden = half("hidden states", states) if states else None
    else:
        bar.update(total)
    cu_seqlens = np.zeros(len(ids) + 1, np.int32)
    np.cumsum([len(part) for part in ids], out=cu_seqlens[1:])
    empty = np.zeros(0)
    return {
        "ids": np.concatenate([*ids, empty]).astype(np.int32),
        "cu_seqlens": cu_seqlens,
        "first": np.concatenate([*(part[1] for part in parts), empty]).astype(np.uint8),
        "targets": np.concatenate([*(part[2] for part in parts), empty]).astype(np.int16),
        "logits": logits,
        **({} if hidden is None else {"representation": hidden}),
        "order": np.array(order, np.int64),
    }


def _languages(
    sentences: Sequence[Sentence], order: npt.NDArray[Any], names: Sequence[str]
) -> npt.NDArray[np.int16]:
    """Number of the language of each run of a shard."""
    number = {name: i for i, name in enumerate(names)}
    each = np.array([number[sentence.language] for sentence in sentences], np.int16)
    runs_of: npt.NDArray[np.int16] = each[order]
    return runs_of


def half(name: str, parts: Sequence[Float32Array]) -> npt.NDArray[np.float16]:
    """Join and narrow what the teacher gave.

    Raises:
        ValueError: it is not finite or exceeds what float16 holds.
    """
    values = np.concatenate(parts)
    if not np.isfinite(values).all() or np.abs(values).max() > _FLOAT16_MAX:
        raise ValueError(f"the teacher's {name} are not finite, or too large for float16")
    return values.astype(np.float16)


def _components(
    teacher: Labeller,
    texts: Texts,
    representation: Representation,
    max_length: int,
    batch_pieces: int,
) -> Components:
    """Principal components of a layer on a sample of the labelled text."""
    words = [s.words or () for corpus in texts.train for s in corpus.sentences]
    sample = align(teacher.tokenizer, spread(words))
    ids = [
        sample.ids[start:stop]
        for sentence in range(len(sample))
        for start, stop in split_points(sample, sentence, max_length)
    ]
    return principal_components(
        lambda add: teacher.outputs(ids, batch_pieces, layer=representation.layer, reduce=add),
        representation.size,
    )
