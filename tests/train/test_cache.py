from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import models, normalizers, pre_tokenizers

from xdistil_fast.train import runs
from xdistil_fast.train.alignment import IGNORED, align, align_text, piece_targets, tag_ids
from xdistil_fast.train.cache import Cache, build_cache
from xdistil_fast.train.corpora import Sentence, read_labelled
from xdistil_fast.train.representation import Representation
from xdistil_fast.train.texts import Texts

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
PIECES = [
    "[UNK]", "nor", "##vell", "##ab", "ship", "##s", "to", "ost", "##by", "wo", "##rks", "there",
    ".", ",", "the", "fleet", "##er", "is", "back",
]  # fmt: skip
TRAIN = "Norvellab\tB-PER\nworks\tO\nthere\tO\n.\tO\n\nOstby\tB-LOC\nships\tO\n.\tO\n\n"
DEV = "Norvell\tB-PER\nis\tO\nback\tO\n\n"


class FakeTeacher:
    """Logits from the pieces alone; notes what it was asked and may fail when asked too often."""

    def __init__(self, fail_after: int = 1_000_000) -> None:
        self.labels = LABELS
        self.max_pieces = 100
        self.precision = "float32"
        self.asked: list[int] = []
        self.fail_after = fail_after
        self.tokenizer = tokenizers.Tokenizer(
            models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]")
        )
        self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def digest(self) -> str:
        return "fake"

    def logits(
        self,
        sequences: Sequence[np.ndarray],
        batch_tokens: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> list[np.ndarray]:
        if len(self.asked) == self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(len(sequences))
        return [self.one(ids) for ids in sequences]

    def outputs(
        self,
        sequences: Sequence[np.ndarray],
        batch_tokens: int = 0,
        progress: Callable[[int], object] | None = None,
        *,
        layer: int,
        reduce: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        logits = self.logits(sequences, batch_tokens, progress)
        states = [self.states(ids, layer) for ids in sequences]
        return logits, states if reduce is None else [reduce(rows) for rows in states]

    def states(self, ids: np.ndarray, layer: int) -> np.ndarray:
        return np.cos(layer * np.float32(ids)[:, None] + np.arange(6)).astype(np.float32)

    def one(self, ids: np.ndarray) -> np.ndarray:
        place = np.arange(len(ids))[:, None] + 1
        return np.sin(np.float32(ids)[:, None] * place + np.arange(len(LABELS))).astype(np.float32)


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    files = {"train.conll": TRAIN, "dev.conll": DEV, "more.conll": "the\tX\nfleet\tX\n\n"}
    files["raw.txt"] = "".join(f"{'the ' * n}fleeter is back, Ostby.\n" for n in range(9))
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return Texts(
        (read_labelled(tmp_path / "train.conll"),),
        (read_labelled(tmp_path / "dev.conll"),),
        (str(tmp_path / "raw.txt"), str(tmp_path / "more.conll")),
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdistil_fast.train.shards.SHARD_SENTENCES", 4)


def label(root: Path, teacher: FakeTeacher, texts: Texts, **more: Any) -> tuple[Cache, str]:
    files = [*(corpus.describe("train") for corpus in texts.train), *texts.describe()]
    return build_cache(root, teacher, texts, files, progress=False, **more)


def build(root: Path, teacher: FakeTeacher, texts: Texts, **more: Any) -> Cache:
    return label(root, teacher, texts, **more)[0]


def sentences_of(cache: Cache) -> list[str]:
    """The sentences of a cache, spelled by their pieces."""
    batch = cache.batch(np.arange(cache.sentences))
    return [
        " ".join(PIECES[i] for i in batch.ids[a:b])
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]


def bytes_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_batches_hold_what_the_teacher_said(tmp_path: Path, texts: Texts) -> None:
    teacher = FakeTeacher()
    cache = build(tmp_path / "c", teacher, texts)
    assert cache.sentences == 2 + 9 + 1
    assert teacher.asked == [2, 4, 4, 1, 1]  # a file at a time
    batch = cache.batch(np.array([11, 0, 5, 0]))
    assert batch.cu_seqlens[-1] == len(batch.ids) == len(batch.logits)
    for row in range(4):
        part = slice(*batch.cu_seqlens[row : row + 2])
        expected = teacher.one(batch.ids[part]).astype(np.float16)
        np.testing.assert_array_equal(batch.logits[part], expected.astype(np.float32))
    whole = cache.batch(np.arange(12))
    assert len(whole.ids) == cache.pieces
    np.testing.assert_array_equal(cache.piece_counts(30), np.bincount(whole.ids, minlength=30))


def test_pieces_and_targets(tmp_path: Path, texts: Texts) -> None:
    teacher = FakeTeacher()
    cache = build(tmp_path / "c", teacher, texts)
    batch = cache.batch(np.array([0, 1, 2]))
    sentences = [s.words or () for s in texts.train[0].sentences]
    gold = align(teacher.tokenizer, sentences)
    words = tag_ids([s.tags or () for s in texts.train[0].sentences], LABELS)
    labelled = len(gold.ids)
    np.testing.assert_array_equal(batch.ids[:labelled], gold.ids)
    np.testing.assert_array_equal(batch.targets[:labelled], piece_targets(gold, words, LABELS))
    assert (batch.targets[labelled:] == IGNORED).all()


def test_labels_alone_ask_no_teacher(tmp_path: Path, texts: Texts) -> None:
    teacher = FakeTeacher(fail_after=0)
    cache = build(tmp_path / "c", teacher, texts, soft=False)
    assert cache.batch(np.array([0])).logits.shape == (7, 0)


def test_second_run_asks_nothing(tmp_path: Path, texts: Texts) -> None:
    build(tmp_path / "c", FakeTeacher(), texts)
    before = bytes_of(tmp_path / "c")
    again = build(tmp_path / "c", FakeTeacher(fail_after=0), texts)
    assert again.sentences == 12
    assert bytes_of(tmp_path / "c") == before


def test_whole_states_are_cached(tmp_path: Path, texts: Texts) -> None:
    teacher = FakeTeacher()
    cache = build(tmp_path / "c", teacher, texts, representation=Representation(2, 0))
    assert cache.width == 6
    batch = cache.batch(np.array([5, 0, 11]))
    np.testing.assert_allclose(batch.representation, teacher.states(batch.ids, 2), atol=1e-3)
    plain = build(tmp_path / "c", FakeTeacher(), texts)
    assert plain.width == 0
    assert plain.batch(np.array([5, 0, 11])).representation.shape == (len(batch.ids), 0)
    np.testing.assert_array_equal(plain.batch(np.array([5, 0, 11])).logits, batch.logits)


def test_reduced_states_are_cached(tmp_path: Path, texts: Texts) -> None:
    teacher = FakeTeacher()
    cache = build(tmp_path / "c", teacher, texts, representation=Representation(2, 3))
    batch = cache.batch(np.arange(cache.sentences))
    (file,) = tmp_path.rglob("components-*.safetensors")
    stored = load_file(file)
    expected = (teacher.states(batch.ids, 2) - stored["mean"]) @ stored["directions"]
    np.testing.assert_allclose(batch.representation, expected, rtol=2e-3, atol=2e-3)
    assert teacher.asked == [2, 2, 4, 4, 1, 1]  # components come from the labelled sentences


@pytest.mark.parametrize("calls", [0, 1, 2, 4, 5])
def test_stopped_run_with_states_goes_on(tmp_path: Path, texts: Texts, calls: int) -> None:
    wanted = Representation(2, 3)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", FakeTeacher(fail_after=calls), texts, representation=wanted)
    second = FakeTeacher()
    build(tmp_path / "c", second, texts, representation=wanted)
    assert len(second.asked) == 6 - calls
    build(tmp_path / "whole", FakeTeacher(), texts, representation=wanted)
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("same", [True, False])
def test_lost_components_take_shards_in_others_with_them(
    tmp_path: Path, texts: Texts, same: bool
) -> None:
    root, wanted = tmp_path / "c", Representation(2, 3)
    with pytest.raises(KeyboardInterrupt):
        build(root, FakeTeacher(fail_after=4), texts, representation=wanted)
    (file,) = root.rglob("components-*.safetensors")
    file.unlink()
    second = FakeTeacher()
    if not same:  # say, sums in another order on another machine
        real = second.states
        second.states = lambda ids, layer: 1.1 * real(ids, layer)  # type: ignore[method-assign]
    build(root, second, texts, representation=wanted)
    assert len(second.asked) == (3 if same else 6)


def test_a_file_of_labels_is_shared(tmp_path: Path, texts: Texts) -> None:
    """A further file, other dev sentences: what was labelled stays."""
    build(tmp_path / "c", FakeTeacher(), texts)
    (tmp_path / "new.txt").write_text("the ship is there\nthe fleet\n", encoding="utf-8")
    more = Texts(texts.train, (), (str(tmp_path / "new.txt"), *texts.transfer))
    second = FakeTeacher()
    cache = build(tmp_path / "c", second, more)
    assert second.asked == [2]
    # "the fleet" is in more.conll as well, and is the new file's.
    assert cache.sentences == 12 + 2 - 1
    assert sentences_of(cache)[2:4] == ["the ship is there", "the fleet"]
    batch = cache.batch(np.arange(cache.sentences))
    np.testing.assert_array_equal(cache.piece_counts(30), np.bincount(batch.ids, minlength=30))
    assert cache.pieces == len(batch.ids)


def test_runs_that_label_at_once_do_not_meet(tmp_path: Path, texts: Texts) -> None:
    build(tmp_path / "alone", FakeTeacher(), texts)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            root = tmp_path / "shared"
            at_once = [pool.submit(build, root, FakeTeacher(), texts) for _ in range(4)]
            assert {run.result().sentences for run in at_once} == {12}
            assert bytes_of(root) == bytes_of(tmp_path / "alone")
            shutil.rmtree(root)


def test_what_a_killed_run_had_half_written_goes(tmp_path: Path, texts: Texts) -> None:
    build(tmp_path / "c", FakeTeacher(), texts)
    before = bytes_of(tmp_path / "c")
    folder = next(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    old, young = (folder / f"shard-00000.safetensors.{n}.part" for n in range(2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    build(tmp_path / "c", FakeTeacher(), texts)
    young.unlink()  # may be another run's, which goes on
    assert bytes_of(tmp_path / "c") == before


def test_precisions_have_their_own_shards(tmp_path: Path, texts: Texts) -> None:
    build(tmp_path, FakeTeacher(), texts)
    narrow = FakeTeacher()
    narrow.precision = "bfloat16"
    build(tmp_path, narrow, texts)
    assert len(narrow.asked) == 5


def test_labelled_sentences_are_known(tmp_path: Path, texts: Texts) -> None:
    cache = build(tmp_path / "c", FakeTeacher(), texts)
    assert cache.labelled.tolist() == [True] * 2 + [False] * 10


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_stopped_run_goes_on(tmp_path: Path, texts: Texts, calls: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", FakeTeacher(fail_after=calls), texts)
    second = FakeTeacher()
    build(tmp_path / "c", second, texts)
    assert len(second.asked) == 5 - calls
    build(tmp_path / "whole", FakeTeacher(), texts)
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "empty manifest"])
def test_damage_is_found_and_mended(
    tmp_path: Path, texts: Texts, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "c"
    build(root, FakeTeacher(), texts)
    before = bytes_of(root)
    (shard,) = root.rglob("shard-00001.safetensors")
    blob = bytearray(shard.read_bytes())
    asked = 1
    if damage == "truncate":
        shard.write_bytes(blob[:-5])
    elif damage == "flip":
        blob[-7] ^= 4
        shard.write_bytes(blob)
    elif damage == "delete":
        shard.unlink()
    else:
        shard.with_name("manifest.json").write_text("{" * (damage == "manifest"), encoding="utf-8")
        asked = 3  # all of its file
    second = FakeTeacher()
    build(root, second, texts)
    assert len(second.asked) == asked
    assert bytes_of(root) == before
    assert ("shard-00001" in capsys.readouterr().err) == (asked == 1)


def test_full_disk_keeps_what_is_finished(
    tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = FakeTeacher()
    real, calls = runs.os.fsync, []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) > 3:  # a shard, its manifest twice, then the disk is full
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(runs.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "c", teacher, texts)
    names = sorted(p.name for p in (tmp_path / "c").rglob("*.*"))
    assert names == ["manifest.json", "shard-00000.safetensors"]
    assert teacher.asked == [2, 4]
    monkeypatch.setattr(runs.os, "fsync", real)
    second = FakeTeacher()
    build(tmp_path / "c", second, texts)
    assert len(second.asked) == 4


@pytest.mark.parametrize(
    "more",
    [
        {"max_length": 9},
        {"soft": False},
        {"representation": Representation(1, 0)},
    ],
)
def test_other_settings_have_their_own_shards(
    tmp_path: Path, texts: Texts, more: dict[str, Any]
) -> None:
    root = tmp_path / "c"
    _, key = label(root, FakeTeacher(), texts)
    before = bytes_of(root)
    _, other = label(root, FakeTeacher(), texts, **more)
    assert other != key
    assert before.items() <= bytes_of(root).items()


def test_other_content_has_its_own_shards(tmp_path: Path, texts: Texts) -> None:
    _, key = label(tmp_path, FakeTeacher(), texts)
    files = [*(corpus.describe("train") for corpus in texts.train), *texts.describe()]
    files[0]["content"] = ["b"]  # of one file: the others keep theirs
    again = FakeTeacher()
    _, other = build_cache(tmp_path, again, texts, files, progress=False)
    assert key != other
    assert again.asked == [2]
    abouts = [json.loads(p.read_text("utf-8"))["about"] for p in tmp_path.rglob("manifest.json")]
    assert sorted(a["content"] for a in abouts) == [[]] * 3 + [["b"]]


def test_repeated_and_dev_sentences_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(TRAIN * 2, encoding="utf-8")
    (tmp_path / "dev.conll").write_text(DEV, encoding="utf-8")
    (tmp_path / "raw.txt").write_text(
        "Norvell is back\nthe fleet\nNorvellab works there.\nthe  fleet\nthefleet\nthe ship\n",
        encoding="utf-8",
    )
    train = (read_labelled(tmp_path / "train.conll"),)
    dev = (read_labelled(tmp_path / "dev.conll"),)
    raw = (str(tmp_path / "raw.txt"),)
    found = sentences_of(build(tmp_path / "c", FakeTeacher(), Texts(train, dev, raw)))
    # Labelled sentences stay, however often they come.
    assert found[4:] == ["the fleet", "the ship"]
    assert found[:2] == found[2:4]
    shown = sentences_of(build(tmp_path / "c", FakeTeacher(), Texts(train, (), raw)))
    assert shown == [*found[:4], "nor ##vell is back", *found[4:]]
    again = Texts(train, train, raw)
    assert sentences_of(build(tmp_path / "c", FakeTeacher(), again)) == shown
    (entry,) = Texts(train, dev, raw).describe()
    assert entry["name"] == "/".join((tmp_path / "raw.txt").parts[-3:])
    assert (entry["sentences"], entry["words"]) == (6, 13)


def test_sentences_are_streamed(
    tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def stream(paths: Sequence[str]) -> Any:
        for number in range(40):
            read.append(number)
            yield Sentence(text="the " * (number + 1))

    monkeypatch.setattr("xdistil_fast.train.texts.read_transfer", stream)
    teacher = FakeTeacher(fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", teacher, texts)
    # Each file once to count; then, after a shard of train, two labelled and the third read.
    assert len(read) == 2 * 40 + 4 * 3


def test_long_sentences_go_on_as_further_ones(tmp_path: Path, texts: Texts) -> None:
    cache = build(tmp_path / "c", FakeTeacher(), texts, max_length=9)
    batch = cache.batch(np.arange(cache.sentences))
    assert np.diff(batch.cu_seqlens).max() <= 9
    assert len(batch.ids) == build(tmp_path / "d", FakeTeacher(), texts).pieces
    begins = [PIECES[i] for i in batch.ids[batch.cu_seqlens[:-1]]]
    assert not any(piece.startswith("##") for piece in begins)  # cut between words


def test_teacher_bounds_the_length(tmp_path: Path, texts: Texts) -> None:
    teacher = FakeTeacher()
    teacher.max_pieces = 8
    cache = build(tmp_path / "c", teacher, texts)
    assert np.diff(cache.batch(np.arange(cache.sentences)).cu_seqlens).max() <= 8


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_logits_beyond_float16_are_refused(
    tmp_path: Path, texts: Texts, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = FakeTeacher()
    monkeypatch.setattr(teacher, "one", lambda ids: np.full((len(ids), 5), value, np.float32))
    with pytest.raises(ValueError, match="not finite, or too large for float16"):
        build(tmp_path / "c", teacher, texts)


def test_texts_without_pieces_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.conll").write_text("\u0007\tO\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no piece"):
        build(tmp_path / "c", FakeTeacher(), Texts((read_labelled(tmp_path / "t.conll"),)))


def test_unknown_tag_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.conll").write_text("the\tB-ORG\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="B-ORG"):
        build(tmp_path / "c", FakeTeacher(), Texts((read_labelled(tmp_path / "t.conll"),)))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.text(st.sampled_from("norve ll.,ab ships\u0007 漢"), max_size=20), max_size=5))
def test_running_text_is_aligned_like_its_words(texts: list[str]) -> None:
    tokenizer = FakeTeacher().tokenizer
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    normalizer = normalizers.BertNormalizer(lowercase=True)
    words = [[w for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t))] for t in texts]
    running, worded = align_text(tokenizer, texts), align(tokenizer, words)
    for name in ("ids", "cu_pieces", "cu_words", "first_piece", "word_of_piece"):
        np.testing.assert_array_equal(getattr(running, name), getattr(worded, name), err_msg=name)
