from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xdistil_fast.train import runs
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.distributed import Ranks, SharedGenerator, one_process_only, processes

TorchRun = Callable[[list[str], Path], subprocess.Popen[str]]

SETTINGS = {
    "schedule": "d1",
    "student": "8x12",
    "epochs": 2,
    "batch_size": 17,
    "lr": 0.01,
    "dropout": 0.2,
}


@pytest.fixture(scope="module")
def named(inputs: dict[str, Any]) -> dict[str, Any]:
    """Files with languages: 120 sentences by 17, so that the last batch is one that both take."""
    train, dev = inputs["train"][0], inputs["dev"][0]
    files = {"train": [f"de={train}"], "dev": [f"de={dev}", f"fi={dev}"]}
    return {"teacher": inputs["teacher"], **files}


def start(
    torchrun: TorchRun, named: dict[str, Any], out: Path, cache: Path, **more: Any
) -> subprocess.Popen[str]:
    arguments = ["distill", "--teacher", named["teacher"], "-o", str(out), "--cache", str(cache)]
    for name in ("train", "dev"):
        arguments += [f"--{name}", *named[name]]
    for name, value in {**SETTINGS, **more}.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    return torchrun(arguments, out.parent)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=1200)
    finally:
        process.kill()
    return output


def alone(named: dict[str, Any], out: Path, cache: Path) -> dict[str, Any]:
    """The same run in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {**SETTINGS, "progress": False, "cache": str(cache)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("xdistil_fast.train.shards.SHARD_SENTENCES", 16)
            return distill(DistillConfig(**named, **settings, output=str(out)))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(named: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("one")
    alone(named, folder / "student", folder / "cache")
    return folder / "student", folder / "cache"


def compare(found: Path, expected: Path) -> None:
    one, two = runs.read_run(expected), runs.read_run(found)
    assert len(one["history"]) == len(two["history"]) == SETTINGS["epochs"]
    for before, after in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "hard", "soft"):
            assert after[name] == pytest.approx(before[name], rel=1e-4)
        assert after["dev_macro_f1"] == pytest.approx(before["dev_macro_f1"], abs=3)
    assert two["metrics"]["dev"]["macro"]["teacher_f1"] > 0
    assert set(two["metrics"]["dev"]["languages"]) == {"de", "fi"}


def test_two_processes_are_one(
    torchrun: TorchRun, named: dict[str, Any], one: tuple[Path, Path], tmp_path: Path
) -> None:
    """Loss by loss, and shard by shard."""
    process = start(torchrun, named, tmp_path / "two", tmp_path / "cache")
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count("parameters, ") == 1  # one of them prints
    assert output.count("macro mean") == 1
    compare(tmp_path / "two", one[0])
    contents = [
        {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*.*")}
        for cache in (tmp_path / "cache", one[1])
    ]
    assert sum("shard-" in name for name in contents[0]) >= 8
    assert contents[0] == contents[1]
    assert not any("manifest-" in name for name in contents[0])


def test_stopped_together_and_gone_on_with_alone(
    torchrun: TorchRun, named: dict[str, Any], one: tuple[Path, Path], tmp_path: Path
) -> None:
    more = {"checkpoint_minutes": 1e-6}
    process = start(torchrun, named, tmp_path / "two", tmp_path / "cache", **more)
    checkpoint = tmp_path / "two.part" / "checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode != 0, output
    assert checkpoint.exists(), output
    alone(named, tmp_path / "two", tmp_path / "cache")
    compare(tmp_path / "two", one[0])


def test_one_rank_is_no_rank() -> None:
    ranks = Ranks()
    batch = np.arange(5)
    assert ranks.part(batch) is batch
    assert ranks.gather([1, 2]).tolist() == [[1, 2]]
    assert ranks.first_does(lambda: 3) == ranks.first_goes_ahead(lambda: 3) == 3
    assert ranks.average(1.0, [], [0.5]) == [0.5]
    ranks.wait()
    ranks.copy_first([])


@pytest.mark.parametrize("count", [3, 4, 64])
def test_parts_are_the_batch(count: int) -> None:
    batch = np.arange(count) * 7
    parts = [Ranks(rank, 3).part(batch) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), batch)
    assert all(len(part) for part in parts)
    assert all(np.array_equal(Ranks(rank, 3).part(batch[:2]), batch[:2]) for rank in range(3))


def test_parts_of_dropout_are_those_of_one_process() -> None:
    rows, widths = [3, 5, 2], (8, 6)
    own = np.random.default_rng(4)
    whole = [own.bytes(sum(rows) * width) for width in widths]
    lengths: list[int] = []

    class Known(Ranks):
        def gather(self, values: Sequence[int]) -> Any:
            assert list(values) == [lengths[self.rank]]
            return np.array(lengths)[:, None]

    shared = [SharedGenerator(np.random.default_rng(4), Known(rank, 3)) for rank in range(3)]
    for width, expected in zip(widths, whole, strict=True):
        lengths[:] = [n * width for n in rows]
        found = [part.bytes(n) for part, n in zip(shared, lengths, strict=True)]
        assert b"".join(found) == expected


def test_commands_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one_process_only("xdistil teacher")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="xdistil teacher runs in one process and torchrun"):
        one_process_only("xdistil teacher")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        processes()
