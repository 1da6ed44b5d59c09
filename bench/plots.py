"""Plots of a benchmark run: `python -m bench.plots [RUN.json]` writes docs/img/.

speed-and-size: tokens per second over parameters, students and teachers. scaling: tokens per
second over length, batch and threads. A plot holds the name of its run as its title, by which
a test finds those that are out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.tables import OURS, PLOTS, SCALING, Run, load, newest

# Colours that the colour-blind can tell apart (Okabe and Ito).
_COLOURS = {
    f"{OURS} float32": "#0072B2",
    f"{OURS} bfloat16": "#56B4E9",
    f"{OURS} int8": "#000000",
    "ONNX Runtime int8": "#D55E00",
    "ONNX Runtime": "#E69F00",
    "OpenVINO": "#009E73",
    "torch": "#CC79A7",
}
_MARKERS = dict(zip(_COLOURS, "osDv^Px", strict=True))
_SHAPE = (32, 32)


def _infos(run: Run) -> list[dict[str, Any]]:
    infos = [entry["extra_info"] for entry in run["benchmarks"]]
    return [info for info in infos if "ratios" in info and info["length"] is not None]


def _thousands(value: float, _: int = 0) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _speed_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def speed_and_size(run: Run) -> Figure:
    """Tokens per second over parameters, at one batch shape."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = {}
    teachers: dict[str, list[tuple[float, float]]] = {}
    for info in _infos(run):
        if (info["batch"], info["length"]) != _SHAPE or not info["parameters"]:
            continue
        if info["group"] == SCALING:
            continue
        for side, result in info["sides"].items():
            speed = info["pieces"] / result["seconds"]
            if side in info["parameters"]:
                teachers.setdefault(side, []).append((info["parameters"][side], speed))
            elif not info["group"].startswith("against"):
                points.setdefault(side, []).append((info["parameters"][OURS], speed))
    for side in _COLOURS:
        if side in points:
            x, y = zip(*sorted(points[side]), strict=True)
            axes.plot(x, y, color=_COLOURS[side], marker=_MARKERS[side], label=side, linewidth=1.2)
    for number, (side, values) in enumerate(sorted(teachers.items(), key=lambda t: -t[1][0][1])):
        x, y = zip(*values, strict=True)
        axes.plot(
            x, y, linestyle="none", marker="p*hXd<>"[number % 7], color="#555555", markersize=7,
            markerfacecolor="none",
            label=side,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _speed_axis(axes)
    axes.set_xlabel("parameters, embeddings included")
    axes.set_ylabel("tokens per second")
    axes.set_title(
        f"ids to logits, batch {_SHAPE[0]} x {_SHAPE[1]}, {run['machine_info']['threads']} threads",
        fontsize=10,
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def scaling(run: Run) -> Figure:
    """Tokens per second over length, batch and threads, for one size of student."""
    figure, panels = plt.subplots(
        1, 3, figsize=(10, 3.8), sharey=True, layout="constrained", width_ratios=(3, 3, 1.6)
    )
    sized = [info for info in _infos(run) if info["group"] == SCALING]
    sizes = sized[0]["sizes"]
    infos = [
        info
        for info in _infos(run)
        if info["sizes"] == sizes and (info["group"] == SCALING or "dense" in info["group"])
    ]
    threads = run["machine_info"]["threads"]
    _panel(panels[0], infos, "length", lambda i: i["batch"] == 32 and i["threads"] == threads)
    _panel(panels[1], infos, "batch", lambda i: i["length"] == 32 and i["threads"] == threads)
    _panel(panels[2], infos, "threads", lambda i: (i["batch"], i["length"]) == (32, 32))
    panels[0].set_ylabel("tokens per second")
    panels[0].set_xlabel("length (batch 32)")
    panels[1].set_xlabel("batch (length 32)")
    panels[2].set_xlabel("threads (32 x 32)")
    named = ", ".join(f"{name} {size}" for name, size in sizes.items())
    figure.suptitle(f"student {named}, ids to logits", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _panel(
    axes: Axes, infos: list[dict[str, Any]], key: str, chosen: Callable[[dict[str, Any]], bool]
) -> None:
    curves: dict[str, dict[int, float]] = {}
    for info in filter(chosen, infos):
        for side, result in info["sides"].items():
            curves.setdefault(side, {})[info[key]] = info["pieces"] / result["seconds"]
    ticks = sorted({at for curve in curves.values() for at in curve})
    for side in _COLOURS:
        if side in curves:
            x, y = zip(*sorted(curves[side].items()), strict=True)
            axes.plot(
                x, y, color=_COLOURS[side], marker=_MARKERS[side], markersize=4, label=side,
                linewidth=1.2,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _speed_axis(axes)


def draw(run: Run, name: str, folder: Path) -> list[Path]:
    """Writes the plots of a run that has the figures for them.

    Args:
        run: of this suite.
        name: file name of the run.
        folder: to write to.
    """
    if not any(info["group"] == SCALING for info in _infos(run)):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context({"svg.hashsalt": "bench", "font.size": 9}):
        for plot, function in zip(PLOTS, (speed_and_size, scaling), strict=True):
            path = folder / f"{plot}.svg"
            figure = function(run)
            figure.savefig(path, metadata={"Title": name, "Date": None})
            plt.close(figure)
            paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a run (default: the newest one filed)")
    parser.add_argument("--out", type=Path, default=root / "docs" / "img", help="folder to write")
    args = parser.parse_args(argv)
    path = args.run or newest(root / "bench" / "results")
    if path is None:
        print("bench.plots: error: there is no run: make bench", file=sys.stderr)
        return 1
    for plot in draw(load(path), path.name, args.out):
        print(plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
