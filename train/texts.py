"""The sentences of a run, file by file: labelled files, transfer text, changed copies."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xdistil_fast.model_io import file_digest
from xdistil_fast.train import runs
from xdistil_fast.train.augmentation import Augmenter
from xdistil_fast.train.corpora import (
    Corpus,
    Sentence,
    detect_format,
    read_transfer,
    split_language,
)


@dataclass(frozen=True)
class Texts:
    """The sentences of a run: all of ``train``, then the transfer text.

    A transfer sentence that came before, in ``train`` or in the transfer text, is not trained on,
    and neither is one of ``dev``. Sentences are compared by their :func:`fingerprint`. The teacher
    labels each file for itself: only what a file repeats is left out of its stream.

    Attributes:
        train: labelled files.
        dev: labelled files whose sentences the transfer text must not show.
        transfer: paths of unlabelled files, perhaps with languages (``de=FILE``).
        augmenter: makes what adds changed copies behind each sentence, anew for each file.
    """

    train: tuple[Corpus, ...]
    dev: tuple[Corpus, ...] = ()
    transfer: tuple[str, ...] = ()
    augmenter: Callable[[], Augmenter] | None = None

    def streams(self) -> list[Callable[[], Iterator[Sentence]]]:
        """The sentences of each file with their changed copies: of ``train``, then ``transfer``.

        Of unlabelled sentences that are the same the first is there.
        """

        def labelled(corpus: Corpus) -> Iterator[Sentence]:
            return self._with_copies(corpus.sentences, set(map(fingerprint, corpus.sentences)))

        def unlabelled(path: str) -> Iterator[Sentence]:
            seen: set[int] = set()
            return self._with_copies(first_ones(read_transfer([path]), seen), seen)

        return [
            *(functools.partial(labelled, corpus) for corpus in self.train),
            *(functools.partial(unlabelled, path) for path in self.transfer),
        ]

    def _with_copies(self, sentences: Iterable[Sentence], seen: set[int]) -> Iterator[Sentence]:
        if self.augmenter is None:
            yield from sentences
            return
        augmenter = self.augmenter()
        dev = {fingerprint(sentence) for corpus in self.dev for sentence in corpus.sentences}
        for sentence in sentences:
            yield sentence
            # A copy of one of dev would show nearly all of it, and is not known by its fingerprint.
            if fingerprint(sentence) not in dev:
                yield from first_ones(augmenter.copies(sentence), seen)

    def hidden(self) -> npt.NDArray[np.uint64]:
        """Fingerprints of the sentences that the transfer text must not show: dev's and train's."""
        return fingerprints(s for corpus in (*self.dev, *self.train) for s in corpus.sentences)

    @property
    def languages(self) -> list[str]:
        """Languages of the files, sorted; empty where none has one."""
        found = {corpus.language for corpus in self.train}
        found |= {split_language(path)[0] for path in self.transfer}
        return sorted(found) if any(found) else []

    def describe(self) -> list[dict[str, Any]]:
        """Read all transfer text once; entries of ``run.json``'s ``data`` for its files.

        Raises:
            ValueError, OSError: a file that cannot be read to its end.
        """
        return [describe_text(path, "transfer") for path in self.transfer]


def describe_text(path: str, role: str) -> dict[str, Any]:
    """Read an unlabelled file once; its entry of ``run.json``'s ``data``.

    Args:
        path: of the file, perhaps with its language (``de=FILE``).
        role: what the run takes it for.

    Raises:
        ValueError, OSError: a file that cannot be read to its end.
    """
    sentences = words = 0
    for sentence in read_transfer([path]):
        sentences += 1
        words += len(sentence.words or (sentence.text or "").split())
    language, file = split_language(path)
    return {
        "role": role,
        "name": runs.portable(str(file)),
        "digest": file_digest(file),
        "format": detect_format(file, labelled=False),
        "sentences": sentences,
        "words": words,
        **({"language": language} if language else {}),
    }


def first_ones(sentences: Iterable[Sentence], seen: set[int]) -> Iterator[Sentence]:
    """Sentences whose fingerprint is not among those seen, to which it is added."""
    for sentence in sentences:
        mark = fingerprint(sentence)
        if mark not in seen:
            seen.add(mark)
            yield sentence


def fingerprints(sentences: Iterable[Sentence]) -> npt.NDArray[np.uint64]:
    """Fingerprint of each sentence."""
    return np.fromiter(map(fingerprint, sentences), np.uint64)


def fingerprint(sentence: Sentence) -> int:
    """64 bits of a hash of a sentence without white space: running text equals its words."""
    joined = "".join(sentence.words or (sentence.text or "").split())
    joined = "".join(joined.split())
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")
