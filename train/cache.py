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
set: about 70 bytes a different sentence) and what the Trainer knows of each sentence (some 20).
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
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

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
from xdistil_fast.train.corpora import Sentence, file_digest
from xdistil_fast.train.distributed import Ranks
from xdistil_fast.train.representation import (
    Components,
    Representation,
    principal_components,
    spread,
    stored_components,
)
from xdistil_fast.train.texts import Texts

SHARD_SENTENCES = 4096
MANIFEST = "manifest.json"
_FORMAT = 1
_FLOAT16_MAX = float(np.finfo(np.float16).max)

T = TypeVar("T")
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
        """Which sentences are of the labelled text, [N]: those whose first piece has a target."""
        parts = [shard["targets"][shard["cu_seqlens"][:-1]] != IGNORED for shard in self.shards()]
        return np.concatenate([np.zeros(0, bool), *parts])

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
        "shard_sentences": SHARD_SENTENCES,
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


class Shards:
    """The shards of a cache folder as they are made.

    Attributes:
        key: SHA-256 of what the shards depend on.
        folder: where they lie.
        manifest: content of the manifests that were found.
        done: entries of the shards that are finished and intact, by name.
        complete: whether these are all.
        ranks: the processes that make them.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        """Find what is there already.

        Args:
            root: cache folder, made where missing.
            about: all that the shards depend on; plain JSON values.
            ranks: the processes that make them together; this one alone if None.
        """
        self.ranks = ranks or Ranks()
        self.key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder = root / self.key[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest = _read_manifests(self.folder)
        self._about = about
        found: dict[str, dict[str, Any]] = self.manifest["shards"]
        self.done = {
            name: entry for name, entry in found.items() if _intact(self.folder / name, entry)
        }
        self.ranks.wait()  # all have read before anybody writes
        self.complete = bool(self.manifest.get("complete")) and len(self.done) == len(found)
        if damaged := sorted(found.keys() - self.done.keys()):
            tqdm.write(f"{self.folder}: damaged, made anew: {', '.join(damaged)}", file=sys.stderr)

    def fill(
        self,
        items: Iterable[T],
        label: Callable[[list[T], tqdm[Any]], Arrays],
        *,
        title: str,
        extra: Mapping[str, Any] = MappingProxyType({}),
        expected: int | None = None,
        progress: bool = True,
    ) -> None:
        """Make the shards that are missing.

        Args:
            items: sentences or texts; streamed.
            label: arrays of a shard from its items; moves the bar on by their pieces.
            title: of the bar.
            extra: further entries of the manifest.
            expected: number of items, about; lets the bar guess when it will be full.
            progress: show a bar, in pieces.

        Raises:
            ValueError: there is no piece in any of the items.
            OSError: a full disk, say; what is finished stays.
        """
        ranks, entry = self.ranks, {"about": self._about, **extra}
        # Where several work, each writes down what was there before as well: nothing is lost when
        # one manifest replaces another.
        own_manifest = self.folder / (
            MANIFEST if ranks.size == 1 else f"manifest-{ranks.rank}.json"
        )
        count = 0
        with tqdm(
            desc=title,
            unit="piece",
            unit_scale=True,
            disable=None if progress else True,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            for number, chunk in enumerate(_chunks(items, SHARD_SENTENCES)):
                name = f"shard-{number:05d}.safetensors"
                if name in self.done:
                    bar.update(self.done[name]["pieces"])
                elif number % ranks.size == ranks.rank:
                    self.done[name] = _write_shard(self.folder / name, label(chunk, bar))
                    self.done = dict(sorted(self.done.items()))
                    runs.write_json(own_manifest, {**entry, "shards": self.done})
                else:
                    continue
                count += len(chunk)
                if expected:
                    bar.total = round(bar.n * max(1.0, expected / ranks.size / count))
        ranks.wait()
        if ranks.size > 1:
            self.done = _read_manifests(self.folder)["shards"]
        ranks.wait()
        if not sum(shard["pieces"] for shard in self.done.values()):
            raise ValueError(
                "train and transfer: the tokeniser makes no piece of any of these words"
            )
        if ranks.first:
            whole = {**entry, "complete": True, "shards": self.done}
            runs.write_json(self.folder / MANIFEST, whole)
            for file in self.folder.glob("manifest-*.json"):
                file.unlink()
        ranks.wait()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
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


def _read_manifests(folder: Path) -> dict[str, Any]:
    """All manifests as one; one that is missing or damaged counts as empty.

    What it would have named is made anew, as are shards in other components than the first one's.
    """
    merged: dict[str, Any] = {"shards": {}}
    for path in [folder / MANIFEST, *sorted(folder.glob("manifest-*.json"))]:
        try:
            manifest = json.loads(path.read_text("utf-8"))
            shards = dict(manifest.get("shards", {}))
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            continue
        if manifest.get("components") == merged.setdefault(
            "components", manifest.get("components")
        ):
            merged["shards"] |= shards
            merged["complete"] = merged.get("complete") or manifest.get("complete")
    return {**merged, "shards": dict(sorted(merged["shards"].items()))}


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
