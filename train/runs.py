"""``run.json``: what every long command leaves beside its result, and what reports read."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

RUN_FILE = "run.json"
Kind: TypeAlias = Literal["pretrain", "teacher", "student", "eval"]

_PACKAGES = ("xdistil-fast", "numpy", "tokenizers", "safetensors", "torch", "transformers")


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def machine_info(threads: int | None = None) -> dict[str, Any]:
    """The machine and the versions a figure was made with; nothing that names the host.

    Args:
        threads: threads the work used; all usable cores when None.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = usable_cores()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": cores if threads is None else threads,
        "isa": _active_isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _active_isa() -> str | None:
    """Instruction set of the kernels; None where the extension is not built."""
    try:
        from xdistil_fast import _core
    except ImportError:
        return None
    return str(_core.active_isa())


def command_line(args: argparse.Namespace) -> list[str]:
    """The command as typed: ``xdistil`` and the arguments the parser was given.

    Absolute paths are shortened, see :func:`portable`, because the command goes into model cards.
    ``args.argv`` holds the arguments where the caller of the parser has kept them.
    """
    return ["xdistil", *map(portable, getattr(args, "argv", sys.argv[1:]))]


def portable(argument: str) -> str:
    """An argument without the part of a path that means something on one machine alone.

    Returns:
        An absolute path's last three components, less the home folder, also behind ``LANG=`` or
        ``--option=``; anything else unchanged.
    """
    name, _, value = argument.partition("=")
    if value and not Path(name).is_absolute():
        return f"{name}={portable(value)}"
    path = Path(argument)
    if not path.is_absolute():
        return argument
    home = Path(os.path.expanduser("~"))
    inner = path.relative_to(home) if path.is_relative_to(home) else path.relative_to(path.anchor)
    return "/".join(inner.parts[-3:]) or "."


def write_file(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename it there, so that no reader sees half a file.

    Processes that write the same file at once do not see each other's halves either.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as :func:`write_file` does."""
    write_file(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def run_record(
    kind: Kind,
    *,
    command: Sequence[str],
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
    seconds: float,
    digest: str,
    threads: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Content of ``run.json``.

    Args:
        kind: what the run made.
        command: argv as typed, see :func:`command_line`.
        settings: all settings, defaults included.
        metrics: figures of the result.
        data: one entry a file: role, name, digest, sentences, words.
        seconds: wall-clock time, over all attempts of a resumed run.
        digest: SHA-256 of the model, see the maker of the run.
        threads: threads used; all usable cores when None.
        **more: further keys of this kind of run.
    """
    return {
        "kind": kind,
        "command": list(command),
        "settings": dict(settings),
        "metrics": dict(metrics),
        "data": [dict(entry) for entry in data],
        "machine": machine_info(threads),
        "seconds": round(seconds, 3),
        "digest": digest,
        **more,
    }


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` as ``run.json`` of ``folder``."""
    write_json(folder / RUN_FILE, record)


def read_run(path: Path | str) -> dict[str, Any]:
    """Read ``run.json`` of a run folder, or a JSON file of the same form.

    Raises:
        ValueError: the file is not JSON or not of a known kind.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RUN_FILE
    record = read_json(path)
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in get_args(Kind):
        allowed = ", ".join(map(repr, get_args(Kind)))
        raise ValueError(f"{path}: kind is {kind!r}; allowed: {allowed}")
    assert isinstance(record, dict)
    return record
