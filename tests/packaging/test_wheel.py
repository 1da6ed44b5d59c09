"""What is in the wheel and in the source distribution, and that the wheel works by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MB = 1 << 20


def _pip(*arguments: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the folder that the editable install was built in, so nothing compiles twice."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), ".", folder=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel_metadata(wheel: Path, names: set[str]) -> Message:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def _sources(folder: str) -> set[str]:
    """Files of a package folder that belong into the wheel, relative to the folder."""
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so"} and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in names} == {"xdistil_fast"}
    packaged = {name for name in names if name.startswith("xdistil_fast/")}
    wanted = {f"xdistil_fast/{name}" for name in _sources("xdistil_fast")}
    wanted |= {f"xdistil_fast/train/{name}" for name in _sources("train")}
    wanted.add(f"xdistil_fast/_core{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert packaged == wanted
    assert {"xdistil_fast/py.typed", "xdistil_fast/_core.pyi"} <= packaged
    assert "xdistil_fast/train/__init__.py" in packaged


def test_wheel_is_small(wheel: Path, names: set[str]) -> None:
    models = 0
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.filename.startswith("xdistil_fast/models/"):
                models += info.compress_size
    assert models <= 8 * MB
    assert wheel.stat().st_size - models <= 2 * MB


def test_wheel_metadata(names: set[str], wheel_metadata: Message) -> None:
    core = [text for text in wheel_metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert not any("torch" in text or "transformers" in text for text in core)
    assert {"train", "data", "test", "bench", "lint"} <= set(
        wheel_metadata.get_all("Provides-Extra", [])
    )
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert (ROOT / "README.md").read_text(encoding="utf-8")[:200] in str(
        wheel_metadata.get_payload()
    )


_USE = """
import json
import sys
from pathlib import Path

import numpy as np
import xdistil_fast
from xdistil_fast import Classifier, Tagger, _core

folder = Path(xdistil_fast.__file__).parent
assert folder.parent == Path(sys.argv[1]), folder
assert Path(_core.__file__).parent == folder

random = np.random.default_rng(0)
shapes = [(32, 5), (32, 8), (32,), (32,)] * 2
weights = _core.BiLSTMWeights([random.standard_normal(s, dtype=np.float32) for s in shapes])
out = np.empty((6, 16), np.float32)
_core.bilstm_forward(
    weights,
    random.standard_normal((6, 5), dtype=np.float32),
    np.array([0, 2, 6], np.int32),
    out,
)
np.save(sys.argv[2], out)

for path in sorted(folder.glob("models/*/config.json")):
    model = path.parent.name
    if json.loads(path.read_text("utf-8"))["task"] == "text-classification":
        found = Classifier.from_pretrained(model)("A dull, lifeless film.")
        assert [prediction["label"] for prediction in found] == ["negative"]
    else:
        entities = Tagger.from_pretrained(model)("Angela Merkel met Tim Cook in Berlin.")
        assert [entity["word"] for entity in entities] == ["Angela Merkel", "Tim Cook", "Berlin"]

assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    _pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), folder=tmp_path)
    # -S: no .pth file is read, so the editable install of the tests' environment is out of reach.
    site = os.pathsep.join([str(target), str(Path(np.__file__).parents[1])])
    out = tmp_path / "out.npy"
    result = subprocess.run(
        [sys.executable, "-S", "-c", _USE, str(target), str(out)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": site},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    hidden = np.load(out)
    assert np.isfinite(hidden).all()
    assert (np.abs(hidden) < 1).all()
    assert hidden.any(axis=1).all()


def test_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    command = (
        "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"PKG-INFO", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    for folder in ("csrc", "xdistil_fast", "train", "tests"):
        assert {f"{folder}/{name}" for name in _sources(folder)} <= names
    unwanted = (".git/", ".github/", ".ci/", ".venv", "build/", "xdistil_fast/train/")
    assert not [name for name in names if name.startswith(unwanted)]
