"""`xdistil quantize`, the folders it writes, and students of every precision."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xdistil_fast import Tagger, _core, cli
from xdistil_fast.commands.quantize import with_quantization
from xdistil_fast.model_config import MULTIPLIED_AS_BYTES, PRECISIONS, QUANTIZED, scales_name
from xdistil_fast.model_io import FILES, ModelError, load_folder, save_folder
from xdistil_fast.quantization import as_floats, quantize_tensors
from xdistil_fast.scoring import score
from xdistil_fast.student import Student


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object) -> tuple[int, str, str]:
        status = cli.main(["quantize", *map(str, args)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def words(sentences: tuple[str, ...]) -> list[list[str]]:
    return [sentence.split() for sentence in sentences]


@pytest.fixture(scope="session")
def write_dev(words: list[list[str]]) -> Callable[..., Path]:
    """Writes the sentences with the tags that a model gives them: its own F1 is 100."""

    def write(path: Path, model: Path) -> Path:
        tags = Tagger.from_pretrained(model).tag_words(words)
        assert any(tag != "O" for row in tags for tag in row)
        sentences = (
            "".join(f"{word}\t{tag}\n" for word, tag in zip(a, b, strict=True))
            for a, b in zip(words, tags, strict=True)
        )
        path.write_text("\n".join(sentences), "utf-8")
        return path

    return write


@pytest.fixture
def dev(folder: Path, tmp_path: Path, write_dev: Callable[..., Path]) -> Path:
    return write_dev(tmp_path / "dev.conll", folder)


@pytest.fixture(scope="session")
def make_int8() -> Callable[[Path, Path], Path]:
    """Writes what `xdistil quantize` would, without measuring."""

    def make(path: Path, source: Path) -> Path:
        content = load_folder(source)
        config = dataclasses.replace(content.config, precision="int8")
        tensors = quantize_tensors(content.tensors)
        return save_folder(path, config, tensors, content.tokenizer_json, "# card\n")

    return make


@pytest.fixture
def int8_folder(folder: Path, tmp_path: Path, make_int8: Callable[..., Path]) -> Path:
    """Either model with int8 weights, in a folder of the test's own."""
    return make_int8(tmp_path / "int8", folder)


def logits(tagger: Tagger, sentences: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """Scores of every piece, which show more than tags do."""
    encoded = tagger._encoder.encode_texts(sentences)
    return tagger._student.logits(encoded.ids, encoded.cu_pieces)


# The command


def test_quantize(
    run: Any, folder: Path, dev: Path, tmp_path: Path, words: list[list[str]]
) -> None:
    out = tmp_path / "out"
    status, printed, err = run(folder, "--dev", dev, "-o", out, "--max-loss", 100)
    assert status == 0, err
    before, after = load_folder(folder), load_folder(out)
    tagger = Tagger.from_pretrained(out)
    assert tagger.precision == after.config.precision == "int8"
    assert sorted(os.listdir(out)) == sorted(FILES)
    assert tagger.parameters == Tagger.from_pretrained(folder).parameters
    for name, tensor in after.tensors.items():
        assert tensor.dtype == (np.int8 if name in QUANTIZED else np.float32), name
    assert (out / "model.safetensors").stat().st_size < (
        folder / "model.safetensors"
    ).stat().st_size / 2
    # All but how the weights are stored is as it was.
    kept = dataclasses.replace(after.config, precision="float32", metrics=before.config.metrics)
    assert kept == before.config
    assert after.tokenizer_json == before.tokenizer_json

    gold = Tagger.from_pretrained(folder).tag_words(words)
    found = tagger.tag_words(words)
    pairs = [pair for a, b in zip(gold, found, strict=True) for pair in zip(a, b, strict=True)]
    metrics = after.config.metrics["quantization"]
    assert metrics["f1_float32"] == 100
    assert metrics["f1_int8"] == score(gold, found).f1
    assert metrics["agreement"] == pytest.approx(100 * np.mean([a == b for a, b in pairs]))
    assert metrics["words"] == len(pairs)
    assert metrics["support"] == score(gold, gold).overall.gold > 0
    assert metrics["source"] == before.digest
    assert metrics["isa"] == _core.active_isa()
    (data,) = metrics["data"]
    assert data["name"].endswith("dev.conll")
    assert f"F1 on dev 100.00 in float32, {metrics['f1_int8']:.2f} in int8" in printed
    assert str(out) in err

    card = (out / "README.md").read_text("utf-8")
    assert card.startswith("# card\n")
    assert card.count("## Quantisation\n") == 1
    assert f"**{metrics['f1_int8']:.2f}**" in card
    assert before.digest[:16] in card


def test_metrics_and_lineage_are_kept(
    run: Any, softmax_folder: Path, tmp_path: Path, write_dev: Callable[..., Path]
) -> None:
    content = load_folder(softmax_folder)
    config = dataclasses.replace(
        content.config, metrics={"test": {"f1": 81.25}}, lineage={"teacher": {"digest": "abc"}}
    )
    save_folder(tmp_path / "m", config, content.tensors, content.tokenizer_json, "")
    dev = write_dev(tmp_path / "dev.conll", softmax_folder)
    (tmp_path / "m" / "README.md").unlink()  # a folder may come without
    args = (tmp_path / "m", "--dev", dev, dev, "-o", tmp_path / "out", "--max-loss", 100)
    assert run(*args)[0] == 0
    found = load_folder(tmp_path / "out").config
    assert found.metrics["test"] == {"f1": 81.25}
    assert found.lineage == config.lineage
    assert len(found.metrics["quantization"]["data"]) == 2


def test_a_loss_is_refused(
    run: Any, softmax_folder: Path, tmp_path: Path, write_dev: Callable[..., Path]
) -> None:
    """A weight of no effect that leaves the others of its row no digit: all is `O` in int8."""
    content = load_folder(softmax_folder)
    tensors = {name: tensor.copy() for name, tensor in content.tensors.items()}
    hidden_size = content.config.hidden_size
    for name in ("bilstm.weight_ih_l0", "bilstm.weight_hh_l0"):
        tensors[name][::hidden_size] = 0  # of unit 0, whose state is 0 for ever
    tensors["output.weight"][:, 0] = 1e6
    save_folder(tmp_path / "m", content.config, tensors, content.tokenizer_json, "")
    dev = write_dev(tmp_path / "dev.conll", tmp_path / "m")
    status, out, err = run(tmp_path / "m", "--dev", dev, "-o", tmp_path / "out")
    assert status == 2
    assert "100.00 in float32, 0.00 in int8 (-100.00)" in out
    assert "int8 loses 100.00 F1, --max-loss allows 0.3: nothing was written" in err
    assert not (tmp_path / "out").exists()
    args = (tmp_path / "m", "--dev", dev, "-o", tmp_path / "out", "--max-loss", 100)
    assert run(*args)[0] == 0
    tags = Tagger.from_pretrained(tmp_path / "out").tag_words([["Ada", "wrote"]])
    assert tags == [["O", "O"]]


def test_refusals(run: Any, folder: Path, dev: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    (tmp_path / "none.conll").write_text("Ada\tO\nwrote\tO\n")
    (tmp_path / "other.conll").write_text("Ada\tB-WEAPON\n")
    (tmp_path / "plain.conll").write_text("Ada\nwrote\n")
    for args, message in (
        ((folder, "--dev", dev), "required: -o/--output"),
        ((folder, "-o", out), "required: --dev"),
        ((folder, "--dev", dev, "-o", tmp_path / "file"), "exists; choose another folder"),
        ((folder, "--dev", dev, "-o", tmp_path / "full"), "exists; choose another folder"),
        ((folder, "--dev", dev, "-o", tmp_path / "no" / "way"), "no is not a folder"),
        ((folder, "--dev", tmp_path / "absent", "-o", out), "No such file"),
        ((folder, "--dev", tmp_path / "none.conll", "-o", out), "--dev holds no entities"),
        ((folder, "--dev", tmp_path / "other.conll", "-o", out), "none in common"),
        ((folder, "--dev", tmp_path / "plain.conll", "-o", out), "one column"),
        ((tmp_path / "absent", "--dev", dev, "-o", out), "was not found"),
        ((tmp_path / "full", "--dev", dev, "-o", out), "config.json"),
        ((folder, "--dev", dev, "-o", out, "--max-loss", -1), "--max-loss is -1.0"),
        ((folder, "--dev", dev, "-o", out, "--max-loss", "nan"), "--max-loss is nan"),
        ((folder, "--dev", dev, "-o", out, "--max-loss", "x"), "invalid float value"),
        ((folder, "--dev", dev, "-o", out, "--threads", -1), "threads is -1"),
        ((folder, "--dev", dev, "-o", out, "--label-map", tmp_path / "absent"), "No such file"),
    ):
        status, printed, err = run(*args)
        assert (status, printed) == (2, ""), message
        assert message in err
        assert not out.exists()
    assert os.listdir(tmp_path / "full") == ["kept"]


def test_an_int8_model_is_refused(run: Any, int8_folder: Path, dev: Path, tmp_path: Path) -> None:
    status, _, err = run(int8_folder, "--dev", dev, "-o", tmp_path / "out")
    assert status == 2
    assert f"{int8_folder} is of precision int8 already" in err
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled(run: Any, folder: Path, dev: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(folder, "--dev", dev, "-o", tmp_path / "out", "--max-loss", 100)[0] == 0
    load_folder(tmp_path / "out")


def test_unknown_types_are_told(run: Any, folder: Path, dev: Path, tmp_path: Path) -> None:
    with open(dev, "a", encoding="utf-8") as file:
        file.write("\nAda\tB-WEAPON\n")
    status, _, err = run(folder, "--dev", dev, "-o", tmp_path / "out", "--max-loss", 100)
    assert status == 0
    assert "the model does not know WEAPON" in err
    (tmp_path / "map.json").write_text('{"WEAPON": null}')
    args = (folder, "--dev", dev, "--label-map", tmp_path / "map.json", "--max-loss", 100)
    status, _, err = run(*args, "-o", tmp_path / "mapped")
    assert status == 0
    assert "WEAPON" not in err


def test_the_card_has_the_new_name(run: Any, folder: Path, dev: Path, tmp_path: Path) -> None:
    source = tmp_path / "float32"
    shutil.copytree(folder, source)
    load = 'tagger = Tagger.from_pretrained("{0}")'
    (source / "README.md").write_text(f"---\n---\n\n# float32\n\n{load.format('float32')}\n")
    status, _, err = run(source, "--dev", dev, "-o", tmp_path / "small", "--max-loss", 100)
    assert status == 0, err
    card = (tmp_path / "small" / "README.md").read_text("utf-8")
    assert card.startswith(f"---\n---\n\n# small\n\n{load.format('small')}\n")


def test_a_section_is_replaced() -> None:
    metrics = {
        "f1_float32": 90.0,
        "f1_int8": 89.9,
        "agreement": 99.5,
        "support": 1234,
        "isa": "avx2",
        "source": "ab" * 32,
        "data": [{"name": "dev.conll", "digest": "cd" * 32}],
    }
    once = with_quantization("# card\n\nText.\n\n\n", metrics)
    assert once.startswith("# card\n\nText.\n\n## Quantisation\n")
    assert "| 1,234 | 90.00 | **89.90** | -0.10 | 99.500 % |" in once
    assert with_quantization(once, metrics) == once


# Students of every precision


def test_every_precision_runs_every_model(
    folder: Path, int8_folder: Path, sentences: tuple[str, ...]
) -> None:
    want = logits(Tagger.from_pretrained(folder), sentences)
    size = np.sqrt(np.mean(want**2))
    for path in (folder, int8_folder):
        taggers = {name: Tagger.from_pretrained(path, precision=name) for name in PRECISIONS}
        stored = "int8" if path == int8_folder else "float32"
        assert Tagger.from_pretrained(path).precision == stored
        found = {}
        for name, tagger in taggers.items():
            assert tagger.precision == name
            assert name in repr(tagger)
            found[name] = logits(tagger, sentences)
            # Far from another model's, which differ by more than their size.
            assert np.sqrt(np.mean((found[name] - want) ** 2)) < 0.1 * size
        assert not np.array_equal(found["float32"], found["bfloat16"])
        assert not np.array_equal(found["float32"], found["int8"])
        error = {name: np.abs(found[name] - found["float32"]).max() for name in PRECISIONS}
        assert error["bfloat16"] < error["int8"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_max_memory_changes_no_result(
    int8_folder: Path, sentences: tuple[str, ...], precision: str
) -> None:
    whole = Tagger.from_pretrained(int8_folder, precision=precision)
    vocab_size = whole.config.vocab_size
    want, texts = logits(whole, sentences), list(sentences)
    row = _core.StudentWeights.table_row_nbytes(precision, whole.config.hidden_size)
    assert whole._student.table_nbytes == vocab_size * row
    for memory, rows in (
        (0, 0),
        (row - 1, 0),
        (row, 1),
        (10 * row + 1, 10),
        (vocab_size * row, vocab_size),
        (1 << 60, vocab_size),
    ):
        tagger = Tagger.from_pretrained(int8_folder, precision=precision, max_memory=memory)
        assert tagger._student.table_rows == rows
        assert tagger._student.table_nbytes == rows * row
        np.testing.assert_array_equal(logits(tagger, sentences), want)
        assert tagger(texts) == whole(texts)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_and_threads_change_no_result(
    folder: Path, sentences: tuple[str, ...], precision: str
) -> None:
    one = Tagger.from_pretrained(folder, threads=1, precision=precision)
    want = one(list(sentences))
    assert [one(sentence) for sentence in sentences] == want
    assert list(one.pipe(sentences, batch_tokens=1)) == want
    for threads in (2, 3):
        other = Tagger.from_pretrained(folder, threads=threads, precision=precision)
        assert other(list(sentences)) == want


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pickling_keeps_precision_and_memory(
    int8_folder: Path, sentences: tuple[str, ...], precision: str
) -> None:
    tagger = Tagger.from_pretrained(int8_folder, precision=precision, max_memory=5_000)
    other = pickle.loads(pickle.dumps(tagger))
    assert repr(other) == repr(tagger)
    assert other.precision == precision
    assert other._student.max_memory == 5_000
    np.testing.assert_array_equal(logits(other, sentences), logits(tagger, sentences))


def test_options_refused(folder: Path) -> None:
    for name in ("float16", "INT8", ""):
        with pytest.raises(ValueError, match=f"precision is '{name}'; allowed: 'float32', 'bfl"):
            Tagger.from_pretrained(folder, precision=name)
    with pytest.raises(ValueError, match="max_memory is -1; it must not be negative"):
        Tagger.from_pretrained(folder, max_memory=-1)
    for wrong in (1.0, "1", True):
        with pytest.raises(TypeError, match=r"max_memory is .*; it must be an int"):
            Tagger.from_pretrained(folder, max_memory=wrong)  # type: ignore[arg-type]


def test_logits_refuse_bounds_that_do_not_fit(folder: Path) -> None:
    """The first piece too: scores before it would be whatever the memory held."""
    content = load_folder(folder)
    student = Student(content.config, content.tensors)
    ids = np.arange(5, dtype=np.int32)
    for bounds in ([], [[0, 5]], [0, 4], [0, 6], [1, 5], [-1, 5], [3, 5]):
        with pytest.raises(ValueError, match="cu_seqlens must be one row from 0 to the 5 pieces"):
            student.logits(ids, np.array(bounds, np.int32))
    with pytest.raises(ValueError, match="ids"):
        student.logits(ids + content.config.vocab_size, np.array([0, 5], np.int32))


@pytest.mark.parametrize("command", ["tag", "eval"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_options_of_commands(
    folder: Path,
    dev: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    precision: str,
) -> None:
    args = {"tag": ["tag", "--model", str(folder), "--text", "Ada Lovelace wrote to London."]}
    args["eval"] = ["eval", str(folder), "--data", str(dev), "--json"]
    printed = []
    for memory in ("0", "1", "1000"):
        assert cli.main([*args[command], "--precision", precision, "--max-memory", memory]) == 0
        printed.append(capsys.readouterr().out)
    if command == "eval":
        records = [json.loads(text) for text in printed]
        assert {record["model"]["precision"] for record in records} == {precision}
        printed = [record["metrics"] for record in records]
    assert printed[0] == printed[1] == printed[2]
    for options, message in (
        (["--precision", "int4"], "invalid choice: 'int4'"),
        (["--max-memory", "-1"], "--max-memory is -1;"),
        (["--max-memory", "x"], "invalid int value"),
    ):
        assert cli.main([*args[command], *options]) == 2
        assert message in capsys.readouterr().err


def test_doctor_tells_how_a_model_runs(
    int8_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", str(int8_folder), "--max-memory", "0", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["stored in"] == model["runs as"]["precision"] == "int8"
    assert model["runs as"]["input table"].startswith("0 of ")
    assert cli.main(["doctor", str(int8_folder), "--precision", "bfloat16", "--json"]) == 0
    runs_as = json.loads(capsys.readouterr().out)["model"]["runs as"]
    assert runs_as["precision"] == "bfloat16"
    assert "enough for all" in runs_as["input table"]


# Stored bytes


def test_bytes_stand_for_the_weights(folder: Path) -> None:
    tensors = load_folder(folder).tensors
    names = [name for name in QUANTIZED if name in tensors]  # of the layers that it has
    assert set(QUANTIZED) - set(names) == {"projection.weight"}
    stored = quantize_tensors(tensors)
    for name in names:
        scales = stored[scales_name(name)]
        assert np.abs(as_floats(stored, name) - tensors[name]).max() <= 0.5001 * scales.max()
        assert _core.valid_int8_rows(stored[name]) or name not in MULTIPLIED_AS_BYTES
    zeros = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    zeros["embedding.weight"][0] = 1e-44
    stored = quantize_tensors(zeros)
    for name in names:
        assert not stored[name].any()
        assert (stored[scales_name(name)] == 1).all()


def put(name: str, place: Any, value: float) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors[name].__setitem__(place, value)


OVER_LIMIT = (0, [0, 1, 4])  # columns of one set: together at most 258


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("embedding.weight.scales"),
            ["'embedding.weight.scales' is missing"],
        ),
        (
            lambda t: t.update({"output.weight": t["output.weight"].astype(np.float32)}),
            ["'output.weight' has dtype F32", "allowed: I8"],
        ),
        (
            lambda t: t.update({"embedding.weight": t["embedding.weight"].astype(np.float16)}),
            ["'embedding.weight' has dtype F16", "allowed: I8"],
        ),
        (
            lambda t: t.update({"output.weight": t["output.weight"].view(np.uint8)}),
            ["'output.weight' has dtype U8", "allowed: I8"],
        ),
        (
            lambda t: t.update({"output.bias": t["output.bias"].astype(np.int8)}),
            ["'output.bias' has dtype I8", "allowed: F32"],
        ),
        (
            lambda t: t.update({"output.weight.scales": np.ones(6, np.float32)}),
            ["'output.weight.scales' has shape [6]", "asks for [7]"],
        ),
        (
            lambda t: t.update({"output.weight.scales": np.ones(7, np.float16)}),
            ["'output.weight.scales' has dtype F16"],
        ),
        (
            lambda t: t.update({"output.bias.scales": np.ones(7, np.float32)}),
            ["'output.bias.scales' is unknown"],
        ),
        (
            put("bilstm.weight_hh_l0.scales", 3, np.nan),
            ["'bilstm.weight_hh_l0.scales' holds nan at [3]"],
        ),
        (put("embedding.weight.scales", 2, np.inf), ["'embedding.weight.scales' holds inf at [2]"]),
        (
            put("output.weight.scales", 1, -1.0),
            ["'output.weight.scales' holds values that are not positive"],
        ),
        (
            put("bilstm.weight_ih_l0_reverse.scales", 0, 0.0),
            ["'bilstm.weight_ih_l0_reverse.scales'", "not positive"],
        ),
        (put("bilstm.weight_hh_l0", OVER_LIMIT, 100), ["'bilstm.weight_hh_l0'", "overflow"]),
        (
            put("bilstm.weight_hh_l0_reverse", OVER_LIMIT, -100),
            ["'bilstm.weight_hh_l0_reverse'", "overflow"],
        ),
        (put("output.weight", (-1, -1), -128), ["'output.weight'", "overflow"]),
    ],
)
def test_corrupt_bytes(
    int8_folder: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    path = int8_folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    for load in (load_folder, Tagger.from_pretrained):
        with pytest.raises(ModelError) as caught:
            load(int8_folder)
        for word in [str(path), *words]:
            assert word in str(caught.value)


def test_saving_refuses_corrupt_bytes(int8_folder: Path, tmp_path: Path) -> None:
    content = load_folder(int8_folder)
    tensors = {**content.tensors, "output.weight": content.tensors["output.weight"].copy()}
    tensors["output.weight"][OVER_LIMIT] = 127
    with pytest.raises(ModelError, match=r"'output\.weight' holds bytes whose sums could overflow"):
        save_folder(tmp_path / "m", content.config, tensors, content.tokenizer_json, "")
    assert not (tmp_path / "m").exists()


def test_precision_and_weights_must_fit(folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    """A configuration of one model with the weights of the other."""
    for config, weights, words in (
        (folder, int8_folder, "is unknown|has dtype I8"),
        (int8_folder, folder, "is missing"),
    ):
        mixed = Path(shutil.copytree(config, tmp_path / f"mixed-{config.name}"))
        shutil.copy(weights / "model.safetensors", mixed / "model.safetensors")
        with pytest.raises(ModelError, match=words):
            load_folder(mixed)
