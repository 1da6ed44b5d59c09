"""The plots of reports and sweeps, drawn by matplotlib (extra ``report``) as SVG.

Plots inside a page take its text colour, so that they can be read on light and on dark ground.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdistil_fast.train import runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid tones that the colour-blind can tell apart, and that stand out from white and from black.
BLUE, ORANGE, GREEN, PURPLE = "#2f86d1", "#d9791a", "#2a9d6f", "#a86cc9"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#c94f5c", "#7f8a3c")
_INK = "#010203"  # stands for the text colour of the page
# Numbers of a history entry that are no losses.
_NO_LOSS = frozenset({"epoch", "epochs", "step", "steps", "seconds", "lr", "fit"})


def need_matplotlib(what: str) -> None:
    """Refuse work that ends in a plot where matplotlib is missing.

    Args:
        what: needs it; begins the message.

    Raises:
        ValueError: it is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f'{what} needs matplotlib, which is not installed: pip install "xdistil-fast[report]"'
        )


def learning_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Losses and dev F1 after each epoch, as SVG to stand inside a page.

    Args:
        history: entries with ``epoch``, losses under any name and ``dev_f1``; where they have
            ``stage`` or ``fit``, a line marks where these change.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.4, 2.7)
    left, right = figure.subplots(1, 2)
    steps = list(range(1, len(history) + 1))
    losses = {
        name: [entry.get(name) for entry in history]
        for name in dict.fromkeys(key for entry in history for key in entry)
        if name not in _NO_LOSS and not name.startswith("dev")
    }
    drawn: list[float] = []
    for colour, (name, values) in zip(_COLOURS, _numeric(losses).items(), strict=False):
        left.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
        drawn += [value for value in values if value is not None]
    if drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        left.set_yscale("log")
    left.set_ylabel("loss")
    if drawn:
        left.legend(frameon=False, labelcolor=_INK, fontsize=8)
    metric = next((key for e in history for key in e if key.startswith("dev_")), "dev_f1")
    scores = [entry.get(metric) for entry in history]
    right.plot(steps, scores, color=BLUE, marker="o", markersize=3, linewidth=1.4)
    known = [(score, step) for step, score in zip(steps, scores, strict=True) if score is not None]
    if known:
        best, at = max(known, key=lambda pair: (pair[0], -pair[1]))
        right.plot([at], [best], color=ORANGE, marker="o", markersize=6)
        right.annotate(
            f"{best:.2f}", (at, best), (0, 6), textcoords="offset points", ha="center", color=_INK,
            fontsize=8,
        )  # fmt: skip
        right.margins(y=0.18)
    right.set_ylabel("dev F1" if metric == "dev_f1" else metric.replace("_", " "))
    changes = _changes(history)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(0.6, len(history) + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for at, _ in changes[1:]:
            axes.axvline(at - 0.5, color=_INK, linewidth=0.7, linestyle=":")
    for at, name in changes:
        right.annotate(
            name[:24], (at if at == 1 else at - 0.5, 1.0), (2, 3), fontsize=7, color=_INK,
            xycoords=("data", "axes fraction"), textcoords="offset points", rotation=20,
            parse_math=False,
        )  # fmt: skip
    return _inline(figure, "curves", "losses and dev F1 by epoch")


def _numeric(losses: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Those rows that hold numbers, and not zero alone (a loss that was off)."""
    return {
        name: [value if value is not None and math.isfinite(value) else None for value in values]
        for name, values in losses.items()
        if all(value is None or isinstance(value, (int, float)) for value in values) and any(values)
    }


def _changes(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Where stage or fit change, counted from 1, with their names; empty without such keys."""
    found: list[tuple[int, str]] = []
    for at, entry in enumerate(history, 1):
        fit = entry.get("fit")
        parts = [entry.get("stage"), f"fit {fit}" if isinstance(fit, int) else fit]
        name = ", ".join(dict.fromkeys(str(part) for part in parts if part is not None))
        if name and (not found or found[-1][1] != name):
            found.append((at, name))
    return found


def type_bars(sides: Mapping[str, Mapping[str, float]]) -> str:
    """F1 of each type as bars, as SVG to stand inside a page.

    Args:
        sides: by name of the model (the student first), F1 by type.
    """
    types = sorted({kind for scores in sides.values() for kind in scores})
    height = 0.8 / len(sides)
    figure = _figure(7.4, 0.7 + 0.26 * max(1.5, len(sides)) * len(types))
    axes = figure.subplots()
    for row, ((name, scores), colour) in enumerate(zip(sides.items(), _COLOURS, strict=False)):
        places = [at + (row - (len(sides) - 1) / 2) * height for at in range(len(types))]
        values = [scores.get(kind, 0.0) for kind in types]
        axes.barh(places, values, 0.9 * height, color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.1f}", (value, place), (3, 0), textcoords="offset points", va="center",
                fontsize=7, color=_INK,
            )  # fmt: skip
    axes.set_yticks(range(len(types)), types, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("F1")
    if len(sides) > 1:
        figure.legend(
            loc="outside upper left", ncols=len(sides), frameon=False, labelcolor=_INK, fontsize=8
        )
    return _inline(figure, "types", "F1 by type")


@dataclass(frozen=True, slots=True)
class Point:
    """A student as it is served.

    Attributes:
        name: its size.
        precision: of the kernels.
        tokens_per_second: word pieces.
        f1: on dev, 0..100.
        megabytes: of its folder.
    """

    name: str
    precision: str
    tokens_per_second: float
    f1: float
    megabytes: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in speed and F1 together, the slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_second, -p.f1)):
        if not front or point.f1 > front[-1].f1:
            front.append(point)
    return front[::-1]


def draw_pareto(
    path: Path, points: Sequence[Point], teacher_f1: float, wanted_f1: float | None, title: str
) -> None:
    """Write F1 against speed as an SVG (or by its name a PNG) file on white ground.

    Args:
        path: to write.
        points: at least one.
        teacher_f1: drawn as a line.
        wanted_f1: drawn as a second line; None for none.
        title: of the plot.
    """
    import matplotlib
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = _figure(7.4, 4.6)
    axes = figure.subplots()
    largest = max(point.megabytes for point in points)
    for precision, colour in zip(
        dict.fromkeys(point.precision for point in points), _COLOURS, strict=False
    ):
        chosen = [point for point in points if point.precision == precision]
        axes.scatter(
            [point.tokens_per_second for point in chosen],
            [point.f1 for point in chosen],
            [12 + 320 * point.megabytes / largest for point in chosen],
            color=colour, alpha=0.55, linewidths=0.8, edgecolors=colour, label=precision,
        )  # fmt: skip
    front = pareto_front(points)
    axes.plot(
        [point.tokens_per_second for point in front], [point.f1 for point in front],
        color=_INK, linewidth=0.9, linestyle="-", zorder=0, label="Pareto front",
    )  # fmt: skip
    for point in front:
        axes.annotate(
            point.name, (point.tokens_per_second, point.f1), (6, 6), textcoords="offset points",
            fontsize=7,
        )  # fmt: skip
    axes.axhline(teacher_f1, color=PURPLE, linewidth=1, linestyle="--", label="teacher's F1")
    if wanted_f1 is not None:
        axes.axhline(wanted_f1, color=GREEN, linewidth=1, linestyle=":", label="F1 to keep")
    speeds = [point.tokens_per_second for point in points]
    if max(speeds) > 4 * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.16, y=0.1)
    axes.set_xlabel("tokens (word pieces) a second, text to entities; size of the mark: MB")
    axes.set_ylabel("dev F1")
    axes.set_title(title, fontsize=9, parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles, labels, frameon=False, fontsize=8, loc="best")
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([40])
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    # As paths: the file is looked at in viewers that have other fonts, or none.
    with matplotlib.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, metadata=metadata, facecolor="white", dpi=150)
    runs.write_file(path, buffer.getvalue())


def _figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches, in the colour that stands for the text."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, which="both", labelsize=8)
    axes.xaxis.label.set(color=_INK, fontsize=8)
    axes.yaxis.label.set(color=_INK, fontsize=8)
    axes.grid(True, color=_INK, alpha=0.13, linewidth=0.6)
    axes.set_axisbelow(True)


def _inline(figure: Figure, name: str, title: str) -> str:
    """A figure as an ``<svg>`` element without anything that points out of the page.

    Args:
        figure: drawn.
        name: begins every id, so that several figures fit into one page.
        title: what a screen reader says.
    """
    import matplotlib

    for axes in figure.axes:
        _style(axes)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with (
        matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # The browser has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")
    return f'<svg role="img" aria-label="{title}" {box.group() if box else ""}>{body.strip()}'
