from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xdistil_fast import Tagger
from xdistil_fast.cli import main
from xdistil_fast.commands import sink, stream
from xdistil_fast.commands.records import RecordReader


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tagger(softmax_folder: Path) -> Tagger:
    return Tagger.from_pretrained(softmax_folder)


@pytest.fixture
def run(softmax_folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    """`run("in.txt", ...)` -> (status, stdout, stderr) of `xdistil tag` in this process."""

    def call(*args: str) -> tuple[int, bytes, str]:
        capfdbinary.readouterr()
        status = main(["tag", "--model", str(softmax_folder), *args])
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return call


@pytest.fixture
def lines(sentences: tuple[str, ...]) -> list[str]:
    return [*sentences, "", "  Ada  ", "a\x0bb\x1cc\u2028d"] * 12


def write_lines(path: str, lines: list[str]) -> None:
    Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode())


def objects(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CHARS_PER_BATCH", 300)


# Formats


def test_string(run: Any, tagger: Tagger, sentences: tuple[str, ...]) -> None:
    status, out, err = run("--text", sentences[1])
    assert (status, err) == (0, "")
    assert json.loads(out) == tagger(sentences[1])
    assert sentences[1].split()[3] in out.decode()  # readable: not escaped
    assert out.count(b"\n") == len(tagger(sentences[1])) + 2
    assert run("--text", "") == (0, b"[]\n", "")
    status, out, err = run("--text", "Ada wrote.", "--format", "conll")
    assert [line.split("\t")[0] for line in out.decode().splitlines()] == ["Ada", "wrote", ".", ""]


def test_text_lines(run: Any, tagger: Tagger, lines: list[str]) -> None:
    write_lines("in.txt", lines)
    status, out, err = run("in.txt")
    assert status == 0
    assert objects(out) == [{"text": line, "entities": tagger(line)} for line in lines]
    pieces = tagger.tag_batch(lines).pieces
    assert f"{len(lines)} texts, {pieces} pieces in " in err
    assert "pieces/s" in err
    assert run("in.txt", "--quiet", "--threads", "1") == (0, out, "")
    assert run("in.txt", "-o", "out.jsonl")[:2] == (0, b"")
    assert Path("out.jsonl").read_bytes() == out
    assert sorted(os.listdir()) == ["in.txt", "out.jsonl"]
    status, bare, _ = run("in.txt", "--no-text")
    assert objects(bare) == [{"entities": tagger(line)} for line in lines]


def test_line_ends_and_marks(run: Any) -> None:
    Path("in.txt").write_bytes(b"\xef\xbb\xbfAda\r\n\r\nwrote \r\nto")
    _, out, _ = run("in.txt")
    assert [row["text"] for row in objects(out)] == ["Ada", "", "wrote ", "to"]


def test_empty_file(run: Any) -> None:
    Path("in.txt").write_bytes(b"")
    Path("out.jsonl.part").touch()  # what a kill may leave of the first moment
    status, out, err = run("in.txt", "-o", "out.jsonl")
    assert (status, out) == (0, b"")
    assert "0 texts, 0 pieces" in err
    assert Path("out.jsonl").read_bytes() == b""


def test_gzip_by_content(run: Any, lines: list[str]) -> None:
    write_lines("in.txt", lines)
    _, expected, _ = run("in.txt")
    Path("zipped").write_bytes(gzip.compress(Path("in.txt").read_bytes()))
    assert run("zipped")[:2] == (0, expected)


def test_jsonl(run: Any, tagger: Tagger) -> None:
    rows = [
        {"id": 7, "text": "Ada met Zoë.", "entities": "old", "more": {"a": [1, None]}},
        {"text": "lone \ud800 surrogate Ada"},
        {"tokens": ["Ada", "isn't", "in", "London"], "id": "x"},
        {"text": "", "tokens": ["ignored"]},
        {"tokens": []},
    ]
    Path("in.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n  \n")
    status, out, _ = run("in.jsonl")
    assert status == 0
    words = rows[2]["tokens"]
    assert objects(out) == [
        {**rows[0], "entities": tagger(rows[0]["text"])},
        {**rows[1], "entities": tagger(rows[1]["text"])},
        {**rows[2], "tags": tagger.tag_words([words])[0]},
        {**rows[3], "entities": []},
        {"tokens": [], "tags": []},
    ]
    assert "Zoë" in out.decode()
    _, bare, _ = run("in.jsonl", "--no-text")
    assert [*map(list, objects(bare))][:3:2] == [["id", "entities", "more"], ["id", "tags"]]


def test_conll(run: Any, tagger: Tagger) -> None:
    Path("in.conll").write_text(
        "-DOCSTART- -X- O O\n\nAda NNP I-NP B-PER\nwrote VB x O\n\n\nto\nLondon\n# O\n"
    )
    split = [["Ada", "wrote"], ["to", "London", "#"]]
    tags = tagger.tag_words(split)
    _, out, _ = run("in.conll", "--format", "conll")
    expected = "".join(
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*pair, strict=True)) + "\n"
        for pair in zip(split, tags, strict=True)
    )
    assert out.decode() == expected
    _, out, _ = run("in.conll")
    assert objects(out) == [{"tokens": w, "tags": t} for w, t in zip(split, tags, strict=True)]
    # Tabs part columns, so that words may hold spaces; the result's words are those of the input.
    Path("in.tsv").write_text("New York\tO\n")
    assert objects(run("in.tsv")[1])[0]["tokens"] == ["New York"]
    status, _, err = run("in.tsv", "--format", "conll")
    assert status == 2
    assert "in.tsv, line 1: the word 'New York' cannot stand in a CoNLL column" in err


def test_running_text_as_conll(run: Any, tagger: Tagger, lines: list[str]) -> None:
    write_lines("in.txt", lines)
    _, out, _ = run("in.txt", "--format", "conll")
    rows = tagger.words(lines, tagger.tag_batch(lines))
    blocks = [block for block in out.decode().split("\n\n") if block]
    expected = ["\n".join(f"{word}\t{tag}" for word, tag in row) for row in rows if row]
    assert blocks == expected


# Refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in.txt", "--text", "a"], "FILE and --text were both given"),
        (["--text", "a", "-o", "out"], "-o is for FILE"),
        (["none.txt"], "none.txt: No such file or directory"),
        (["."], ".: Is a directory"),
        (["in.txt", "-o", "."], "is a folder"),
        (["in.txt", "-o", "in.txt"], "is the input itself"),
        (["in.txt", "-o", "none/out"], "none/out.part: No such file or directory"),
        (["in.txt", "-o", "out.gz"], "results are not compressed"),
        (["in.txt", "--threads", "-1"], "threads is -1"),
        (["in.txt", "--threads", "two"], "invalid int value: 'two'"),
        (["in.txt", "--format", "xml"], "invalid choice: 'xml'"),
        (["in.txt", "--formt", "conll"], "unknown option --formt; did you mean --format?"),
        (["in.txt", "b.txt"], "unrecognized arguments: b.txt"),
    ],
)
def test_arguments(run: Any, args: list[str], message: str) -> None:
    Path("in.txt").write_text("Ada\n")
    status, out, err = run(*args)
    assert (status, out) == (2, b"")
    assert err.startswith("xdistil: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir() == ["in.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"Ada\nb\xffc\n", "a.txt, line 2: byte 0xff at offset 5 is not UTF-8"),
        ("a.txt", b"Ada\n\xe6\x9d\n", "line 2: byte 0xe6 at offset 4"),
        ("a.txt", "Ada\n".encode("utf-16"), "line 1: byte 0xff at offset 0"),
        ("a.txt", b"Ada\nZo\xeb\n", "line 2: byte 0xeb at offset 6"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', "line 2: a JSON object is needed, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', 'line 2: needs "text"'),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', 'line 2: needs "text"'),
        ("a.jsonl", b'{"text": "a"}\n{"tokens": [3]}\n', 'line 2: needs "text"'),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 10**5 + b"\n", "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
        ("a.conll", b"Ada\n\n\tO\n", "line 3: the first column, the word, is empty"),
        ("a.txt", gzip.compress(b"Ada\n" * 99, mtime=0)[:-9], "damaged or truncated gzip data"),
    ],
)
def test_input_that_cannot_be_read(run: Any, name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    status, _, err = run(name, "-o", "out.jsonl")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    # Nothing that looks finished; what came before is kept.
    assert not Path("out.jsonl").exists()
    assert Path("out.jsonl.part").exists()


def test_mend_and_go_on(run: Any, small_batches: None, lines: list[str]) -> None:
    """A bad line in the middle: mended, or read with --errors replace, the run goes on."""
    write_lines("good.txt", [*lines, "b?c", *lines])
    _, expected, _ = run("good.txt")
    bad = Path("good.txt").read_bytes().replace(b"b?c", b"b\xffc")
    Path("in.txt").write_bytes(bad)
    status, _, err = run("in.txt", "-o", "out.jsonl")
    assert status == 2
    assert f"line {len(lines) + 1}: byte 0xff" in err
    assert "what was done is kept" in err
    kept = Path("out.jsonl.part").read_bytes()
    assert kept.count(b"\n") == len(lines)
    os.link("out.jsonl.part", "part")
    status, _, err = run("in.txt", "-o", "out.jsonl", "--errors", "replace")
    assert status == 0
    assert f"{len(lines) + 1} texts (and {len(lines)} before)" in err
    result = objects(Path("out.jsonl").read_bytes())
    assert result[len(lines)]["text"] == "b\ufffdc"
    del result[len(lines)]
    good = objects(expected)
    del good[len(lines)]
    assert result == good
    # The same with the line mended.
    os.rename("out.jsonl", "other")
    assert run("in.txt", "-o", "out.jsonl")[0] == 2
    Path("in.txt").write_bytes(Path("good.txt").read_bytes())
    assert run("in.txt", "-o", "out.jsonl")[0] == 0
    assert Path("out.jsonl").read_bytes() == expected


def test_truncation_error(run: Any) -> None:
    write_lines("in.txt", ["Ada", "Ada " * 100, "Ada"])
    status, _, err = run("in.txt", "--truncation", "error")
    assert status == 2
    assert "in.txt, line 2: 100 pieces; --truncation error allows at most 24" in err
    assert run("--text", "Ada " * 100, "--truncation", "error")[0] == 2
    Path("in.conll").write_text("Ada\n\n" + "Ada\n" * 100)
    assert "in.conll, line 3: " in run("in.conll", "--truncation", "error")[2]


# Stopping and going on


class Stop(BaseException):
    """What a kill looks like from inside: nothing is cleaned up after it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException) -> None:
    original, done = sink.FileSink.write, [0]

    def write(self: Any, data: bytes, position: Any) -> None:
        done[0] += 1
        if done[0] > writes:
            # As a kill in the middle of a write leaves it: some bytes, no record of them.
            self._file.write(data[: len(data) // 2])
            raise error
        original(self, data, position)

    monkeypatch.setattr(sink.FileSink, "write", write)


@pytest.fixture(params=["in.txt", "in.jsonl", "in.conll", "in.txt.gz"])
def source(request: pytest.FixtureRequest, lines: list[str]) -> str:
    """The lines as an input of each format."""
    name = str(request.param)
    path = Path(name)
    if name.startswith("in.txt"):
        write_lines(name, lines)
    elif name == "in.jsonl":
        write_lines(name, [json.dumps({"text": line}) for line in lines])
    else:
        write_lines(name, ["\n".join([*line.split(), ""]) for line in lines])
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return name


def test_killed_anywhere_it_goes_on(
    run: Any, small_batches: None, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, _ = run(source)
    for writes in (0, 1, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, writes, Stop())
            with pytest.raises(Stop):
                run(source, "-o", "out")
        assert not Path("out").exists()
    status, _, err = run(source, "-o", "out", "--threads", "1")
    assert status == 0
    assert " before)" in err
    assert Path("out").read_bytes() == expected
    assert sorted(os.listdir()) == sorted([source, "out"])


def test_ctrl_c(
    run: Any, small_batches: None, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines("in.txt", lines)
    _, expected, _ = run("in.txt")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        status, _, err = run("in.txt", "-o", "out")
    assert status == 130
    assert err.count("\n") == 1
    assert "interrupted; what was done is kept" in err
    assert run("in.txt", "-o", "out")[0] == 0
    assert Path("out").read_bytes() == expected


def test_full_disk(
    run: Any, small_batches: None, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines("in.txt", lines)
    _, expected, _ = run("in.txt")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, OSError(28, "No space left on device"))
        status, _, err = run("in.txt", "-o", "out")
    assert status == 2
    assert err.count("\n") == 1
    assert "out.part: No space left on device; what was done is kept" in err
    assert run("in.txt", "-o", "out")[0] == 0
    assert Path("out").read_bytes() == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_device(run: Any, softmax_folder: Path) -> None:
    Path("in.txt").write_text("Ada\n")
    status, _, err = run("in.txt", "-o", "/dev/full")
    assert status == 2
    assert "No space left on device" in err
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "xdistil_fast", "tag", "--model", str(softmax_folder), "in.txt"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env=environment(),
        )
    assert result.returncode == 2
    assert result.stderr.decode().splitlines() == [
        "xdistil: error: standard output: No space left on device"
    ]


def begin(run: Any, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """Leaves an unfinished run behind."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stop())
        with pytest.raises(Stop):
            run(*args, "-o", "out")


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "conll"], "it was made with --format 'jsonl', now it is 'conll'"),
        (["--no-text"], "it was made with --no-text False, now it is True"),
        (["--input-format", "conll"], "it was made with --input-format 'txt', now it is 'conll'"),
    ],
)
def test_other_settings(
    run: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    write_lines("in.txt", lines)
    begin(run, monkeypatch, "in.txt")
    before = Path("out.part").read_bytes()
    status, _, err = run("in.txt", "-o", "out", *args)
    assert status == 2
    assert message in err
    assert "--restart" in err
    assert Path("out.part").read_bytes() == before
    assert run("in.txt", "-o", "out", "--restart", *args)[0] == 0
    expected = run("in.txt", *args)[1]
    assert Path("out").read_bytes() == expected


@pytest.mark.usefixtures("small_batches")
def test_other_model(
    run: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, crf_folder: Path
) -> None:
    write_lines("in.txt", lines)
    begin(run, monkeypatch, "in.txt")
    status, _, err = run("in.txt", "-o", "out", "--model", str(crf_folder))
    assert status == 2
    assert "it was made with model config.json" in err


@pytest.mark.usefixtures("small_batches")
def test_other_input(run: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("in.txt", lines)
    begin(run, monkeypatch, "in.txt")
    for other in (["x" + lines[0], *lines[1:]], lines[:2], []):
        write_lines("in.txt", other)
        status, _, err = run("in.txt", "-o", "out")
        assert status == 2
        assert "in.txt is not what it was" in err
    # More at the end is no other beginning.
    write_lines("in.txt", [*lines, "one more"])
    _, expected, _ = run("in.txt")
    assert run("in.txt", "-o", "out")[0] == 0
    assert Path("out").read_bytes() == expected


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "out.part.json is missing"),
        ("{", "is not JSON"),
        ("[]", "is damaged"),
        ('{"settings": {}, "records": -1}', "is damaged"),
        (json.dumps({"output_bytes": 10**9}), "of its bytes are gone"),
    ],
)
def test_damaged_record(
    run: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, record: str | None, message: str
) -> None:
    write_lines("in.txt", lines)
    begin(run, monkeypatch, "in.txt")
    path = Path("out.part.json")
    if record is None:
        path.unlink()
    elif "output_bytes" in record:
        path.write_text(json.dumps({**json.loads(path.read_text()), **json.loads(record)}))
    else:
        path.write_text(record)
    before = Path("out.part").read_bytes()
    status, _, err = run("in.txt", "-o", "out")
    assert status == 2
    assert message in err
    assert "--restart" in err
    assert Path("out.part").read_bytes() == before


def test_two_at_once(run: Any) -> None:
    write_lines("in.txt", ["Ada"])
    with open("out.part", "ab") as other:
        import fcntl

        fcntl.flock(other, fcntl.LOCK_EX)
        status, _, err = run("in.txt", "-o", "out")
    assert status == 2
    assert "out.part: another process is writing it" in err


# As a program


def environment() -> dict[str, str]:
    """So that the tree under test is found from any folder, and output is not buffered away."""
    import xdistil_fast

    root = str(Path(xdistil_fast.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}


@pytest.fixture
def start(softmax_folder: Path) -> Iterator[Any]:
    """Starts `xdistil tag` as a process; what is left at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def call(*args: str, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "xdistil_fast", "tag", "--model", str(softmax_folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        # A shell that started the tests in the background has them ignore SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            started.append(subprocess.Popen([*command, *args], env=environment(), **pipes))
        finally:
            signal.signal(signal.SIGINT, before)
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def wait_for_records(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits until the run has noted its first records."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and json.loads(path.read_text())["records"] > 0:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} notes no records")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way(start: Any, run: Any, sentences: tuple[str, ...], how: int) -> None:
    write_lines("in.txt", list(sentences) * 20_000)
    process = start("in.txt", "-o", "out", "--threads", "1")
    wait_for_records(Path("out.part.json"), process)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert err.decode().startswith("xdistil: error: interrupted; what was done is kept")
        assert err.count(b"\n") == 1
    assert not Path("out").exists()
    position = json.loads(Path("out.part.json").read_text())
    assert 0 < position["records"] < len(sentences) * 20_000
    # The rest would be long: what matters is how the two parts join.
    data = Path("in.txt").read_bytes().split(b"\n")
    Path("in.txt").write_bytes(b"\n".join(data[: position["records"] + 500]) + b"\n")
    assert run("in.txt", "-o", "out")[0] == 0
    _, expected, _ = run("in.txt")
    assert Path("out").read_bytes() == expected


def test_standard_input(start: Any, tagger: Tagger, sentences: tuple[str, ...]) -> None:
    text = "".join(f"{sentence}\n" for sentence in sentences).encode()
    for data in (text, gzip.compress(text)):
        process = start("-", stdin=subprocess.PIPE)
        out, err = process.communicate(data)
        assert process.returncode == 0
        assert [row["entities"] for row in objects(out)] == tagger(list(sentences))
        assert b"pieces/s" in err
        assert b"\r" not in err  # no bar where nobody looks
    process = start("-", "-o", "out", stdin=subprocess.PIPE)
    process.communicate(text)
    assert objects(Path("out").read_bytes()) == objects(out)


def test_closed_pipe(start: Any) -> None:
    write_lines("in.txt", ["Ada wrote to Charles."] * 50_000)
    process = start("in.txt")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 141
    assert err == ""


def test_memory_stays_flat(start: Any) -> None:
    """Four times the input takes no more memory: neither it nor the results are held."""
    peaks = []
    for copies in (10_000, 40_000):
        write_lines("in.txt", ["Ada wrote to Zoë."] * copies)
        process = start("in.txt", "-o", "out", "--threads", "1", "--quiet")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert Path("out").read_bytes().count(b"\n") == copies
        peaks.append(usage.ru_maxrss)  # KiB
    # Held results would be some 30 MB, held texts 3 MB.
    assert peaks[1] - peaks[0] < 8 * 1024


# Reading


def test_positions_join(lines: list[str], source: str) -> None:
    """From any record on, a reader that skipped there gives what the first one gave."""
    kind = {"in.jsonl": "jsonl", "in.conll": "conll"}.get(source, "txt")
    first = RecordReader(Path(source), kind)
    places, records = [first.position()], []
    for record in first:
        records.append(record)
        places.append(first.position())
    first.close()
    assert len(records) > 50
    for index in (0, 1, 17, len(records)):
        again = RecordReader(Path(source), kind)
        again.skip(places[index])
        assert again.position() == places[index]
        assert list(again) == records[index:]
        again.close()
