from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from xdistil_fast.train.documents import read_documents

ROWS = [("A fine film .", "pos"), ("Two hours lost .", "neg"), ("Café ☕ closed .", "neg")]


def check(path: Path) -> None:
    found = read_documents(path)
    assert list(zip(found.texts, found.labels, strict=True)) == ROWS
    assert found.classes == {"pos", "neg"}
    entry = found.describe("dev")
    assert (entry["role"], entry["sentences"], entry["words"]) == ("dev", 3, 12)


def test_formats(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": 1, "text": a, "label": b}) + "\n" for a, b in ROWS)
    (tmp_path / "a.jsonl").write_text(lines + "\n", "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain = "".join(f"{a}\t{b}\n" for a, b in ROWS)
    (tmp_path / "a.tsv").write_text(plain, "utf-8")
    (tmp_path / "glue.tsv.gz").write_bytes(gzip.compress(("sentence\tlabel\n" + plain).encode()))
    turned = "index\tlabel\ttext\n" + "".join(f"{i}\t{b}\t{a}\n" for i, (a, b) in enumerate(ROWS))
    (tmp_path / "turned.tsv").write_text(turned, "utf-8")
    for path in sorted(tmp_path.iterdir()):
        check(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, labels = map(list, zip(*ROWS, strict=True))
    table = pyarrow.table({"label": labels, "id": [1, 2, 3], "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    check(tmp_path / "a.parquet")


def test_numbers_and_label_map(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": n}) + "\n" for n in (0, 1, 2)))
    assert read_documents(path).labels == ("0", "1", "2")
    mapped = read_documents(path, {"0": "neg", "1": None, "*": "other"})
    assert mapped.labels == ("neg", "other")
    assert mapped.describe("train")["label_map"] == {"0": "neg", "1": None, "*": "other"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl, line 1: labelled texts need"),
        ("a.jsonl", '{"text": "a", "label": 1.5}\n', "line 1: labelled texts need"),
        ("a.jsonl", '{"text": "a", "label": true}\n', "line 1: labelled texts need"),
        ("a.jsonl", '{"text": ["a"], "label": "b"}\n', "line 1: labelled texts need"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("a.jsonl", "[]\n", "line 1: a JSON object is needed"),
        ("a.jsonl", "", "no labelled text"),
        ("a.tsv", "a\tb\nc\n", "line 2: 1 columns, must be 2"),
        ("a.tsv", "a\tb\tc\n", "line 1: 3 columns, must be 2"),
        ("a.tsv", "a\t \n", "line 1: labelled texts need"),
        ("a.conll", "a\tO\n", "cannot tell the format"),
        ("a.tsv", b"a\xff\tb\n", "is not UTF-8"),
        ("a.jsonl", gzip.compress(b'{"text": "a", "label": "b"}\n', mtime=0)[:-5], "gzip"),
        ("a.parquet", b"PAR1 and no more", "Parquet|pyarrow"),
    ],
)
def test_refuses(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        read_documents(path)
