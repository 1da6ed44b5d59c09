"""What `xdistil tag` and `classify` share: records in, result lines out, in constant memory."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xdistil_fast import __version__
from xdistil_fast.commands.records import FORMATS, Position, Record, RecordReader, guess_format
from xdistil_fast.commands.sink import FileSink, StreamSink
from xdistil_fast.cuda_student import device_number
from xdistil_fast.model_config import PRECISIONS
from xdistil_fast.model_io import FILES, embedded_models, file_digest
from xdistil_fast.student import MAX_PIECES
from xdistil_fast.text_model import TRUNCATIONS, TextModel
from xdistil_fast.tokenization import Encoded

_CHARS_PER_BATCH = 4 * MAX_PIECES
_SURROGATE = re.compile("[\ud800-\udfff]")
# Result lines of some records, read from an input of that name, and how many pieces they had.
Work = Callable[[list[Record], str], tuple[bytes, int]]


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what is read and where results go; `run_stream` takes them."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="result file (default: standard output); OUT.part while it grows",
    )
    parser.add_argument(
        "--input-format", choices=FORMATS, help="of the input (default: by the file's name)"
    )
    parser.add_argument(
        "--no-text", action="store_true", help="leave the text itself out of JSON results"
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: stop there, or read them as U+FFFD",
    )
    parser.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="window",
        help="texts longer than the model's window: read in overlapping windows, or refuse",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew where a stopped run could go on"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")


def refuse_stream_arguments(args: argparse.Namespace) -> None:
    """Refuses those of `add_stream_arguments` that say nothing about a string (ValueError)."""
    given = {
        "-o": args.output is not None,
        "--input-format": args.input_format is not None,
        "--no-text": args.no_text,
        "--errors": args.errors != "strict",
        "--restart": args.restart,
    }
    for name in filter(given.get, given):
        raise ValueError(f"{name} is for FILE; the result of --text is printed")


def add_model_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--model`, with the embedded model that is meant where none is given."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"folder, embedded name or Hub id (default: the embedded {default})",
    )


def model_or(model: str | None, default: str) -> str:
    """The model that was asked for, or the embedded one.

    Raises:
        ValueError: none was given, and this installation does not have that one.
    """
    if model is None and default not in embedded_models():
        raise ValueError(f"this installation has no embedded {default}; give a model")
    return model or default


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a student runs: `--threads`, `--precision`, `--max-memory`, `--device`."""
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: every core")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the kernels (default: what the model is stored in); int8 is the fastest",
    )
    parser.add_argument(
        "--max-memory",
        type=int,
        metavar="MB",
        help="of the table of word pieces (default: 268); changes speed, no result",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: cpu); a GPU needs a build with CUDA",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_runtime_arguments` read, as arguments of a `TextModel`.

    Raises:
        ValueError, RuntimeError: the device is none, or does not run here; less than no memory.
    """
    if args.max_memory is not None and args.max_memory < 0:
        raise ValueError(f"--max-memory is {args.max_memory}; it must be 0 or more, in MB")
    memory = None if args.max_memory is None else args.max_memory * 1_000_000
    options = {"threads": args.threads, "precision": args.precision, "max_memory": memory}
    if args.device is not None:
        device_number(args.device)
        options["device"] = args.device
    return options


def run_stream(
    args: argparse.Namespace,
    load: Callable[[], tuple[TextModel, Path, Work]],
    settings: Mapping[str, Any],
) -> int:
    """Works through an input, with a progress bar; with `-o`, resumable.

    Args:
        args: of `add_stream_arguments`, with `input`.
        load: gives the model, its folder and what to do with records; called after the arguments
            were checked.
        settings: what the bytes of the result depend on besides model and input.

    Returns:
        The exit status.
    """
    path = None if args.input in (None, "-") else Path(args.input)
    _check_output(args.output, path)
    if args.restart and args.output is None:
        raise ValueError("--restart is for -o OUT; what goes to standard output begins anew anyway")
    kind = args.input_format or ("txt" if path is None else guess_format(path.name))
    model, folder, work = load()
    reader = RecordReader(path, kind, args.errors)
    try:
        # Everything that a byte of the result depends on. Threads and batches are not among it. Nor
        # are --errors and --truncation: they differ where a run stopped, not in what came before.
        identity = {
            "version": __version__,
            **{f"model {name}": file_digest(folder / name) for name in FILES[:3]},
            "--precision": model.precision,
            "--device": model.device.partition(":")[0],
            "--input-format": kind,
            **settings,
            "--no-text": args.no_text,
        }
        sink = _open_sink(args, reader, identity)
        try:
            return _work_through(args, reader, sink, work)
        finally:
            sink.close()
    finally:
        reader.close()


def _check_output(output: Path | None, path: Path | None) -> None:
    if output is None:
        return
    if output.is_dir():
        raise ValueError(f"-o {output} is a folder; it must be a file")
    if output.suffix == ".gz":
        raise ValueError(f"-o {output}: results are not compressed here; write to another name")
    if path is not None and output.exists() and path.exists() and output.samefile(path):
        raise ValueError(f"-o {output} is the input itself; choose another file")


def _open_sink(
    args: argparse.Namespace, reader: RecordReader, settings: Mapping[str, Any]
) -> StreamSink | FileSink:
    output: Path | None = args.output
    if output is None or (output.exists() and not output.is_file()):
        return StreamSink(output)
    sink = FileSink(output, settings, resumable=reader.size is not None, restart=args.restart)
    try:
        if sink.start is not None:
            reader.skip(sink.start)
        sink.begin(reader.position())
    except BaseException:
        sink.close()
        raise
    return sink


def _work_through(
    args: argparse.Namespace, reader: RecordReader, sink: StreamSink | FileSink, work: Work
) -> int:
    began = time.perf_counter()
    before = reader.position().records
    pieces = 0
    bar = tqdm(
        total=reader.size,
        initial=reader.raw_position(),
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=args.quiet or reader.interactive or not sys.stderr.isatty(),
    )
    kept = "; what was done is kept, run the same command to go on" if sink.resumable else ""
    try:
        with bar:
            for records, position in _batches(reader):
                data, count = work(records, reader.name)
                sink.write(data, position)
                pieces += count
                bar.update(reader.raw_position() - bar.n)
            sink.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    except ValueError as error:
        raise ValueError(f"{error}{kept}") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        name = sink.name if error.filename is None else error.filename
        raise OSError(error.errno, f"{error.strerror}{kept}", name) from error
    seconds = time.perf_counter() - began
    if not args.quiet:
        done = reader.position().records
        earlier = f" (and {before} before)" if before else ""
        print(
            f"{done - before} texts{earlier}, {pieces} pieces in {seconds:.2f} s: "
            f"{pieces / max(seconds, 1e-9):.0f} pieces/s",
            file=sys.stderr,
        )
    return 0


def _batches(reader: RecordReader) -> Iterator[tuple[list[Record], Position]]:
    """Records in batches of bounded size, with the place behind each batch."""
    batch: list[Record] = []
    size = 0
    try:
        for record in reader:
            batch.append(record)
            words = record.words
            size += 16 + (len(record.text or "") if words is None else 8 * len(words))
            if size >= _CHARS_PER_BATCH or reader.interactive:
                yield batch, reader.position()
                batch, size = [], 0
    except ValueError:
        # Everything before a line that cannot be read is done and kept.
        if batch:
            yield batch, reader.position()
        raise
    if batch:
        yield batch, reader.position()


def check_lengths(model: TextModel, records: list[Record], encoded: Encoded, name: str) -> None:
    """Refuses records longer than the model's window, for `--truncation error` (ValueError)."""
    window = model.config.window
    lengths = encoded.cu_pieces[1:] - encoded.cu_pieces[:-1]
    for index in (lengths > window).nonzero()[0][:1].tolist():
        raise ValueError(
            f"{name}, line {records[index].line}: {lengths[index]} pieces; --truncation error "
            f"allows at most {window}"
        )


def line(value: Mapping[str, Any], no_text: bool = False) -> bytes:
    """A line of JSON; with `no_text` without the text itself, running or split."""
    if no_text:
        value = {name: item for name, item in value.items() if name not in ("text", "tokens")}
    return to_json(value).encode() + b"\n"


def to_json(value: Any) -> str:
    """JSON in which text stays readable."""
    text = json.dumps(value, ensure_ascii=False)
    # A lone surrogate, which JSON can spell and UTF-8 cannot, keeps its escape.
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
