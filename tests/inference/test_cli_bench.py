"""`xdistil bench`: what it prints and writes; how fast anything is, is not looked at."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdistil_fast import cli
from xdistil_fast.commands import bench, footprint
from xdistil_fast.model_io import file_digest

QUICK = ("--texts", "4", "--seconds", "0.001", "--threads", "1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str) -> tuple[int, str, str]:
        status = cli.main(["bench", *args])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def texts(tmp_path: Path, sentences: tuple[str, ...]) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n\n".join(sentences[:3]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def teacher(tmp_path: Path, tokenizer_json: str) -> Path:
    """A tiny BERT with random weights."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    labels = dict(enumerate(["O", "B-PER", "I-PER"]))
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
    )
    folder = tmp_path / "teacher"
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return folder


def test_table_and_record(run: Any, softmax_folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    status, printed, error = run(
        str(softmax_folder), "--data", str(texts), "--json", str(out), *QUICK
    )
    assert status == 0, error
    assert error == ""
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["kind"] == "bench"
    assert record["model"]["digest"] == file_digest(softmax_folder / "model.safetensors")
    assert record["data"]["texts"] == 3  # blank lines are none
    assert record["machine"]["threads"] == 1
    names = [f"student {precision}" for precision in bench.PRECISIONS]
    assert names[0] == "student float32"
    for name in names:
        rows = [row for row in record["latencies"] if row["model"] == name]
        shapes = [(row["task"], row["texts"]) for row in rows]
        assert shapes == [(task, count) for task in bench.TASKS for count in (3, 1)]
        assert all(row["median"] > 0 and row["tokens_per_second"] > 0 for row in rows)
        assert f"\n  {name} " in printed
    files = ("config.json", "model.safetensors", "tokenizer.json")
    size = sum((softmax_folder / name).stat().st_size for name in files)
    assert [entry["model"] for entry in record["footprints"]] == names
    assert {entry["disk_bytes"] for entry in record["footprints"]} == {size}
    assert record["notes"] == []
    assert not list(tmp_path.glob("*.part"))


def test_own_sentences_without_data(run: Any, crf_folder: Path) -> None:
    status, printed, error = run(str(crf_folder), *QUICK)
    assert status == 0, error
    assert "4 texts (built-in)" in printed
    assert "text to entities:" in printed


def test_beside_a_teacher(
    run: Any,
    softmax_folder: Path,
    teacher: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    out = tmp_path / "bench.json"
    arguments = ("--teacher", str(teacher), "--data", str(texts), "--json", str(out), *QUICK)
    status, printed, error = run(str(softmax_folder), *arguments)
    assert status == 0, error
    record = json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["model"], row["task"], row["texts"]) for row in record["latencies"]}
    assert {("teacher, torch float32", bench.TASKS[0], count) for count in (3, 1)} <= rows
    assert {("teacher, transformers pipeline", bench.TASKS[1], count) for count in (3, 1)} <= rows
    assert len(record["footprints"]) == len(bench.PRECISIONS) + 1
    assert "was not measured in ONNX Runtime: onnx is not installed" in printed


def test_beside_a_teacher_in_onnx_runtime(
    run: Any, softmax_folder: Path, teacher: Path, texts: Path
) -> None:
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} of the bench extra is not installed")
    status, printed, error = run(
        str(softmax_folder), "--teacher", str(teacher), "--data", str(texts), *QUICK
    )
    assert status == 0, error
    assert "teacher, ONNX Runtime float32 " in printed
    assert "teacher, ONNX Runtime int8 " in printed
    assert "note:" not in printed


def test_a_teacher_needs_torch(
    run: Any, softmax_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "xdistil_fast.commands.bench_teacher", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, error = run(str(softmax_folder), "--teacher", "somewhere", *QUICK)
    assert status == 2
    assert '--teacher needs torch: pip install "xdistil-fast[train]"' in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--texts", "0"), "--texts is 0; it must be at least 1"),
        (("--seconds", "0"), "--seconds is 0.0; it must be above 0"),
        (("--seconds", "nan"), "--seconds is nan; it must be above 0"),
        (("--threads", "-1"), "threads is -1"),
        (("--json", "{tmp}"), "is a folder; it must be a file"),
        (("--json", "{tmp}/no/out.json"), "there is no folder"),
        (("--data", "{tmp}/none.txt"), "none.txt: No such file"),
        (("--data", "{tmp}/blank.txt"), "blank.txt holds no text"),
    ],
)
def test_bad_arguments(
    run: Any, softmax_folder: Path, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    status, printed, error = run(
        str(softmax_folder), *(arg.replace("{tmp}", str(tmp_path)) for arg in args)
    )
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert printed == ""


def test_unknown_model(run: Any) -> None:
    status, _, error = run("no-such-model")
    assert status == 2
    assert "'no-such-model' was not found" in error


def test_read_texts_joins_words(tmp_path: Path) -> None:
    path = tmp_path / "in.conll"
    path.write_text("Ada\tB-PER\nwrote\tO\n\nRain\tO\n")
    assert bench.read_texts(path) == ["Ada wrote", "Rain"]
    assert bench.read_texts(path, 1) == ["Ada wrote"]


def test_latency_counts() -> None:
    made: list[int] = []
    calls: list[Callable[[], object]] = [lambda: made.append(0), lambda: made.append(1)]
    row = bench.latency("name", bench.TASKS[0], calls, [3, 5], 1, 0.001)
    assert row.calls >= 2
    assert set(made) == {0, 1}
    assert row.median > 0
    assert (row.p99 is None) == (row.calls < 100)


def test_footprint(softmax_folder: Path) -> None:
    arguments = {"model": str(softmax_folder), "threads": 1, "precision": "float32"}
    costs = footprint.measure("xdistil_fast.commands.bench:load_tagger", arguments, ["Ada."])
    assert costs.load_seconds > 0
    if not os.path.exists("/proc/self/status"):
        assert costs.loaded_bytes is None
        return
    assert costs.loaded_bytes is not None
    assert costs.peak_bytes is not None
    assert 0 < costs.loaded_bytes <= costs.peak_bytes


def test_footprint_tells_why_it_failed(tmp_path: Path) -> None:
    arguments = {"model": str(tmp_path), "threads": 1, "precision": "float32"}
    with pytest.raises(
        ChildProcessError, match=r"load_tagger failed in its process: .*config\.json"
    ):
        footprint.measure("xdistil_fast.commands.bench:load_tagger", arguments, ["Ada."])
