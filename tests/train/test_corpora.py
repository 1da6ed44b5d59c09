from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdistil_fast.labels import spans
from xdistil_fast.train.corpora import (
    Sentence,
    file_digest,
    labelling_of,
    read_labelled,
    read_transfer,
)
from xdistil_fast.train.label_maps import load_label_map

IOB2 = "Mara\tB-PER\nLind\tI-PER\nvisited\tO\nOslo\tB-LOC\n\nTea\tO\n.\tO\n"
ROWS = (
    Sentence(("Mara", "Lind", "visited", "Oslo"), ("B-PER", "I-PER", "O", "B-LOC")),
    Sentence(("Tea", "."), ("O", "O")),
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tags_of(path: Path) -> list[tuple[str, ...] | None]:
    return [sentence.tags for sentence in read_labelled(path).sentences]


def test_iob2_with_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", IOB2)
    corpus = read_labelled(path)
    assert corpus.sentences == ROWS
    assert (corpus.scheme, corpus.repaired, corpus.words) == ("IOB2", 0, 6)
    assert corpus.types == {"PER", "LOC"}
    assert corpus.describe("train") == {
        "role": "train",
        "name": "/".join(path.parts[-3:]),
        "digest": hashlib.sha256(IOB2.encode()).hexdigest(),
        "format": "conll",
        "sentences": 2,
        "words": 6,
    }


@pytest.mark.parametrize(
    "content",
    [
        IOB2.replace("\t", " "),
        IOB2.replace("\t", "   NN "),
        IOB2.replace("\n", "\r\n"),
        "\ufeff" + IOB2,
        "-DOCSTART-\tO\n\n" + IOB2,
        "-DOCSTART-\n" + IOB2,
        IOB2.replace("\n\n", "\n-DOCSTART- -X- O O\n"),
        "\n\n" + IOB2 + "\n\n \n",
        IOB2.rstrip("\n"),
        IOB2.replace("\t", "\tNNP\tI-NP\t"),
    ],
    ids=["space", "spaces", "crlf", "bom", "doc", "doc1", "docmid", "blank", "noend", "four"],
)
def test_variants_of_conll(tmp_path: Path, content: str) -> None:
    assert read_labelled(write(tmp_path / "eng.train", content)).sentences == ROWS


def test_gzip_is_seen_from_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", gzip.compress(IOB2.encode()))
    assert read_labelled(path).sentences == ROWS
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("tags", "expected", "scheme", "repaired"),
    [
        ("I-PER I-PER O I-LOC", "B-PER I-PER O B-LOC", "IOB1", 0),
        ("I-PER B-PER I-LOC O", "B-PER B-PER B-LOC O", "IOB1", 0),
        ("B-PER I-PER O I-LOC", "B-PER I-PER O B-LOC", "IOB2", 1),
        ("B-PER I-LOC I-LOC O", "B-PER B-LOC I-LOC O", "IOB2", 1),
        ("B-PER E-PER O S-LOC", "B-PER I-PER O B-LOC", "BIOES", 0),
        ("B-PER L-PER U-PER U-LOC", "B-PER I-PER B-PER B-LOC", "BIOES", 0),
        ("B-PER E-PER I-PER E-PER", "B-PER I-PER B-PER I-PER", "BIOES", 1),
        ("B-PER I-PER I-PER E-LOC", "B-PER I-PER I-PER B-LOC", "BIOES", 1),
        ("O O O B-creative-work", "O O O B-creative-work", "IOB2", 0),
    ],
)
def test_schemes(tmp_path: Path, tags: str, expected: str, scheme: str, repaired: int) -> None:
    lines = [f"{w}\t{t}" for w, t in zip("abcd", tags.split(), strict=True)]
    corpus = read_labelled(write(tmp_path / "a.conll", "\n".join(lines)))
    assert corpus.sentences[0].tags == tuple(expected.split())
    assert (corpus.scheme, corpus.repaired) == (scheme, repaired)


@st.composite
def entity_lists(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int]]]:
    position, found = 0, []
    for _ in range(draw(st.integers(0, 5))):
        position += draw(st.integers(0, 2))
        size = draw(st.integers(1, 3))
        found.append((draw(st.sampled_from(["PER", "LOC"])), position, position + size))
        position += size
    return max(1, position + draw(st.integers(0, 2))), found


@settings(deadline=None)  # files are written
@given(entity_lists(), st.sampled_from(["IOB1", "IOB2", "BIOES", "BILOU"]))
def test_every_scheme_gives_the_same_entities(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[int, list[tuple[str, int, int]]],
    scheme: str,
) -> None:
    length, found = case
    tags = ["O"] * length
    for kind, start, stop in found:
        for i in range(start, stop):
            tags[i] = f"{'B' if i == start else 'I'}-{kind}"
        if scheme == "IOB1" and not (start and tags[start - 1][1:] == f"-{kind}"):
            tags[start] = f"I-{kind}"
        if scheme in ("BIOES", "BILOU"):
            tags[stop - 1] = f"{scheme[3] if scheme == 'BIOES' else 'L'}-{kind}"
            if stop - start == 1:
                tags[start] = f"{scheme[4]}-{kind}"
    path = tmp_path_factory.mktemp("scheme") / "a.conll"
    write(path, "".join(f"w\t{tag}\n" for tag in tags))
    corpus = read_labelled(path)
    assert [tuple(s) for s in spans(corpus.sentences[0].tags or ())] == found
    assert corpus.repaired == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no sentence in this file"),
        ("\n \n\n", "no sentence in this file"),
        ("-DOCSTART- O\n\n", "no sentence in this file"),
        ("Mara\nLind\n", "line 1: one column only.*'Mara'"),
        ("Mara\tB-PER\nLind\n", "line 2: 1 columns where the file began with 2"),
        ("a\tO\nb\tx\tO\n", "line 2: 3 columns where the file began with 2"),
        ("a O\n\nb x O\n", "line 3: 3 columns where the file began with 2"),
        ("a\tO\n\tO\n", "line 2: the first column, the word, is empty"),
        ("a\tO\n\nb\tPER\n", "line 3: 'PER' is no IOB tag"),
        ("a\tX-PER\n", "line 1: 'X-PER' is no IOB tag"),
        ("a\tB-\n", "line 1: 'B-' is no IOB tag"),
        ("a\tb-PER\n", "line 1: 'b-PER'"),
        ("a\tS-PER\nb\tO\nc\tU-PER\n", r"mix BIOES and BILOU \(see .*line 1 and .*line 3\)"),
        (b"a\tO\nb\xff\tO\n", "line 2: byte 0xff at offset 5 is not UTF-8"),
        ("Łódź\tO\n".encode("cp1250"), "line 1: byte 0xa3 at offset 0 is not UTF-8"),
        (IOB2.encode("utf-16"), "line 1: .*UTF-16|line 1: byte 0xff"),
        (IOB2.encode("utf-16-le"), "line 1: a NUL byte at offset 1;.*UTF-16"),
    ],
)
def test_refuses_conll(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "bad.conll", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled(path)
    assert str(path) in str(caught.value)


def test_mixed_encodings_name_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", "é\tO\n".encode() + "é\tO\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2: byte 0xe9 at offset 5"):
        read_labelled(path)


@pytest.mark.parametrize("keep", [5, 30, -4])
def test_truncated_gzip(tmp_path: Path, keep: int) -> None:
    packed = gzip.compress((IOB2 * 50).encode())
    path = write(tmp_path / "a.conll.gz", packed[:keep])
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        read_labelled(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress((IOB2 * 50).encode()))
    packed[-6] ^= 0xFF  # the checksum
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        read_labelled(write(tmp_path / "a.conll.gz", bytes(packed)))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_labelled(tmp_path / "none.conll")
    with pytest.raises(IsADirectoryError):
        read_labelled(tmp_path)


@pytest.mark.parametrize("key", ["tags", "ner_tags"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records(tmp_path: Path, kind: str, key: str) -> None:
    records = [{"id": 7, "tokens": list(s.words or ()), key: list(s.tags or ())} for s in ROWS]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, "\n\n".join(json.dumps(r) for r in records))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert read_labelled(path).sentences == ROWS
    assert [s.words for s in read_transfer([path])] == [s.words for s in ROWS]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a JSON object is needed, not list"),
        ('{"text": "Tea."}', 'line 2: no "tokens"'),
        ('{"tokens": ["a"]}', "line 2: no tags"),
        ('{"tokens": ["a"], "tags": [1]}', "line 2: .*list of strings; numbers"),
        ('{"tokens": "a b", "tags": ["O"]}', 'line 2: "tokens" must be a list of strings'),
        ('{"tokens": ["a", "b"], "tags": ["O"]}', 'line 2: 2 "tokens" but 1 "tags"'),
        ('{"tokens": ["a", " "], "tags": ["O", "O"]}', "line 2: .*empty word"),
        ('{"tokens": ["a"], "tags": ["Q-PER"]}', "line 2: 'Q-PER' is no IOB tag"),
    ],
)
def test_refuses_records(tmp_path: Path, line: str, message: str) -> None:
    good = '{"tokens": ["a"], "tags": ["O"]}'
    with pytest.raises(ValueError, match=message):
        read_labelled(write(tmp_path / "a.jsonl", f"{good}\n{line}\n"))


def test_refuses_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="damaged Parquet"):
        read_labelled(write(tmp_path / "a.parquet", b"PAR1 this is none"))


def test_transfer_in_order_and_streamed(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "  Tea is served. \n\n\tMara left.\nLast")
    conll = write(tmp_path / "b.conll.gz", gzip.compress(b"dogs\tNOUN\nbark\tVERB\n"))
    jsonl = write(tmp_path / "c.jsonl", '{"text": " Snow "}\n{"text": " "}\n{"tokens": ["a"]}\n')
    stream = read_transfer([text, conll, jsonl])
    assert next(stream) == Sentence(text="Tea is served.")
    assert list(stream) == [
        Sentence(text="Mara left."),
        Sentence(text="Last"),
        Sentence(words=("dogs", "bark")),
        Sentence(text="Snow"),
        Sentence(words=("a",)),
    ]


def test_transfer_checks_all_files_first(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", "Tea.\n")
    with pytest.raises(FileNotFoundError):
        read_transfer([good, tmp_path / "none.txt"])
    with pytest.raises(ValueError, match=r"format of this transfer text.*\.conll.*\.txt"):
        read_transfer([good, write(tmp_path / "eng.train", IOB2)])


@pytest.mark.parametrize("content", ["Mara\tB-PER\n", "-DOCSTART- -X- O O\n", "tea\tO\n"])
def test_conll_named_txt_is_no_transfer_text(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"holds CoNLL columns; name it \.conll"):
        list(read_transfer([write(tmp_path / "a.txt", content)]))


def test_empty_transfer_file_is_an_error(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", "Tea.\n")
    stream = read_transfer([good, write(tmp_path / "b.txt", "\n")])
    next(stream)
    with pytest.raises(ValueError, match=r"b\.txt: no sentence"):
        next(stream)


def test_label_map_renames_drops_and_keeps(tmp_path: Path) -> None:
    content = "a\tB-person\nb\tI-person\nc\tB-product\nd\tI-product\ne\tB-LOC\n"
    path = write(tmp_path / "a.conll", content)
    mapping = {"person": "PER", "product": None}
    corpus = read_labelled(path, mapping)
    assert corpus.sentences[0].tags == ("B-PER", "I-PER", "O", "O", "B-LOC")
    assert corpus.describe("dev")["label_map"] == mapping
    mapped = read_labelled(path, {"person": "PER", "*": None})
    assert mapped.sentences[0].tags == ("B-PER", "I-PER", "O", "O", "O")
    # The scheme is resolved first: what touched stays two entities under one name.
    both = read_labelled(path, {"person": "X", "product": "X"})
    assert both.sentences[0].tags == ("B-X", "I-X", "B-X", "I-X", "B-LOC")


def test_label_map_file(tmp_path: Path) -> None:
    path = write(tmp_path / "map.json", '{"person": "PER", "*": null}')
    assert load_label_map(path) == {"person": "PER", "*": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        ("[]", "must be a JSON object.*not list"),
        ('{"a": 3}', "sends 'a' to 3"),
        ('{"a": ""}', "sends 'a' to ''"),
        ('{"a": "O"}', "null for 'O'"),
        ('{"a": "b c"}', "without white space"),
        ('{"": "b"}', "empty type name"),
        ('{"a": "b", "a": "c"}', "names 'a' twice"),
    ],
)
def test_refuses_label_map(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_label_map(write(tmp_path / "map.json", content))


def test_plain_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", "The\tDET\ndog\tNOUN\n\nsat\tVERB\n")
    corpus = read_labelled(path)
    assert (corpus.scheme, corpus.labelling, corpus.repaired) == ("tags", "tags", 0)
    assert corpus.types == {"DET", "NOUN", "VERB"}
    assert [s.tags for s in corpus.sentences] == [("DET", "NOUN"), ("VERB",)]
    mapped = read_labelled(path, {"NOUN": "N", "DET": None})
    assert [s.tags for s in mapped.sentences] == [("O", "N"), ("VERB",)]
    assert mapped.types == {"N", "VERB"}
    entities = read_labelled(write(tmp_path / "b.conll", IOB2))
    assert labelling_of([corpus, mapped]) == "tags"
    assert labelling_of([entities]) == "IOB2"
    with pytest.raises(ValueError, match=r"holds plain tags of words, .* tags of entities"):
        labelling_of([corpus, entities])
    for content, line in (("a\tNOUN\nb\tB-PER\n", 1), ("a\tNOUN\nb\tO\n", 1)):
        with pytest.raises(ValueError, match=f"line {line}: 'NOUN' is no IOB tag"):
            read_labelled(write(tmp_path / "c.conll", content))
    with pytest.raises(ValueError, match="line 2: the tag '' is empty"):
        read_labelled(write(tmp_path / "d.conll", "a\tNOUN\nb\t\n"))
