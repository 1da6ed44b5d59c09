"""Long runs that may be stopped at any time: the working folder and its checkpoint.

A run that makes the folder ``OUT`` works in ``OUT.part`` beside it:

    run_key.json            what this run is: settings, labels, digests of its input
    checkpoint.safetensors  all state of the run, replaced as a whole

and renames the finished result to ``OUT``. The same command, started again, goes on from the
checkpoint; another one is refused.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from xdistil_fast.file_lock import lock
from xdistil_fast.train import runs

KEY_FILE = "run_key.json"
CHECKPOINT_FILE = "checkpoint.safetensors"

Arrays = dict[str, npt.NDArray[Any]]


def check_output(out: Path) -> None:
    """Refuse an output that cannot become a run's folder.

    Raises:
        ValueError: it is a file, its parent is missing, or it holds anything but a finished run.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out} is a file; it must be a new folder")
    if not out.parent.is_dir():
        raise ValueError(f"output {out}: the folder {out.parent} does not exist")
    if out.is_dir() and any(out.iterdir()) and not (out / runs.RUN_FILE).is_file():
        raise ValueError(f"output {out} exists and holds no {runs.RUN_FILE}; give a new folder")


def finished_before(out: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """``run.json`` of an output that this very run has made; None where there is none yet.

    Raises:
        ValueError: the output holds the result of another run.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return None
    record = runs.read_run(out)
    if record.get("key") != key:
        raise ValueError(
            f"output {out} holds the result of another run "
            f"({difference(record.get('key'), key)}); give a new folder or remove it"
        )
    return record


def key_of(part: Path) -> object:
    """The key in a working folder; None where there is no such folder or key.

    Raises:
        ValueError: the key is damaged.
    """
    file = part / KEY_FILE
    if not file.is_file():
        return None
    try:
        key: object = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); remove {part}") from None
    return key


def open_part(part: Path, key: Mapping[str, Any]) -> None:
    """Make the working folder, or check that the one there belongs to this very run.

    Raises:
        ValueError: it belongs to another run, or to none; what differs is named.
    """
    old = key_of(part)
    if old is not None:
        if old != key:
            raise ValueError(
                f"{part} holds an unfinished run that differs ({difference(old, key)}); give the "
                "same arguments to go on with it, or remove it"
            )
        return
    half_written = f"{KEY_FILE}.*.part"  # of a run that was killed as it began
    if part.exists() and (
        not part.is_dir() or any(not file.match(half_written) for file in part.iterdir())
    ):
        raise ValueError(f"{part} exists and is no unfinished run of ours; remove it")
    part.mkdir(exist_ok=True)
    runs.write_json(part / KEY_FILE, key)


@contextlib.contextmanager
def alone(part: Path) -> Iterator[None]:
    """Keep other processes out of a working folder.

    Raises:
        BlockingIOError: one is at work there.
    """
    with open(part / KEY_FILE, "rb") as file:
        lock(file, part, "another process is at work in it")
        yield


def difference(old: object, new: Mapping[str, Any]) -> str:
    """Which entries of two run keys differ, for a message."""
    if not isinstance(old, dict):
        return "no key of ours"

    def flat(value: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
        for name, entry in value.items():
            if isinstance(entry, dict):
                yield from entry.items()
            else:
                yield name, entry

    before, after = dict(flat(old)), dict(flat(new))
    parts = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            shown = ""
            if isinstance(after.get(name), (int, float, str)):
                shown = f": {before.get(name)!r} there, {after.get(name)!r} here"
            parts.append(name + shown)
    return "; ".join(parts)


def save_checkpoint(part: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint: tensors, and state as JSON, in one file that is renamed into place.

    Raises:
        OSError: it cannot be written; the checkpoint before is as it was.
    """
    content = save(dict(tensors), metadata={"state": json.dumps(state)})
    runs.write_file(part / CHECKPOINT_FILE, content)


def load_checkpoint(part: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Tensors and state of the checkpoint; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = part / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: np.array(file.get_tensor(name)) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged checkpoint ({error}); remove {part} to start anew"
        ) from None


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is finished and kept.

    The second one interrupts at once. Outside of the main thread signals are left alone.

    Attributes:
        asked: whether a signal has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
