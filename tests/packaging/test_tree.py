"""Rules that hold for every file of the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CODE = ("csrc", "xdistil_fast", "train", "bench", "tests")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".sh"}
LONGEST_FILE = 600


def _files() -> list[Path]:
    # Folders that link elsewhere are not walked: a development tree may link train/ twice.
    found: list[Path] = []
    for folder in CODE:
        for here, folders, names in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            found += [Path(here, name) for name in names if Path(name).suffix in SUFFIXES]
    return found


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _workflows() -> list[Path]:
    return sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_there_is_code_in_every_folder() -> None:
    assert {_relative(path).split("/")[0] for path in _files()} == set(CODE)


def test_no_file_is_long() -> None:
    lengths = {
        _relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in _files()
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    here = Path(__file__)
    found = [
        f"{_relative(path)}:{number}"
        for path in _files()
        if path != here
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_results_hold_figures_and_no_texts() -> None:
    """Corpora are other people's, and no string of ours is as long."""

    def longest(value: object) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, dict):
            return longest(list(value.values()))
        return max(map(longest, value), default=0) if isinstance(value, list) else 0

    folders = (ROOT / "bench" / "results", ROOT / "docs" / "records")
    files = [path for folder in folders for path in folder.rglob("*.json")]
    assert len(files) > 2
    for path in files:
        assert longest(json.loads(path.read_text(encoding="utf-8"))) < 1000, path


def test_tests_stand_alone() -> None:
    """With --import-mode=importlib a conftest in the root would put the tree on sys.path."""
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_ci_runs_the_make_targets() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    called = re.findall(r"^make (\w+)$", script, re.MULTILINE)
    assert {"lint", "test"} <= set(called) <= _make_targets()


@pytest.mark.parametrize("path", _workflows(), ids=lambda path: path.name)
def test_workflow_is_sound(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = _make_targets()
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for target in re.findall(r"\bmake (\w+)", step.get("run", "")):
                assert target in targets


def test_wheels_cover_what_the_metadata_promises() -> None:
    names = {path.name for path in _workflows()}
    assert names == {"ci.yml", "wheels.yml"}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    (built,) = re.findall(r'^build = "(.*)"$', text, re.MULTILINE)
    assert built.split() == [f"cp3{minor}-*" for minor in promised]


def test_presets_are_those_documented() -> None:
    presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in presets["configurePresets"] if not entry.get("hidden")]
    assert names == ["dev", "release", "asan", "emulate", "cuda", "aarch64"]
    assert [entry["configurePreset"] for entry in presets["buildPresets"]] == names
