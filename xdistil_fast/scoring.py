"""Strict word-level entity scores, the way ``conlleval`` counts.

An entity is right when its type and both its borders are right. A tag ``I-X`` that no open
entity of type X precedes opens an entity of its own, as in ``conlleval`` (Tjong Kim Sang,
CoNLL-2000), so scores of predictions that break IOB2 are comparable with published ones.

Of plain tags (parts of speech) every tagged word counts as an entity of one word. Where all words
have a tag, F1 is then the word accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from xdistil_fast.labels import Scheme, spans


@dataclass(frozen=True, slots=True)
class Counts:
    """Entities counted: in the gold tags, in the predicted tags, and in both.

    The properties are percentages, 0..100; a ratio of nothing to nothing is 0.
    """

    gold: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are right."""
        return 100.0 * self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the gold entities that were found."""
        return 100.0 * self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.gold + self.predicted
        return 200.0 * self.correct / total if total else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """The three percentages and the three counts; ``support`` is the number of gold ones."""
        return {
            "f1": self.f1,
            "precision": self.precision,
            "recall": self.recall,
            "support": self.gold,
            "predicted": self.predicted,
            "correct": self.correct,
        }


@dataclass(frozen=True, slots=True)
class Scores:
    """What :func:`score` returns: micro-averaged over all entities, and by type."""

    overall: Counts
    per_type: dict[str, Counts]
    accuracy: float
    sentences: int
    words: int

    @property
    def f1(self) -> float:
        """Overall F1, 0..100."""
        return self.overall.f1

    @property
    def precision(self) -> float:
        """Overall precision, 0..100."""
        return self.overall.precision

    @property
    def recall(self) -> float:
        """Overall recall, 0..100."""
        return self.overall.recall

    def to_dict(self) -> dict[str, object]:
        """Plain dict for JSON: overall figures, word accuracy, counts and ``per_type``."""
        return {
            **self.overall.to_dict(),
            "accuracy": self.accuracy,
            "sentences": self.sentences,
            "words": self.words,
            "per_type": {name: counts.to_dict() for name, counts in self.per_type.items()},
        }


def score(
    gold: Sequence[Sequence[str]], pred: Sequence[Sequence[str]], scheme: Scheme = "IOB2"
) -> Scores:
    """Compare predicted tags with gold tags, sentence by sentence.

    Args:
        gold: right tags, one list a sentence.
        pred: predicted tags, of the same lengths.
        scheme: of the tags, see `labels.scheme_of`.

    Returns:
        Micro-averaged and per-type precision, recall and F1 (0..100), and the share of words
        whose tag is right (``accuracy``, 0..100). Types are those of either side, sorted.

    Raises:
        ValueError: the two sides differ in length, or under IOB2 a tag is not ``O``, ``B-X`` or
            ``I-X``.
    """
    if len(gold) != len(pred):
        raise ValueError(f"gold has {len(gold)} sentences and pred {len(pred)}: must be equal")
    in_gold: Counter[str] = Counter()
    in_pred: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    words = equal = 0
    for index, (gold_tags, pred_tags) in enumerate(zip(gold, pred, strict=True)):
        if len(gold_tags) != len(pred_tags):
            raise ValueError(
                f"sentence {index} has {len(gold_tags)} gold tags and {len(pred_tags)} predicted "
                "ones: must be equal"
            )
        try:
            gold_spans, pred_spans = spans(gold_tags, scheme), spans(pred_tags, scheme)
        except ValueError as error:
            raise ValueError(f"sentence {index}: {error}") from None
        in_gold.update(span.type for span in gold_spans)
        in_pred.update(span.type for span in pred_spans)
        correct.update(span.type for span in set(gold_spans).intersection(pred_spans))
        words += len(gold_tags)
        equal += sum(a == b for a, b in zip(gold_tags, pred_tags, strict=True))
    return Scores(
        overall=Counts(in_gold.total(), in_pred.total(), correct.total()),
        per_type={
            kind: Counts(in_gold[kind], in_pred[kind], correct[kind])
            for kind in sorted(in_gold.keys() | in_pred.keys())
        },
        accuracy=100.0 * equal / words if words else 0.0,
        sentences=len(gold),
        words=words,
    )
