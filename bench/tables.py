"""Tables from benchmark runs: docs/BENCHMARKS.md and the one in README.md.

`python -m bench.tables RUN.json` files a run of pytest-benchmark under bench/results/ and rewrites
both from the newest run there; without an argument it only rewrites. `--show` prints a run's table
and writes nothing, `--check` writes nothing and fails if the files are not what would be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN = "<!-- benchmarks: begin, written by `make bench` -->"
END = "<!-- benchmarks: end -->"

OURS = "xdistil-fast"
# The group that is drawn as well as printed, and its plots; see bench/plots.py.
SCALING = "scaling"
PLOTS = ("speed-and-size", "scaling")

Run = dict[str, Any]


def load(path: Path) -> Run:
    """Reads a run and refuses what is not one.

    Raises:
        ValueError: not JSON, or not written by this suite.
    """
    try:
        run: Run = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not run.get("benchmarks"):
        raise ValueError(f"{path} holds no benchmarks")
    for entry in run["benchmarks"]:
        info = entry.get("extra_info", {})
        if "group" not in info or not {"ratios", "footprints"} & set(info):
            raise ValueError(
                f"{path}: {entry.get('fullname')} holds neither ratios nor footprints; is it of "
                "this suite?"
            )
    return run


def file_name(run: Run) -> str:
    """`<date>-<cpu>-<isa>.json`."""
    machine = run["machine_info"]
    cpu = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{run['datetime'][:10]}-{cpu}-{machine['isa']}.json"


def newest(folder: Path) -> Path | None:
    """The run that was measured last; a file's own time says nothing after a checkout."""
    paths = sorted(folder.glob("*.json"))
    return max(paths, key=lambda path: str(load(path)["datetime"]), default=None)


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def _what(info: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in info["sizes"].items())
    return f"{info['task']}, {sizes}"


def _shape(info: dict[str, Any]) -> str:
    if info["length"] is not None:
        shape = f"{info['batch']} x {info['length']}"
    else:
        texts = "text" if info["batch"] == 1 else "texts"
        shape = f"{info['batch']} {texts}, {info['pieces']:,} pieces"
    return shape


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _duels(run: Run) -> list[dict[str, Any]]:
    infos = [entry["extra_info"] for entry in run["benchmarks"]]
    return [info for info in infos if "ratios" in info]


def _shown(ratio: float, aim: float | None) -> str:
    # A near miss must not read as if it were none.
    near_miss = aim is not None and ratio < aim <= round(ratio, 2)
    return f"{ratio:.3f}×" if near_miss else _ratio(ratio)


def short_table(infos: Sequence[dict[str, Any]], left_out: Sequence[str] = ()) -> str:
    """One row for each case and precision: our time, and how many times longer each peer takes."""
    rows = []
    for info in infos:
        for precision, ratios in info["ratios"].items():
            if precision in left_out:
                continue
            seconds = info["sides"][f"{OURS} {precision}"]["seconds"]
            aims = info["aims"].get(precision, {})
            peers = (f"{peer} {_shown(q[1], aims.get(peer))}" for peer, q in ratios.items())
            rows.append(
                [
                    _what(info),
                    _shape(info),
                    precision,
                    _seconds(seconds),
                    f"{info['pieces'] / seconds:,.0f}",
                    ", ".join(peers),
                ]
            )
    header = [
        "on the CPU", "batch x length", "precision", OURS, "tokens/s", "times as fast as",
    ]  # fmt: skip
    return _table(header, rows)


def long_table(infos: Sequence[dict[str, Any]]) -> str:
    """One row for each case, precision and peer, with quartiles and the aim."""
    rows = []
    for info in infos:
        for precision, ratios in info["ratios"].items():
            ours = info["sides"][f"{OURS} {precision}"]
            for peer, (low, median, high) in ratios.items():
                side = info["sides"][peer]
                aim = info["aims"].get(precision, {}).get(peer)
                met = "met" if aim is not None and median >= aim else "missed"
                rows.append(
                    [
                        _what(info),
                        _shape(info),
                        precision,
                        _seconds(ours["seconds"]),
                        _p99(ours),
                        f"{peer} ({side['setting']})" if side["setting"] else peer,
                        _seconds(side["seconds"]),
                        _p99(side),
                        f"**{_shown(median, aim)}**",
                        f"{_ratio(low)} to {_ratio(high)}",
                        "" if aim is None else f"{_ratio(aim)}: {met}",
                    ]
                )
    header = [
        "what", "batch x length", "precision", "ours", "p99", "peer", "its time", "p99", "ratio",
        "quartiles", "aim",
    ]  # fmt: skip
    return _table(header, rows)


def _p99(side: dict[str, Any]) -> str:
    return "" if side["p99"] is None else _seconds(side["p99"])


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} MB"


def footprint_table(infos: Sequence[dict[str, Any]]) -> str:
    """What each model costs before its first answer."""
    rows = [
        [
            row["model"],
            _megabytes(row["disk_bytes"]),
            _seconds(row["load_seconds"]),
            _megabytes(row["loaded_bytes"]),
            _megabytes(row["peak_bytes"]),
        ]
        for info in infos
        for row in info["footprints"]
    ]
    header = ["model and runtime", "on disk", "loads in", "memory, loaded", "memory, tagging"]
    return _table(header, rows)


def _notes(infos: Sequence[dict[str, Any]]) -> list[str]:
    """Notes of all sides, each once, and how often rounded arithmetic gives float32's result."""
    lines = dict.fromkeys(
        f"- {side}: {note}." for info in infos for side, note in info.get("notes", {}).items()
    )
    agreement: dict[str, list[float]] = {}
    for info in infos:
        for side, share in info.get("agreement", {}).items():
            agreement.setdefault(side, []).append(share)
    for side, shares in agreement.items():
        low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
        spread = low if low == high else f"{low} to {high}"
        lines[
            f"- {side}: the same result as {OURS} in float32 for {spread} of pieces or texts."
        ] = None
    return list(lines)


def sections(run: Run) -> str:
    """All tables of a run, one for each group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in run["benchmarks"]:
        groups.setdefault(entry["extra_info"]["group"], []).append(entry["extra_info"])
    parts = []
    for group, infos in groups.items():
        parts.append(f"## {group[0].upper()}{group[1:]}")
        if "footprints" in infos[0]:
            parts.append(footprint_table(infos))
        elif group == SCALING:
            parts += [short_table(infos), *(f"![{name}](img/{name}.svg)" for name in PLOTS)]
        else:
            parts.append(long_table(infos))
        if notes := _notes(infos):
            parts.append("\n".join(notes))
    return "\n\n".join(parts)


def machine_line(run: Run) -> str:
    """Where and with what the run was made, in one sentence."""
    machine = run["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = run["commit_info"]
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, instruction set {machine['isa']}; "
        f"Python {machine['python_version']}, {versions}; "
        f"commit {commit['id'][:10]}{changed}, {run['datetime'][:10]}."
    )


def page(run: Run, name: str) -> str:
    """The whole of docs/BENCHMARKS.md."""
    turns = sorted({info["turns"] for info in _duels(run)})
    return f"""# Benchmarks

Written by `make bench` from [{name}](../bench/results/{name}); do not edit.

{machine_line(run)}
Load average of the machine when the run ended: {run["machine_info"]["load_average"]:.1f}.

All sides get the same inputs, weights and number of threads, and their outputs are compared
before anything is timed. They then take turns ({", ".join(map(str, turns))} of them), a block of
calls each; a ratio is the peer's time over ours within a turn, given as the median over the turns
with its quartiles. Above 1 we are faster. A peer with several settings is shown with its fastest;
padding and sorting its batches is not in its time. p99 is over all calls, where there were 100.
What is measured and how: [bench/](../bench).

{sections(run)}
"""


def with_table(readme: str, run: Run) -> str:
    """README.md with the table between its markers replaced.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    headlines = [info for info in _duels(run) if info["headline"]]
    table = short_table(headlines, left_out=("bfloat16",))
    more = (
        "bfloat16, quartiles, peers' times and settings: [docs/BENCHMARKS.md](docs/BENCHMARKS.md)."
    )
    return f"{before}{BEGIN}\n{table}\n\n{machine_line(run)} {more}\n{END}{after}"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="JSON of pytest-benchmark to file")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="repository")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--show", action="store_true", help="print the table only")
    group.add_argument("--check", action="store_true", help="fail if the files are out of date")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (OSError, ValueError) as error:
        print(f"bench.tables: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    results = args.root / "bench" / "results"
    if args.run is not None:
        run = load(args.run)
        if args.show:
            print(sections(run))
            return 0
        if not args.check:
            results.mkdir(parents=True, exist_ok=True)
            _write(results / file_name(run), json.dumps(run, indent=1) + "\n")
    path = newest(results)
    if path is None:
        print(f"no run in {results}: make bench", file=sys.stderr)
        return 1
    run = load(path)
    if args.show:
        print(sections(run))
        return 0
    readme = args.root / "README.md"
    targets = {
        readme: with_table(readme.read_text(encoding="utf-8"), run),
        args.root / "docs" / "BENCHMARKS.md": page(run, path.name),
    }
    if args.check:
        stale = [
            target.name
            for target, text in targets.items()
            if not target.exists() or target.read_text(encoding="utf-8") != text
        ]
        if stale:
            print(f"not written from {path.name}: {', '.join(stale)}", file=sys.stderr)
        return int(bool(stale))
    for target, text in targets.items():
        target.parent.mkdir(exist_ok=True)
        _write(target, text)
    print(sections(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
