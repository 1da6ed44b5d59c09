"""The README tells the truth: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from xdistil_fast.model_io import embedded_models

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
_COMMANDS = {
    "tag": "xdistil_fast.commands.tag",
    "classify": "xdistil_fast.commands.classify",
    "eval": "xdistil_fast.commands.eval",
    "quantize": "xdistil_fast.commands.quantize",
    "bench": "xdistil_fast.commands.bench",
    "doctor": "xdistil_fast.commands.doctor",
    "pretrain": "xdistil_fast.train.commands.pretrain",
    "teacher": "xdistil_fast.train.commands.teacher",
    "distill": "xdistil_fast.train.commands.distill",
    "sweep": "xdistil_fast.train.commands.sweep",
    "report": "xdistil_fast.train.commands.report",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _shell_commands() -> list[list[str]]:
    lines = "\n".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = _blocks("python")
    assert len(blocks) == 2
    if "en-ner" not in embedded_models():
        pytest.skip("this installation has no embedded en-ner")
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert "PER Angela Merkel 0 13" in capsys.readouterr().out
    assert names["tags"] == [["B-PER", "I-PER", "O"]]
    assert names["places"] == ["Oslo"] * 1000


def test_torch_block_runs() -> None:
    pytest.importorskip("torch")
    names: dict[str, object] = {}
    exec(compile(_blocks("python")[1], "README.md", "exec"), names)
    assert names["loss"].item() > 0  # type: ignore[attr-defined]


def test_commands_parse() -> None:
    pytest.importorskip("torch")
    parser = argparse.ArgumentParser(prog="xdistil", exit_on_error=False)
    subparsers = parser.add_subparsers()
    for module in _COMMANDS.values():
        importlib.import_module(module).add_parser(subparsers)
    seen = set()
    for words in _shell_commands():
        if words[0] == "xdistil":
            words = words[: words.index("<")] if "<" in words else words
            parser.parse_args(words[1:])
            seen.add(words[1])
    assert seen == _COMMANDS.keys()


def test_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    targets = re.findall(
        r"\bmake ([a-z]+)\b", "\n".join(_blocks("bash") + re.findall("`.*?`", README))
    )
    assert {"demo", "test", "lint", "bench"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for extra in ",".join(re.findall(r"\.\[([\w,]+)\]", README)).split(","):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists(), link
