"""Where results go: standard output, or a file that survives a kill.

A file grows as `OUT.part`; `OUT.part.json` beside it says how much of the input that is, with which
settings it was made and how many of its bytes count. Whatever a kill or a full disk leaves behind
them is cut off when the same command runs again. At the end the file is renamed to `OUT`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from xdistil_fast.commands.records import Position
from xdistil_fast.file_lock import lock

_ANEW = "%s cannot be gone on with: %s; use --restart to begin anew"
_POSITION = {"records": int, "lines": int, "input_bytes": int, "input_sha256": str}


class StreamSink:
    """Standard output, a device or a pipe: written as it comes, nothing to resume.

    Args:
        path: None for standard output.
    """

    resumable = False

    def __init__(self, path: Path | None) -> None:
        self.name = "standard output" if path is None else str(path)
        self._file: IO[bytes] = sys.stdout.buffer if path is None else path.open("wb", buffering=0)

    def write(self, data: bytes, position: Position) -> None:
        """Writes the results of all records up to `position` that are not written yet."""
        del position
        # An unbuffered file may take a part only.
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._file.flush()

    def finish(self) -> None:
        """All is written."""

    def close(self) -> None:
        """Closes a file; standard output stays open."""
        if self._file is not sys.stdout.buffer:
            self._file.close()


class FileSink:
    """A result file that can be gone on with.

    Args:
        path: the file to end up with; its folder must exist.
        settings: what the results depend on; they must be equal to go on.
        resumable: false for an input that cannot be read again: always begins anew.
        restart: begin anew even if there is something to go on with.

    Raises:
        ValueError: what is there was made with other settings, or is not ours.
        OSError: it cannot be written, or another process is writing it.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, resumable: bool, restart: bool
    ) -> None:
        self._path = path
        self.part = path.with_name(path.name + ".part")
        self.name = str(self.part)
        self.resumable = resumable
        self._record = path.with_name(path.name + ".part.json")
        self._settings = dict(settings)
        self.start: Position | None = None
        size = 0
        # An empty one without a record is what a kill, or a full disk, left of the first moment.
        begun = self.part.exists() and (self._record.exists() or self.part.stat().st_size > 0)
        found = resumable and not restart and begun
        self._file: IO[bytes] = self.part.open("ab", buffering=0)
        try:
            lock(self._file, self.part, "another process is writing it")
            if found:
                self.start, size = self._read_record()
                if (actual := os.fstat(self._file.fileno()).st_size) < size:
                    raise ValueError(_ANEW % (self.part, f"{size - actual} of its bytes are gone"))
            self._file.truncate(size)
        except BaseException:
            self._file.close()
            raise
        self._size = size

    def begin(self, position: Position) -> None:
        """Notes where writing begins; a full disk or a read-only folder shows here."""
        self._write_record(position)

    def write(self, data: bytes, position: Position) -> None:
        """Writes the results of all records up to `position` that are not written yet."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._size += len(data)
        self._write_record(position)

    def finish(self) -> None:
        """Puts the complete file in its place."""
        os.fsync(self._file.fileno())
        os.replace(self.part, self._path)
        self._record.unlink()

    def close(self) -> None:
        """Closes the file; what is written stays to be gone on with."""
        self._file.close()

    def _write_record(self, position: Position) -> None:
        content = {"settings": self._settings, "output_bytes": self._size, **asdict(position)}
        fresh = self._record.with_name(self._record.name + ".new")
        try:
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, self._record)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def _read_record(self) -> tuple[Position, int]:
        try:
            content = json.loads(self._record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(_ANEW % (self.part, f"{self._record.name} is missing")) from None
        except (ValueError, RecursionError):
            raise ValueError(_ANEW % (self.part, f"{self._record.name} is not JSON")) from None
        kinds = {**_POSITION, "output_bytes": int, "settings": dict}
        if not isinstance(content, dict) or any(
            type(content.get(key)) is not kind or (kind is int and content[key] < 0)
            for key, kind in kinds.items()
        ):
            raise ValueError(_ANEW % (self.part, f"{self._record.name} is damaged"))
        for key, value in self._settings.items():
            before = content["settings"].get(key)
            if before != value:
                raise ValueError(
                    _ANEW % (self.part, f"it was made with {key} {before!r}, now it is {value!r}")
                )
        return Position(**{key: content[key] for key in _POSITION}), content["output_bytes"]
