"""What a model costs before its first answer: seconds to load, memory, bytes on disk.

Measured in a process of its own, which holds nothing but the runtime in question:
`python -m xdistil_fast.commands.footprint` reads a JSON object {"factory", "arguments", "texts"}
from standard input and prints the result as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Loads a model and returns what tags a list of texts.
Factory = Callable[..., Callable[[list[str]], object]]


@dataclass(frozen=True)
class Footprint:
    """Costs of one model in one runtime.

    Attributes:
        load_seconds: from the first import to a model that is ready.
        loaded_bytes: resident memory that importing and loading added; None where the system does
            not tell.
        peak_bytes: likewise at the highest point while tagging.
    """

    load_seconds: float
    loaded_bytes: int | None
    peak_bytes: int | None


def measure(factory: str, arguments: Mapping[str, Any], texts: Sequence[str]) -> Footprint:
    """Loads a model in a new process and tags some texts there.

    Args:
        factory: "module:function"; see `Factory`.
        arguments: of the function; plain JSON values.
        texts: tagged once.

    Raises:
        ChildProcessError: the process failed; its last line of errors is in the message.
    """
    request = {"factory": factory, "arguments": dict(arguments), "texts": list(texts)}
    result = subprocess.run(
        [sys.executable, "-m", "xdistil_fast.commands.footprint"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise ChildProcessError(f"{factory} failed in its process: {reason}")
    return Footprint(**json.loads(result.stdout.splitlines()[-1]))


def folder_bytes(path: Path) -> int:
    """Bytes of a model on disk: a file, or all files right in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.iterdir() if item.is_file())


def _resident(key: str) -> int | None:
    """VmRSS or VmHWM (its highest value) of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _added(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def _main() -> None:
    request = json.load(sys.stdin)
    before = _resident("VmRSS:")
    begin = time.perf_counter()
    module, _, name = request["factory"].partition(":")
    factory: Factory = getattr(importlib.import_module(module), name)
    tag = factory(**request["arguments"])
    seconds = time.perf_counter() - begin
    loaded = _resident("VmRSS:")
    tag(request["texts"])
    peak = _resident("VmHWM:")
    result = {
        "load_seconds": seconds,
        "loaded_bytes": _added(loaded, before),
        "peak_bytes": _added(peak, before),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
