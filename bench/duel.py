"""Several implementations of one computation, timed in turns.

A machine's speed drifts while a benchmark runs: other processes, clock frequency, heat. So the
sides take turns, a block of calls each, and what is reported is the ratio within a turn; its median
over the turns is the figure, its quartiles say how far to trust it. Before its block a side rests
for a moment, so that worker threads of the previous side have stopped spinning, and then runs
unmeasured until its own threads and caches are warm.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

OURS = "xdistil-fast"
_REST_SECONDS = 0.05
_LEAST_CALLS = 3

Call = Callable[[], object]


@dataclass(frozen=True)
class Turns:
    """How long to measure: turns per case, and seconds per side and turn."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """What is measured: one row of the tables.

    Attributes:
        task: what is computed, in the words of the table.
        batch: sequences in the batch.
        length: pieces per sequence.
        sizes: the model's, such as {"input_size": 100, "hidden_size": 200}.
        aims: for some peers, the least ratio (peer's time over ours) that the project holds
            itself to.
    """

    task: str
    batch: int
    length: int
    sizes: Mapping[str, int]
    aims: Mapping[str, float] = field(default_factory=dict)


def _block(call: Call, seconds: float) -> float:
    """Median seconds of a call, over at least `seconds` of calls."""
    time.sleep(_REST_SECONDS)
    warm = time.perf_counter() + seconds / 4
    call()
    while time.perf_counter() < warm:
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def duel(
    benchmark: BenchmarkFixture, case: Case, sides: Mapping[str, Mapping[str, Call]], turns: Turns
) -> None:
    """Times all sides in turns and leaves the result in the benchmark's `extra_info`.

    pytest-benchmark's own statistics are of our side: one call after each turn.

    Args:
        benchmark: pytest-benchmark's fixture; the result is stored with it.
        case: what is measured.
        sides: for each side, `OURS` among them, its settings by name and the call of each. A side
            with several settings is represented by its fastest.
        turns: how long to measure.
    """
    (ours,) = sides[OURS].values()
    medians: dict[tuple[str, str], list[float]] = {
        (side, setting): [] for side, settings in sides.items() for setting in settings
    }

    def take_turn() -> None:
        entries = list(medians.items())
        first = len(entries[0][1]) % len(entries)
        gc.collect()
        gc.disable()
        try:
            for (side, setting), times in entries[first:] + entries[:first]:
                times.append(_block(sides[side][setting], turns.seconds))
        finally:
            gc.enable()
        ours()

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        ours, setup=take_turn, rounds=turns.count
    )

    best: dict[str, tuple[str, list[float]]] = {}
    for (side, setting), times in medians.items():
        if side not in best or statistics.median(times) < statistics.median(best[side][1]):
            best[side] = (setting, times)
    our_times = best[OURS][1]
    info: dict[str, Any] = {
        "task": case.task,
        "batch": case.batch,
        "length": case.length,
        "sizes": dict(case.sizes),
        "precision": "float32",
        "turns": turns.count,
        "turn_seconds": turns.seconds,
        "seconds": {
            f"{side} {setting}".strip(): times for (side, setting), times in medians.items()
        },
        "sides": {
            side: {"setting": setting, "seconds": statistics.median(times)}
            for side, (setting, times) in best.items()
        },
        "ratios": {
            side: _quartiles([peer / our for peer, our in zip(times, our_times, strict=True)])
            for side, (_, times) in best.items()
            if side != OURS
        },
        "aims": dict(case.aims),
    }
    benchmark.extra_info.update(info)
