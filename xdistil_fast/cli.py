"""`xdistil`: the command line.

Each sub-command is a module with `add_parser(subparsers)` and `run(args) -> int`. Those of the
distillation layer need torch, so they are imported only when asked for.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from xdistil_fast import __version__
from xdistil_fast._backend import DeviceError

_INFERENCE = {
    "tag": "xdistil_fast.commands.tag",
    "classify": "xdistil_fast.commands.classify",
    "eval": "xdistil_fast.commands.eval",
    "quantize": "xdistil_fast.commands.quantize",
    "bench": "xdistil_fast.commands.bench",
    "doctor": "xdistil_fast.commands.doctor",
}
# With the line that `xdistil --help` shows of a module it does not import.
_TRAINING = {
    "pretrain": ("xdistil_fast.train.commands.pretrain", "train an encoder on unlabelled text"),
    "teacher": ("xdistil_fast.train.commands.teacher", "fine-tune a teacher on labelled text"),
    "distill": ("xdistil_fast.train.commands.distill", "distil a teacher into a small student"),
    "sweep": (
        "xdistil_fast.train.commands.sweep",
        "distil students of many sizes and compare them",
    ),
    "report": (
        "xdistil_fast.train.commands.report",
        "write the results page from run records, or a student's report in HTML",
    ),
}
# Typed again, these go on where they were; `tag` and `classify` say for themselves whether they do.
_RESUMABLE = ("pretrain", "teacher", "distill", "sweep")
_EXTRA = ("torch", "transformers", "pyarrow")

EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE = 128 + 13  # what a shell shows for a program that SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    """Refuses unknown options at once, with the nearest that exists."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Looks for mistyped long options before argparse misses what they were meant to be."""
        for arg in args or ():
            if arg == "--" or (self._subparsers is not None and not arg.startswith("-")):
                break  # what follows a command is for that command's parser
            name = arg.partition("=")[0]
            if " " in name:
                continue  # text, and not the name of an option: argparse takes it for a value too
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name}" + _nearest(name, self._option_string_actions))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints one line, like every other error of the program."""
        self.exit(EXIT_ERROR, f"xdistil: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status: 0, 2 after an error, 130 after Ctrl-C, 141 after a closed pipe.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            args = _parse(argv)
            status = int(args.run(args))
            sys.stdout.flush()
        except SystemExit as stop:
            return _status(stop)
    except BrokenPipeError:
        _drop_stdout()
        return EXIT_PIPE
    except KeyboardInterrupt as stop:
        _drop_stdout()
        kept = "; run the same command to go on" if _command(argv) in _RESUMABLE else ""
        return _fail(str(stop) or f"interrupted{kept}", EXIT_INTERRUPTED)
    except OSError as error:
        _drop_stdout()
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return _fail(f"{name}{error.strerror or error}")
    except MemoryError as error:
        return _fail(f"not enough memory: {error}" if str(error) else "not enough memory")
    except (ValueError, TypeError, DeviceError) as error:
        return _fail(str(error))
    return status


def entry_point() -> NoReturn:
    """The `xdistil` script."""
    sys.exit(main())


def _command(argv: list[str]) -> str | None:
    return next((arg for arg in argv if not arg.startswith("-")), None)


def _parse(argv: list[str]) -> argparse.Namespace:
    command = _command(argv)
    parser = _Parser(
        prog="xdistil",
        description="Tag and classify text with small students distilled from large models.",
    )
    parser.add_argument("--version", action="version", version=f"xdistil-fast {__version__}")
    known = [*_INFERENCE, *_TRAINING]
    if command is not None and command not in known:
        raise ValueError(f"unknown command {command!r}" + _nearest(command, known))
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _INFERENCE.values():
        importlib.import_module(module).add_parser(subparsers)
    for name, (module, line) in _TRAINING.items():
        if name == command:
            _import_training(name, module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    args = parser.parse_args(argv)
    args.argv = argv
    return args


def _import_training(name: str, module: str):  # type: ignore[no-untyped-def]
    # torch's worker threads spin for milliseconds after each of its operators and keep ours from
    # the cores they need next: a training step takes a third longer. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ValueError(
            f"xdistil {name} needs {error.name}, which is not installed: "
            'pip install "xdistil-fast[train]"'
        ) from error


def _nearest(name: str, known: Sequence[str] | dict[str, argparse.Action]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(known)}"


def _fail(message: str, status: int = EXIT_ERROR) -> int:
    print(f"xdistil: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _status(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        return _fail(stop.code)
    return stop.code or 0


def _drop_stdout() -> None:
    """Keeps Python from failing once more on what it could not write, when it closes stdout."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
