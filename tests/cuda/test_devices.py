"""What is asked to run on a GPU that is not there says why, before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xdistil_fast import Classifier, Tagger, _backend
from xdistil_fast.cli import main

NAME = "no-such-model/anywhere"


def machine(
    driver: int = 13_000, devices: int = 1, capability: tuple[int, int] = (9, 0), error: str = ""
) -> Any:
    """An extension built with CUDA 13.0, on some machine."""

    def device_info(device: int) -> dict[str, Any]:
        if error:
            raise RuntimeError(error)
        if device >= devices:
            raise ValueError(f"device: got {device}, this machine has {devices} GPUs")
        return {"name": "Old", "compute_capability": capability}

    return SimpleNamespace(
        driver_version=lambda: driver, runtime_version=lambda: 13_000, device_info=device_info
    )


def not_built() -> Any:
    raise _backend.DeviceError("this xdistil-fast was built without CUDA; build it")


CASES = {
    "built without CUDA": not_built,
    "needs an NVIDIA driver; there is none": lambda: machine(driver=0),
    "driver is for CUDA 12.4, this extension was built with CUDA 13.0": lambda: machine(12_040),
    "does not run here: no usable GPU": lambda: machine(error="no usable GPU"),
    "has compute capability 7.5; xdistil-fast needs 8.0": lambda: machine(capability=(7, 5)),
}


@pytest.fixture(params=CASES)
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Why no GPU is to be had."""
    monkeypatch.setattr(_backend, "cuda", CASES[request.param])
    _backend.device_info.cache_clear()
    yield request.param
    _backend.device_info.cache_clear()


@pytest.mark.parametrize("kind", [Tagger, Classifier])
def test_models(reason: str, kind: Any) -> None:
    """The reason comes before the model, which there is not either."""
    with pytest.raises(RuntimeError, match=reason):
        kind.from_pretrained(NAME, device="cuda")


@pytest.mark.parametrize("command", ["tag", "classify"])
def test_commands(
    reason: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("A text.\n")
    for rest in (["--text", "A text."], [str(source), "-o", str(out)]):
        assert main([command, "--model", NAME, "--device", "cuda", *rest]) == 2
        error = capsys.readouterr().err
        assert error.startswith("xdistil: error: ")
        assert reason in error
    assert list(tmp_path.iterdir()) == [source]


def test_eval(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", NAME, "--data", "nothing.conll", "--device", "cuda:0"]) == 2
    assert reason in capsys.readouterr().err


def test_a_number_that_no_gpu_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_backend, "cuda", machine)
    assert main(["tag", "--device", "cuda:7", "--text", "A"]) == 2
    assert "device: got 7, this machine has 1 GPUs" in capsys.readouterr().err
    assert main(["tag", "--device", "gpu", "--text", "A"]) == 2
    assert "device is 'gpu'; allowed: 'cpu', 'cuda', 'cuda:N'" in capsys.readouterr().err


def test_a_device_of_the_emulation(device: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as it runs where there is one."""
    options = ["--device", "cuda", "--threads", "1", "--max-memory", "1"]
    assert main(["classify", *options, "--text", "A film to see twice."]) == 0
    assert '"positive"' in capsys.readouterr().out
    assert main(["tag", *options, "--text", "Tim Cook is in Berlin."]) == 0
    assert '"Berlin"' in capsys.readouterr().out
