from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xdistil_fast.train import runs


def record(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "command": ["xdistil", "teacher"],
        "settings": {"seed": 0},
        "metrics": {"dev": {"f1": 91.5}},
        "data": [{"role": "train", "name": "a.conll"}],
        "seconds": 1.23456,
        "digest": "00ff",
    }
    return runs.run_record("teacher", **{**fields, **changes})  # type: ignore[arg-type]


def test_machine_info_is_json_and_names_versions() -> None:
    info = runs.machine_info(threads=1)
    assert json.loads(json.dumps(info)) == info
    assert info["threads"] == 1
    assert info["cores"] == runs.usable_cores() >= 1
    assert info["cpu"]
    assert {"python", "numpy", "torch"} <= info["versions"].keys()
    assert runs.machine_info()["threads"] == info["cores"]


def test_round_trip(tmp_path: Path) -> None:
    written = record(labels=["O"])
    runs.write_run(tmp_path, written)
    assert runs.read_run(tmp_path) == written
    assert runs.read_run(tmp_path / "run.json") == written
    assert written["seconds"] == 1.235
    assert written["labels"] == ["O"]
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_writers_of_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path, contents = tmp_path / "a.bin", [bytes([n]) * 200_000 for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(runs.write_file, path, contents[n % 4]) for n in range(80)]:
            done.result()
            assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "kind is None"),
        ('{"kind": "bench"}', "kind is 'bench'; allowed: 'pretrain', 'teacher', 'student', 'eval'"),
    ],
)
def test_refuses(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        runs.read_run(tmp_path)


def test_missing_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        runs.read_run(tmp_path)


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("a.conll", "a.conll"),
        ("../news/en/more/a.conll", "../news/en/more/a.conll"),
        ("--lr", "--lr"),
        ("/srv/data/news/en/a.conll", "news/en/a.conll"),
        ("/a.conll", "a.conll"),
        ("/home/ada/a.conll", "a.conll"),
        ("/home/ada/sets/news/en/a.conll", "news/en/a.conll"),
        ("/home/ada", "."),
        ("/", "."),
        ("de=/home/ada/sets/news/de/a.conll", "de=news/de/a.conll"),
        ("--output=/home/ada/out", "--output=out"),
        ("--lr=0.1", "--lr=0.1"),
        ("/srv/a=b/c.conll", "srv/a=b/c.conll"),
    ],
)
def test_portable(monkeypatch: pytest.MonkeyPatch, argument: str, shown: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert runs.portable(argument) == shown


def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.command_line(argparse.Namespace(argv=["eval", "m"])) == ["xdistil", "eval", "m"]
    monkeypatch.setattr("sys.argv", ["/opt/bin/xdistil", "teacher", "-o", "/srv/x/y/z/t"])
    assert runs.command_line(argparse.Namespace()) == ["xdistil", "teacher", "-o", "y/z/t"]
