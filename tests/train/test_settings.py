"""Settings and files that do not go together are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.corpora import read_transfer
from xdistil_fast.train.distillation import TaggingJob, distill
from xdistil_fast.train.distributed import Ranks
from xdistil_fast.train.document_cache import LabelledTexts
from xdistil_fast.train.document_teacher import DocumentTeacher
from xdistil_fast.train.documents import read_documents
from xdistil_fast.train.errors import EXACT, TYPE, count_kinds, pair_entities
from xdistil_fast.train.label_maps import check_label_map


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "d0-s", "augment": "crop=1"}, r"augment is 'crop=1\.?0?'.*labels alone"),
        ({"pooling": "mean"}, "pooling is 'mean' and task is 'tagging'.*allowed: 'max'"),
        ({"soft_weight": float("inf")}, "soft_weight is inf; allowed: a number from 0"),
        ({"hard_weight": float("nan")}, "hard_weight is nan"),
        ({"clip": float("inf")}, "clip is inf"),
        ({"labelled_share": 0.5}, "labelled_share is 0.5 and schedule 'd4.1' has no stage"),
        (
            {"projected": True, "representation_size": 6, "schedule": "d1"},
            "representation_size is 6, projected is True and schedule 'd1' has no hidden states",
        ),
    ],
)
def test_configuration(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig("t", ("a",), ("b",), "o", **settings)


def test_pooling_of_a_classifier() -> None:
    config = DistillConfig("t", ("a",), ("b",), "o", task="classification", pooling="mean")
    assert config.pooling == "mean"


def test_classes_may_hold_white_space() -> None:
    mapping = {"1": "very good", "2": None}
    assert check_label_map(mapping, classes=True) == mapping
    with pytest.raises(ValueError, match="allowed: a type name without white space"):
        check_label_map(mapping)
    with pytest.raises(ValueError, match="allowed: a class name, or null"):
        check_label_map({"1": " "}, classes=True)


def test_the_default_schedule_hangs_on_the_task() -> None:
    for task, schedule in (("tagging", "d4.1"), ("classification", "joint-labels")):
        assert DistillConfig("t", ("a",), ("b",), "o", task=task).schedule == schedule


def test_texts_take_no_language(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="files of texts take no language"):
        read_documents(f"de={tmp_path / 'a.tsv'}")


def test_transfer_text_of_a_classifier_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "unlabelled.tsv"
    path.write_text("sentence\tlabel\nA fine day.\t1\n")
    with pytest.raises(ValueError, match=r"unlabelled\.tsv: transfer text .* cannot be columns"):
        LabelledTexts((), (), (str(path),))


def test_a_lone_surrogate_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "caf\\u00e9 \\ud83d\\ude00"}\n{"text": "bad \\ud800 film"}\n')
    sentences = read_transfer([path])
    assert next(sentences).text == "café 😀"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: a lone surrogate"):
        next(sentences)


def test_several_classes_at_once(tmp_path: Path) -> None:
    config = BertConfig(id2label={0: "rude", 1: "polite"})
    assert DocumentTeacher.labels_of_config("m", config) == ["rude", "polite"]
    config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type is 'multi_label_classification'; allowed"):
        DocumentTeacher.labels_of_config("m", config)


def test_mistakes_of_plain_tags() -> None:
    pairs = pair_entities([["NOUN", "VERB"]], [["NOUN", "NOUN"]], "tags")
    assert [pair.kind for pair in pairs] == [EXACT, TYPE]
    assert sum(count_kinds(pairs).values()) == 2


def test_a_cache_knows_how_its_files_are_read(inputs: dict[str, Any], tmp_path: Path) -> None:
    """The same bytes as columns of words and as a text a line."""
    keys = []
    for name in ("same.conll", "same.txt"):
        (tmp_path / name).write_text("Pia O\nlives O\n\nIt O\nrains O\n", "utf-8")
        train, dev = inputs["train"][0], inputs["dev"][0]
        transfer = (str(tmp_path / name),)
        config = DistillConfig(inputs["teacher"], (train,), (dev,), "o", transfer=transfer)
        keys.append(TaggingJob(config).build_cache(tmp_path / "cache", Ranks())[1])
    assert keys[0] != keys[1]


def test_start_values_are_read_before_any_work(inputs: dict[str, Any], tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    table.write_text("in 0.5 0.25\n", "utf-8")
    common = {"transfer": tuple(inputs["transfer"]), "embeddings": str(table), "progress": False}
    files = (inputs["teacher"], tuple(inputs["train"]), tuple(inputs["dev"]), str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"table\.txt, line 1: 2 values; the student's size is 8"):
        distill(DistillConfig(*files, student="8x4", **common))
    assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]


def test_a_cache_knows_the_roles_of_its_files(inputs: dict[str, Any], tmp_path: Path) -> None:
    """The same files in other roles: other targets, other text."""
    files = [*inputs["train"], *inputs["dev"], str(tmp_path / "third.conll")]
    Path(files[2]).write_text(Path(files[1]).read_text() + "\nPia\tB-PER\n")
    first = DistillConfig(inputs["teacher"], (files[0],), (files[1],), "o", transfer=(files[2],))
    second = DistillConfig(inputs["teacher"], tuple(files[:2]), (files[2],), "o")
    keys = [
        TaggingJob(config).build_cache(tmp_path / "cache", Ranks())[1] for config in (first, second)
    ]
    assert keys[0] != keys[1]
