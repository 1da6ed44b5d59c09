"""A teacher's outputs on texts, for text classification; folders as in `train/cache.py`.

A text of more than ``max_length`` pieces is cut at word borders and goes on as a further text with
the same class, so each is a row here. A shard of S texts and P pieces:

    ids         [P] int32      the teacher's piece ids, no special tokens
    cu_seqlens  [S + 1] int32  where the texts start; ends at P
    targets     [S] int16      class, IGNORED where there is none
    logits      [S, C] float16 the teacher's; C = 0 where only the labels are trained on
    representation  [S, D] float16  of a hidden layer at the first token ([CLS]); not there where
        none is asked for
    fingerprints  [S] uint64   of the text, or of that which it was cut from
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from xdistil_fast.train.alignment import IGNORED, align_text, split_points
from xdistil_fast.train.cache import Batch, Cache, Part, fill_all, half
from xdistil_fast.train.corpora import Sentence, detect_format, read_transfer
from xdistil_fast.train.distributed import Ranks
from xdistil_fast.train.document_teacher import DocumentTeacher
from xdistil_fast.train.documents import Documents
from xdistil_fast.train.representation import Components, FloatArray, principal_components
from xdistil_fast.train.shards import Arrays, digest_of
from xdistil_fast.train.texts import Texts, fingerprints, first_ones

_FORMAT = 2


@dataclass(frozen=True)
class LabelledTexts:
    """The texts of a run: all of ``train`` with their classes, then the transfer text.

    What is left out of the transfer text is as in :class:`~xdistil_fast.train.texts.Texts`.

    Attributes:
        train: labelled files.
        dev: labelled files whose texts the transfer text must not show.
        transfer: paths of unlabelled files.
    """

    train: tuple[Documents, ...]
    dev: tuple[Documents, ...] = ()
    transfer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses columns: those of words are no texts, and those of texts have a class each."""
        for path in self.transfer:
            if detect_format(Path(path), labelled=False) == "conll":
                raise ValueError(
                    f"{path}: transfer text of a classifier cannot be columns; allowed: one text a "
                    "line, JSON lines or Parquet with text"
                )

    def streams(self) -> list[Callable[[], Iterator[tuple[str, str | None]]]]:
        """The texts of each file with their classes: of ``train``, then ``transfer``."""

        def labelled(documents: Documents) -> Iterator[tuple[str, str | None]]:
            return zip(documents.texts, documents.labels, strict=True)

        def unlabelled(path: str) -> Iterator[tuple[str, str | None]]:
            for sentence in first_ones(read_transfer([path]), set()):
                yield sentence.text or " ".join(sentence.words or ()), None

        return [
            *(functools.partial(labelled, documents) for documents in self.train),
            *(functools.partial(unlabelled, path) for path in self.transfer),
        ]

    def hidden(self) -> npt.NDArray[np.uint64]:
        """Fingerprints of the texts that the transfer text must not show: dev's and train's."""
        return _fingerprints(
            text for documents in (*self.dev, *self.train) for text in documents.texts
        )

    def describe(self) -> list[dict[str, Any]]:
        """Read all transfer text once; entries of ``run.json``'s ``data`` for its files."""
        return Texts((), (), self.transfer).describe()


class DocumentCache(Cache):
    """Finished shards of texts: a row of targets, logits and representations is a text's."""

    components: Components | None = None

    def batch(self, sentences: npt.NDArray[np.integer]) -> Batch:
        """Texts by number, in the order given; [B], [B, C] and [B, R] in place of the pieces'."""
        ids: list[npt.NDArray[Any]] = [np.zeros(0, np.int32)]
        names = ("targets", "logits", *(["representation"] if self.width else []))
        rows: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        cu_seqlens = np.zeros(len(sentences) + 1, np.int32)
        for row, (shard, local) in enumerate(self.locate(sentences)):
            start, stop = shard["cu_seqlens"][local : local + 2]
            cu_seqlens[row + 1] = cu_seqlens[row] + stop - start
            ids.append(shard["ids"][start:stop])
            for name, values in rows.items():
                values.append(shard[name][local])
        joined = {name: np.stack(values) for name, values in rows.items()}
        pieces = np.concatenate(ids)
        states = np.zeros((len(sentences), 0), np.float32)
        if self.width:
            states = joined["representation"].astype(np.float32)
        if self.components is not None:
            states = self.components(states)
        return Batch(
            ids=pieces,
            cu_seqlens=cu_seqlens,
            targets=joined["targets"].astype(np.int64),
            logits=joined["logits"].astype(np.float32),
            representation=states,
        )

    @staticmethod
    def _has_target(shard: Arrays) -> npt.NDArray[np.bool_]:
        return np.asarray(shard["targets"] != IGNORED)

    def reduce(self, size: int) -> None:
        """Give representations in ``size`` principal components from now on.

        Raises:
            ValueError: they have fewer elements.
        """

        def states(add: Callable[[FloatArray], FloatArray]) -> None:
            for shard, kept in self.shards():
                add(shard["representation"][kept].astype(np.float32))

        self.components = principal_components(states, size)
        self.width = size


def build_document_cache(
    root: Path,
    teacher: DocumentTeacher,
    texts: LabelledTexts,
    files: Sequence[Mapping[str, Any]],
    *,
    max_length: int = 256,
    soft: bool = True,
    layer: int | None = None,
    batch_pieces: int = 8192,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> tuple[DocumentCache, str]:
    """Label all texts with the teacher, or take up what was labelled before.

    Args:
        root: cache folder, made where missing.
        teacher: gives labels, tokeniser and logits.
        texts: streamed, never all in memory.
        files: entries of ``run.json``'s ``data`` for the files of ``texts``, those of ``train``
            before those of ``transfer``; ``content`` is what decides the texts of a file beside its
            bytes.
        max_length: most pieces of a text; longer ones are cut at word borders.
        soft: whether the logits are wanted.
        layer: of the hidden states that are wanted, from 1; None for none.
        batch_pieces: pieces the teacher is given at once.
        progress: show a bar, in pieces.
        ranks: the processes that do it together; this one alone if None.

    Returns:
        The cache and its key.

    Raises:
        ValueError: no text with pieces, or outputs that are not finite or exceed float16.
        OSError: a full disk, say; what is finished stays.
    """
    max_length = min(max_length, teacher.max_pieces)
    about = {
        "format": _FORMAT,
        "task": "classification",
        "teacher": teacher.digest(),
        "precision": teacher.precision,
        "max_length": max_length,
        "soft": soft,
        "layer": layer,
    }
    asked = soft or layer is not None
    index = {label: number for number, label in enumerate(teacher.labels)}

    def label(chunk: list[tuple[str, str | None]], bar: tqdm[Any]) -> Arrays:
        aligned = align_text(teacher.tokenizer, [text for text, _ in chunk])
        marks = _fingerprints(text for text, _ in chunk)
        ids: list[npt.NDArray[np.int32]] = []
        targets: list[int] = []
        order: list[int] = []
        for number, (_, name) in enumerate(chunk):
            for start, stop in split_points(aligned, number, max_length):
                ids.append(aligned.ids[start:stop])
                targets.append(IGNORED if name is None else index[name])
                order.append(number)
        arrays = _arrays(ids, targets, teacher if asked else None, layer, batch_pieces, bar)
        return {**arrays, "fingerprints": marks[np.array(order, np.intp)]}

    title = "teacher labels" if asked else "pieces"
    filled = fill_all(root, about, files, texts.streams(), label, title, progress, ranks or Ranks())
    cache = DocumentCache([Part(s.folder, s.done) for s in filled], texts.hidden())
    return cache, digest_of([shards.key for shards in filled])


def _fingerprints(texts: Iterable[str]) -> npt.NDArray[np.uint64]:
    return fingerprints(Sentence(text=text) for text in texts)


def _arrays(
    ids: Sequence[npt.NDArray[np.int32]],
    targets: Sequence[int],
    teacher: DocumentTeacher | None,
    layer: int | None,
    batch_pieces: int,
    bar: tqdm[Any],
) -> Arrays:
    """The arrays of one shard."""
    total = sum(map(len, ids))
    logits = np.zeros((len(ids), 0), np.float16)
    further: Arrays = {}
    if teacher is not None and ids:
        mean = total / len(ids)
        values, states = teacher.document_outputs(
            ids, batch_pieces, lambda n: bar.update(round(n * mean)), layer=layer
        )
        logits = half("logits", [values])
        if layer is not None:
            further["representation"] = half("hidden states", [states])
    else:
        bar.update(total)
    cu_seqlens = np.zeros(len(ids) + 1, np.int32)
    np.cumsum([len(part) for part in ids], out=cu_seqlens[1:])
    return {
        "ids": np.concatenate([*ids, np.zeros(0, np.int32)]).astype(np.int32),
        "cu_seqlens": cu_seqlens,
        "targets": np.array(targets, np.int16),
        "logits": logits,
        **further,
    }
