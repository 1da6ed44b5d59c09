"""The teacher's outputs on disk: made once, resumable, read at random.

A cache folder holds one folder a file of text, named by its key, the SHA-256 of everything the
logits depend on: the teacher, the bytes of the file, the settings of the cut into pieces. So runs
share what was labelled, whichever other files they have. In it lie shards of about 4096 sentences
(``shard-00000.safetensors``) and ``manifest.json``, which names each finished shard with the
digest of its bytes. A run that was killed goes on behind its last shard; a shard that does not
match its digest is made anew. Where several processes label, each makes every N-th shard and has a
manifest of its own, ``manifest-R.json``, until all are done and become one.

A shard of S sentences and P pieces:

    ids         [P] int32    the teacher's piece ids, no special tokens
    cu_seqlens  [S + 1] int32  where the sentences start; ends at P
    first       [P] uint8    1 for the first piece of a word
    targets     [P] int16    gold labels, IGNORED where there is none
    logits      [P, C] float16  the teacher's; C = 0 where only the labels are trained on
    fingerprints  [S] uint64  of the sentence, or of that which it was cut from
    representation  [P, R] float16  of a hidden layer of the teacher; not there where none is asked

Which sentences a run trains on is known when it opens the shards: by their fingerprints it leaves
out what another of its files has already, or its dev.

The principal components that representations are reduced to lie beside the folders, as
``components-KEY.safetensors`` (:mod:`~xdistil_fast.train.representation`).

Memory does not grow with the text, but for the fingerprints of the sentences of the file that is
being labelled (64 bits each, in a set: some 75 bytes a different sentence) and what is known of
each sentence in training (some 40). A Parquet file is read by the row group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
from xdistil_fast.train.shards import Arrays, Shards, digest_of, map_shard
from xdistil_fast.train.texts import Texts, fingerprints

_FORMAT = 3
_FLOAT16_MAX = float(np.finfo(np.float16).max)

Item = TypeVar("Item")
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
    precision: str

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
        targets: [P] int64, gold labels or IGNORED.
        logits: [P, C] float32, the teacher's.
        representation: [P, R] float32, of a hidden layer of the teacher; R = 0 where the cache has
            none.
    """

    ids: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]
    logits: Float32Array
    representation: Float32Array


@dataclass(frozen=True)
class Part:
    """The finished shards of one file.

    Attributes:
        folder: where they lie.
        shards: entries of the manifest, by name.
        language: number of the file's language.
    """

    folder: Path
    shards: Mapping[str, Mapping[str, Any]]
    language: int = 0


class Cache:
    """Finished shards, memory-mapped: read at random, in memory only what is being read.

    Attributes:
        sentences: N, those that are trained on.
        pieces: number of all their pieces.
        labelled: which sentences have a target, [N]: those of the labelled text.
        languages: number of each sentence's language, [N].
        width: R of the representations, 0 where there are none.
    """

    def __init__(self, parts: Sequence[Part], hidden: npt.NDArray[np.uint64]) -> None:
        """Open the shards of some files.

        Args:
            parts: the files, in order.
            hidden: fingerprints of sentences that are left out where they have no target.

        Raises:
            ValueError: there is no piece in any of the sentences.
        """
        # Each open map holds a file descriptor, of which a process may have 1024 at worst.
        self._map = functools.lru_cache(maxsize=512)(map_shard)
        self._paths: list[Path] = []
        self._kept: list[npt.NDArray[np.intp]] = []  # sentences of each shard
        lengths = [np.zeros(0, np.int64)]
        labelled = [np.zeros(0, bool)]
        languages = [np.zeros(0, np.int16)]
        for part in parts:
            here = [hidden]
            for name, entry in sorted(part.shards.items()):
                if not entry["pieces"]:
                    continue
                shard = self._map(part.folder / name)
                gold = self._has_target(shard)
                kept = np.flatnonzero(gold | ~np.isin(shard["fingerprints"], hidden))
                here.append(shard["fingerprints"][kept])
                if len(kept):
                    self._paths.append(part.folder / name)
                    self._kept.append(kept)
                    lengths.append(np.diff(shard["cu_seqlens"])[kept])
                    labelled.append(gold[kept])
                    languages.append(np.full(len(kept), part.language, np.int16))
            hidden = np.unique(np.concatenate(here))
        self.labelled: npt.NDArray[np.bool_] = np.concatenate(labelled)
        self.languages: npt.NDArray[np.int16] = np.concatenate(languages)
        counts = [len(kept) for kept in self._kept]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.sentences = len(self.labelled)
        self.pieces = int(np.concatenate(lengths).sum())
        if not self.pieces:
            raise ValueError(
                "train and transfer: the tokeniser makes no piece of any of these words"
            )
        first = self._map(self._paths[0])
        self.width = first["representation"].shape[1] if "representation" in first else 0

    def locate(self, sentences: npt.NDArray[np.integer]) -> Iterator[tuple[Arrays, int]]:
        """Shard of each sentence, and its number there."""
        homes = np.searchsorted(self._first, sentences, side="right") - 1
        for home, sentence in zip(homes, sentences, strict=True):
            yield self._map(self._paths[home]), int(self._kept[home][sentence - self._first[home]])

    def shards(self) -> Iterator[tuple[Arrays, npt.NDArray[np.intp]]]:
        """The arrays of every shard, and which of its sentences are trained on."""
        return zip(map(self._map, self._paths), self._kept, strict=True)

    @staticmethod
    def _has_target(shard: Arrays) -> npt.NDArray[np.bool_]:
        # No sentence is empty, which reduceat would not stand.
        known = shard["targets"] != IGNORED
        return np.asarray(np.logical_or.reduceat(known, shard["cu_seqlens"][:-1]), bool)

    def batch(self, sentences: npt.NDArray[np.integer]) -> Batch:
        """Sentences by number, in the order given."""
        names = ("ids", "targets", "logits", *(["representation"] if self.width else []))
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
            targets=joined["targets"].astype(np.int64),
            logits=joined["logits"].astype(np.float32),
            representation=(
                joined["representation"].astype(np.float32)
                if self.width
                else np.zeros((len(joined["ids"]), 0), np.float32)
            ),
        )

    def piece_counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """How often each of the teacher's pieces occurs, [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for shard, kept in self.shards():
            wanted = np.zeros(len(shard["cu_seqlens"]) - 1, bool)
            wanted[kept] = True
            pieces = np.repeat(wanted, np.diff(shard["cu_seqlens"]))
            counts += np.bincount(shard["ids"][pieces], minlength=vocab_size)
        return counts


def build_cache(
    root: Path,
    teacher: Labeller,
    texts: Texts,
    files: Sequence[Mapping[str, Any]],
    *,
    max_length: int = 256,
    soft: bool = True,
    representation: Representation | None = None,
    batch_pieces: int = 8192,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> tuple[Cache, str]:
    """Label all sentences with the teacher, or take up what was labelled before.

    Args:
        root: cache folder, made where missing.
        teacher: gives labels, tokeniser and logits.
        texts: sentences; streamed, never all in memory.
        files: entries of ``run.json``'s ``data`` for the files of ``texts``, those of ``train``
            before those of ``transfer``; ``content`` is what decides the sentences of a file beside
            its bytes.
        max_length: most pieces of a sentence; longer ones are cut at word borders.
        soft: whether the logits are wanted.
        representation: which hidden states are wanted; None for none. Logits come with them.
        batch_pieces: pieces the teacher is given at once.
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
        "precision": teacher.precision,
        "max_length": max_length,
        "soft": soft,
    }
    ranks = ranks or Ranks()
    reduce = None
    if representation is not None:
        about["representation"] = dataclasses.asdict(representation)
    if representation is not None and representation.size:
        train = [file["digest"] for file in files if file["role"] == "train"]
        root.mkdir(parents=True, exist_ok=True)
        path = root / f"components-{digest_of({**about, 'train': train})[:16]}.safetensors"
        reduce, about["components"] = ranks.first_goes_ahead(
            lambda: stored_components(
                path, lambda: _components(teacher, texts, representation, max_length, batch_pieces)
            )
        )

    def ask(
        ids: list[npt.NDArray[Any]], bar: Callable[[int], object]
    ) -> tuple[list[Float32Array], list[Float32Array]]:
        if representation is None:
            return teacher.logits(ids, batch_pieces, bar), []
        return teacher.outputs(ids, batch_pieces, bar, layer=representation.layer, reduce=reduce)

    def label(chunk: list[Sentence], bar: tqdm[Any]) -> Arrays:
        return _label(teacher, chunk, max_length, ask if asked else None, bar)

    asked = soft or representation is not None
    title = "teacher labels" if asked else "pieces"
    filled = fill_all(root, about, files, texts.streams(), label, title, progress, ranks)
    numbers = {language: number for number, language in enumerate(texts.languages)}
    parts = [
        Part(shards.folder, shards.done, numbers.get(file.get("language", ""), 0))
        for shards, file in zip(filled, files, strict=True)
    ]
    return Cache(parts, texts.hidden()), digest_of([shards.key for shards in filled])


def fill_all(
    root: Path,
    about: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    streams: Sequence[Callable[[], Iterator[Item]]],
    label: Callable[[list[Item], tqdm[Any]], Arrays],
    title: str,
    progress: bool,
    ranks: Ranks,
) -> list[Shards]:
    """Make the shards of each file that are not there yet.

    Args:
        root: cache folder.
        about: what the shards of all files depend on.
        files: entries of ``run.json``'s ``data``, with ``content`` as for :func:`build_cache`.
        streams: what is in each of them.
        label: arrays of a shard.
        title: of the bar, which also names the file.
        progress: show a bar, in pieces.
        ranks: the processes that do it together.
    """
    filled = []
    for file, stream in zip(files, streams, strict=True):
        own = {"role": file["role"], "file": file["digest"], "format": file["format"]}
        own["content"] = file.get("content", [])
        shards = Shards(root, {**about, **own}, ranks)
        if not shards.complete:
            name = "/".join(Path(file["name"]).parts[-2:])
            shards.fill(
                stream(),
                label,
                title=f"{title}, {name}",
                expected=file["sentences"],
                progress=progress,
            )
        filled.append(shards)
    return filled


def _label(
    teacher: Labeller,
    sentences: Sequence[Sentence],
    max_length: int,
    ask: Ask | None,
    bar: tqdm[Any],
) -> Arrays:
    """The arrays of one shard."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []  # ids, targets of each run
    order: list[int] = []  # which of ``sentences`` each run is of
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
            targets = piece_targets(group, words, teacher.labels)
        for sentence in range(len(group)):
            for start, stop in split_points(group, sentence, max_length):
                run = slice(start, stop)
                parts.append((group.ids[run], targets[run]))
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
        "targets": np.concatenate([*(part[1] for part in parts), empty]).astype(np.int16),
        "logits": logits,
        **({} if hidden is None else {"representation": hidden}),
        "fingerprints": fingerprints(sentences)[np.array(order, np.intp)],
    }


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
