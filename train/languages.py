"""Several languages in one run: scores for each, their macro mean, and balanced sampling.

A file has a language where ``LANG=FILE`` says so, see
:func:`xdistil_fast.train.corpora.split_language`.
Means are over languages, each counting once, as in Tables 3 to 17 of XtremeDistil (Mukherjee and
Hassan Awadallah, ACL 2020); their standard deviation is that of the population (divided by n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xdistil_fast.labels import Scheme
from xdistil_fast.scoring import Scores, score
from xdistil_fast.train.corpora import Corpus

Tags = Sequence[Sequence[str]]


def check_languages(corpora: Sequence[Corpus], role: str) -> None:
    """Refuse a set of files of which only some have a language.

    Raises:
        ValueError: naming the first file without one.
    """
    without = [corpus.path for corpus in corpora if not corpus.language]
    if without and len(without) < len(corpora):
        raise ValueError(
            f"{role}: {without[0]} has no language and other files have one; give it to all of "
            "them (LANG=FILE) or to none"
        )


def languages_of(corpora: Sequence[Corpus]) -> list[str]:
    """Language of every sentence of the files; empty where none has a language."""
    if not any(corpus.language for corpus in corpora):
        return []
    return [corpus.language for corpus in corpora for _ in corpus.sentences]


def score_languages(
    languages: Sequence[str], gold: Tags, pred: Tags, scheme: Scheme = "IOB2"
) -> dict[str, Scores]:
    """Scores of each language, sorted by its name.

    Args:
        languages: of every sentence, see :func:`languages_of`; empty for none.
        gold: right tags of every sentence.
        pred: predicted tags, of the same lengths.
        scheme: of the tags.
    """
    rows: dict[str, list[int]] = {}
    for index, language in enumerate(languages):
        rows.setdefault(language, []).append(index)
    return {
        language: score([gold[i] for i in mine], [pred[i] for i in mine], scheme)
        for language, mine in sorted(rows.items())
    }


def macro(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation, (0, 0) of nothing."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def chosen_by(pooled: Scores, by_language: Mapping[str, Scores]) -> float:
    """What a model is chosen by on dev: the macro mean of F1 where there are languages."""
    return macro([s.f1 for s in by_language.values()])[0] if by_language else pooled.f1


def language_report(
    student: Mapping[str, Scores], teacher: Mapping[str, Scores] | None = None
) -> dict[str, Any]:
    """Scores by language as JSON, beside those of the teacher where they are known.

    Args:
        student: scores of a model by language.
        teacher: of its teacher, for the same languages.

    Returns:
        ``languages``: for each its scores, and with a teacher ``teacher_f1`` and ``kept``, the
        percentage of the teacher's F1 (None where that is 0). ``macro``: mean ``f1`` and ``sd``
        over languages, and with a teacher its ``teacher_f1`` and ``teacher_sd``, and ``kept`` of
        the means.
    """
    languages: dict[str, dict[str, Any]] = {}
    for name, scores in student.items():
        entry: dict[str, Any] = {
            "f1": scores.f1,
            "precision": scores.precision,
            "recall": scores.recall,
            "accuracy": scores.accuracy,
            "support": scores.overall.gold,
            "sentences": scores.sentences,
        }
        if teacher is not None:
            entry |= {"teacher_f1": teacher[name].f1, "kept": _kept(scores.f1, teacher[name].f1)}
        languages[name] = entry
    mean, deviation = macro([scores.f1 for scores in student.values()])
    total: dict[str, Any] = {"f1": mean, "sd": deviation}
    if teacher is not None:
        teacher_mean, teacher_deviation = macro([teacher[name].f1 for name in student])
        total |= {
            "teacher_f1": teacher_mean,
            "teacher_sd": teacher_deviation,
            "kept": _kept(mean, teacher_mean),
        }
    return {"languages": languages, "macro": total}


def language_table(report: Mapping[str, Any]) -> str:
    """The report as lines of text for a terminal."""
    total = report["macro"]
    compared = "teacher_f1" in total
    width = max(10, *map(len, report["languages"]))
    head = f"{'language':{width}}  support      F1" + ("  teacher   kept %" if compared else "")
    lines = [head]

    def row(name: str, support: str, entry: Mapping[str, Any]) -> str:
        line = f"{name:{width}}  {support:>7}  {entry['f1']:6.2f}"
        if compared:
            kept = "-" if entry["kept"] is None else f"{entry['kept']:.1f}"
            line += f"  {entry['teacher_f1']:7.2f}  {kept:>7}"
        return line

    lines += [row(k, str(v["support"]), v) for k, v in report["languages"].items()]
    lines.append(row("macro mean", "", total))
    deviation = f"{'sd (of n)':{width}}  {'':7}  {total['sd']:6.2f}"
    lines.append(deviation + (f"  {total['teacher_sd']:7.2f}" if compared else ""))
    return "\n".join(lines)


def language_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as a table in Markdown."""
    compared = "teacher_f1" in report["macro"]
    columns = ["language", "F1", *(["teacher's F1", "kept"] if compared else [])]

    def row(name: str, entry: Mapping[str, Any]) -> str:
        cells = [name, f"{entry['f1']:.2f}"]
        if compared:
            share = "-" if entry["kept"] is None else f"{entry['kept']:.1f} %"
            cells += [f"{entry['teacher_f1']:.2f}", share]
        return "| " + " | ".join(cells) + " |"

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [row(name, entry) for name, entry in report["languages"].items()]
    lines.append(row("**mean**", report["macro"]))
    return lines


def sample_counts(sizes: npt.NDArray[np.integer], alpha: float) -> npt.NDArray[np.int64]:
    """How many sentences of each language an epoch takes: in all as many as there are.

    Language l is drawn with probability ``n_l^alpha / sum_k n_k^alpha`` (Conneau et al., ACL 2020,
    section 3.1): with 1 as they come, with 0 all alike, between them small languages more often.

    Args:
        sizes: [L] sentences of each language.
        alpha: 0 to 1.

    Returns:
        [L], summing to the sum of ``sizes``; by largest remainders.
    """
    total = int(sizes.sum())
    shares = np.where(sizes > 0, np.power(np.maximum(sizes, 1).astype(np.float64), alpha), 0.0)
    exact = shares / shares.sum() * total
    counts: npt.NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[rest] += 1
    return counts


def epoch_order(
    languages: npt.NDArray[np.integer], alpha: float, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Order in which an epoch takes the sentences, some perhaps several times or never.

    A language that is drawn more often than it has sentences goes through all of them before any
    comes again.

    Args:
        languages: [N] number of the language of each sentence.
        alpha: see :func:`sample_counts`; with 1 the result is a plain permutation.
        generator: source of the shuffles.

    Returns:
        [N] numbers of sentences.
    """
    if alpha == 1.0 or not len(languages):
        return generator.permutation(len(languages))
    sizes = np.bincount(languages)
    parts: list[npt.NDArray[np.int64]] = []
    for number, count in enumerate(sample_counts(sizes, alpha).tolist()):
        mine = np.flatnonzero(languages == number)
        while count > 0:
            parts.append(generator.permutation(mine)[:count])
            count -= len(parts[-1])
    return generator.permutation(np.concatenate(parts))


def _kept(value: float, whole: float) -> float | None:
    return 100.0 * value / whole if whole else None
