from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import xdistil_fast.train as package


def test_exports() -> None:
    for name in package.__all__:
        value = getattr(package, name)
        assert callable(value)
        assert value.__name__ == name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_only_under_its_own_name() -> None:
    spec = importlib.util.spec_from_file_location("train", Path(str(package.__file__)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match="as 'xdistil_fast"):
        spec.loader.exec_module(module)


def test_data_and_scores_need_no_torch() -> None:
    code = f"""
import sys
sys.path[:] = {[p for p in sys.path if p]!r}
import xdistil_fast.scoring
from xdistil_fast.train import corpora, report, runs
assert not {{'torch', 'transformers', 'pyarrow'}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
