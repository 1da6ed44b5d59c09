"""One self-contained page on one student: scores, mistakes, curves, settings.

The page needs no network and runs no code; its plots are SVG inside it, its colours follow the
reader's choice of light or dark. Every string that comes from data or records is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from xdistil_fast.commands.eval import Model, evaluate
from xdistil_fast.labels import Span, scheme_of, spans
from xdistil_fast.model_io import FILES, resolve_model
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import errors, plots, runs
from xdistil_fast.train.card import kept
from xdistil_fast.train.corpora import Corpus, labelling_of
from xdistil_fast.train.errors import Pair
from xdistil_fast.train.evaluation import Evaluation, check_same_data, tokens_per_second
from xdistil_fast.train.report import write_report

EXAMPLES = 20
_WINDOW = 14  # words shown on either side of an error
_HISTORY_FILE = "history.json"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #666c76; --ground: #fff; --line: #dfe2e7;
  --card: #f5f6f8; --right: #2a9d6f; --wrong: #c94f5c; --blue: #2f86d1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa1ac; --ground: #16181c;
  --line: #343941; --card: #1f2228; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--ground); }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, .note { color: var(--soft); margin: .3rem 0 .7rem; }
.wide { overflow-x: auto; } svg { width: 100%; max-width: 52rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; overflow-wrap: anywhere; } tr.all td { font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem 1rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.35rem; }
.tile span { color: var(--soft); font-size: .85rem; }
.hit { background: color-mix(in srgb, var(--right) var(--share), transparent); }
.miss { background: color-mix(in srgb, var(--wrong) var(--share), transparent); }
.error { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; margin: .5rem 0; }
.error .what { color: var(--soft); font-size: .85rem; } .error .who { color: var(--soft);
  display: inline-block; min-width: 4.5rem; font-size: .85rem; }
mark { color: inherit; border-radius: .25rem; padding: .05rem .2rem; background: none; }
mark.gold { background: color-mix(in srgb, var(--right) 30%, transparent); }
mark.wrong { background: color-mix(in srgb, var(--wrong) 32%, transparent); }
mark.other { border-bottom: 2px solid var(--line); }
mark small { color: var(--soft); font-size: .7em; margin-left: .3em; }
code, pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; white-space: pre-wrap; }
"""


def html_report(
    student: str,
    model: Model,
    corpora: Sequence[Corpus],
    output: Path | str,
    *,
    teacher: Evaluation | None = None,
    examples: int = EXAMPLES,
    seconds: float = 1.0,
    command: Sequence[str] = (),
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Write the page on a student.

    Args:
        student: its folder, embedded name or Hub id, for what lies beside the weights.
        model: the same, loaded by :func:`xdistil_fast.commands.eval.load_model`.
        corpora: labelled files to score it on.
        output: the page; written beside, then renamed.
        teacher: its scores on the same files.
        examples: mistakes shown of each kind.
        seconds: to measure the speed for.
        command: that makes the page.
        progress: called with the number of sentences tagged since the last call.

    Returns:
        The record of the student's evaluation, with ``kinds`` of mistakes, ``tokens_per_second``
        and, if the teacher is known, ``kept`` (per cent of its F1).

    Raises:
        ValueError: matplotlib is missing, the model is a teacher, or the teacher's scores are of
            other files.
        OSError: the page cannot be written.
    """
    plots.need_matplotlib("a report in HTML")
    if model.tagger is None:
        raise ValueError(f"{student} is a teacher; a report in HTML is on a student")
    record, tags = evaluate(model, corpora, command, model.tagger.threads, progress)
    if teacher is not None:
        check_same_data(teacher.record, record)
    sentences = [sentence for corpus in corpora for sentence in corpus.sentences]
    words = [list(sentence.words or ()) for sentence in sentences]
    gold = [list(sentence.tags or ()) for sentence in sentences]
    pairs = errors.pair_entities(gold, tags, labelling_of(corpora))
    record["kinds"] = errors.count_kinds(pairs)
    record["tokens_per_second"] = round(tokens_per_second(model.tagger, words, seconds))
    if teacher is not None and teacher.metrics["f1"]:
        record["kept"] = 100 * record["metrics"]["f1"] / teacher.metrics["f1"]
    folder = resolve_model(student)
    page = _Page(
        name=Path(student).name,
        folder=folder,
        tagger=model.tagger,
        record=record,
        run=_run_of(folder),
        teacher=teacher,
        words=words,
        gold=gold,
        tags=tags,
        pairs=pairs,
        examples=examples,
    )
    write_report(page.html(), output)
    return record


def _run_of(folder: Path) -> Mapping[str, Any]:
    """What the run that made the folder wrote; empty for a folder that came without."""
    run: dict[str, Any] = {}
    if (folder / runs.RUN_FILE).is_file():
        run = runs.read_run(folder)
    if not run.get("history") and (folder / _HISTORY_FILE).is_file():
        try:
            run["history"] = json.loads((folder / _HISTORY_FILE).read_text("utf-8"))["epochs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / _HISTORY_FILE}: damaged ({error!r})") from None
    return run


@dataclass(frozen=True)
class _Page:
    """All that the page shows, and how."""

    name: str
    folder: Path
    tagger: Tagger
    record: Mapping[str, Any]
    run: Mapping[str, Any]
    teacher: Evaluation | None
    words: Sequence[Sequence[str]]
    gold: Sequence[Sequence[str]]
    tags: Sequence[Sequence[str]]
    pairs: Sequence[Pair]
    examples: int

    def html(self) -> str:
        """The page."""
        files = ", ".join(str(entry["name"]) for entry in self.record["data"])
        metrics = self.record["metrics"]
        config = self.tagger.config
        body = [
            f"<h1>{escape(self.name)}</h1>",
            f"<p>BiLSTM student, embedding {config.embedding_size}, hidden {config.hidden_size} in "
            f"each direction, {config.head} head, run in {self.tagger.precision}; scored on "
            f"{escape(files)}: {metrics['sentences']:,} sentences, {metrics['words']:,} words, "
            f"{metrics['support']:,} entities.{escape(self._seen())}</p>",
            self._tiles(),
            self._types(),
            self._groups(),
            self._kinds(),
            self._confusion(),
            self._mistakes(),
            self._curves(),
            self._speed(),
            self._settings(),
            self._data(),
            self._machine(),
        ]
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.name)}: report</title>\n<style>{_STYLE}</style>\n"
            "</head>\n<body>\n" + "\n".join(part for part in body if part) + "\n</body>\n</html>\n"
        )

    def _made_of(self) -> list[Mapping[str, Any]]:
        made_of = self.run.get("data") or self.tagger.config.lineage.get("data") or []
        return [entry for entry in made_of if isinstance(entry, Mapping)]

    def _seen(self) -> str:
        """A warning where the data had a part in making the student."""
        scored = {entry["digest"] for entry in self.record["data"]}
        roles = {str(e.get("role")) for e in self._made_of() if e.get("digest") in scored}
        if not roles:
            return ""
        return f" This data had a part in making the student, as {', '.join(sorted(roles))}."

    @property
    def _megabytes(self) -> float:
        files = [self.folder / name for name in FILES]
        return sum(file.stat().st_size for file in files if file.is_file()) / 1e6

    def _tiles(self) -> str:
        metrics = self.record["metrics"]
        tiles = [(f"{metrics['f1']:.2f}", "F1")]
        if "kept" in self.record:
            tiles.append((f"{self.record['kept']:.1f} %", "of the teacher's F1"))
        if self.teacher is not None:
            tiles.append((f"{self.teacher.metrics['f1']:.2f}", "teacher's F1"))
        tiles += [
            (f"{self.tagger.parameters:,}", "parameters"),
            (f"{self._megabytes:.2f} MB", "folder"),
            (f"{self.record['tokens_per_second']:,}", "tokens/s"),
        ]
        inner = "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
            for value, name in tiles
        )
        return f'<div class="tiles">{inner}</div>'

    def _types(self) -> str:
        metrics = self.record["metrics"]
        other = None if self.teacher is None else self.teacher.metrics
        columns = ["type", "precision", "recall", "F1", "entities", "found"]
        if other is not None:
            columns += ["teacher's F1", "kept"]

        def row(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> list[str]:
            cells = [
                name,
                *(f"{mine[key]:.2f}" for key in ("precision", "recall", "f1")),
                f"{mine['support']:,}",
                f"{mine['predicted']:,}",
            ]
            if other is not None:
                cells += [f"{theirs['f1']:.2f}" if theirs else "-", kept(mine, theirs)]
            return cells

        rows = [
            row(kind, counts, other and other["per_type"].get(kind))
            for kind, counts in metrics["per_type"].items()
        ]
        rows.append(row("all", metrics, other))
        sides = {"student": {k: v["f1"] for k, v in metrics["per_type"].items()}}
        if other is not None:
            sides["teacher"] = {k: v["f1"] for k, v in other["per_type"].items()}
        plot = plots.type_bars(sides) if sides["student"] else ""
        return (
            _title("Scores by type", "Strict, entity-level, on words, 0 to 100: type and both "
                   "borders must be right.")
            + _table(columns, rows, last="all")
            + plot
        )  # fmt: skip

    def _groups(self) -> str:
        """F1 by language where the record has it, and by file where there are several."""
        parts = []
        languages = self.record["metrics"].get("languages") or {}
        source = "in this data"
        if not languages:
            languages = (self.run.get("metrics", {}).get("dev") or {}).get("languages") or {}
            source = "on dev, from the record of the run"
        if languages:
            rows = [
                [str(name), f"{counts['f1']:.2f}", f"{counts.get('support', 0):,}"]
                for name, counts in languages.items()
            ]
            parts.append(_title("Scores by language", f"F1 {source}."))
            parts.append(_table(["language", "F1", "entities"], rows))
        data = self.record["data"]
        if len(data) > 1:
            theirs = self.teacher.record["data"] if self.teacher is not None else data
            rows = [
                [str(mine["name"]), f"{mine['f1']:.2f}"]
                + ([f"{other['f1']:.2f}"] if self.teacher is not None else [])
                for mine, other in zip(data, theirs, strict=True)
            ]
            columns = ["file", "F1"] + (["teacher's F1"] if self.teacher is not None else [])
            parts += [_title("Scores by file"), _table(columns, rows)]
        return "".join(parts)

    def _kinds(self) -> str:
        kinds = self.record["kinds"]
        everything = sum(kinds.values())
        totals = dict.fromkeys(kinds, everything - kinds[errors.SPURIOUS])
        totals[errors.SPURIOUS] = everything - kinds[errors.MISSED]
        meaning = {
            errors.EXACT: "type and borders right",
            errors.BORDERS: "type right, borders overlap",
            errors.TYPE: "borders right, another type",
            errors.BOTH: "another type, borders overlap",
            errors.MISSED: "nothing found there",
            errors.SPURIOUS: "found where nothing is",
        }
        rows = [
            [
                kind,
                meaning[kind],
                f"{count:,}",
                f"{100 * count / totals[kind]:.1f} %" if totals[kind] else "-",
            ]
            for kind, count in kinds.items()
        ]
        scores = [
            [name, f"{s.precision:.2f}", f"{s.recall:.2f}", f"{s.f1:.2f}", what]
            for (name, s), what in zip(
                errors.partial_scores(kinds).items(),
                ("type and borders", "borders alone", "borders, an overlap counts half",
                 "type, on any overlap"),
                strict=True,
            )
        ]  # fmt: skip
        return (
            _title("Partial matches", "Each gold entity is paired with at most one found entity "
                   "that shares a word with it. Shares are of the gold entities, that of spurious "
                   "ones of those found.")
            + _table(["", "", "entities", "share"], rows, text=(1,))
            + _title("Scores that forgive", "As in SemEval-2013 task 9.", level=3)
            + _table(["", "precision", "recall", "F1", "compares"], scores, text=(4,))
        )  # fmt: skip

    def _confusion(self) -> str:
        table = errors.confusion(self.pairs)
        if len(table) < 2:
            return ""
        columns = list(next(iter(table.values())))
        lines = []
        for row, counts in table.items():
            total = sum(counts.values())
            cells = [f"<td>{escape(row)}</td>"]
            for column in columns:
                count = counts[column]
                share = round(75 * count / total) if total else 0
                kind = "hit" if row == column else "miss"
                cells.append(f'<td class="{kind}" style="--share: {share}%">{count or ""}</td>')
            lines.append(f"<tr>{''.join(cells)}<td>{total:,}</td></tr>")
        head = "".join(f"<th>{escape(name)}</th>" for name in ("gold", *columns, "all"))
        return (
            _title("Confusion between types", "Rows: the gold type, or spurious; columns: what "
                   "was found. On the diagonal the borders are right too.")
            + f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
        )  # fmt: skip

    def _mistakes(self) -> str:
        wrong, missed = errors.surest_mistakes(
            self.tagger, self.words, self.tags, self.pairs, self.examples
        )
        parts = []
        for title, note, chosen in (
            ("Surest wrong entities", "By the mean probability of the words' tags.", wrong),
            ("Surest missed entities", "By the mean probability that the words are no entity.",
             missed),
        ):  # fmt: skip
            if chosen:
                parts.append(_title(title, f"{note} The same mistake is shown once."))
                parts += [self._mistake(mistake) for mistake in chosen]
        return "\n".join(parts)

    def _mistake(self, mistake: errors.Mistake) -> str:
        pair = mistake.pair
        times = f", {mistake.count} times" if mistake.count > 1 else ""
        lines = [
            f'<div class="what">{escape(pair.kind)}, {100 * mistake.confidence:.1f} % sure{times}; '
            f"sentence {pair.sentence + 1}</div>",
            self._line("gold", pair, self.gold[pair.sentence], pair.gold, "gold"),
            self._line("student", pair, self.tags[pair.sentence], pair.predicted, "wrong"),
        ]
        if self.teacher is not None and self.teacher.tags is not None:
            theirs = self.teacher.tags[pair.sentence]
            lines.append(self._line("teacher", pair, theirs, None, "other"))
        return f'<div class="error">{"".join(lines)}</div>'

    def _line(self, who: str, pair: Pair, tags: Sequence[str], span: Span | None, kind: str) -> str:
        """The sentence around a mistake, with one side's entities marked."""
        sides = [side for side in (pair.gold, pair.predicted) if side is not None]
        words = self.words[pair.sentence]
        begin = max(0, min(side.start for side in sides) - _WINDOW)
        stop = min(len(words), max(side.end for side in sides) + _WINDOW)
        inner = marked(words, spans(tags, scheme_of(tags)), span, kind, begin, stop)
        return f'<div><span class="who">{who}</span>{inner}</div>'

    def _curves(self) -> str:
        history = self.run.get("history")
        if not history:
            return ""
        return _title(
            "Learning curves",
            "Mean losses of each epoch, and strict F1 on the dev files of the run; the best epoch "
            "was kept.",
        ) + plots.learning_curves(history)

    def _speed(self) -> str:
        metrics = {**self.tagger.config.metrics, **self.run.get("metrics", {})}
        seconds = self.record["seconds"]
        rows = [
            ["tokens/s of the student", f"{self.record['tokens_per_second']:,} word pieces, from "
             "text to entities, many texts at a time"],
            ["student's time on this data", f"{seconds:,.2f} s"],
        ]  # fmt: skip
        if self.teacher is not None:
            theirs = self.teacher.record["seconds"]
            rows.append(
                ["teacher's time on this data", f"{theirs:,.2f} s ({theirs / seconds:,.0f} times)"]
                if seconds
                else ["teacher's time on this data", f"{theirs:,.2f} s"]
            )
        for name, took in (self.run.get("stages") or {}).items():
            rows.append([f"{name} when it was made", f"{took:,.0f} s"])
        parameters = metrics.get("teacher_parameters")
        own = self.tagger.parameters
        rows.append(["parameters", f"{own:,}"])
        if parameters:
            rows.append(["teacher's parameters", f"{parameters:,} ({parameters / own:.1f} times)"])
        rows += [
            ["vocabulary", f"{self.tagger.config.vocab_size:,} word pieces"],
            ["folder", f"{self._megabytes:.2f} MB"],
        ]
        return _title("Size and speed") + _table(["", ""], rows, text=(1,))

    def _settings(self) -> str:
        lineage = self.tagger.config.lineage
        settings = self.run.get("settings") or lineage.get("settings")
        if not isinstance(settings, Mapping):
            return ""
        rows = [[str(name), _shown(value)] for name, value in settings.items()]
        return _title("Settings of the run") + _table(["setting", "value"], rows, text=(1,))

    def _data(self) -> str:
        entries: list[Mapping[str, Any]] = [
            {**entry, "role": "scored here"} for entry in self.record["data"]
        ]
        entries += self._made_of()
        keys = ("role", "name", "sentences", "words", "digest")
        rows = [[_shown(entry.get(key, "-")) for key in keys] for entry in entries]
        columns = ["role", "file", "sentences", "words", "SHA-256"]
        return _title("Data") + _table(columns, rows, text=(1, 4))

    def _machine(self) -> str:
        lineage = self.tagger.config.lineage
        rows = [["scored on", _machine_line(self.record["machine"])]]
        if self.run.get("machine"):
            rows.append(["trained on", _machine_line(self.run["machine"])])
        rows.append(["weights (SHA-256)", str(self.record["model"]["digest"])])
        teacher = lineage.get("teacher")
        if isinstance(teacher, Mapping):
            rows.append(["teacher", f"{teacher.get('name')}, {teacher.get('digest')}"])
            digest = self.teacher and self.teacher.record["model"].get("digest")
            if digest and digest != teacher.get("digest"):
                rows.append(["compared with", f"another teacher, {digest}"])
        made_by = self.run.get("command") or lineage.get("command") or []
        commands = [
            f"<h3>{title}</h3><pre>{escape(shlex.join(map(str, command)))}</pre>"
            for title, command in (("Made by", made_by), ("This page", self.record["command"]))
            if command
        ]
        return (
            _title("Machine and commands") + _table(["", ""], rows, text=(1,)) + "".join(commands)
        )


def marked(
    words: Sequence[str],
    found: Iterable[Span],
    chosen: Span | None,
    kind: str,
    begin: int,
    stop: int,
) -> str:
    """Words as HTML, entities marked with their types.

    Args:
        words: of a sentence.
        found: its entities, in order.
        chosen: the one that is marked as ``kind``, the others as ``other``.
        kind: a class of the page's style.
        begin: first word shown.
        stop: one past the last.
    """
    parts = ["…"] if begin else []
    at = begin
    for span in found:
        if span.end <= begin or span.start >= stop:
            continue
        first, last = max(span.start, begin), min(span.end, stop)
        parts += [escape(word) for word in words[at:first]]
        name = kind if span == chosen else "other"
        inner = escape(" ".join(words[first:last]))
        parts.append(f'<mark class="{name}">{inner}<small>{escape(span.type)}</small></mark>')
        at = last
    parts += [escape(word) for word in words[at:stop]]
    return " ".join([*parts, "…"] if stop < len(words) else parts)


def _title(title: str, note: str = "", level: int = 2) -> str:
    text = f"<h{level}>{escape(title)}</h{level}>"
    return text + (f'<p class="note">{escape(note)}</p>' if note else "") + "\n"


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Sequence[int] = (),
    last: str = "",
) -> str:
    """A table of escaped cells; ``text`` are the columns of words, ``last`` a row that sums up."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = []
    for row in rows:
        cells = [
            ('<td class="text">' if at in text else "<td>") + f"{escape(cell)}</td>"
            for at, cell in enumerate(row)
        ]
        begin = '<tr class="all">' if row[0] == last else "<tr>"
        lines.append(f"{begin}{''.join(cells)}</tr>")
    top = f"<tr>{head}</tr>" if any(columns) else ""
    return f'<div class="wide"><table>{top}{"".join(lines)}</table></div>\n'


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _machine_line(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in sorted(machine["versions"].items()))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine.get('isa')} kernels; {machine.get('system')}; {versions}"
    )
