"""More transfer text from little: changed copies of sentences, for the teacher to label.

Five changes, each with a number of copies a sentence; a fraction is a probability:

- ``swap``: every entity of a labelled sentence becomes another of its type from the training set
  (mention replacement: Dai and Adel, COLING 2020). Of plain tags, a word in ten becomes another of
  its tag (part-of-speech-guided replacement: Tang et al., 2019, arXiv 1903.12136).
- ``dropout``: each word goes with a probability of a tenth, one at least.
- ``mask``: each word becomes the teacher's mask piece with a probability of a tenth, one at least
  (masking: Tang et al.).
- ``crop``: a part without gaps, half the words or more (n-gram sampling: Tang et al.).
- ``join``: the sentence before, of the same language, and this one as one.

Copies have no labels: what a changed sentence means only the teacher can say. They are made as the
sentences stream by, from the seed and a sentence's number, so that the same run makes the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from xdistil_fast.labels import OUTSIDE, spans
from xdistil_fast.train.corpora import Corpus, Sentence

_SHARE = 0.1  # of the words that dropout, mask and swap of plain tags change
_SHORTEST = 4  # words of a sentence that crop takes parts of

Words = tuple[str, ...]


@dataclass(frozen=True)
class Augmentation:
    """Number of copies a sentence of each kind; see the module.

    Raises:
        ValueError: a number that is negative or above 100.
    """

    swap: float = 0.0
    dropout: float = 0.0
    mask: float = 0.0
    crop: float = 0.0
    join: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not good or not 0 <= value <= 100:
                raise ValueError(
                    f"augment: {field.name} is {value!r}; allowed: copies a sentence, 0 to 100"
                )

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """As :func:`parse_augmentation` reads it; "" for none."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ",".join(f"{name}={value:g}" for name, value in given if value)


def parse_augmentation(text: str) -> Augmentation:
    """Read ``swap=1,dropout=0.5``; "" is none.

    Raises:
        ValueError: an unknown kind, one named twice, or what is no number from 0 to 100.
    """
    kinds = [field.name for field in fields(Augmentation)]
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        if name not in kinds or name in found:
            twice = " twice" if name in found else ""
            raise ValueError(
                f"augment names {name!r}{twice}; allowed: {', '.join(kinds)}, each once"
            )
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(
                f"augment: {part.strip()!r} has no number; write it like {name}=1"
            ) from None
    return Augmentation(**found)


class Augmenter:
    """Makes the copies of a stream of sentences.

    Args:
        rates: how many of each kind.
        train: labelled files, whose mentions ``swap`` puts in; kept in memory.
        seed: of the run.
        mask: the teacher's mask piece, None where it has none.

    Raises:
        ValueError: ``mask`` copies are wanted and the teacher has no such piece.
    """

    def __init__(
        self, rates: Augmentation, train: Sequence[Corpus], seed: int, mask: str | None = None
    ) -> None:
        if rates.mask and mask is None:
            raise ValueError("augment: mask copies need a teacher whose tokeniser has a mask piece")
        self.rates, self.seed, self.mask = rates, seed, mask or ""
        self.plain = bool(train) and train[0].labelling == "tags"
        self.mentions = _mentions(train) if rates.swap else {}
        self._number = 0
        self._before: dict[str, Sentence] = {}

    def copies(self, sentence: Sentence) -> Iterator[Sentence]:
        """Changed copies of the next sentence of the stream, without labels."""
        generator = np.random.default_rng([self.seed, self._number, 2])
        self._number += 1
        before = self._before.get(sentence.language)
        if self.rates.join:
            self._before[sentence.language] = sentence
        # Running text is changed at its white space and stays running text.
        words = sentence.words or tuple((sentence.text or "").split())
        for kind in ("swap", "dropout", "mask", "crop", "join"):
            if kind == "swap" and sentence.tags is None:
                continue
            rate = getattr(self.rates, kind)
            count = math.floor(rate) + (generator.random() < rate % 1 if rate % 1 else 0)
            for _ in range(count):
                if kind == "join":
                    changed = _joined(before, sentence)
                elif kind == "swap":
                    changed = self._swap(sentence, generator)
                elif kind == "crop":
                    changed = _crop(words, generator)
                else:
                    changed = self._thin(words, generator, kind)
                if not changed or changed == words:
                    continue
                if sentence.words is None:
                    yield Sentence(text=" ".join(changed), language=sentence.language)
                else:
                    yield Sentence(words=changed, language=sentence.language)

    def _swap(self, sentence: Sentence, generator: np.random.Generator) -> Words:
        assert sentence.tags is not None
        assert sentence.words is not None
        out: list[str] = []
        done = 0
        for span in spans(sentence.tags, "tags" if self.plain else "IOB2"):
            known = self.mentions.get((sentence.language, span.type), [])
            if not known or (self.plain and generator.random() >= _SHARE):
                continue
            out += sentence.words[done : span.start]
            out += known[generator.integers(len(known))]
            done = span.end
        return (*out, *sentence.words[done:])

    def _thin(self, words: Words, generator: np.random.Generator, kind: str) -> Words:
        if len(words) < 2:
            return ()
        hit = generator.random(len(words)) < _SHARE
        hit[generator.integers(len(words))] = True
        if kind == "mask":
            return tuple(
                self.mask if out else word for word, out in zip(words, hit.tolist(), strict=True)
            )
        return tuple(word for word, out in zip(words, hit.tolist(), strict=True) if not out)


def _crop(words: Words, generator: np.random.Generator) -> Words:
    if len(words) < _SHORTEST:
        return ()
    length = int(generator.integers((len(words) + 1) // 2, len(words)))
    start = int(generator.integers(len(words) - length + 1))
    return words[start : start + length]


def _joined(before: Sentence | None, sentence: Sentence) -> Words:
    # Words and running text differ in their spaces and are not mixed.
    if before is None or (before.words is None) != (sentence.words is None):
        return ()
    if sentence.words is not None:
        return (*(before.words or ()), *sentence.words)
    return (before.text or "", sentence.text or "")


def _mentions(train: Sequence[Corpus]) -> dict[tuple[str, str], list[Words]]:
    """Different mentions of each type in each language, in the order they come."""
    found: dict[tuple[str, str], dict[Words, None]] = {}
    for corpus in train:
        for sentence in corpus.sentences:
            for span in spans(sentence.tags or (), corpus.labelling):
                if span.type != OUTSIDE and sentence.words is not None:
                    mention = sentence.words[span.start : span.end]
                    found.setdefault((sentence.language, span.type), {})[mention] = None
    return {key: list(mentions) for key, mentions in found.items()}
