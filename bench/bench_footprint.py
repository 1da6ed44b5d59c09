"""Size on disk, load time and memory of our tagger and of the main peers, each in a new process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.bench_text import onnx_models
from bench.corpus import own_texts
from bench.duel import OURS
from bench.teacher_peers import MBERT, TeacherPeers
from bench.text_peers import hf_tokenizer
from xdistil_fast import PRECISIONS
from xdistil_fast.commands import footprint
from xdistil_fast.model_io import FILES, TOKENIZER_FILE, ModelFolder

_TEXTS = 32
_LOAD_ONNX = "bench.onnx_tagger:load_onnx"

pytestmark = pytest.mark.filterwarnings("ignore")


def bench_footprint(
    benchmark: BenchmarkFixture,
    threads: int,
    model: ModelFolder,
    tmp_path: Path,
) -> None:
    sample = own_texts(_TEXTS).texts
    rows: list[dict[str, Any]] = []

    def add(name: str, disk: int, factory: str, **arguments: Any) -> None:
        costs = footprint.measure(factory, {**arguments, "threads": threads}, sample)
        rows.append({"model": name, "disk_bytes": disk, **asdict(costs)})

    def measure() -> None:
        disk = sum((model.path / name).stat().st_size for name in FILES[:3])
        for precision in PRECISIONS:
            add(
                f"{OURS} {precision}",
                disk,
                "xdistil_fast.commands.bench:load_tagger",
                model=str(model.path),
                precision=precision,
            )
        tokenizer = model.path / TOKENIZER_FILE
        common = {"tokenizer": str(tokenizer), "labels": list(model.config.labels)}
        for name, weights in onnx_models(model, threads, sample).items():
            path = tmp_path / "student.onnx"
            path.write_bytes(weights)
            disk = footprint.folder_bytes(path) + footprint.folder_bytes(tokenizer)
            add(name, disk, _LOAD_ONNX, model=str(path), time_major=True, **common)
        with TeacherPeers(MBERT, threads) as teacher:
            for int8 in (True, False):
                path = teacher.onnx_file(int8)
                name = f"{MBERT.name}, tokenizers + ONNX Runtime" + (" int8" if int8 else "")
                disk = footprint.folder_bytes(path) + footprint.folder_bytes(tokenizer)
                add(name, disk, _LOAD_ONNX, model=str(path), time_major=False, **common)
            with teacher.saved(hf_tokenizer(model.tokenizer.to_str())) as folder:
                add(
                    f"{MBERT.name}, transformers pipeline",
                    footprint.folder_bytes(folder),
                    "xdistil_fast.commands.bench_teacher:load_pipeline",
                    teacher=str(folder),
                )

    benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update({"group": "size, load time, memory", "footprints": rows})
