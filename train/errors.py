"""What kind of mistakes a tagger makes: entities paired, partial matches, types confused.

Every gold entity is paired with at most one predicted entity that shares a word with it, the best
first: same type and borders, same borders, same type, then the largest overlap. The pairs fall into
the classes of :data:`KINDS`, from which the four scores of SemEval-2013 task 9 follow
(Segura-Bedmar et al.; the counts are those of MUC-5: correct, incorrect, partial, missing,
spurious).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from xdistil_fast.labels import Scheme, Span, outside_of, spans
from xdistil_fast.tagger import Tagger

EXACT = "exact"
BORDERS = "borders wrong"
TYPE = "type wrong"
BOTH = "both wrong"
MISSED = "missed"
SPURIOUS = "spurious"
KINDS = (EXACT, BORDERS, TYPE, BOTH, MISSED, SPURIOUS)

Tags: TypeAlias = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A gold entity and the predicted one that goes with it, or one of them alone.

    Attributes:
        sentence: index of the sentence.
        gold: the right entity; None if there is none here.
        predicted: the entity found; None if it was missed.
    """

    sentence: int
    gold: Span | None
    predicted: Span | None

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        if self.gold is None:
            return SPURIOUS
        if self.predicted is None:
            return MISSED
        if self.gold[1:] == self.predicted[1:]:
            return EXACT if self.gold.type == self.predicted.type else TYPE
        return BORDERS if self.gold.type == self.predicted.type else BOTH


@dataclass(frozen=True, slots=True)
class PartialScores:
    """Counts and scores of one way to compare, as SemEval-2013 defines them.

    Attributes:
        correct: pairs that agree.
        incorrect: pairs that do not.
        partial: pairs of which half counts.
        missed: gold entities without a partner.
        spurious: predicted entities without a partner.
    """

    correct: int
    incorrect: int
    partial: int
    missed: int
    spurious: int

    @property
    def precision(self) -> float:
        """0..100; 0 where nothing was predicted."""
        return self._share(self.correct + self.incorrect + self.partial + self.spurious)

    @property
    def recall(self) -> float:
        """0..100; 0 where there is nothing to find."""
        return self._share(self.correct + self.incorrect + self.partial + self.missed)

    @property
    def f1(self) -> float:
        """Harmonic mean of the two, 0..100."""
        total = self.precision + self.recall
        return 2.0 * self.precision * self.recall / total if total else 0.0

    def _share(self, total: int) -> float:
        return 100.0 * (self.correct + 0.5 * self.partial) / total if total else 0.0


def pair_entities(gold: Tags, predicted: Tags, scheme: Scheme = "IOB2") -> list[Pair]:
    """Pair the entities of both sides, sentence by sentence.

    Args:
        gold: right tags, one list of IOB2 tags a sentence.
        predicted: found tags, of the same lengths.
        scheme: of both.

    Returns:
        Every entity of either side in exactly one pair; sentences in order, and within one those
        with a gold entity first.

    Raises:
        ValueError: the sides differ in length, or a tag is not IOB2.
    """
    if len(gold) != len(predicted):
        raise ValueError(f"gold has {len(gold)} sentences and predicted {len(predicted)}")
    found: list[Pair] = []
    for index, (right, mine) in enumerate(zip(gold, predicted, strict=True)):
        if len(right) != len(mine):
            raise ValueError(
                f"sentence {index} has {len(right)} gold tags and {len(mine)} predicted ones"
            )
        found += _pair_sentence(index, spans(right, scheme), spans(mine, scheme))
    return found


def _pair_sentence(index: int, gold: list[Span], predicted: list[Span]) -> list[Pair]:
    candidates = sorted(
        (
            (right[1:] != mine[1:], right.type != mine.type, -shared, i, j)
            for i, right in enumerate(gold)
            for j, mine in enumerate(predicted)
            if (shared := min(right.end, mine.end) - max(right.start, mine.start)) > 0
        ),
    )
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for *_, i, j in candidates:
        if i not in partner and j not in taken:
            partner[i] = j
            taken.add(j)
    return [
        *(
            Pair(index, span, predicted[partner[i]] if i in partner else None)
            for i, span in enumerate(gold)
        ),
        *(Pair(index, None, span) for j, span in enumerate(predicted) if j not in taken),
    ]


def count_kinds(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many pairs are of each of :data:`KINDS`."""
    counts = Counter(pair.kind for pair in pairs)
    return {kind: counts[kind] for kind in KINDS}


def confusion(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """Gold type to what became of it, with counts.

    Returns:
        For each gold type, sorted, and for ``SPURIOUS``: how often it was found as each type
        (as itself only with the right borders), with ``BORDERS`` wrong, or ``MISSED``.
    """
    types = sorted({span.type for p in pairs for span in (p.gold, p.predicted) if span})
    table = {row: dict.fromkeys((*types, BORDERS, MISSED), 0) for row in (*types, SPURIOUS)}
    for pair in pairs:
        row = pair.gold.type if pair.gold else SPURIOUS
        column = pair.predicted.type if pair.predicted else MISSED
        table[row][BORDERS if pair.kind == BORDERS else column] += 1
    return table


def partial_scores(kinds: dict[str, int]) -> dict[str, PartialScores]:
    """The four scores of SemEval-2013.

    Args:
        kinds: see :func:`count_kinds`.

    Returns:
        ``strict`` (type and borders), ``exact`` (borders alone), ``partial`` (borders alone, an
        overlap counting half) and ``type`` (type alone, on any overlap).
    """
    exact, borders, kind, both, missed, spurious = (kinds[name] for name in KINDS)

    def scores(correct: int, incorrect: int, partial: int = 0) -> PartialScores:
        return PartialScores(correct, incorrect, partial, missed, spurious)

    return {
        "strict": scores(exact, borders + kind + both),
        "exact": scores(exact + kind, borders + both),
        "partial": scores(exact + kind, 0, borders + both),
        "type": scores(exact + borders, kind + both),
    }


@dataclass(frozen=True)
class Mistake:
    """A mistake and how often the same one was made.

    Attributes:
        pair: the surest of them.
        confidence: 0..1; of a predicted entity the mean over its words of the probability of
            their tags, of a missed one that of ``O``.
        count: mistakes with the same words and types.
    """

    pair: Pair
    confidence: float
    count: int


def surest_mistakes(
    tagger: Tagger,
    words: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]],
    pairs: Sequence[Pair],
    most: int,
) -> tuple[list[Mistake], list[Mistake]]:
    """The wrong entities and the missed ones that the model is surest of.

    Args:
        tagger: the model.
        words: of all sentences.
        tags: that it gave them.
        pairs: see :func:`pair_entities`.
        most: of each of the two.
    """
    wrong = [pair for pair in pairs if pair.kind != EXACT]
    places = sorted({pair.sentence for pair in wrong})
    rows = dict(
        zip(places, tagger.word_probabilities([list(words[i]) for i in places]), strict=True)
    )
    names = tagger.labels
    outside = outside_of(names)
    groups: dict[tuple[Any, ...], list[tuple[float, int, Pair]]] = {}
    for order, pair in enumerate(wrong):
        found, row = pair.predicted, rows[pair.sentence]
        if found is None:
            assert pair.gold is not None
            # Of plain tags a word may have none only where `O` is one of them.
            none = names.index(outside) if outside in names else None
            shares = [0.0 if none is None else float(row[at, none]) for at in range(*pair.gold[1:])]
        else:
            mine = tags[pair.sentence]
            # Nor has a word without pieces a tag of theirs.
            known = [(at, mine[at]) for at in range(*found[1:])]
            shares = [
                float(row[at, names.index(tag)]) if tag in names else 0.0 for at, tag in known
            ]
        key = tuple(
            span and (span.type, *words[pair.sentence][span.start : span.end])
            for span in (pair.gold, found)
        )
        groups.setdefault(key, []).append((sum(shares) / len(shares), -order, pair))
    mistakes = [
        Mistake(best[2], best[0], len(group))
        for group in groups.values()
        for best in [max(group, key=lambda entry: entry[:2])]
    ]
    mistakes.sort(key=lambda mistake: -mistake.confidence)
    missed = [m for m in mistakes if m.pair.kind == MISSED]
    return [m for m in mistakes if m.pair.kind != MISSED][:most], missed[:most]
