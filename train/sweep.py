"""Many students of one teacher: which size keeps how much, and how fast each is.

Every student is a run of :func:`xdistil_fast.train.distill` into a folder of its own, so a sweep
that was killed goes on where it was, and finished students are not made again. All share one cache
of the teacher's logits. Small ones come first.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xdistil_fast.labels import scheme_of
from xdistil_fast.model_io import FILES, load_folder, save_folder
from xdistil_fast.quantization import quantize_tensors
from xdistil_fast.scoring import score
from xdistil_fast.tagger import Tagger
from xdistil_fast.train import plots, runs
from xdistil_fast.train.config import DistillConfig, parse_size
from xdistil_fast.train.corpora import Corpus, read_labelled
from xdistil_fast.train.evaluation import teacher_evaluation, tokens_per_second
from xdistil_fast.train.report import markdown_table, write_report

SWEEP_FILE = "sweep.json"
PAGE_FILE = "README.md"
PLOT_FILE = "pareto.svg"
TEACHER_FILE = "teacher.dev.json"
CACHE_FOLDER = "cache"
# The configurations of the XtremeDistil paper (Mukherjee and Hassan Awadallah, ACL 2020, figure 3).
PAPER = tuple(f"{e}x{h}" for e in (50, 100, 200, 300) for h in (100, 200, 400, 600))
SERVED = ("float32", "int8")
_UNKNOWN_VOCABULARY = 1 << 40

Distil = Callable[[DistillConfig], Mapping[str, Any]]


def parse_sizes(text: str) -> tuple[str, ...]:
    """Sizes of a list like ``50x100,50x200``, or of the name ``paper``.

    Raises:
        ValueError: no size, one that is none, or the same twice.
    """
    if text == "paper":
        return PAPER
    sizes = tuple(part.strip() for part in text.split(","))
    for size in sizes:
        parse_size(size)
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"sizes is {text!r}; each size may stand in it once")
    return sizes


def parameters_of(size: str, vocabulary: int, tags: int = 0) -> int:
    """Trained values of a student without its CRF: table, two LSTMs, output layer.

    Args:
        size: ``ExH``.
        vocabulary: V, word pieces.
        tags: C, labels.
    """
    embedding, hidden = parse_size(size)
    lstm = 2 * 4 * hidden * (embedding + hidden + 2)
    return vocabulary * embedding + lstm + tags * (2 * hidden + 1)


def sweep(
    base: DistillConfig,
    sizes: Sequence[str],
    *,
    keep: float | None = None,
    seconds: float = 1.0,
    command: Sequence[str] = (),
    distil: Distil | None = None,
    say: Callable[[str], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Make students of several sizes and compare them.

    With ``keep`` the students are made in order of their number of parameters, and the first that
    keeps the share of the teacher's dev F1 ends the sweep: it is the smallest, by parameters, of
    the sizes given. The share is that of the student in float32.

    Args:
        base: settings of every student; ``output`` is the sweep's folder, ``student`` is not used.
            Without a ``cache`` the logits lie in the sweep's folder.
        sizes: ``ExH`` each.
        keep: per cent of the teacher's dev F1; None makes all.
        seconds: to measure each speed for.
        command: for the page and the records.
        distil: makes one student; :func:`xdistil_fast.train.distill` if None.
        say: told one line after each student.
        progress: told of sentences that the teacher has tagged.

    Returns:
        The content of ``sweep.json``.

    Raises:
        ValueError: a value out of its range, an output that is no sweep, or from ``distill``.
    """
    plots.need_matplotlib("a sweep")
    check_sweep(Path(base.output), sizes, keep)
    out = Path(base.output)
    corpora = [read_labelled(path, base.label_map) for path in base.dev]
    out.mkdir(exist_ok=True)
    teacher = teacher_evaluation(
        base.teacher, corpora, known=out / TEACHER_FILE, progress=progress
    ).record
    if not teacher["metrics"]["f1"]:
        raise ValueError(f"the teacher's F1 on dev is 0: there is nothing to keep ({base.teacher})")
    if distil is None:
        from xdistil_fast.train.distillation import distill

        distil = distill
    done = _Sweep(out, base, teacher, keep, list(command))
    pending = list(sizes)
    while pending:
        # Until a vocabulary is known, the smallest embedding first: it weighs most.
        order = sorted(
            pending,
            key=lambda s: (done.parameters(s), parse_size(s)),
        )
        size = order[0]
        found = done.smallest()
        if found is not None and done.parameters(size) > done.parameters(found["size"]):
            break
        pending.remove(size)
        config = dataclasses.replace(
            base,
            student=size,
            output=str(out / size),
            cache=base.cache or str(out / CACHE_FOLDER),
        )
        record = distil(config)
        row = done.add(size, record, corpora, seconds)
        done.write()
        if say is not None:
            say(
                f"{size}: dev F1 {row['f1']:.2f}, {row['kept']:.1f} % of the teacher's, "
                f"{row['parameters']:,} parameters"
            )
    return done.content()


def check_sweep(out: Path, sizes: Sequence[str], keep: float | None) -> None:
    """Refuse what cannot become a sweep, before any work.

    Raises:
        ValueError: naming the value.
    """
    if not sizes:
        raise ValueError("sizes is empty; at least one ExH is needed")
    if keep is not None and not 0 < keep <= 200:
        raise ValueError(f"keep is {keep:g}; allowed: a share of the teacher's F1 in per cent")
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out} is a file; it must be a folder")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"output {out}: the folder {out.parent} does not exist")
    ours = (SWEEP_FILE, TEACHER_FILE, f"{TEACHER_FILE}.*.part")
    files = list(out.iterdir()) if out.is_dir() else []
    if files and not any(file.match(name) for file in files for name in ours):
        raise ValueError(f"output {out} holds other things than a sweep; give a new folder")


class _Sweep:
    """The rows so far, and what is written of them."""

    def __init__(
        self,
        out: Path,
        base: DistillConfig,
        teacher: Mapping[str, Any],
        keep: float | None,
        command: list[str],
    ) -> None:
        self.out, self.base, self.teacher, self.keep = out, base, teacher, keep
        self.command = command
        self.rows: list[dict[str, Any]] = []
        self.vocabulary = self.tags = 0
        self._measured = _measured_before(out / SWEEP_FILE)

    def add(
        self, size: str, record: Mapping[str, Any], corpora: Sequence[Corpus], seconds: float
    ) -> dict[str, Any]:
        """Enter a finished student; it is measured unless it was before, on the same machine."""
        metrics = record["metrics"]
        self.vocabulary, self.tags = int(metrics["vocabulary"]), len(record["labels"])
        served = self._measured.get(f"{record['digest']} {runs.machine_info()}")
        if served is None:
            served = _measure(self.out / size, corpora, seconds)
        row = {
            "size": size,
            "parameters": int(metrics["parameters"]),
            "f1": metrics["dev"]["f1"],
            "kept": 100 * metrics["dev"]["f1"] / self.teacher["metrics"]["f1"],
            "seconds": record["seconds"],
            "digest": record["digest"],
            "served": served,
        }
        self.rows.append(row)
        self.rows.sort(key=lambda row: (row["parameters"], row["size"]))
        return row

    def parameters(self, size: str) -> int:
        """Of a student of this size, as far as the vocabulary is known."""
        return parameters_of(size, self.vocabulary or _UNKNOWN_VOCABULARY, self.tags)

    def smallest(self) -> dict[str, Any] | None:
        """Of the students that keep the share, that with the fewest parameters."""
        if self.keep is None:
            return None
        return next((row for row in self.rows if row["kept"] >= self.keep), None)

    def content(self) -> dict[str, Any]:
        """Content of ``sweep.json``."""
        chosen = self.smallest()
        return {
            "kind": "sweep",
            "command": self.command,
            "teacher": self.teacher,
            "keep": self.keep,
            "smallest": None if chosen is None else chosen["size"],
            "students": self.rows,
            "machine": runs.machine_info(),
        }

    def write(self) -> None:
        """Replace the three files of the sweep."""
        content = self.content()
        runs.write_json(self.out / SWEEP_FILE, content)
        teacher_f1 = self.teacher["metrics"]["f1"]
        points = [
            plots.Point(
                row["size"], precision, served["tokens_per_second"], served["f1"],
                served["bytes"] / 1e6,
            )
            for row in self.rows
            for precision, served in row["served"].items()
        ]  # fmt: skip
        names = ", ".join(str(entry["name"]) for entry in self.teacher["data"])
        machine = content["machine"]
        plots.draw_pareto(
            self.out / PLOT_FILE,
            points,
            teacher_f1,
            None if self.keep is None else teacher_f1 * self.keep / 100,
            f"{names}; {machine['cpu']}, {machine['threads']} threads, {machine['isa']}",
        )
        write_report(sweep_page(content), self.out / PAGE_FILE)


def _measured_before(file: Path) -> dict[str, Any]:
    """Speeds in a sweep's file, by student and machine; empty where there is none."""
    if not file.is_file():
        return {}
    content = runs.read_json(file)
    try:
        machine = content["machine"]
        return {f"{row['digest']} {machine}": row["served"] for row in content["students"]}
    except (KeyError, TypeError):
        raise ValueError(f"{file}: not the file of a sweep; remove it") from None


def _measure(folder: Path, corpora: Sequence[Corpus], seconds: float) -> dict[str, Any]:
    """F1, speed and bytes of a student as it is served in each precision."""
    content = load_folder(folder)
    sentences = [sentence for corpus in corpora for sentence in corpus.sentences]
    words = [list(sentence.words or ()) for sentence in sentences]
    gold = [list(sentence.tags or ()) for sentence in sentences]
    found: dict[str, Any] = {}
    for precision in SERVED:
        config, tensors, size = content.config, content.tensors, _bytes(folder)
        if precision == "int8":
            config = dataclasses.replace(config, precision=precision)
            tensors = quantize_tensors(tensors)
            with tempfile.TemporaryDirectory() as parent:
                served = Path(parent) / "int8"
                card = (folder / FILES[3]).read_text("utf-8")
                save_folder(served, config, tensors, content.tokenizer_json, card)
                size = _bytes(served)
        tagger = Tagger(config, tensors, content.tokenizer)
        found[precision] = {
            "f1": score(gold, tagger.tag_words(words), scheme_of(config.labels)).f1,
            "tokens_per_second": round(tokens_per_second(tagger, words, seconds)),
            "bytes": size,
        }
    return found


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in FILES if (folder / name).is_file())


def sweep_page(content: Mapping[str, Any]) -> str:
    """The sweep as Markdown.

    Args:
        content: of ``sweep.json``.
    """
    teacher, machine = content["teacher"], content["machine"]
    files = ", ".join(f"{e['name']} (`{e['digest'][:16]}`)" for e in teacher["data"])
    chosen = content["smallest"]
    lines = [
        f"# Students of {teacher['model']['name']}",
        "",
        f"Teacher: {teacher['model']['parameters']:,} parameters, F1 "
        f"**{teacher['metrics']['f1']:.2f}** on dev ({files}; {teacher['metrics']['support']:,} "
        f"entities), in {teacher['seconds']:,.1f} s. F1 is strict, at word level, 0 to 100; kept "
        "is the share of the teacher's. Dev also chose each student's epoch, so score the one you "
        "choose on test data.",
        "",
    ]
    if content["keep"] is not None:
        wanted = f"{content['keep']:g} % of the teacher's dev F1"
        lines += [
            f"The smallest student that keeps {wanted}: **{chosen}**, by number of parameters, "
            "in float32. Larger sizes were not tried after it."
            if chosen
            else f"No student so far keeps {wanted}.",
            "",
        ]
    rows = [
        [
            f"**{row['size']}**" if row["size"] == chosen else row["size"],
            f"{row['parameters']:,}",
            f"{row['f1']:.2f}",
            f"{row['kept']:.1f} %",
            *(
                cell
                for served in row["served"].values()
                for cell in (
                    f"{served['bytes'] / 1e6:.2f}",
                    f"{served['tokens_per_second']:,}",
                )
            ),
            f"{row['served']['int8']['f1']:.2f}",
            f"{row['seconds']:,.0f} s",
        ]
        for row in content["students"]
    ]
    columns = ["size", "parameters", "dev F1", "kept", "MB", "tokens/s", "MB int8",
               "tokens/s int8", "dev F1 int8", "made in"]  # fmt: skip
    lines += [
        *markdown_table(columns, rows),
        "",
        "Tokens are word pieces, from text to entities, many texts at a time, on "
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels.",
        "",
        f"![F1 against tokens a second]({PLOT_FILE})",
        "",
    ]
    if content["command"]:
        lines += ["```sh", shlex.join(content["command"]), "```", ""]
    return "\n".join(lines)


def summary(content: Mapping[str, Any], sizes: Iterable[str]) -> str:
    """What the command prints in the end."""
    rows = {row["size"]: row for row in content["students"]}
    keep, chosen = content["keep"], content["smallest"]
    if keep is None:
        return f"{len(rows)} students"
    if chosen is None:
        best = max(rows.values(), key=lambda row: row["kept"])
        return (
            f"none of {len(list(sizes))} sizes keeps {keep:g} % of the teacher's dev F1; the best, "
            f"{best['size']}, keeps {best['kept']:.1f} %"
        )
    row = rows[chosen]
    return (
        f"{chosen} is the smallest of the sizes that keeps {keep:g} % of the teacher's dev F1: "
        f"{row['kept']:.1f} % with {row['parameters']:,} parameters"
    )
