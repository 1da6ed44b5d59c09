from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xdistil_fast import cli
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.label_maps import load_label_map

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"

# Notes its arguments and makes what -o names, of the size it is told.
STUB = """\
import json, os, sys
from pathlib import Path
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(sys.argv[1:]) + "\\n")
if "-o" in sys.argv:
    folder = Path(sys.argv[sys.argv.index("-o") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes(int(os.environ["SIZE"])))
"""

if shutil.which("bash") is None:
    pytest.skip("recipes are bash scripts, and there is no bash", allow_module_level=True)


def follow(
    tmp_path: Path, recipe: str, *args: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a recipe with a stub in place of the command; its result and the stub's arguments."""
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    notes = tmp_path / "notes"
    notes.touch()
    variables = {
        **os.environ,
        "XDISTIL": f"{sys.executable} {tmp_path / 'stub.py'}",
        "NOTES": str(notes),
        "SIZE": "100",
        **env,
    }
    done = subprocess.run(
        ["bash", str(RECIPES / recipe), *args], env=variables, capture_output=True, text=True
    )
    return done, [json.loads(line) for line in notes.read_text("utf-8").splitlines()]


def parse(argv: list[str]) -> Any:
    return cli._parse(argv)


@pytest.mark.parametrize(
    ("recipe", "scores"), [("en-ner.sh", 6), ("conll2003-en.sh", 6), ("en-sentiment.sh", 2)]
)
def test_every_command_is_one_that_exists(tmp_path: Path, recipe: str, scores: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reviews.txt").write_text("A film .\n")  # as of an earlier run
    done, commands = follow(tmp_path, recipe, "data", str(tmp_path / "out"), BASE="some/base")
    assert done.returncode == 0, done.stderr
    parsed = [parse(argv) for argv in commands]
    assert [args.command for args in parsed[:2]] == ["teacher", "distill"]
    assert parsed[0].model == "some/base"
    for argv in commands:
        assert f"+ {sys.executable} {tmp_path / 'stub.py'} {' '.join(argv)}" in done.stderr
    for args in parsed:
        if args.command == "distill":
            assert args.teacher == str(parsed[0].output)
            fields = {name for name in DistillConfig.__dataclass_fields__ if hasattr(args, name)}
            values = {name: getattr(args, name) for name in fields - {"label_map"}}
            assert DistillConfig(**values).train
    evaluated = {str(args.model) for args in parsed if args.command == "eval"}
    # What a later command makes better is not scored itself.
    improved = {str(args.model) for args in parsed if args.command == "quantize"}
    made = {str(args.output) for args in parsed if args.command != "eval"}
    assert evaluated == made - improved
    figures = [str(args.json) for args in parsed if args.command == "eval"]
    assert len(set(figures)) == len(figures) == scores


def test_en_ner_maps_types_and_trains_on_what_may_be_published(tmp_path: Path) -> None:
    _, commands = follow(tmp_path, "en-ner.sh", "data", str(tmp_path / "out"))
    for args in map(parse, commands):
        assert load_label_map(args.label_map)["politician"] == "PER"
        if args.command in ("teacher", "distill"):
            sets = {str(path).split("/")[1] for path in (*args.train, *args.dev)}
            assert sets == {"uner", "wnut17", "crossner"}
            assert not any("test" in str(path) for path in (*args.train, *args.dev))


def test_transfer_text_can_be_chosen(tmp_path: Path) -> None:
    _, commands = follow(
        tmp_path, "conll2003-en.sh", "d", str(tmp_path / "out"), TRANSFER="a.txt b/c.txt.gz"
    )
    assert parse(commands[1]).transfer == ["d/a.txt", "d/b/c.txt.gz"]


def test_a_model_that_is_too_large_stops_the_recipe(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done, commands = follow(tmp_path, "en-ner.sh", "data", out, SIZE=str(8_000_001))
    assert done.returncode == 1
    assert "larger than 8 MB" in done.stderr
    assert [argv[0] for argv in commands] == ["teacher", "distill", "quantize"]


def test_en_sentiment_has_sentences_of_reviews(tmp_path: Path) -> None:
    """Split, each once, so many of each file; none of the labels is read."""
    (tmp_path / "data" / "imdb").mkdir(parents=True)
    raw = "It is good. So is Mr. Bean for the third time! Is it not? Too short."
    (tmp_path / "data" / "imdb" / "unlabeled.txt").write_text(raw + "\n")
    row = {"text": "Bad from start to end. It is good. Nobody should see it.", "label": "neg"}
    (tmp_path / "data" / "imdb" / "train.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    _, commands = follow(
        tmp_path, "en-sentiment.sh", str(tmp_path / "data"), str(out), PYTHON=sys.executable,
        TRANSFER="imdb/unlabeled.txt imdb/train.jsonl", SENTENCES="2",
    )  # fmt: skip
    lines = (out / "reviews.txt").read_text().splitlines()
    assert lines == ["Bean for the third time!", "Bad from start to end.", "Nobody should see it."]
    assert parse(commands[1]).transfer == [str(out / "reviews.txt")]


@pytest.mark.parametrize("recipe", ["en-ner.sh", "conll2003-en.sh", "en-sentiment.sh"])
def test_usage(tmp_path: Path, recipe: str) -> None:
    done, commands = follow(tmp_path, recipe, "data")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not commands
