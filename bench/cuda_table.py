"""What ptxas says of each kernel, as a table: registers, shared memory, spills.

    python -m bench.cuda_table BUILD_LOG            prints it; exit status 1 if a kernel spills
    python -m bench.cuda_table BUILD_LOG -o FILE    also writes JSON

`make cuda` builds the extension and runs this. Shared memory is what the kernel declares; that of
the recurrence is asked for at launch and depends on the plan, which the second table shows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
# Processors, shared memory of a block, largest cluster, of an H100 and an A100.
_DEVICES = {"H100": (132, 232_448, 16), "A100": (108, 166_912, 1)}


def parse(log: str) -> list[dict[str, Any]]:
    """Kernels of a build log.

    Args:
        log: output of nvcc with `-Xptxas -v`.

    Returns:
        A row each, by name and architecture: `kernel`, `architecture`, `registers`,
        `shared_memory`, `stack`, `spill_stores`, `spill_loads` (bytes).

    Raises:
        ValueError: the log has no kernels, or a kernel without its figures.
    """
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            rows.append({"symbol": entry[1], "architecture": entry[2]})
        elif rows and (spills := _SPILLS.search(line)) and "stack" not in rows[-1]:
            rows[-1]["stack"], rows[-1]["spill_stores"], rows[-1]["spill_loads"] = map(
                int, spills.groups()
            )
        elif rows and (used := _USED.search(line)) and "registers" not in rows[-1]:
            rows[-1]["registers"] = int(used[1])
            rows[-1]["shared_memory"] = int(used[2] or 0)
    if not rows:
        raise ValueError("the log names no kernel: was it built with -Xptxas -v, and anew?")
    if unfinished := [row["symbol"] for row in rows if len(row) != 7]:
        raise ValueError(f"the log has no figures of {unfinished[0]}")
    names = _demangled([row.pop("symbol") for row in rows])
    for row, name in zip(rows, names, strict=True):
        row["kernel"] = name
    return sorted(rows, key=lambda row: (row["kernel"], row["architecture"]))


def _demangled(symbols: list[str]) -> list[str]:
    text = "\n".join(symbols)
    result = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    names = []
    for line in result.stdout.splitlines():
        program = re.search(r"run_program<(.*)>\(", line)
        name = program[1] if program else line
        name = re.sub(r"\(xdf::cuda::CrfTask\)(\d)", lambda m: _TASKS[int(m[1])], name)
        names.append(name.replace("xdf::cuda::", "").replace("xdf::", "").replace("> >", ">>"))
    return names


_TASKS = ("likelihood", "gradient", "marginals", "viterbi")


def plans(extension: Any) -> list[dict[str, Any]]:
    """How students of usual sizes would run, by the estimates of csrc/cuda/lstm_plan.h.

    Rows of None: such a pass does not fit the shared memory of the device.
    """
    rows: list[dict[str, Any]] = []
    for device, limits in _DEVICES.items():
        for kind in ("float32", "bfloat16", "int8"):
            passes = (False,) if kind == "int8" else (False, True)
            for hidden in (100, 200, 600):
                for batch in (32, 512):
                    for backward in passes:
                        row: dict[str, Any] = {
                            "device": device,
                            "kind": kind,
                            "hidden_size": hidden,
                            "batch": batch,
                            "pass": "backward" if backward else "forward",
                        }
                        try:
                            plan = extension.lstm_plan(kind, backward, hidden, batch, *limits)
                        except ValueError:
                            rows.append({**row, "rows": None})
                            continue
                        for name in ("rows", "cluster", "resident", "warps", "shared_memory"):
                            row[name] = getattr(plan, name)
                        rows.append(row)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column)) for column in columns) + " |")


def main(arguments: list[str]) -> int:
    """Runs the script; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(arguments)
    kernels = parse(args.log.read_text(encoding="utf-8"))
    _print(kernels)
    report: dict[str, Any] = {"kernels": kernels}
    try:
        from xdistil_fast import _backend

        report["plans"] = plans(_backend.cuda())
        print()
        _print(report["plans"])
    except RuntimeError as error:
        print(f"no table of plans: {error}", file=sys.stderr)
    if args.output is not None:
        half = args.output.with_suffix(".part")
        half.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        half.replace(args.output)
    spilling = [row["kernel"] for row in kernels if row["spill_stores"] or row["spill_loads"]]
    for name in sorted(set(spilling)):
        print(f"spills registers: {name}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
