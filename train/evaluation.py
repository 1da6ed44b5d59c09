"""What a student keeps of its teacher: both scored on the same files, and the student's speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdistil_fast.commands.bench import TASKS, latency
from xdistil_fast.commands.eval import evaluate, load_model
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import runs
from xdistil_fast.train.corpora import Corpus

_MOST_TEXTS = 1000  # timed; more tell nothing new


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on the data of a report.

    Attributes:
        record: of ``xdistil eval``.
        tags: of every sentence; None where only the record is known.
    """

    record: Mapping[str, Any]
    tags: Sequence[Sequence[str]] | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Scores, see :meth:`xdistil_fast.scoring.Scores.to_dict`."""
        metrics: Mapping[str, Any] = self.record["metrics"]
        return metrics


def teacher_evaluation(
    teacher: str,
    corpora: Sequence[Corpus],
    *,
    known: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score a teacher, or read the scores it has had.

    Args:
        teacher: folder or Hub id; or a JSON file that ``xdistil eval`` wrote about it.
        corpora: labelled files.
        known: a record to use in place of the work if it is of this teacher and these files, and
            to write otherwise.
        progress: called with the number of sentences tagged since the last call.

    Raises:
        ValueError: no teacher there, or a record of other files.
    """
    if Path(teacher).is_file():
        record = runs.read_run(Path(teacher))
        if record["kind"] != "eval":
            raise ValueError(f"{teacher} is a record of kind {record['kind']!r}; needed: 'eval'")
        check_same_data(record, {"data": [corpus.describe("") for corpus in corpora]})
        return Evaluation(record)
    model = load_model(teacher, {})
    if model.tagger is not None:
        raise ValueError(f"{teacher} is a student; needed: a teacher, or its record of 'eval'")
    if known is not None and known.is_file():
        record = runs.read_run(known)
        files = data_key([corpus.describe("") for corpus in corpora])
        if data_key(record["data"]) == files and record["model"] == model.about:
            return Evaluation(record)
    command = ["xdistil", "eval", teacher, "--data", *(str(corpus.path) for corpus in corpora)]
    record, tags = evaluate(model, corpora, list(map(runs.portable, command)), 0, progress)
    if known is not None:
        runs.write_json(known, record)
    return Evaluation(record, tags)


def data_key(entries: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    """What makes scores comparable: the bytes of the files and the label maps."""
    return [(entry["digest"], entry.get("label_map")) for entry in entries]


def check_same_data(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Refuse a comparison of scores on different data.

    Raises:
        ValueError: the records differ in files or label maps.
    """
    if data_key(teacher["data"]) != data_key(student["data"]):
        names = [", ".join(str(e["name"]) for e in side["data"]) for side in (teacher, student)]
        raise ValueError(
            f"the teacher's scores are of {names[0]} and the student's of {names[1]}, or of other "
            "versions or label maps of them; both need the same data"
        )


def tokens_per_second(tagger: Tagger, words: Sequence[Sequence[str]], seconds: float) -> float:
    """Word pieces a second from text to entities, many texts at a time, as ``xdistil bench``.

    Args:
        tagger: as it is served.
        words: sentences; their words are joined by spaces.
        seconds: to measure for.
    """
    texts = [" ".join(sentence) for sentence in words[:_MOST_TEXTS]]
    pieces = tagger.tag_batch(texts).pieces
    measured = latency("", TASKS[1], [lambda: tagger(texts)], [pieces], len(texts), seconds)
    return measured.tokens_per_second
