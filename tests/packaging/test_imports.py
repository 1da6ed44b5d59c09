"""Inference in a process that cannot import torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_WITHOUT_FRAMEWORKS = """
import sys
for name in ("torch", "transformers", "pyarrow", "scipy"):
    sys.modules[name] = None  # an import of it now fails
"""


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_FRAMEWORKS + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "module", ["tagger", "cli", "model_io", "tokenization", "student", "labels", "scoring"]
)
def test_inference_modules_need_no_framework(module: str, tmp_path: Path) -> None:
    result = _run(f"import xdistil_fast.{module}", tmp_path)
    assert result.returncode == 0, result.stderr


def test_help_needs_no_framework(tmp_path: Path) -> None:
    result = _run("from xdistil_fast.cli import main\nsys.exit(main(['--help']))", tmp_path)
    assert result.returncode == 0, result.stderr
    for command in ("tag", "eval", "bench", "doctor", "teacher", "distill", "sweep", "report"):
        assert command in result.stdout


def test_training_commands_name_the_extra(tmp_path: Path) -> None:
    code = "from xdistil_fast.cli import main\nsys.exit(main(['distill', '--help']))"
    result = _run(code, tmp_path)
    assert result.returncode == 2
    assert 'pip install "xdistil-fast[train]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_folder_train_is_no_package_of_its_own(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    result = _run(f"sys.path.insert(0, {str(root)!r})\nimport train", tmp_path)
    assert result.returncode == 1
    assert "xdistil_fast.train" in result.stderr
