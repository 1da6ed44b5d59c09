"""Real text for the benchmarks: files given on the command line, or a few sentences of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xdistil_fast.commands.bench import SENTENCES, read_texts

Tagged = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Texts:
    """Texts and what to call them.

    The texts are no part of what a result says of its parameters: they are other people's.
    """

    name: str
    texts: list[str] = field(repr=False)

    def sample(self, count: int) -> list[str]:
        """So many texts, evenly spread over all of them; fewer if there are fewer."""
        step = max(1.0, len(self.texts) / count)
        return [self.texts[int(i * step)] for i in range(min(count, len(self.texts)))]


def own_texts(count: int) -> Texts:
    """Our sentences over and over."""
    copies = -(-count // len(SENTENCES))
    return Texts("own sentences", (list(SENTENCES) * copies)[:count])


def corpus_texts(path: Path) -> Texts:
    """The texts of a file; words of a file that is split into words are joined by spaces."""
    names = path.resolve().parts[-3:]
    return Texts("/".join(names), read_texts(path))


def labelled(path: Path, count: int) -> Sequence[Tagged]:
    """The first sentences of a labelled file, none if it has no labels."""
    from xdistil_fast.train.corpora import read_labelled

    try:
        sentences = read_labelled(path).sentences[:count]
    except ValueError:
        return []
    return [(s.words or (), s.tags or ()) for s in sentences]
