"""The sentences of a run as one stream: labelled files, transfer text, changed copies."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from xdistil_fast.model_io import file_digest
from xdistil_fast.train import runs
from xdistil_fast.train.augmentation import Augmenter
from xdistil_fast.train.corpora import (
    Corpus,
    Sentence,
    read_transfer,
    split_language,
)


@dataclass(frozen=True)
class Texts:
    """The sentences of a run: all of ``train``, then the transfer text.

    A transfer sentence that came before, in ``train`` or in the transfer text, is left out, and so
    is one of ``dev``. Sentences are compared without white space, so that running text equals its
    tokenised form.

    Attributes:
        train: labelled files.
        dev: labelled files whose sentences the transfer text must not show.
        transfer: paths of unlabelled files, perhaps with languages (``de=FILE``).
        augmenter: makes what adds changed copies behind each sentence, anew for each pass.
    """

    train: tuple[Corpus, ...]
    dev: tuple[Corpus, ...] = ()
    transfer: tuple[str, ...] = ()
    augmenter: Callable[[], Augmenter] | None = None

    def __iter__(self) -> Iterator[Sentence]:
        seen = {fingerprint(s) for corpus in (*self.dev, *self.train) for s in corpus.sentences}
        augmenter = None if self.augmenter is None else self.augmenter()

        def new(sentences: Iterable[Sentence]) -> Iterator[Sentence]:
            for sentence in sentences:
                mark = fingerprint(sentence)
                if mark not in seen:
                    seen.add(mark)
                    yield sentence

        labelled = (sentence for corpus in self.train for sentence in corpus.sentences)
        for sentence in itertools.chain(labelled, new(read_transfer(self.transfer))):
            yield sentence
            if augmenter is not None:
                yield from new(augmenter.copies(sentence))

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
        entries = []
        for path in self.transfer:
            sentences = words = 0
            for sentence in read_transfer([path]):
                sentences += 1
                words += len(sentence.words or (sentence.text or "").split())
            language, file = split_language(path)
            entries.append(
                {
                    "role": "transfer",
                    "name": runs.portable(str(file)),
                    "digest": file_digest(file),
                    "sentences": sentences,
                    "words": words,
                    **({"language": language} if language else {}),
                }
            )
        return entries


def fingerprint(sentence: Sentence) -> int:
    """64 bits of a hash: a set of them costs a tenth of the texts."""
    joined = "".join(sentence.words or (sentence.text or "").split())
    joined = "".join(joined.split())
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")
