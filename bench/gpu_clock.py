"""The clock and the record of bench/gpu_report.py. Imports nothing that a bare machine may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Report:
    """The JSON and the log, and the clock.

    Args:
        folder: where both go.
        minutes: for everything.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.deadline = time.monotonic() + 60 * minutes
        self.data: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._log = (folder / "gpu_report.log").open("w", encoding="utf-8")

    def close(self) -> None:
        """Closes the log."""
        self._log.close()

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """To the log and the terminal."""
        for stream in (self._log, sys.stdout):
            print(text, file=stream, flush=True)

    def save(self) -> None:
        """Writes the JSON beside the old one, then over it."""
        half = self.folder / "gpu_report.json.part"
        half.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        half.replace(self.folder / "gpu_report.json")

    def section(self, name: str, needs: float, body: Callable[[], Any]) -> bool:
        """Runs a section if `needs` seconds are left. True if it came to its end."""
        if self.left() < needs:
            self.say(f"== {name}: left out, {self.left():.0f} s are left and it needs {needs:.0f}")
            self.data[name] = {"left_out": f"{self.left():.0f} s left, needs {needs:.0f}"}
            self.save()
            return False
        self.say(f"== {name} ({self.left():.0f} s left)")
        began = time.monotonic()
        try:
            self.data[name] = body()
            done = True
        except Exception as error:
            self.say(traceback.format_exc())
            self.data[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            done = False
        self.data.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        self.save()
        return done

    def command(self, arguments: list[str], seconds: float, **variables: str) -> str:
        """Runs a command, its output to the log; its last lines. RuntimeError if it fails."""
        limit = max(1.0, min(seconds, self.left()))
        self.say("$ " + " ".join(arguments))
        result = subprocess.run(
            arguments,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        self._log.write(result.stdout)
        tail = "\n".join(result.stdout.splitlines()[-12:])
        print(tail, flush=True)
        if result.returncode != 0:
            raise RuntimeError(f"exit status {result.returncode}: {tail}")
        return tail


class Clock:
    """Times of GPU work.

    Args:
        report: whose time it takes.
    """

    def __init__(self, report: Report) -> None:
        self._report = report

    def time(self, run: Callable[[], Any], seconds: float = 0.4) -> dict[str, Any]:
        """Median and quartiles in microseconds of `run`, which has been warmed up."""
        import torch

        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        once = max(time.perf_counter() - begin, 1e-6)
        inner = max(1, min(50, int(2e-3 / once)))
        samples: list[float] = []
        stop = time.perf_counter() + min(seconds, max(self._report.left(), 0.05))
        while len(samples) < 5 or (time.perf_counter() < stop and len(samples) < 300):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(inner):
                run()
            end.record()
            end.synchronize()
            samples.append(1e3 * start.elapsed_time(end) / inner)
        samples.sort()
        quarter = len(samples) // 4
        return {
            "median_us": round(samples[len(samples) // 2], 2),
            "quartiles_us": [round(samples[quarter], 2), round(samples[-1 - quarter], 2)],
            "samples": len(samples),
        }

    def graphed(self, run: Callable[[], Any]) -> tuple[Callable[[], None], str]:
        """`run` as a CUDA graph; as it is, with the reason, if it cannot be captured."""
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            torch.cuda.synchronize()
            return run, f"not captured: {type(error).__name__}: {error}"[:200]
        return graph.replay, "CUDA graph"

    def both(self, name: str, run: Callable[[], Any], into: dict[str, Any]) -> float:
        """Times `run` in a graph; the median. A failure is recorded and counts as endless."""
        try:
            replay, how = self.graphed(run)
            into[name] = {**self.time(replay), "how": how}
            self._report.say(f"   {name}: {into[name]['median_us']} us ({how})")
            return float(into[name]["median_us"])
        except Exception as error:
            into[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            self._report.say(f"   {name}: {into[name]['error']}")
            return float("inf")
