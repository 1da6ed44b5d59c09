"""A teacher of multilingual BERT's shape and vocabulary, distilled from end to end.

Its weights are random and its layers narrow; its 119,547 pieces are the real ones, which are not in
this repository: XDISTIL_MBERT_VOCAB names the file (one piece a line, as the model's vocab.txt).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from xdistil_fast.tagger import Tagger
from xdistil_fast.train import runs
from xdistil_fast.train.config import DistillConfig
from xdistil_fast.train.corpora import read_labelled
from xdistil_fast.train.distillation import distill
from xdistil_fast.train.teacher import Teacher

VOCAB = os.environ.get("XDISTIL_MBERT_VOCAB", "")
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
ROWS = {
    "de": "Jürgen B-PER\nKoller I-PER\nwohnt O\nin O\nKöln B-LOC\n. O\n\n",
    "ru": "Анна B-PER\nприехала O\nиз O\nМосквы B-LOC\n. O\n\n",  # noqa: RUF001
    "ja": "田中 B-PER\nさん O\nは O\n東京 B-LOC\nに O\n\n",
}

pytestmark = pytest.mark.skipif(
    not Path(VOCAB).is_file(),
    reason="XDISTIL_MBERT_VOCAB does not name the vocabulary of bert-base-multilingual-cased",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mbert") / "teacher"
    folder.mkdir()
    pieces = Path(VOCAB).read_text("utf-8").split("\n")
    (folder / "vocab.txt").write_text("\n".join(pieces), "utf-8")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(  # of bert-base-multilingual-cased, but for the widths
        vocab_size=119547, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=512, type_vocab_size=2, directionality="bidi",
        initializer_range=0.3, id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    return folder


def test_mbert_is_distilled(teacher: Path, tmp_path: Path) -> None:
    loaded = Teacher.from_pretrained(teacher, device="cpu")
    assert loaded.tokenizer.get_vocab_size() == 119547
    assert loaded.max_pieces == 510
    # As Google's own multilingual cased model cuts it: case and accents stay.
    assert loaded.tokenizer.encode("Jürgen 東京", add_special_tokens=False).tokens == [
        "Jürgen", "東", "京",
    ]  # fmt: skip
    files = []
    for language, rows in ROWS.items():
        path = tmp_path / f"{language}.conll"
        path.write_text(rows.replace(" ", "\t") * 6, "utf-8")
        files.append(f"{language}={path}")
    raw = tmp_path / "raw.txt"
    raw.write_text("Анна живет в Köln .\n京都 は 東京 より 古い\n", "utf-8")
    config = DistillConfig(
        teacher=str(teacher), train=tuple(files), dev=tuple(files), transfer=(f"ru={raw}",),
        output=str(tmp_path / "student"), student="8x12", epochs=3, lr=0.02, batch_size=8,
        language_sampling=0.5, augment="swap=1,mask=0.5", progress=False,
    )  # fmt: skip
    metrics = distill(config)["metrics"]
    assert list(metrics["dev"]["languages"]) == ["de", "ja", "ru"]
    assert metrics["dev"]["macro_f1"] == metrics["dev"]["macro"]["f1"]
    # Cut to the pieces seen and all single characters.
    assert metrics["vocabulary"] < 40_000
    assert metrics["teacher_parameters"] > 119547 * 16
    tagger = Tagger.from_pretrained(tmp_path / "student")
    for file in files:
        words = [list(s.words or ()) for s in read_labelled(file).sentences]
        assert [len(tags) for tags in tagger.tag_words(words)] == [len(row) for row in words]
        pieces = [tagger._encoder.encode_words([row]).ids for row in words]
        expected = [loaded.tokenizer.encode(row, is_pretokenized=True, add_special_tokens=False)
                    for row in words]  # fmt: skip
        assert [len(ids) for ids in pieces] == [len(encoding.ids) for encoding in expected]
    names = {entry.get("language") for entry in runs.read_run(tmp_path / "student")["data"]}
    assert names == {"de", "ru", "ja"}
