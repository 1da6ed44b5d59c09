"""The model card that a distillation writes: what the student is, comes from and can do."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from xdistil_fast.labels import label_types, scheme_of
from xdistil_fast.model_config import TEXT_CLASSIFICATION
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.train import runs
from xdistil_fast.train.evaluation import data_key
from xdistil_fast.train.languages import language_lines

_TEST_TITLE = "## Scores on test data"


def teacher_on_dev(teacher: str, data: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The scores that a teacher's own run had on the dev files of a student.

    Args:
        teacher: folder or Hub id.
        data: of the student's record.

    Returns:
        Scores as in ``run.json``; None where the teacher has no record, or one of other files.
    """
    file = Path(teacher) / runs.RUN_FILE
    if not file.is_file():
        return None
    try:
        record = runs.read_run(file)
        same, mine = (
            data_key([entry for entry in entries if entry["role"] == "dev"])
            for entries in (record["data"], data)
        )
        scores = record["metrics"]["dev"]
        known = same == mine and all("f1" in s for s in (scores, *scores["per_type"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # a teacher from elsewhere may have a file of that name
    return dict(scores) if known else None


def model_card(
    name: str,
    config: ModelConfig,
    record: Mapping[str, Any],
    teacher: Mapping[str, Any] | None = None,
) -> str:
    """Markdown of a student's ``README.md``.

    Args:
        name: of the model.
        config: of the model.
        record: its ``run.json``.
        teacher: its scores on the same dev files, see :func:`teacher_on_dev`; None if not known.
    """
    metrics, settings, machine = record["metrics"], record["settings"], record["machine"]
    classes = config.task == TEXT_CLASSIFICATION
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    how = _recipe(record)
    lines = [
        "---",
        "library_name: xdistil-fast",
        f"pipeline_tag: {config.task}",
        "---",
        "",
        f"# {name}",
        "",
        *(_class_intro if classes else _tag_intro)(name, config, settings["teacher"]),
        "",
        "## Size",
        "",
        f"Embedding {config.embedding_size}, hidden {config.hidden_size} in each direction, "
        + (f"projected to {config.projection_size}, " if config.projection_size else "")
        + f"{config.vocab_size:,} word pieces: {metrics['parameters']:,} parameters "
        f"(teacher: {metrics['teacher_parameters']:,}). The table is stored in "
        f"{settings['embedding_dtype']}.",
        "",
        "## Scores on dev",
        "",
        ("Texts of dev" if classes else "Strict, word level")
        + ", 0 to 100, by the code and with the weights in this folder. "
        f"Dev chose the epoch ({metrics['best_epoch']} of {len(record['history'])}"
        + ("; by the mean over its languages)." if "languages" in metrics["dev"] else ")."),
        "",
        *(_class_scores(metrics["dev"]) if classes else _dev_table(metrics["dev"], teacher)),
        "",
        *([*language_lines(metrics["dev"]), ""] if "languages" in metrics["dev"] else []),
        "## Training",
        "",
        f"Trained on {how}: {metrics['training_sentences']:,} sentences, "
        f"{metrics['training_pieces']:,} pieces, {len(record['history'])} epochs, seed "
        f"{settings['seed']}.",
        "",
        "| role | file | sentences | words | SHA-256 |",
        "|---|---|---|---|---|",
        *(
            f"| {d['role']} | {d['name']} | {d['sentences']:,} | {d['words']:,} "
            f"| `{d['digest'][:16]}` |"
            for d in record["data"]
        ),
        "",
        f"Teacher: `{config.lineage['teacher']['digest']}`  ",
        f"Weights: `{record['digest']}`",
        "",
        *(["```", shlex.join(record["command"]), "```", ""] if record["command"] else []),
        f"{record['stages']['labelling']:,.0f} s of labelling by the teacher, "
        f"{record['stages']['training']:,.0f} s of training "
        f"({record['pieces_per_second']:,} pieces/s) on {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['isa']} kernels; {versions}.",
        "",
    ]
    return "\n".join(lines)


def _recipe(record: Mapping[str, Any]) -> str:
    """Which losses each stage had, from the history."""
    settings = record["settings"]
    names = {
        "hard": "labels (weight {:g})",
        "soft": "the teacher's logits (weight {:g})",
        "representation": "the teacher's hidden states (weight {:g})",
    }
    stages: dict[str, list[str]] = {}
    for entry in record["history"]:
        used = [n for n in names if entry[n]]
        stages.setdefault(entry["stage"], used)
    if all(used == ["hard"] for used in stages.values()):
        return "labels alone"
    return ", then on ".join(
        " and ".join(names[n].format(settings[f"{n}_weight"]) for n in used)
        for used in stages.values()
    )


def with_test_scores(
    card: str,
    digest: str,
    evaluations: Sequence[Mapping[str, Any]],
    made_of: Collection[Mapping[str, Any]] = (),
) -> str:
    """The card with a section of scores on further data, in place of one it may have already.

    Args:
        card: Markdown from :func:`model_card`.
        digest: of the student's weights.
        evaluations: records of ``xdistil eval``; those of this student are shown, beside those of
            its teacher on the same files.
        made_of: entries of the files that the student was trained and chosen on; an evaluation on
            one of them is no test and is not shown.

    Raises:
        ValueError: none is left of this student.
    """
    seen = {entry["digest"] for entry in made_of}
    own = [
        e
        for e in evaluations
        if e["model"]["digest"] == digest and seen.isdisjoint(d["digest"] for d in e["data"])
    ]
    if not own:
        raise ValueError(
            f"no evaluation of the model with digest {digest[:16]} is on data that had no part in "
            "making it"
        )
    classes = "accuracy" in own[0]["metrics"] and "per_class" in own[0]["metrics"]
    key, name = ("accuracy", "accuracy") if classes else ("f1", "F1")
    parts, count = ("per_class", "texts") if classes else ("per_type", "support")
    lines = [
        _TEST_TITLE,
        "",
        ("Texts" if classes else "Strict, word level")
        + ", 0 to 100. The files had no part in training or choosing.",
        "",
        f"| data | {'texts' if classes else 'entities'} | {name} | teacher's {name} | kept "
        f"| F1 by {'class' if classes else 'type'} (the teacher's) |",
        "|---|---|---|---|---|---|",
    ]
    for student in own:
        mine = student["metrics"]
        theirs = next(
            (
                e["metrics"]
                for e in evaluations
                if e["model"]["digest"] == student["model"].get("teacher_digest")
                and data_key(e["data"]) == data_key(student["data"])
            ),
            None,
        )
        teacher = f"{theirs[key]:.2f}" if theirs else "-"
        other = theirs[parts] if theirs else {}
        by_type = (
            f"{kind} {counts['f1']:.2f}" + (f" ({other[kind]['f1']:.2f})" if kind in other else "")
            for kind, counts in mine[parts].items()
        )
        lines.append(
            f"| {', '.join(d['name'] for d in student['data'])} | {mine[count]:,} "
            f"| **{mine[key]:.2f}** | {teacher} "
            f"| {kept(mine, theirs, key)} | {', '.join(by_type)} |"
        )
    before, title, after = card.partition("## Training\n")
    before = before.partition(_TEST_TITLE)[0]
    return before + "\n".join(lines) + "\n\n" + title + after


def _dev_table(dev: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> list[str]:
    """Scores by type, beside the teacher's where they are known."""
    columns = ["type", "precision", "recall", "F1", "entities"]
    if teacher is not None:
        columns += ["teacher's F1", "kept"]
    sides = [
        (kind, counts, teacher and teacher["per_type"].get(kind))
        for kind, counts in dev["per_type"].items()
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, counts, theirs in [*sides, ("**all**", dev, teacher)]:
        cells = [
            name,
            *(f"{counts[key]:.2f}" for key in ("precision", "recall", "f1")),
            f"{counts['support']:,}",
        ]
        if teacher is not None:
            cells += [f"{theirs['f1']:.2f}" if theirs else "-", kept(counts, theirs)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def kept(student: Mapping[str, Any], teacher: Mapping[str, Any] | None, key: str = "f1") -> str:
    """The student's score in per cent of the teacher's; ``-`` where that is not known or 0."""
    return f"{100 * student[key] / teacher[key]:.1f} %" if teacher and teacher[key] else "-"


def _tag_intro(name: str, config: ModelConfig, teacher: str) -> list[str]:
    types = label_types(config.labels)
    kind = "entity types" if scheme_of(config.labels) == "IOB2" else "tags of words"
    return [
        f"A BiLSTM tagger ({config.head} head) for the {kind} {', '.join(types)}, distilled "
        f"from the teacher `{teacher}`.",
        "",
        "```python",
        "from xdistil_fast import Tagger",
        "",
        f'tagger = Tagger.from_pretrained("{name}")',
        "```",
    ]


def _class_intro(name: str, config: ModelConfig, teacher: str) -> list[str]:
    return [
        f"A BiLSTM classifier of texts ({config.pooling} pooling) with the classes "
        f"{', '.join(config.labels)}, distilled from the teacher `{teacher}`.",
        "",
        "```python",
        "from xdistil_fast import Classifier",
        "",
        f'classifier = Classifier.from_pretrained("{name}")',
        "```",
    ]


def _class_scores(dev: Mapping[str, Any]) -> list[str]:
    return [
        f"Accuracy **{dev['accuracy']:.2f}**, macro F1 {dev['macro_f1']:.2f}.",
        "",
        "| class | precision | recall | F1 | texts |",
        "|---|---|---|---|---|",
        *(_row(name, counts) for name, counts in dev["per_class"].items()),
    ]


def _row(name: str, counts: Mapping[str, Any]) -> str:
    return (
        f"| {name} | {counts['precision']:.2f} | {counts['recall']:.2f} | {counts['f1']:.2f} "
        f"| {counts['support']:,} |"
    )
