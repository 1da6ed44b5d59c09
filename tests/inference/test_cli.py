from __future__ import annotations

import argparse
import builtins
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import xdistil_fast
from xdistil_fast import Tagger, _core, cli
from xdistil_fast.commands import doctor
from xdistil_fast.model_config import POOLINGS, PRECISIONS
from xdistil_fast.model_io import file_digest
from xdistil_fast.scoring import score

ROOT = Path(xdistil_fast.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}


def python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, **environment},
    )


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str) -> tuple[int, str, str]:
        status = cli.main(list(args))
        return status, *capsys.readouterr()

    return call


# Importing


def test_no_torch(folder: Path, tmp_path: Path) -> None:
    """Nothing of inference loads torch or transformers, or asks for them."""
    (tmp_path / "in.conll").write_text("Ada\tB-PER\nwrote\tO\n")
    code = """
import sys, importlib.abc
class Deny(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "pyarrow", "onnxruntime", "scipy"):
            raise ImportError(f"{name} was asked for", name=name)
sys.meta_path.insert(0, Deny())
folder, data, out = sys.argv[1:]
from xdistil_fast import Tagger
tagger = Tagger.from_pretrained(folder)
tagger("Ada wrote."), list(tagger.pipe(["Ada"])), tagger.tag_words([["Ada"]])
from xdistil_fast.cli import main
assert main(["tag", "--model", folder, "--text", "Ada"]) == 0
assert main(["tag", "--model", folder, data, "-o", out]) == 0
assert main(["eval", folder, "--data", data]) == 0
assert main(["doctor", folder]) == 0
assert main(["bench", folder, "--texts", "2", "--seconds", "0.001"]) == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
    result = python(code, str(folder), str(tmp_path / "in.conll"), str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr


def test_importing_is_cheap() -> None:
    code = "import sys, xdistil_fast; print(*sys.modules)"
    modules = set(python(code).stdout.split())
    assert "xdistil_fast._core" in modules
    assert not {"xdistil_fast.tagger", "tokenizers", "safetensors", "huggingface_hub"} & modules


def test_exports() -> None:
    assert xdistil_fast.__version__ == _core.__version__
    assert xdistil_fast.Tagger is Tagger
    assert {"Tagger", "ModelError", "__version__"} <= set(dir(xdistil_fast))
    with pytest.raises(AttributeError, match="no attribute 'Taggr'"):
        xdistil_fast.Taggr  # noqa: B018


def test_other_version_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    with pytest.raises(ImportError, match=r"xdistil-fast 9\.9\.9 found .* of version .*reinstall"):
        xdistil_fast._check_extension()


def test_kernels_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "xdistil_fast" and args[2] == ("_core",):
            raise ModuleNotFoundError("No module named 'xdistil_fast._core'")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"compiled kernels .* are missing.*pip install"):
        xdistil_fast._check_extension()


def test_unsupported_instruction_set() -> None:
    result = python("import xdistil_fast", XDF_ISA="sse9")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "sse9" in last
    assert "generic" in last


# The parser


def test_version_and_help(run: Any) -> None:
    assert run("--version") == (0, f"xdistil-fast {xdistil_fast.__version__}\n", "")
    status, out, _ = run("--help")
    assert status == 0
    for name in ("tag", "eval", "bench", "doctor", "teacher", "distill", "report"):
        assert f"\n    {name} " in out
    for name in ("tag", "eval", "bench", "doctor"):
        assert run(name, "--help")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tga"], "unknown command 'tga'; did you mean tag?"),
        (["distil", "--teacher", "x"], "unknown command 'distil'; did you mean distill?"),
        (["xyzzy"], "unknown command 'xyzzy'; there are tag, classify, eval, quantize"),
        (["tag", "--modle", "x"], "unknown option --modle; did you mean --model?"),
        (["tag", "--modle=x"], "unknown option --modle; did you mean --model?"),
        (["tag", "--tex", "x"], "unknown option --tex; did you mean --text?"),
        (["eval", "x"], "the following arguments are required: --data"),
        (["eval", "x", "--dta", "y"], "unknown option --dta; did you mean --data?"),
        (["--verison"], "unknown option --verison; did you mean --version?"),
        (["doctor", "-x"], "unrecognized arguments: -x"),
        (["tag", "--text", "a", "--model", "none"], "model 'none' was not found; tried folder"),
    ],
)
def test_mistakes(run: Any, args: list[str], message: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("xdistil: error: ")
    assert err.count("\n") == 1


def test_training_commands_without_their_extra(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from xdistil_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""
    for name in ("teacher", "distill"):
        result = python(code, name, "--model", "x")
        assert result.returncode == 2
        assert f"xdistil {name} needs " in result.stderr
        assert 'pip install "xdistil-fast[train]"' in result.stderr
        assert result.stderr.count("\n") == 1
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": []}')
    (tmp_path / "a.conll").write_text("Ada\tB-PER\n")
    result = python(code, "eval", str(tmp_path), "--data", str(tmp_path / "a.conll"))
    assert result.returncode == 2
    assert 'pip install "xdistil-fast[train]"' in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (OSError(28, "No space left on device", "a/b"), 2, "a/b: No space left on device"),
        (OSError("odd"), 2, "odd"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("go on so"), 130, "go on so"),
    ],
)
def test_errors_of_commands(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    found, _, err = run("doctor")
    assert found == status
    assert err.startswith(f"xdistil: error: {message}")
    assert err.count("\n") == 1
    assert "go on" not in err.replace("go on so", "")  # that is for commands that can


def test_options_of_doctor_are_for_a_model(run: Any) -> None:
    for option in (["--precision", "int8"], ["--threads", "2"], ["--max-memory", "1"]):
        status, _, err = run("doctor", *option)
        assert status == 2
        assert "are for MODEL, and none was given" in err


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


# tag


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "Ada", "-o", "out"], "-o is for FILE"),
        (["--text", "Ada", "--input-format", "txt"], "--input-format is for FILE"),
        (["--text", "Ada", "--no-text"], "--no-text is for FILE"),
        (["--text", "Ada", "--errors", "replace"], "--errors is for FILE"),
        (["--text", "Ada", "--restart"], "--restart is for FILE"),
        (["in.txt", "--restart"], "--restart is for -o OUT"),
        (["in.txt", "--no-text", "--format", "conll"], "--no-text is for --format jsonl"),
        (["in.txt", "--max-memory", "-5"], "--max-memory is -5; it must be 0 or more, in MB"),
    ],
)
def test_options_of_tag_without_a_meaning(
    run: Any, folder: Path, args: list[str], message: str
) -> None:
    status, out, err = run("tag", "--model", str(folder), *args)
    assert (status, out) == (2, "")
    assert message in err


def test_text_that_looks_like_an_option(run: Any, folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder)
    for text in ("-- Ada wrote", "--text is Ada"):
        status, out, _ = run("tag", "--model", str(folder), "--text", text)
        assert (status, json.loads(out)) == (0, tagger(text))


# doctor


def test_doctor(run: Any, folder: Path) -> None:
    status, out, _ = run("doctor", str(folder), "--json")
    assert status == 0
    report = json.loads(out)
    assert report["xdistil-fast"] == xdistil_fast.__version__
    assert report["isa"]["active"] == _core.active_isa()
    assert report["isa"]["compiled"][0] == "generic"
    assert report["threads"] == _core.default_threads()
    assert report["packages"]["numpy"]
    assert report["self-test"]["ok"] is True
    assert report["model"]["size"] == "12x10"
    assert report["model"]["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    status, out, _ = run("doctor")
    assert status == 0
    assert f"active: {_core.active_isa()}" in out
    assert "model:" not in out


def test_doctor_refuses_a_bad_model(run: Any, tmp_path: Path) -> None:
    status, _, err = run("doctor", str(tmp_path))
    assert status == 2
    assert "config.json" in err


@pytest.mark.parametrize("isa", _core.isas_available())
def test_self_test_on_every_instruction_set(isa: str) -> None:
    result = python(
        "from xdistil_fast.cli import main; raise SystemExit(main(['doctor', '--json']))",
        XDF_ISA=isa,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["isa"]["active"] == report["isa"]["XDF_ISA"] == isa


@pytest.mark.parametrize(
    "kernel", ["embedding_gather", "bilstm_forward", "linear", "softmax", "crf_marginals"]
)
def test_self_test_sees_wrong_numbers(
    run: Any, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    original = getattr(_core, kernel)

    def wrong(*args: Any) -> None:
        original(*args)
        args[-1].flat[-1] += 1e-3

    monkeypatch.setattr(_core, kernel, wrong)
    status, out, _ = run("doctor")
    assert status == 1
    assert "ok: NO" in out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_self_test_sees_wrong_scores_of_one_precision(
    run: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    original = _core.student_scores

    def wrong(weights: Any, *args: Any) -> None:
        original(weights, *args)
        if weights.precision == precision:
            args[-1].flat[-1] += 0.5

    monkeypatch.setattr(_core, "student_scores", wrong)
    status, out, _ = run("doctor")
    assert status == 1
    assert "ok: NO" in out
    errors = doctor.self_test()
    for kind in ("student", "projected student"):
        assert errors.pop(f"{kind} {precision}") == pytest.approx(0.5, abs=0.2)
    assert max(errors.values()) < 0.2


@pytest.mark.parametrize("pooling", POOLINGS)
def test_self_test_sees_wrong_scores_of_one_pooling(
    monkeypatch: pytest.MonkeyPatch, pooling: str
) -> None:
    original = _core.student_class_scores
    order = iter(POOLINGS)

    def wrong(*args: Any) -> None:
        original(*args)
        if next(order) == pooling:
            args[-1].flat[-1] += 0.5

    monkeypatch.setattr(_core, "student_class_scores", wrong)
    errors = doctor.self_test()
    assert errors.pop(f"classifier {pooling}") == pytest.approx(0.5, abs=0.2)
    assert max(errors.values()) < 0.2


def test_self_test_sees_a_wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _core.crf_viterbi

    def wrong(*args: Any) -> None:
        original(*args)
        args[5][2] ^= 1

    monkeypatch.setattr(_core, "crf_viterbi", wrong)
    assert doctor.self_test()["crf viterbi"] > 0.1


# eval

CONLL = "Ada\tB-PER\nLovelace\tI-PER\nwrote\tO\n\nLondon\tB-LOC\nisn't\tO\nfar\tO\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.conll"
    path.write_text(CONLL)
    return path


def test_eval(run: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    gold = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "O"]]
    tagger = Tagger.from_pretrained(folder)
    scores = score(
        gold, tagger.tag_words([["Ada", "Lovelace", "wrote"], ["London", "isn't", "far"]])
    )
    out_file = tmp_path / "eval.json"
    status, out, _ = run("eval", str(folder), "--data", str(data), "--json", str(out_file))
    assert status == 0
    assert f"{scores.f1:.2f}" in out
    assert "2 sentences, 6 words" in out
    record = json.loads(out_file.read_text())
    assert record["kind"] == "eval"
    assert record["model"] == {
        "name": folder.name,
        "digest": tagger.digest,
        "kind": "student",
        "parameters": tagger.parameters,
        "precision": "float32",
    }
    assert record["metrics"] == scores.to_dict()
    (entry,) = record["data"]
    assert entry["name"].endswith("test.conll")
    assert (entry["sentences"], entry["words"]) == (2, 6)
    assert entry["digest"] == file_digest(data)
    assert record["command"][:2] == ["xdistil", "eval"]
    assert record["seconds"] >= 0
    assert record["machine"]["isa"] == _core.active_isa()
    status, out, _ = run("eval", str(folder), "--data", str(data), "--json")
    printed = json.loads(out)
    assert printed["metrics"] == record["metrics"]


def test_eval_pools_files(run: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.conll"
    other.write_text("Charles\tB-PER\n\n" * 3)
    status, out, _ = run("eval", str(folder), "--data", str(data), str(other), "--json")
    assert status == 0
    record = json.loads(out)
    assert [Path(entry["name"]).name for entry in record["data"]] == ["test.conll", "other.conll"]
    assert record["metrics"]["sentences"] == 5
    assert all(0 <= entry["f1"] <= 100 for entry in record["data"])
    status, out, _ = run("eval", str(folder), "--data", str(data), "--data", str(other))
    assert "other.conll: F1 " in out


def test_eval_label_map(run: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    data.write_text(CONLL.replace("PER", "person").replace("LOC", "weapon"))
    status, _, err = run("eval", str(folder), "--data", str(data))
    assert status == 2
    assert "none in common" in err
    label_map = tmp_path / "map.json"
    label_map.write_text('{"person": "PER"}')
    status, out, err = run("eval", str(folder), "--data", str(data), "--label-map", str(label_map))
    assert status == 0
    assert "the model does not know weapon" in err
    label_map.write_text('{"person": "PER", "*": null}')
    status, out, err = run("eval", str(folder), "--data", str(data), "--label-map", str(label_map))
    assert (status, err) == (0, "")
    assert "weapon" not in out


def test_eval_names_the_teacher(run: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    import dataclasses

    from xdistil_fast.model_io import load_folder, save_folder

    content = load_folder(folder)
    config = dataclasses.replace(content.config, lineage={"teacher": {"digest": "abc"}})
    save_folder(tmp_path / "m", config, content.tensors, content.tokenizer_json, "")
    record = json.loads(run("eval", str(tmp_path / "m"), "--data", str(data), "--json")[1])
    assert record["model"]["teacher_digest"] == "abc"


def test_eval_refuses(run: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "one.conll").write_text("Ada\nwrote\n")
    (tmp_path / "config.json").write_text('{"format_version": 2}')
    for args, message in (
        ((str(folder), "--data", str(tmp_path / "none")), "No such file"),
        ((str(folder), "--data", str(tmp_path / "one.conll")), "one column"),
        ((str(tmp_path), "--data", str(data)), "model.safetensors"),
        (("no-such", "--data", str(data)), "was not found"),
    ):
        status, out, err = run("eval", *args)
        assert (status, out) == (2, "")
        assert message in err
