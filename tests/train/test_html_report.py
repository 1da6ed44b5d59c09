from __future__ import annotations

import copy
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from xdistil_fast import cli
from xdistil_fast.commands.eval import load_model
from xdistil_fast.labels import Span
from xdistil_fast.model_io import embedded_models, resolve_model
from xdistil_fast.scoring import score
from xdistil_fast.train import errors, plots, runs
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.html_report import marked

pytest.importorskip("matplotlib")
if "en-ner" not in embedded_models():
    pytest.skip("this installation has no embedded en-ner", allow_module_level=True)

ROWS = [
    "Angela/B-PER Merkel/I-PER met/O Tim/B-PER Cook/I-PER in/O Berlin/B-LOC ./O",
    "<script>alert(1)</script>/B-PER met/O &amp;/O Paris/B-PER in/O Oslo/O ./O",
    "Xqwzt/B-ORG was/O late/O ./O",
    "Xqwzt/B-ORG was/O late/O ./O",
    "Mr/O Tim/B-PER Cook/I-PER and/O Berlin/B-ORG ./O",
]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def write_data(folder: Path) -> Path:
    pairs = [[word.rsplit("/", 1) for word in row.split()] for row in ROWS]
    path = folder / "test.conll"
    path.write_text("\n\n".join("\n".join(map("\t".join, row)) for row in pairs) + "\n")
    return path


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """The embedded student with the record of a run beside it."""
    folder = tmp_path / "my <student>"
    shutil.copytree(resolve_model("en-ner"), folder)
    entry = {"role": "train", "name": "a&b.conll", "digest": "ab" * 32, "sentences": 7, "words": 70}
    runs.write_run(
        folder,
        runs.run_record(
            "student",
            command=["xdistil", "distill", "--train", "a <b>"],
            settings={"student": "50x200", "note": "<i>"},
            metrics={"teacher_parameters": 22568071, "dev": {"languages": {
                "en": {"f1": 61.25, "support": 5}, "da<": {"f1": 44.5, "support": 4}}}},
            data=[entry], seconds=1.0, digest="f" * 64,
            stages={"labelling": 449.0, "training": 408.0},
            history=[
                {"epoch": 1, "stage": "logits", "fit": "all", "loss": 2.0, "heldout_loss": 2.5},
                {"epoch": 2, "stage": "<labels>", "fit": "top", "loss": 1.0, "dev_f1": 55.0},
                {"epoch": 3, "stage": "<labels>", "fit": "all", "loss": 0.5, "dev_f1": 60.0},
            ],
        ),
    )  # fmt: skip
    return folder


def teacher_record(data: Path, folder: Path, f1: float, digest: str = "e" * 64) -> Path:
    corpus = read_labelled(data)
    gold = [sentence.tags or () for sentence in corpus.sentences]
    record = {
        "kind": "eval",
        "model": {"name": "big", "kind": "teacher", "digest": digest, "parameters": 9},
        "data": [{k: v for k, v in corpus.describe("").items() if k != "role"}],
        "metrics": {**score(gold, gold).to_dict(), "f1": f1},
        "command": ["xdistil", "eval"],
        "machine": runs.machine_info(),
        "seconds": 12.5,
    }
    path = folder / "teacher.json"
    path.write_text(json.dumps(record))
    return path


def test_page(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path)
    teacher = teacher_record(data, tmp_path, 100.0)
    out = tmp_path / "report.html"
    status = cli.main(
        ["report", "--html", str(student), "--data", str(data), "--teacher", str(teacher), "-o",
         str(out)]
    )  # fmt: skip
    assert status == 0
    corpus = read_labelled(data)
    model = load_model(str(student), {})
    assert model.tagger is not None
    gold = [list(sentence.tags or ()) for sentence in corpus.sentences]
    tags = model.tagger.tag_words([list(sentence.words or ()) for sentence in corpus.sentences])
    f1 = score(gold, tags).f1
    assert 0 < f1 < 100
    assert f"{out}: F1 {f1:.2f}, {f1:.1f} % of the teacher's, " in capsys.readouterr().out
    page = Page(out)
    for text in (
        "my <student>", f"{f1:.2f} F1", f"{f1:.1f} % of the teacher's F1", "tokens/s",
        "Scores by type", "Partial matches", "Confusion between types", "Surest wrong entities",
        "Surest missed entities", "Learning curves", "Settings of the run", "50x200", "a&b.conll",
        "ab" * 32, "Scores by language", "da< 44.50 4", "labelling when it was made 449 s",
        "<script>alert(1)</script>", "<labels>, top", "xdistil distill --train 'a <b>'",
        f"xdistil report --html {runs.portable(str(student))!r}", "12.50 s", "1,735,407",
        "another teacher, " + "e" * 64,
    ):  # fmt: skip
        assert text in page.text, text
    assert "2 times" in page.text  # Xqwzt was missed twice and is shown once
    assert page.text.count("Xqwzt ORG was late") == 1  # gold
    assert page.text.count("Xqwzt was late") == 1  # student
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    # Nothing is fetched: what refers refers to the page itself.
    whole = out.read_text(encoding="utf-8")
    assert "http" not in whole
    assert "@import" not in whole
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value is not None
            assert value.startswith("#")
    assert whole.count("url(") == whole.count("url(#")
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = {value[1:] for name, value in page.attributes if name == "href" and value}
    assert targets <= set(identifiers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "my <student>", "report.html", "teacher.json", "test.conll",
    ]  # fmt: skip


def test_a_folder_without_records_has_a_page(tmp_path: Path) -> None:
    data, out = write_data(tmp_path), tmp_path / "report.html"
    arguments = ["report", "--html", "en-ner", "--data", str(data), "-o", str(out)]
    assert cli.main([*arguments, "--examples", "0", "--precision", "float32"]) == 0
    page = Page(out)
    assert "Surest" not in page.text
    assert "run in float32" in page.text
    assert "Learning curves" not in page.text
    assert "kept" not in page.text
    assert "uner/en/train.conll.gz" in page.text  # from config.json


def test_data_that_the_student_was_made_of_is_named(student: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path), tmp_path / "report.html"
    record = runs.read_run(student)
    record["data"].append(
        {**record["data"][0], "role": "dev", "digest": read_labelled(data).digest}
    )
    runs.write_run(student, record)
    assert cli.main(["report", "--html", str(student), "--data", str(data), "-o", str(out)]) == 0
    assert "This data had a part in making the student, as dev." in Page(out).text


def test_confidence_and_grouping() -> None:
    model = load_model("en-ner", {})
    assert model.tagger is not None
    words = [["Angela", "Merkel", "met", "Tim"], ["Nothing", "here"], ["Nothing", "here"]]
    gold = [["O", "O", "O", "O"], ["B-ORG", "O"], ["B-ORG", "O"]]
    tags = model.tagger.tag_words(words)
    pairs = errors.pair_entities(gold, tags)
    wrong, missed = errors.surest_mistakes(model.tagger, words, tags, pairs, 9)
    shares = {e["word"]: e["score"] for e in model.tagger("Angela Merkel met Tim")}
    assert [m.confidence for m in wrong] == pytest.approx(sorted(shares.values(), reverse=True))
    outside = model.tagger.word_probabilities(words)[1][0][model.labels.index("O")]
    assert [(m.count, m.pair.sentence) for m in missed] == [(2, 1)]
    assert missed[0].confidence == pytest.approx(float(outside))


def test_a_plain_tag_that_is_none_of_the_models() -> None:
    """What a word without pieces is given."""

    class Tagger:
        labels = ("NOUN", "VERB")

        def word_probabilities(self, words: list[list[str]]) -> list[np.ndarray[Any, Any]]:
            return [np.full((len(row), 2), 0.5, np.float32) for row in words]

    words, gold, tags = [["ships", "\u200f"]], [["NOUN", "NOUN"]], [["VERB", "_"]]
    pairs = errors.pair_entities(gold, tags, "tags")
    wrong, _ = errors.surest_mistakes(cast("Any", Tagger()), words, tags, pairs, 9)
    assert [mistake.confidence for mistake in wrong] == [0.5, 0.0]


def test_marked_words_are_escaped_and_cut() -> None:
    words = ["a", "<b>", "c", "d", "e"]
    spans = [Span("X&", 0, 2), Span("Y", 3, 5)]
    assert marked(words, spans, spans[0], "gold", 1, 4) == (
        '… <mark class="gold">&lt;b&gt;<small>X&amp;</small></mark> c '
        '<mark class="other">d<small>Y</small></mark> …'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "en-ner"], "--html needs labelled sentences: --data FILE"),
        (["run.json", "--html", "en-ner", "--data", "DATA"], "takes no RUN"),
        (["--data", "DATA"], "--data goes with --html STUDENT alone"),
        (["--html", "en-ner", "--data", "DATA", "--examples", "-1"], "--examples is -1"),
        (["--html", "en-ner", "--data", "DATA", "--teacher", "en-ner"], "en-ner is a student"),
        (["--html", "en-ner", "--data", "DATA", "--teacher", "OTHER"], "need the same data"),
        (["--html", "en-ner", "--data", "DATA", "-o", "nowhere/report.html"], "does not exist"),
        (["--html", "en-ner", "--data", "DATA", "-o", "."], "is a folder"),
        ([], "no run given"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path)
    record = json.loads(teacher_record(data, tmp_path, 90.0).read_text())
    other = copy.deepcopy(record)
    other["data"][0]["digest"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    known = {"DATA": str(data), "OTHER": str(tmp_path / "other.json")}
    out = tmp_path / "report.html"
    words = [known.get(word, word) for word in arguments]
    status = cli.main(["report", *([] if "-o" in words else ["-o", str(out)]), *words])
    assert status == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "report.html"
    data = str(write_data(tmp_path))
    assert cli.main(["report", "--html", "en-ner", "--data", data, "-o", str(out)]) == 2
    assert 'pip install "xdistil-fast[report]"' in capsys.readouterr().err


def test_curves_of_odd_histories() -> None:
    entries: list[dict[str, Any]] = [
        {"epoch": 1, "loss": 1.0, "soft": 0.0, "dev_f1": 0.0},
        {"epoch": 2, "loss": float("inf"), "dev_f1": 0.0, "new": None},
    ]
    for history in (entries, entries[:1], [{"epoch": 1}], [{"stage": "$x_{", "loss": "?"}]):
        assert plots.learning_curves(history).startswith("<svg ")


def test_pareto_front() -> None:
    def point(name: str, speed: float, f1: float) -> plots.Point:
        return plots.Point(name, "int8", speed, f1, 1.0)

    points = [point("a", 10, 90), point("b", 20, 80), point("c", 15, 70), point("d", 10, 85)]
    assert [p.name for p in plots.pareto_front(points)] == ["a", "b"]
