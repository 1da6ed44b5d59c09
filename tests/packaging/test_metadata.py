"""One version, one list of dependencies, and pins for all of them."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import xdistil_fast
from xdistil_fast import _core

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def _constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]]
    return [Requirement(text) for text in [*texts, *(text for extra in extras for text in extra)]]


def test_version_is_one() -> None:
    version = PROJECT["version"]
    assert xdistil_fast.__version__ == version
    assert _core.__version__ == version
    assert metadata.version("xdistil-fast") == version


def test_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(PROJECT['version'])}\b", changelog, re.MULTILINE)


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_every_dependency_is_pinned(requirement: Requirement) -> None:
    pin = _constraints()[canonicalize_name(requirement.name)]
    ((operator, version),) = [(part.operator, part.version) for part in pin.specifier]
    assert operator == "=="
    assert requirement.specifier.contains(version)


def test_what_is_installed_is_what_is_pinned() -> None:
    pins = _constraints()
    wrong = []
    for distribution in metadata.distributions():
        pin = pins.get(canonicalize_name(distribution.metadata["Name"]))
        if pin is not None and not pin.specifier.contains(distribution.version, prereleases=True):
            wrong.append(f"{distribution.metadata['Name']} {distribution.version}, not {pin}")
    assert not wrong


def test_inference_depends_on_no_framework() -> None:
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert names == {"huggingface-hub", "numpy", "safetensors", "tokenizers", "tqdm"}


def test_package_is_marked_as_typed() -> None:
    assert (Path(xdistil_fast.__file__).parent / "py.typed").is_file()


def test_stub_names_all_of_the_extension() -> None:
    stub = Path(xdistil_fast.__file__).parent / "_core.pyi"
    named: set[str] = set()
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            named.add(node.target.id)
    there = {name for name in dir(_core) if not name.startswith("_")} | {"__version__"}
    assert there <= named
    assert {name for name in named if not name.startswith("_")} <= there
