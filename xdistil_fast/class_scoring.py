"""Scores of text classification: accuracy, and precision, recall and F1 of every class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from xdistil_fast.scoring import Counts


@dataclass(frozen=True, slots=True)
class ClassScores:
    """What :func:`score_classes` returns; shares are percentages, 0..100.

    Attributes:
        accuracy: share of the texts whose class is right.
        macro_f1: mean of the classes' F1, each weighing the same.
        per_class: counts of every class that occurs on either side, sorted by name.
        texts: number of texts.
    """

    accuracy: float
    macro_f1: float
    per_class: dict[str, Counts]
    texts: int

    def to_dict(self) -> dict[str, object]:
        """Plain dict for JSON."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "texts": self.texts,
            "per_class": {name: counts.to_dict() for name, counts in self.per_class.items()},
        }


def score_classes(gold: Sequence[str], pred: Sequence[str]) -> ClassScores:
    """Compare predicted classes with gold classes, text by text.

    Args:
        gold: right class of each text.
        pred: predicted class of each text.

    Raises:
        ValueError: the two sides differ in length.
    """
    if len(gold) != len(pred):
        raise ValueError(f"gold has {len(gold)} texts and pred {len(pred)}: must be equal")
    in_gold, in_pred = Counter(gold), Counter(pred)
    correct = Counter(a for a, b in zip(gold, pred, strict=True) if a == b)
    per_class = {
        name: Counts(in_gold[name], in_pred[name], correct[name])
        for name in sorted(in_gold.keys() | in_pred.keys())
    }
    return ClassScores(
        accuracy=100.0 * correct.total() / len(gold) if gold else 0.0,
        macro_f1=sum(c.f1 for c in per_class.values()) / len(per_class) if per_class else 0.0,
        per_class=per_class,
        texts=len(gold),
    )
