"""The teacher's outputs on disk: made once, resumable, read at random.

A cache folder holds one folder a key, the SHA-256 of everything the logits depend on: the
teacher, the bytes of all texts, the settings of the cut into pieces. In it lie shards of about
4096 sentences (``shard-00000.safetensors``) and ``manifest.json``, which names each finished
shard with the digest of its bytes. A run that was killed goes on behind its last shard; a shard
that does not match its digest is made anew.

A shard of S sentences and P pieces:

    ids         [P] int32    the teacher's piece ids, no special tokens
    cu_seqlens  [S + 1] int32  where the sentences start; ends at P
    first       [P] uint8    1 for the first piece of a word
    targets     [P] int16    gold labels, IGNORED where there is none
    logits      [P, C] float16  the teacher's; C = 0 where only the labels are trained on
    representation  [P, R] float16  of a hidden layer of the teacher; not there where none is asked

Beside shards with reduced representations lies ``components.safetensors``, the principal components
they are given in (:mod:`~xdistil_fast.train.representation`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from safetensors.numpy import save
from tqdm import tqdm

from xdistil_fast.train import runs
from xdistil_fast.train.alignment import (
    IGNORED,
    Alignment,
    align,
    piece_targets,
    split_points,
    tag_ids,
)
from xdistil_fast.train.corpora import Corpus, Sentence, file_digest, read_transfer
from xdistil_fast.train.representation import (
    Components,
    Representation,
    principal_components,
    spread,
    stored_components,
)

SHARD_SENTENCES = 4096
MANIFEST = "manifest.json"
_FORMAT = 1
_FLOAT16_MAX = float(np.finfo(np.float16).max)

Float32Array = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]
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
class Texts:
    """The sentences of a run: all of ``train``, then the transfer text.

    A transfer sentence that came before, in ``train`` or in the transfer text, is left out, and so
    is one of ``dev``. Sentences are compared without white space, so that running text equals its
    tokenised form.

    Attributes:
        train: labelled files.
        dev: labelled files whose sentences the transfer text must not show.
        transfer: paths of unlabelled files.
    """

    train: tuple[Corpus, ...]
    dev: tuple[Corpus, ...] = ()
    transfer: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Sentence]:
        seen = {_fingerprint(s) for corpus in (*self.dev, *self.train) for s in corpus.sentences}
        for corpus in self.train:
            yield from corpus.sentences
        for sentence in read_transfer(self.transfer):
            mark = _fingerprint(sentence)
            if mark not in seen:
                seen.add(mark)
                yield sentence

    def describe(self) -> list[dict[str, Any]]:
        """Read all transfer text once; entries of ``run.json``'s ``data`` for its files.

        Raises:
            ValueError, OSError: a file that cannot be read to its end.
        """
        entries = []
        for path in self.transfer:
            sentences = words = 0
            for sentence in read_transfer([path]):
                sentences += 1
                words += len(sentence.words or (sentence.text or "").split())
            entries.append(
                {
                    "role": "transfer",
                    "name": runs.portable(path),
                    "digest": file_digest(path),
                    "sentences": sentences,
                    "words": words,
                }
            )
        return entries


def _fingerprint(sentence: Sentence) -> int:
    """64 bits of a hash: a set of them costs a tenth of the texts."""
    joined = "".join(sentence.words or (sentence.text or "").split())
    joined = "".join(joined.split())
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")


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
        self._map = functools.lru_cache(maxsize=512)(_map_shard)
        first = self._map(self._paths[0]) if self._paths else {}
        self.width = first["representation"].shape[1] if "representation" in first else 0

    def batch(self, sentences: npt.NDArray[np.integer]) -> Batch:
        """Sentences by number, in the order given."""
        names = ("ids", "first", "targets", "logits", *(["representation"] if self.width else []))
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        cu_seqlens = np.zeros(len(sentences) + 1, np.int32)
        homes = np.searchsorted(self._first, sentences, side="right") - 1
        for row, (home, sentence) in enumerate(zip(homes, sentences, strict=True)):
            shard = self._map(self._paths[home])
            local = sentence - self._first[home]
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
        for path in self._paths:
            shard = self._map(path)
            # No sentence is empty, which reduceat would not stand.
            known = shard["targets"] != IGNORED
            parts.append(np.logical_or.reduceat(known, shard["cu_seqlens"][:-1]))
        return np.concatenate(parts)

    def piece_counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """How often each of the teacher's pieces occurs, [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for path in self._paths:
            counts += np.bincount(self._map(path)["ids"], minlength=vocab_size)
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
        "shard_sentences": SHARD_SENTENCES,
    }
    if representation is not None:
        about["representation"] = dataclasses.asdict(representation)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    folder = root / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder / MANIFEST)
    done: dict[str, dict[str, Any]] = manifest.get("shards", {})
    good = {name for name, entry in done.items() if _intact(folder / name, entry)}
    if manifest.get("complete") and len(good) == len(done):
        return Cache(folder, done), key
    extra: dict[str, Any] = {}
    reduce = None
    if representation is not None and representation.size:
        reduce, extra["components"] = stored_components(
            folder, lambda: _components(teacher, texts, representation, max_length, batch_pieces)
        )
        if extra["components"] != manifest.get("components"):
            done, good = {}, set()  # shards in other components are of no use beside these

    def ask(
        ids: list[npt.NDArray[Any]], bar: Callable[[int], object]
    ) -> tuple[list[Float32Array], list[Float32Array]]:
        if representation is None:
            return teacher.logits(ids, batch_pieces, bar), []
        return teacher.outputs(ids, batch_pieces, bar, layer=representation.layer, reduce=reduce)

    if damaged := sorted(set(done) - good):
        tqdm.write(f"{folder}: damaged, made anew: {', '.join(damaged)}", file=sys.stderr)
    done = {name: done[name] for name in sorted(good)}
    sentences = 0
    asked = soft or representation is not None
    with tqdm(
        desc="teacher labels" if asked else "pieces",
        unit="piece",
        unit_scale=True,
        disable=None if progress else True,
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        for number, chunk in enumerate(_chunks(texts, SHARD_SENTENCES)):
            name = f"shard-{number:05d}.safetensors"
            if name not in good:
                arrays = _label(teacher, chunk, max_length, pieces, ask if asked else None, bar)
                done[name] = _write_shard(folder / name, arrays)
                done = dict(sorted(done.items()))
                runs.write_json(folder / MANIFEST, {"about": about, **extra, "shards": done})
            else:
                bar.update(done[name]["pieces"])
            sentences += len(chunk)
            if expected:
                bar.total = round(bar.n * max(1.0, expected / sentences))
    if not sum(entry["pieces"] for entry in done.values()):
        raise ValueError("train and transfer: the tokeniser makes no piece of any of these words")
    runs.write_json(folder / MANIFEST, {"about": about, "complete": True, **extra, "shards": done})
    return Cache(folder, done), key


def _chunks(texts: Iterable[Sentence], size: int) -> Iterator[list[Sentence]]:
    chunk: list[Sentence] = []
    for sentence in texts:
        chunk.append(sentence)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _label(
    teacher: Labeller,
    sentences: Sequence[Sentence],
    max_length: int,
    pieces: Literal["all", "first"],
    ask: Ask | None,
    bar: tqdm[Any],
) -> Arrays:
    """The arrays of one shard."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []  # ids, first, targets of each run
    # Sentences of words and sentences of text are tokenised in different ways.
    worded = [s for s in sentences if s.words is not None]
    running = [s.text or "" for s in sentences if s.words is None]
    labelled = [s for s in worded if s.tags is not None]
    plain = [s for s in worded if s.tags is None]
    for group, tags in (
        (align(teacher.tokenizer, [s.words or () for s in labelled]), labelled),
        (align(teacher.tokenizer, [s.words or () for s in plain]), None),
        (align_text(teacher.tokenizer, running), None),
    ):
        targets = np.full(len(group.ids), IGNORED, np.int64)
        if tags is not None:
            words = tag_ids([s.tags or () for s in tags], teacher.labels)
            targets = piece_targets(group, words, teacher.labels, pieces)
        first = np.zeros(len(group.ids), np.uint8)
        first[group.first_piece[group.first_piece >= 0]] = 1
        for sentence in range(len(group)):
            for start, stop in split_points(group, sentence, max_length):
                run = slice(start, stop)
                parts.append((group.ids[run], first[run], targets[run]))
    ids = [part[0] for part in parts]
    total = sum(map(len, ids))
    logits = np.zeros((total, 0), np.float16)
    hidden = None
    if ask is not None and ids:
        lengths = total / len(ids)
        values, states = ask(ids, lambda n: bar.update(round(n * lengths)))
        logits = _half("logits", values)
        hidden = _half("hidden states", states) if states else None
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
    }


def _half(name: str, parts: Sequence[Float32Array]) -> npt.NDArray[np.float16]:
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


def align_text(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Alignment:
    """Tokenise running text; a word is what the tokeniser's pre-tokeniser takes for one."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    cu_pieces = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(encoding.ids) for encoding in encodings], out=cu_pieces[1:])
    ids = np.array([i for encoding in encodings for i in encoding.ids], np.int32)
    # A piece without a word (an added token that stands in the text) is a word by itself.
    local = np.array(
        [-1 if w is None else w for encoding in encodings for w in encoding.word_ids], np.int64
    )
    begins = np.ones(len(ids), bool)
    begins[1:] = (local[1:] != local[:-1]) | (local[1:] < 0)
    begins[cu_pieces[:-1][np.diff(cu_pieces) > 0]] = True
    first_piece = np.flatnonzero(begins)
    return Alignment(
        ids=ids,
        cu_pieces=cu_pieces,
        word_of_piece=np.cumsum(begins) - 1,
        cu_words=np.searchsorted(first_piece, cu_pieces),
        first_piece=first_piece,
    )


def _write_shard(path: Path, arrays: Arrays) -> dict[str, Any]:
    """Write beside and rename; the shard's entry of the manifest."""
    blob = save(arrays)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(blob)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return {
        "sentences": len(arrays["cu_seqlens"]) - 1,
        "pieces": len(arrays["ids"]),
        "bytes": len(blob),
        "digest": hashlib.sha256(blob).hexdigest(),
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest; empty where there is none or it is damaged, and the shards are made anew."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _intact(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        same_size = path.stat().st_size == int(entry["bytes"])
        return same_size and file_digest(path) == str(entry["digest"])
    except FileNotFoundError:
        return False


def _map_shard(path: Path) -> Arrays:
    """Arrays of a safetensors file as views of its mapped bytes: nothing is read here."""
    mapped = np.memmap(path, np.uint8, "r")
    begin = 8 + int(mapped[:8].view("<u8")[0])
    header = json.loads(mapped[8:begin].tobytes())
    types = {"I32": "<i4", "I16": "<i2", "U8": "u1", "F16": "<f2"}
    return {
        name: mapped[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
        .view(types[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
