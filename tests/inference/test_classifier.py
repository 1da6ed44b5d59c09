from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdistil_fast import Classifier, ModelError, Tagger
from xdistil_fast.cli import main
from xdistil_fast.labels import validate_classes
from xdistil_fast.model_io import ModelConfig, load_folder, save_folder
from xdistil_fast.quantization import quantize_tensors
from xdistil_fast.reference import student as oracle
from xdistil_fast.reference import student_hidden
from xdistil_fast.tokenization import plan_windows

LABELS = ("good", "bad", "so so")
POOLINGS = ("max", "mean", "last")


@pytest.fixture(scope="module")
def folders(make_model: Callable[..., Path], tmp_path_factory: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {
        pooling: make_model(
            root / pooling, labels=LABELS, task="text-classification", pooling=pooling
        )
        for pooling in POOLINGS
    }


@pytest.fixture(scope="module", params=POOLINGS)
def classifier(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Classifier:
    return Classifier.from_pretrained(folders[request.param])


def test_shape_of_results(classifier: Classifier, sentences: tuple[str, ...]) -> None:
    """As transformers' pipeline("text-classification") has it."""
    single = classifier(sentences[0])
    assert len(single) == 1
    assert list(single[0]) == ["label", "score"]
    assert type(single[0]["score"]) is float
    several = classifier(list(sentences))
    assert several[0] == single[0]
    assert len(several) == len(sentences)
    every = classifier(sentences[0], top_k=None)
    assert {row["label"] for row in every} == set(LABELS)
    scores = [row["score"] for row in every]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-6)
    assert every[0] == single[0]
    assert classifier(list(sentences), top_k=2)[0] == every[:2]
    assert classifier(sentences[0], top_k=1) == single
    assert classifier([sentences[0]], top_k=1) == [single]
    assert classifier([]) == []
    assert classifier.labels == list(LABELS)
    assert repr(classifier).startswith("Classifier(")


def probabilities(classifier: Classifier, texts: list[str]) -> np.ndarray[Any, Any]:
    return classifier.classify_batch(texts).probabilities


def test_batch_equals_single(
    classifier: Classifier, folders: dict[str, Path], sentences: tuple[str, ...]
) -> None:
    texts = ["", *sentences, " ".join(sentences), " ", sentences[0] * 9]
    whole = probabilities(classifier, texts)
    for row, text in zip(whole, texts, strict=True):
        np.testing.assert_array_equal(probabilities(classifier, [text])[0], row)
    one = Classifier.from_pretrained(folders[str(classifier.config.pooling)], 1, max_memory=0)
    np.testing.assert_array_equal(probabilities(one, texts), whole)
    for batch_tokens in (1, 40, 10**6):
        assert list(classifier.pipe(iter(texts), batch_tokens)) == classifier(texts)


def test_is_the_reference(classifier: Classifier, sentences: tuple[str, ...]) -> None:
    """Of short texts and long ones: windows, and what is pooled of them."""
    config, tensors = classifier.config, classifier._tensors
    bilstm: list[Any] = []
    for suffix in ("", "_reverse"):
        bias = tensors[f"bilstm.bias_ih_l0{suffix}"] + tensors[f"bilstm.bias_hh_l0{suffix}"]
        bilstm += [tensors[f"bilstm.weight_{part}_l0{suffix}"] for part in ("ih", "hh")] + [bias]
    counts: list[int] = []
    for text in ("", "Ada", sentences[0], " ".join(sentences)):
        encoded = classifier._encoder.encode_texts([text])
        windows = plan_windows(len(encoded.ids), config.window, config.stride, encoded.first)
        counts.append(len(windows))
        kept, pooled = [], []
        for window in windows:
            ids = encoded.ids[window.start : window.stop]
            states = student_hidden(ids, [0, len(ids)], tensors["embedding.weight"], bilstm)
            core = states[window.core_start - window.start : window.core_stop - window.start]
            kept.append(core)
            pooled.append(oracle.pool(states, [0, len(ids)], "last"))
        joined = np.concatenate([np.zeros((0, 2 * config.hidden_size)), *kept])
        if config.pooling != "last" or not windows:
            pooled = [oracle.pool(joined, [0, len(joined)], str(config.pooling))]
        logits = np.concatenate(pooled) @ tensors["output.weight"].T + tensors["output.bias"]
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        got = probabilities(classifier, [text])[0]
        np.testing.assert_allclose(got, shares.mean(axis=0), atol=2e-6)
    assert counts[:3] == [0, 1, 2]
    assert counts[3] > 5


@pytest.mark.parametrize("pooling", POOLINGS)
def test_int8(
    pooling: str, folders: dict[str, Path], sentences: tuple[str, ...], tmp_path: Path
) -> None:
    """A folder stored in int8 is a float32 one run in int8, to the bit; bfloat16 is near it."""
    folder = load_folder(folders[pooling])
    texts = [*sentences, " ".join(sentences)]
    config = replace(folder.config, precision="int8")
    save_folder(
        tmp_path / "int8", config, quantize_tensors(folder.tensors), folder.tokenizer_json, ""
    )
    stored = Classifier.from_pretrained(tmp_path / "int8")
    assert stored.precision == "int8"
    full = probabilities(Classifier.from_pretrained(folders[pooling]), texts)
    close = probabilities(Classifier.from_pretrained(folders[pooling], precision="bfloat16"), texts)
    assert np.abs(close - full).max() < 0.05
    assert np.mean(probabilities(stored, texts).argmax(1) == full.argmax(1)) > 0.7
    again = Classifier.from_pretrained(tmp_path / "int8", threads=1, max_memory=0)
    np.testing.assert_array_equal(probabilities(again, texts), probabilities(stored, texts))


def test_pickles_and_is_shared_between_threads(
    classifier: Classifier, sentences: tuple[str, ...]
) -> None:
    copy = pickle.loads(pickle.dumps(classifier))
    assert type(copy) is Classifier
    want = classifier(list(sentences), top_k=None)
    assert copy(list(sentences), top_k=None) == want
    found: list[Any] = []
    workers = [
        threading.Thread(target=lambda: found.append(classifier(list(sentences), top_k=None)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [want] * 4


def test_bad_arguments(classifier: Classifier, sentences: tuple[str, ...]) -> None:
    long = " ".join(sentences)
    with pytest.raises(ValueError, match=r"texts\[1\] has \d+ pieces; truncation='error'"):
        classifier(["short", long], truncation="error")
    with pytest.raises(ValueError, match="truncation is 'cut'"):
        classifier("a", truncation="cut")
    for top_k in (0, -1):
        with pytest.raises(ValueError, match="top_k is"):
            classifier("a", top_k=top_k)
    for wrong in (True, 1.5, "all"):
        with pytest.raises(TypeError, match="top_k is"):
            classifier("a", top_k=wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        classifier(["a", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="pipe takes an iterable of strings"):
        classifier.pipe("a")


def test_pipe_reads_no_further_than_needed(classifier: Classifier) -> None:
    taken = 0

    def stream() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "Ada wrote to Charles Babbage"

    results = classifier.pipe(stream(), 40)
    for _ in range(20):
        next(results)
    assert taken < 60


def test_the_other_class_is_named(folders: dict[str, Path], softmax_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"is a classifier of texts .* xdistil_fast\.Classifier"):
        Tagger.from_pretrained(folders["max"])
    with pytest.raises(ModelError, match=r"is a tagger of words .* xdistil_fast\.Tagger"):
        Classifier.from_pretrained(softmax_folder)


# --- the folder --------------------------------------------------------------------------------


def config(**changes: Any) -> ModelConfig:
    values = {
        "labels": LABELS, "vocab_size": 5, "embedding_size": 2, "hidden_size": 2,
        "task": "text-classification", "pooling": "max", **changes,
    }  # fmt: skip
    return ModelConfig(**values)


def test_config_round_trip(folders: dict[str, Path], softmax_folder: Path) -> None:
    raw = json.loads((folders["mean"] / "config.json").read_text("utf-8"))
    assert (raw["task"], raw["pooling"]) == ("text-classification", "mean")
    assert load_folder(folders["mean"]).config.pooling == "mean"
    # As before there were classifiers, so that older versions read it.
    assert "pooling" not in json.loads((softmax_folder / "config.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": None}, "pooling is None; allowed: 'max', 'mean', 'last'"),
        ({"pooling": "sum"}, "pooling is 'sum'"),
        ({"pooling": 3}, "pooling is 3"),
        ({"head": "crf"}, "head is 'crf'"),
        ({"task": "token-classification", "labels": ("O", "B-X", "I-X")}, "only a text classifier"),
        ({"task": "regression"}, "task is 'regression'"),
        ({"labels": ("a", "a")}, "stands twice"),
        ({"labels": ("a",)}, "at least 2"),
        ({"labels": ("a", " ")}, "non-empty"),
        ({"labels": ("a", "\ud800")}, "surrogates"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config(**changes)


def test_class_names_are_free() -> None:
    validate_classes(["Sci/Tech", "B-side", "O", "très bien"])
    with pytest.raises(ValueError, match="must be a non-empty string"):
        validate_classes(["a", 3])  # type: ignore[list-item]


# --- the command line --------------------------------------------------------------------------


@pytest.fixture
def model(folders: dict[str, Path]) -> str:
    return str(folders["max"])


def test_classify_string(
    model: str, sentences: tuple[str, ...], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    found = Classifier.from_pretrained(model)(sentences[0], top_k=None)
    for options, want in ([], found[:1]), (["--top-k", "0"], found), (["--top-k", "2"], found[:2]):
        assert main(["classify", "--model", model, "--text", sentences[0], *options]) == 0
        assert json.loads(capsysbinary.readouterr().out) == want


def test_classify_file(model: str, sentences: tuple[str, ...], tmp_path: Path) -> None:
    rows = [{"id": i, "text": text, "label": "gold"} for i, text in enumerate(sentences)]
    rows.append({"tokens": sentences[0].split()})
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    classifier = Classifier.from_pretrained(model)
    texts = [*sentences, " ".join(sentences[0].split())]
    common = ["classify", "--model", model, str(source), "-q"]
    assert main([*common, "-o", str(out)]) == 0
    got = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    for row, record, want in zip(rows, got, classifier(texts), strict=True):
        assert record == {**row, "prediction": want["label"], "score": want["score"]}
    assert main([*common, "-o", str(out), "--no-text", "--top-k", "2"]) == 0
    got = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [record["predictions"] for record in got] == classifier(texts, top_k=2)
    assert not any("text" in record or "tokens" in record for record in got)


def test_classify_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that cannot be read stops it; mended, the same command goes on to the same bytes."""
    monkeypatch.setattr("xdistil_fast.commands.stream._CHARS_PER_BATCH", 100)
    good = "".join(f"Ada wrote letter {i} to Charles Babbage\n" for i in range(40))
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_bytes(good.encode() + b"\xff\n")
    command = ["classify", "--model", model, str(source), "-o", str(out), "-q"]
    assert main(command) == 2
    assert "run the same command to go on" in capsys.readouterr().err
    part = (tmp_path / "out.jsonl.part").read_bytes()
    assert part.count(b"\n") == 40
    source.write_bytes(good.encode() + b"so\n")
    assert main([*command, "--top-k", "1"]) == 2
    assert "--top-k" in capsys.readouterr().err
    assert main(command) == 0
    assert out.read_bytes().startswith(part)
    assert out.read_bytes().count(b"\n") == 41


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "in.txt"], "FILE and --text"),
        (["--text", "a", "--top-k", "-1"], "--top-k is -1"),
        (["--text", "a", "-o", "x"], "-o is for FILE"),
    ],
)
def test_classify_refuses(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--model", model, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tag_names_the_class(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tag", "--model", model, "--text", "a"]) == 2
    assert "xdistil_fast.Classifier" in capsys.readouterr().err


def test_tsv_is_words_or_texts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.tsv"
    source.write_text("good film\tpos\nbad film\tneg\n", "utf-8")
    for arguments in (
        ["classify", "--model", model, str(source)],
        ["bench", model, "--data", str(source)],
    ):
        assert main(arguments) == 2
        assert ".tsv" in capsys.readouterr().err
    assert main(["classify", "--model", model, str(source), "--input-format", "conll"]) == 0


def test_scores_that_overflow_are_refused(
    model: str, sentences: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier.from_pretrained(model)
    original = classifier._student.class_logits

    def wrong(*args: Any) -> Any:
        logits = original(*args)
        logits[0, 0] = np.inf
        return logits

    monkeypatch.setattr(classifier._student, "class_logits", wrong)
    with pytest.raises(ValueError, match="scores are not finite"):
        classifier(sentences[0])


def test_long_text_is_refused_by_line(
    model: str, sentences: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("short\n" + " ".join(sentences) + "\n", "utf-8")
    assert main(["classify", "--model", model, str(source), "--truncation", "error"]) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.fixture
def labelled(model: str, sentences: tuple[str, ...], tmp_path: Path) -> Path:
    """Gold that the model has half right."""
    found = Classifier.from_pretrained(model)(list(sentences))
    path = tmp_path / "gold.tsv"
    rows = [
        f"{text}\t{row['label'] if i % 2 else 'bad'}"
        for i, (text, row) in enumerate(zip(sentences, found, strict=True))
    ]
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", "utf-8")
    return path


def test_eval(model: str, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", model, "--data", str(labelled), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    gold = [line.split("\t")[1] for line in labelled.read_text("utf-8").splitlines()[1:]]
    texts = [line.split("\t")[0] for line in labelled.read_text("utf-8").splitlines()[1:]]
    pred = [row["label"] for row in Classifier.from_pretrained(model)(texts)]
    right = sum(a == b for a, b in zip(gold, pred, strict=True))
    assert record["metrics"]["accuracy"] == pytest.approx(100 * right / len(gold))
    assert record["metrics"]["texts"] == len(gold)
    assert record["model"]["kind"] == "student"
    assert main(["eval", model, "--data", str(labelled), str(labelled)]) == 0
    assert "macro F1" in capsys.readouterr().out
    labelled.write_text("a\tfoo\n", "utf-8")
    assert main(["eval", model, "--data", str(labelled)]) == 2
    assert "none in common" in capsys.readouterr().err


def test_quantize(
    model: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int8"
    command = ["quantize", model, "--dev", str(labelled), "-o", str(out), "--max-loss", "100"]
    assert main(command) == 0
    assert "accuracy on dev" in capsys.readouterr().out
    metrics = load_folder(out).config.metrics["quantization"]
    assert metrics["texts"] == 8
    assert 0 <= metrics["agreement"] <= 100
    assert "accuracy int8" in (out / "README.md").read_text("utf-8")
    assert Classifier.from_pretrained(out).precision == "int8"


def test_doctor_and_bench(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", model, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["model"]
    assert (described["task"], described["pooling"]) == ("text-classification", "max")
    assert main(["bench", model, "--texts", "3", "--seconds", "0.01", "-q"]) == 0
    assert "text to class" in capsys.readouterr().out
    assert main(["bench", model, "--teacher", "x"]) == 2
    assert "--teacher is for students that tag" in capsys.readouterr().err
