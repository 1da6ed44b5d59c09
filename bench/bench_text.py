"""From text to entities, as a user calls it: our tagger against what else one would use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.corpus import Texts, labelled
from bench.duel import OURS, Case, Turns, duel
from bench.onnx_models import student_model
from bench.onnx_tagger import onnx_settings
from bench.ours import our_calls
from bench.peers import ONNX_RUNTIME, ONNX_RUNTIME_INT8
from bench.student_peers import StudentPeers
from bench.text_peers import Tag, same_entities, spacy_tagger
from xdistil_fast import PRECISIONS, Tagger
from xdistil_fast.model_io import ModelFolder

STUDENT_INT8 = f"tokenizers + {ONNX_RUNTIME_INT8}"
STUDENT_FLOAT32 = f"tokenizers + {ONNX_RUNTIME}"
SPACY = "spaCy"
_SPACY_SENTENCES = 400
_ARGMAX = "takes each piece's best tag, where ours decodes under the rules of IOB2"


def taggers(model: ModelFolder, threads: int) -> dict[str, Tagger]:
    """Ours in each precision."""
    return {
        precision: Tagger(
            model.config,
            model.tensors,
            model.tokenizer,
            threads=threads,
            precision=precision,
        )
        for precision in PRECISIONS
    }


def onnx_models(model: ModelFolder, threads: int, texts: list[str]) -> dict[str, bytes]:
    """The same student for ONNX Runtime; these texts choose the variant of int8."""
    tagger = Tagger(model.config, model.tensors, model.tokenizer, threads=threads)
    encoded = tagger.tag_batch(texts).encoded
    ids, cu_seqlens = encoded.ids, encoded.cu_pieces
    expected = our_calls(model.config, model.tensors, threads, ids, cu_seqlens)["float32"]()
    int8 = StudentPeers(model.tensors, threads).for_text(ids, cu_seqlens, expected)
    return {STUDENT_INT8: int8, STUDENT_FLOAT32: student_model(model.tensors, ragged=True)}


def onnx_taggers(model: ModelFolder, threads: int, texts: list[str]) -> dict[str, dict[str, Tag]]:
    """Taggers of `onnx_models`, each with its settings."""
    tokenizer, labels = model.tokenizer.to_str(), model.config.labels
    return {
        name: dict(onnx_settings(weights, tokenizer, labels, threads, time_major=True))
        for name, weights in onnx_models(model, threads, texts).items()
    }


@pytest.mark.parametrize("batch", ["many", "one"])
def bench_student(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    model: ModelFolder,
    texts: Texts,
    sample: list[str],
    batch: str,
) -> None:
    ours = taggers(model, threads)
    peers = onnx_taggers(model, threads, sample)
    wanted = ours["float32"](sample)
    agreement = {
        name: min(same_entities(tag(sample), wanted) for tag in settings.values())
        for name, settings in peers.items()
    }
    for name, tagger in ours.items():
        if name != "float32":
            agreement[f"{OURS} {name}"] = same_entities(tagger(sample), wanted)
    # Its argmax knows no rules of IOB2, where ours decodes under them.
    assert agreement[STUDENT_FLOAT32] > 0.75
    if batch == "one":
        sample = sample[:64]
    case = Case(
        group="text to entities",
        task=f"student, {texts.name}" + (", one by one" if batch == "one" else ""),
        batch=len(sample),
        length=None,
        pieces=ours["float32"].tag_batch(sample).pieces,
        sizes={"E": model.config.embedding_size, "H": model.config.hidden_size},
        threads=threads,
        aims={"int8": {STUDENT_INT8: 4.0}},
        agreement=agreement,
        notes={STUDENT_FLOAT32: _ARGMAX, STUDENT_INT8: _ARGMAX},
        headline=batch == "many",
    )
    call = _one_by_one if batch == "one" else _all_at_once
    duel(
        benchmark,
        case,
        {name: call(tagger, sample) for name, tagger in ours.items()},
        {
            name: {setting: call(tag, sample) for setting, tag in settings.items()}
            for name, settings in peers.items()
        },
        turns,
    )


def bench_spacy(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    model: ModelFolder,
    texts: Texts,
    sample: list[str],
    pytestconfig: pytest.Config,
) -> None:
    pytest.importorskip("spacy", reason="spaCy is not installed: pip install '.[spacy]'")
    paths: list[Path] = pytestconfig.getoption("corpus")
    sentences = next(filter(None, (labelled(path, _SPACY_SENTENCES) for path in paths)), ())
    if not sentences:
        pytest.skip("spaCy's recogniser needs labelled sentences to learn from: --corpus FILE")
    ours = taggers(model, threads)
    tag = spacy_tagger(sentences)
    assert any(tag(sample)), "spaCy learnt nothing"
    case = Case(
        group="text to entities",
        task=f"{SPACY}'s recogniser, {texts.name}",
        batch=len(sample),
        length=None,
        pieces=ours["float32"].tag_batch(sample).pieces,
        sizes={"E": model.config.embedding_size, "H": model.config.hidden_size},
        threads=threads,
        notes={
            SPACY: "spacy.blank('en') with its default ner, trained for a moment; it uses one "
            "thread, whatever it is given"
        },
    )
    duel(
        benchmark,
        case,
        {name: _all_at_once(tagger, sample) for name, tagger in ours.items()},
        {SPACY: {"": _all_at_once(tag, sample)}},
        turns,
    )


def _all_at_once(tag: Callable[[list[str]], object], texts: list[str]) -> Callable[[], object]:
    return lambda: tag(texts)


def _one_by_one(tag: Callable[[list[str]], object], texts: list[str]) -> Callable[[], object]:
    return lambda: [tag([text]) for text in texts]
