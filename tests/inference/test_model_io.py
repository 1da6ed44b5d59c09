from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xdistil_fast import model_io
from xdistil_fast.model_io import (
    ModelConfig,
    ModelError,
    load_folder,
    resolve_model,
    save_folder,
)

GOOD = {"labels": ("O", "B-A", "I-A"), "vocab_size": 4, "embedding_size": 2, "hidden_size": 3}


@pytest.fixture
def copy(crf_folder: Path, tmp_path: Path) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(crf_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config.update(changes)
    path.write_text(json.dumps(config), "utf-8")


def refused(folder: Path, *words: str) -> None:
    """Loading names the file, and all of `words`."""
    with pytest.raises(ModelError) as caught:
        load_folder(folder)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    content = load_folder(folder)
    saved = save_folder(
        tmp_path / "again", content.config, content.tensors, content.tokenizer_json, "card"
    )
    assert saved == tmp_path / "again"
    again = load_folder(saved)
    assert again.config == content.config
    assert again.digest == content.digest
    assert again.tokenizer_json == content.tokenizer_json
    assert again.tensors.keys() == content.config.tensor_shapes().keys()
    for name, value in content.tensors.items():
        assert value.dtype == np.float32
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, again.tensors[name])
    assert sorted(os.listdir(saved)) == sorted(model_io.FILES)
    assert (saved / "README.md").read_text("utf-8") == "card"
    # As open as any other folder: made by hand it would look the same.
    (tmp_path / "plain").mkdir()
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_lineage_and_metrics_survive(folder: Path, tmp_path: Path) -> None:
    content = load_folder(folder)
    lineage = {"teacher": {"digest": "ab"}, "data": ["Zoë", 3]}
    config = dataclasses.replace(content.config, lineage=lineage, metrics={"f1": 81.25})
    save_folder(tmp_path / "m", config, content.tensors, content.tokenizer_json, "")
    loaded = load_folder(tmp_path / "m").config
    assert loaded.lineage == lineage
    assert loaded.metrics == {"f1": 81.25}


def test_float16_embedding_is_widened(folder: Path, tmp_path: Path) -> None:
    content = load_folder(folder)
    half = content.tensors["embedding.weight"].astype(np.float16)
    tensors = {**content.tensors, "embedding.weight": half}
    save_folder(tmp_path / "m", content.config, tensors, content.tokenizer_json, "")
    table = load_folder(tmp_path / "m").tensors["embedding.weight"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, half.astype(np.float32))


def test_crf_may_forbid_moves(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["crf.transitions"][0, 2] = -np.inf
    tensors["crf.start_transitions"][2] = -np.inf
    tensors["crf.end_transitions"][3] = -np.inf
    save_file(tensors, copy / "model.safetensors")
    assert load_folder(copy).tensors["crf.transitions"][0, 2] == -np.inf


# Missing and unreadable files.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refused(copy, name, "No such file", "a model folder holds")


def test_card_is_not_needed(copy: Path) -> None:
    (copy / "README.md").unlink()
    load_folder(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_is_no_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    refused(copy, name, "not a regular file")
    (copy / name).rmdir()
    os.mkfifo(copy / name)  # opening it would wait for ever
    refused(copy, name, "not a regular file")
    (copy / name).unlink()
    (copy / name).symlink_to(copy / name)
    refused(copy, name)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none", "is not a folder")


def test_only_four_names_are_opened(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (copy / "modeling.py").write_text("raise SystemExit")
    (copy / "tokenizer_config.json").write_text("{broken")
    opened: list[str] = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or original(self))
    load_folder(copy)
    assert sorted(opened) == ["config.json", "tokenizer.json"]


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b'{"labels": [NaN]}', "holds NaN"),
        (b'{"labels": -Infinity}', "holds -Infinity"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' stands twice"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 (byte 0)"),
        (b'{"labels": "\xc3"}', "is not UTF-8 (byte 12)"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"{}", "format_version is None"),
        (b'{"model_type": "bert"}', "is of a transformers model; make a student of it first"),
    ],
)
def test_config_is_not_json(copy: Path, content: bytes, message: str) -> None:
    (copy / "config.json").write_bytes(content)
    refused(copy, "config.json", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "this library reads up to 1: upgrade"),
        ({"format_version": 10**30}, "this library reads up to 1: upgrade"),
        ({"format_version": 2, "labels": 5, "new": {}}, "this library reads up to 1: upgrade"),
        ({"format_version": 0}, "format_version is 0"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": 1.0}, "format_version is 1.0"),
        ({"task": "translation"}, "task is 'translation'; allowed"),
        ({"task": "text-classification"}, "pooling is None; allowed"),
        ({"task": None}, "task is None; allowed"),
        ({"head": "linear"}, "head is 'linear'; allowed: 'softmax', 'crf'"),
        ({"head": ["crf"]}, "head is ['crf']; allowed"),
        ({"precision": "int4"}, "precision is 'int4'; allowed: 'float32', 'int8'"),
        ({"labels": "O"}, "labels is 'O'; it must be a list"),
        ({"labels": []}, "labels hold no entity type and no tag"),
        ({"labels": ["O", "B-A"]}, "lack 'I-A'"),
        ({"labels": ["O", "B-A", "I-A", "I-A"]}, "'I-A' stands twice"),
        ({"labels": ["O", "S-A", "I-A"]}, "'S-A' is not IOB2"),
        ({"labels": ["O", None]}, "labels[1] is None"),
        ({"labels": ["O"] * 5000}, "at most 1024"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer from 1"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; it must be"),
        ({"vocab_size": 5.0}, "vocab_size is 5.0"),
        ({"embedding_size": -3}, "embedding_size is -3"),
        ({"embedding_size": True}, "embedding_size is True"),
        ({"hidden_size": "10"}, "hidden_size is '10'"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"window": 0}, "window is 0"),
        ({"stride": -1}, "stride is -1"),
        ({"stride": 13}, "stride is 13; it must be at most half of window 24"),
        ({"labels": ["O", "B-\ud800", "I-\ud800"]}, "lone surrogates"),
        ({"library_version": None}, "library_version is None"),
        ({"lineage": []}, "lineage is []"),
        ({"metrics": "x" * 10_000}, "metrics is 'xxx"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown key 'auto_map'"),
        ({"x" * 10_000: 1}, "unknown key 'xxx"),
    ],
)
def test_config_value(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(copy, **changes)
    refused(copy, "config.json", message)


@pytest.mark.parametrize(
    "key",
    [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in ("pooling", "projection_size")
    ],
)
def test_config_key_missing(copy: Path, key: str) -> None:
    config = json.loads((copy / "config.json").read_text("utf-8"))
    del config[key]
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    refused(copy, "config.json", "format_version is None" if key == "format_version" else key)


def test_config_too_long(copy: Path) -> None:
    with open(copy / "config.json", "ab") as file:
        file.truncate(1 << 30)  # sparse
    refused(copy, "config.json", "at most")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"labels": ("O",)}, "no entity type"),
        ({"labels": "O"}, "must be a list"),
        ({"stride": 600}, "half of window"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_config_from_python(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig(**{**GOOD, **changes})


def test_config_with_what_json_cannot_hold() -> None:
    for value in (float("nan"), float("inf"), object(), {1, 2}):
        with pytest.raises(ModelError, match="plain JSON"):
            ModelConfig(**GOOD, lineage={"a": value}).to_json()


# model.safetensors


def resave(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("output.bias"), ["'output.bias' is missing"]),
        (lambda t: t.pop("crf.transitions"), ["'crf.transitions' is missing"]),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), ["'extra' is unknown"]),
        (
            lambda t: t.update({"output.bias": np.zeros(8, np.float32)}),
            ["'output.bias' has shape [8]", "asks for [7]"],
        ),
        (
            lambda t: t.update({"output.bias": np.zeros((7, 1), np.float32)}),
            ["'output.bias' has shape [7, 1]"],
        ),
        (
            lambda t: t.update({"bilstm.weight_hh_l0": t["bilstm.weight_hh_l0"].T.copy()}),
            ["'bilstm.weight_hh_l0' has shape [10, 40]"],
        ),
        (
            lambda t: t.update({"output.bias": np.zeros(7, np.float64)}),
            ["'output.bias' has dtype F64", "allowed: F32"],
        ),
        (
            lambda t: t.update({"output.bias": np.zeros(7, np.float16)}),
            ["'output.bias' has dtype F16", "allowed: F32"],
        ),
        (
            lambda t: t.update({"embedding.weight": t["embedding.weight"].astype(np.int32)}),
            ["'embedding.weight' has dtype I32", "allowed: F32, F16"],
        ),
        (
            lambda t: t["embedding.weight"].__setitem__((3, 5), np.nan),
            ["'embedding.weight' holds nan at [3, 5]", "must be finite"],
        ),
        (
            lambda t: t["output.weight"].__setitem__((0, 0), -np.inf),
            ["'output.weight' holds -inf at [0, 0]"],
        ),
        (
            lambda t: t["bilstm.bias_hh_l0_reverse"].__setitem__(7, np.inf),
            ["'bilstm.bias_hh_l0_reverse' holds inf at [7]"],
        ),
        (
            lambda t: t["crf.transitions"].__setitem__((1, 2), np.inf),
            ["'crf.transitions' holds inf at [1, 2]", "finite or -inf"],
        ),
        (lambda t: t["crf.end_transitions"].__setitem__(1, np.nan), ["holds nan at [1]"]),
        (lambda t: t["crf.end_transitions"].__setitem__(0, -np.inf), ["forbids 'O'"]),
        (lambda t: t["crf.start_transitions"].__setitem__(0, -np.inf), ["forbids 'O'"]),
        (lambda t: t["crf.transitions"].__setitem__((0, 0), -np.inf), ["forbids 'O'"]),
    ],
)
def test_tensors(copy: Path, change: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    resave(copy, change)
    refused(copy, "model.safetensors", *words)


def test_crf_tensors_in_a_softmax_model(copy: Path) -> None:
    edit_config(copy, head="softmax")
    refused(copy, "model.safetensors", "'crf.end_transitions' is unknown")


def test_sizes_that_do_not_fit_the_weights(copy: Path) -> None:
    edit_config(copy, hidden_size=11)
    refused(copy, "model.safetensors", "has shape [40, 12]", "asks for [44, 12]")


def test_nan_in_float16(copy: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        half = tensors["embedding.weight"].astype(np.float16)
        half[1, 1] = np.nan
        tensors["embedding.weight"] = half

    resave(copy, change)
    refused(copy, "'embedding.weight' holds nan at [1, 1]")


def test_truncated_at_any_length(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(12), 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(copy, "model.safetensors")
    path.write_bytes(whole + b"\0")
    refused(copy, "model.safetensors")


def test_corrupt_header(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for header in (b"not safetensors, but a text of some length", b"\x80\x04\x95pickle" * 10):
        path.write_bytes(header)
        refused(copy, "model.safetensors", "corrupt or truncated")
    for size in (0, 2**63 - 1, 2**64 - 1):
        path.write_bytes(size.to_bytes(8, "little") + whole[8:])
        refused(copy, "model.safetensors", "corrupt or truncated")
    # Every single flipped bit of the header is refused or still says the same.
    random = np.random.default_rng(0)
    length = int.from_bytes(whole[:8], "little")
    for place in random.integers(0, 8 + length, 300):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(bytes(broken))
        try:
            content = load_folder(copy)
        except ModelError:
            continue
        assert {n: t.shape for n, t in content.tensors.items()} == content.config.tensor_shapes()


# tokenizer.json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["does not load"]),
        (b"{}", ["does not load"]),
        (b"null", ["does not load"]),
        (b"[" * 100_000, ["does not load"]),
        (b"\xff", ["is not UTF-8 (byte 0)"]),
        (b'{"version": "1.0", "model": {"type": "Magic", "vocab": {}}}', ["does not load"]),
    ],
)
def test_tokenizer_does_not_load(copy: Path, content: bytes, words: list[str]) -> None:
    (copy / "tokenizer.json").write_bytes(content)
    refused(copy, "tokenizer.json", *words)


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def test_tokenizer_ids_out_of_range(copy: Path) -> None:
    size = load_folder(copy).config.vocab_size
    edit_tokenizer(copy, lambda t: t["model"]["vocab"].update(extra=size))
    refused(copy, "tokenizer.json", f"piece 'extra' has id {size}", f"vocab_size {size}")


def test_tokenizer_added_token_out_of_range(copy: Path) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    token = {"id": 100_000, "content": "[X]", **flags}
    edit_tokenizer(copy, lambda t: t["added_tokens"].append(token))
    refused(copy, "tokenizer.json", "'[X]'")


def test_tokenizer_without_unknown_piece(copy: Path) -> None:
    edit_tokenizer(copy, lambda t: t["model"]["vocab"].pop("[UNK]"))
    refused(copy, "tokenizer.json", "UNK")


def test_tokenizer_with_empty_vocabulary(copy: Path) -> None:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    edit_tokenizer(copy, lambda t: t.update(model=model, added_tokens=[]))
    refused(copy, "tokenizer.json", "empty vocabulary")


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"},
        {"type": "Prepend", "prepend": "xxxx"},
    ],
)
def test_normalizer_that_lengthens_a_text(copy: Path, step: dict[str, Any]) -> None:
    def nest(count: int) -> dict[str, Any]:
        inner = {"type": "Sequence", "normalizers": [step] * count}
        return {"type": "Sequence", "normalizers": [inner, {"type": "Lowercase"}]}

    edit_tokenizer(copy, lambda t: t.update(normalizer=nest(2)))
    load_folder(copy)
    edit_tokenizer(copy, lambda t: t.update(normalizer=nest(60)))
    refused(copy, "tokenizer.json", "normalizer that may lengthen a text more than 256 times")


def test_tokenizer_truncation_and_padding_are_off(copy: Path) -> None:
    content = load_folder(copy)
    assert json.loads(content.tokenizer_json)["truncation"]["max_length"] == 8
    encoding = content.tokenizer.encode("a a", add_special_tokens=False)
    assert len(encoding.ids) == 2
    assert len(content.tokenizer.encode("a " * 50, add_special_tokens=False).ids) == 50


# Saving


@pytest.fixture
def parts(crf_folder: Path) -> tuple[Any, ...]:
    content = load_folder(crf_folder)
    return content.config, content.tensors, content.tokenizer_json, "card"


def test_save_refuses_what_load_would(tmp_path: Path, parts: tuple[Any, ...]) -> None:
    config, tensors, tokenizer_json, card = parts
    nan = {**tensors, "output.bias": np.full(7, np.nan, np.float32)}
    for bad in (nan, {**tensors, "x": np.zeros(1, np.float32)}, {}):
        with pytest.raises(ModelError):
            save_folder(tmp_path / "m", config, bad, tokenizer_json, card)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        save_folder(tmp_path / "m", config, tensors, "{}", card)
    assert os.listdir(tmp_path) == []


def test_save_refuses_an_existing_folder(tmp_path: Path, parts: tuple[Any, ...]) -> None:
    save_folder(tmp_path / "m", *parts)
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        save_folder(tmp_path / "m", *parts)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not a folder"):
        save_folder(tmp_path / "file", *parts, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "empty", *parts)
    load_folder(tmp_path / "empty")


def test_overwrite_keeps_other_entries(tmp_path: Path, parts: tuple[Any, ...]) -> None:
    target = save_folder(tmp_path / "m", *parts)
    (target / "run.json").write_text("{}")
    (target / "checkpoints").mkdir()
    (target / "checkpoints" / "1").write_text("x")
    save_folder(target, *parts[:3], "another card", overwrite=True)
    assert (target / "README.md").read_text() == "another card"
    assert (target / "run.json").read_text() == "{}"
    assert (target / "checkpoints" / "1").read_text() == "x"
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_full_disk_leaves_nothing(
    tmp_path: Path, parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = save_folder(tmp_path / "m", *parts)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        save_folder(target, *parts[:3], "another card", overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        save_folder(tmp_path / "fresh", *parts)
    monkeypatch.undo()
    assert (target / "README.md").read_text() == "card"
    load_folder(target)
    assert os.listdir(tmp_path) == ["m"]


# Finding models


def test_resolve_folder_and_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder
    monkeypatch.setattr(model_io, "_EMBEDDED", tmp_path)
    shutil.copytree(folder, tmp_path / "xx-ner")
    (tmp_path / "not-a-model").mkdir()
    assert model_io.embedded_models() == ["xx-ner"]
    assert resolve_model("xx-ner") == tmp_path / "xx-ner"
    for name in ("xx-ner", str(folder)):
        with pytest.raises(ModelError, match="only for Hub ids"):
            resolve_model(name, "main")
    with pytest.raises(ModelError, match=r"'yy-ner' was not found.*embedded models \(xx-ner\)"):
        resolve_model("yy-ner")


def test_resolve_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    (tmp_path / "file").write_text("x")
    for name in ("", "a\0b", tmp_path / "none", f"{tmp_path}/file", "../none", "a/b/c", "~nobody"):
        with pytest.raises(ModelError):
            resolve_model(name)
    for wrong in (None, 3, b"model", ["m"]):
        with pytest.raises(TypeError, match="must be a string or a path"):
            resolve_model(wrong)  # type: ignore[arg-type]


def test_hub_fetches_four_names_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/name", "v1") == folder
    assert asked == [
        ("owner/name", {"revision": "v1", "allow_patterns": list(model_io.FILES)}),
    ]


@pytest.mark.filterwarnings("default")
def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set, and no local copy exists"):
        resolve_model("owner/name")


def test_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.HFValidationError("Repo id is bad\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"Hub model owner/name \(HFValidationError: Repo id is b"):
        resolve_model("owner/name")
