"""Several implementations of one computation, timed in turns.

A machine's speed drifts while a benchmark runs: other processes, clock frequency, heat. So the
sides take turns, a block of calls each, and what is reported is the ratio within a turn; its median
over the turns is the figure, its quartiles say how far to trust it. Before its block a side rests
for a moment, so that worker threads of the previous side have stopped spinning, and then runs
unmeasured until its own threads and caches are warm.

A peer with several settings runs each of them for a block first; only those near its fastest go on
to the turns, and the fastest of these represents it.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

OURS = "xdistil-fast"
_REST_SECONDS = 0.05
_LEAST_CALLS = 3
# A call that takes longer is timed once a block.
_LONG_SECONDS = 0.5
# How much slower than a peer's fastest setting another may be to stay in.
_NEAR = 1.15

Call = Callable[[], object]


@dataclass(frozen=True)
class Turns:
    """How long to measure: turns per case, and seconds per side and turn."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """What is measured: some rows of the tables, one for each of our precisions and each peer.

    Attributes:
        group: heading under which the tables show it.
        task: what is computed, in the words of the table.
        batch: sequences in the batch.
        length: pieces per sequence, or None where lengths differ.
        pieces: pieces of one call, all sequences together.
        sizes: the model's, such as {"E": 100, "H": 200}.
        threads: of every side.
        aims: by our precision and peer, the least ratio (peer's time over ours) that the project
            holds itself to.
        notes: by side, what a reader must know to judge its figure.
        agreement: by side, share of results equal to float32's where a tolerance says little.
        parameters: number of them by side, `OURS` for the student in any runtime.
        headline: whether README.md shows it.
    """

    group: str
    task: str
    batch: int
    length: int | None
    pieces: int
    sizes: Mapping[str, int]
    threads: int
    aims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    agreement: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    headline: bool = False


def _block(call: Call, seconds: float) -> list[float]:
    """Seconds of each call, over at least `seconds` of calls."""
    time.sleep(_REST_SECONDS)
    warm = time.perf_counter() + seconds / 4
    call()
    while time.perf_counter() < warm:
        call()
    times: list[float] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        times.append(now - start)
        enough = len(times) >= _LEAST_CALLS or now - begin > _LONG_SECONDS
        if enough and now - begin >= seconds:
            return times


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _p99(times: list[float]) -> float | None:
    """None below 100 calls: it would be the largest of them and nothing more."""
    if len(times) < 100:
        return None
    return statistics.quantiles(times, n=100, method="inclusive")[-1]


def _near_fastest(settings: Mapping[str, Call], seconds: float) -> list[str]:
    if len(settings) == 1:
        return list(settings)
    times = {name: statistics.median(_block(call, seconds)) for name, call in settings.items()}
    limit = _NEAR * min(times.values())
    return [name for name, median in times.items() if median <= limit]


def duel(
    benchmark: BenchmarkFixture,
    case: Case,
    ours: Mapping[str, Call],
    peers: Mapping[str, Mapping[str, Call]],
    turns: Turns,
) -> None:
    """Times all sides in turns and leaves the result in the benchmark's `extra_info`.

    pytest-benchmark's own statistics are of our first precision: one call after each turn.

    Args:
        benchmark: pytest-benchmark's fixture; the result is stored with it.
        case: what is measured.
        ours: our call in each precision.
        peers: for each peer, its settings by name and the call of each.
        turns: how long to measure.
    """
    calls: dict[tuple[str, str], Call] = {
        (f"{OURS} {precision}", ""): call for precision, call in ours.items()
    }
    for peer, settings in peers.items():
        for name in _near_fastest(settings, turns.seconds):
            calls[peer, name] = settings[name]
    times: dict[tuple[str, str], list[list[float]]] = {key: [] for key in calls}
    numbers = itertools.count()

    def take_turn() -> None:
        entries = list(calls.items())
        first = next(numbers) % len(entries)
        gc.collect()
        gc.disable()
        try:
            for key, call in entries[first:] + entries[:first]:
                times[key].append(_block(call, turns.seconds))
        finally:
            gc.enable()

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        next(iter(ours.values())), setup=take_turn, rounds=turns.count
    )

    medians = {key: [statistics.median(block) for block in blocks] for key, blocks in times.items()}
    best: dict[str, str] = {}
    for side, setting in medians:
        previous = medians[side, best.get(side, setting)]
        if statistics.median(medians[side, setting]) <= statistics.median(previous):
            best[side] = setting

    def ratios(precision: str) -> dict[str, list[float]]:
        own = medians[f"{OURS} {precision}", ""]
        return {
            peer: _quartiles(
                [theirs / our for theirs, our in zip(medians[peer, best[peer]], own, strict=True)]
            )
            for peer in peers
        }

    info: dict[str, Any] = {
        "group": case.group,
        "task": case.task,
        "batch": case.batch,
        "length": case.length,
        "pieces": case.pieces,
        "sizes": dict(case.sizes),
        "threads": case.threads,
        "turns": turns.count,
        "turn_seconds": turns.seconds,
        "seconds": {
            f"{side} {setting}".strip(): value for (side, setting), value in medians.items()
        },
        "sides": {
            side: {
                "setting": setting,
                "seconds": statistics.median(medians[side, setting]),
                "p99": _p99([second for block in times[side, setting] for second in block]),
            }
            for side, setting in best.items()
        },
        "ratios": {precision: ratios(precision) for precision in ours},
        "aims": {precision: dict(aims) for precision, aims in case.aims.items()},
        "notes": dict(case.notes),
        "agreement": dict(case.agreement),
        "parameters": dict(case.parameters),
        "headline": case.headline,
    }
    benchmark.extra_info.update(info)
