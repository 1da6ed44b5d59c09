from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from xdistil_fast.train import runs
from xdistil_fast.train.checkpoint import (
    CHECKPOINT_FILE,
    StopRequest,
    alone,
    check_output,
    finished_before,
    load_checkpoint,
    open_part,
    save_checkpoint,
)

KEY = {"settings": {"lr": 0.003, "seed": 1}, "teacher": "ab12", "labels": ["O"]}
TENSORS = {"weights/a": np.arange(6, dtype=np.float32).reshape(2, 3), "step/a": np.float32(4)}


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    state = {"epoch": 3, "sums": {"loss": 0.1 + 0.2}, "history": [{"f1": 1 / 3}]}
    save_checkpoint(tmp_path, {k: np.asarray(v) for k, v in TENSORS.items()}, state)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    tensors, found = loaded
    assert found == state
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], value)
        assert tensors[name].dtype == np.float32
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_failed_write_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, {}, {"epoch": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, {}, {"epoch": 2})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[1] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT_FILE]


@pytest.mark.parametrize("keep", [0, 5, 40, -3])
def test_damaged_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    save_checkpoint(tmp_path, {"a": np.ones(20, np.float32)}, {"epoch": 1})
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"damaged checkpoint.*start anew"):
        load_checkpoint(tmp_path)


def test_part_belongs_to_one_run(tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    open_part(part, KEY)
    open_part(part, KEY)
    other = {**KEY, "settings": {"lr": 0.01, "seed": 1}, "labels": ["O", "B-X", "I-X"]}
    with pytest.raises(ValueError, match=r"labels; lr: 0.003 there, 0.01 here"):
        open_part(part, other)
    (part / "run_key.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        open_part(part, KEY)


def test_part_of_a_run_that_was_killed_as_it_began(tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "run_key.json.0123abcd.part").write_text("{", encoding="utf-8")
    open_part(part, KEY)
    open_part(part, KEY)


def test_foreign_part_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="no unfinished run of ours"):
        open_part(tmp_path, KEY)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_output_must_be_new_or_a_run(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    with pytest.raises(ValueError, match=r"folder .* does not exist"):
        check_output(tmp_path / "no" / "new")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        check_output(tmp_path)


def test_finished_output_is_recognised(tmp_path: Path) -> None:
    assert finished_before(tmp_path / "new", KEY) is None
    assert finished_before(tmp_path, KEY) is None
    runs.write_run(tmp_path, {"kind": "student", "key": KEY, "seconds": 3})
    record = finished_before(tmp_path, KEY)
    assert record is not None
    assert record["seconds"] == 3
    with pytest.raises(ValueError, match=r"another run \(teacher: 'ab12' there, 'cd34' here\)"):
        finished_before(tmp_path, {**KEY, "teacher": "cd34"})
    runs.write_run(tmp_path, {"kind": "teacher"})
    with pytest.raises(ValueError, match="another run"):
        finished_before(tmp_path, KEY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    open_part(tmp_path / "out.part", KEY)
    with alone(tmp_path / "out.part"), alone(tmp_path / "out.part"):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    open_part(part, KEY)
    with alone(part):
        with pytest.raises(BlockingIOError, match="another process is at work in it"), alone(part):
            pass
        (part / CHECKPOINT_FILE).write_bytes(b"")  # whoever has it writes there
    with alone(part):
        pass
