"""Texts to sentences, for recipes: JSONL with "text" or plain lines, also gzipped, to stdout.

    python sentences.py [--words MIN MAX] [--limit N] FILE ...

A sentence ends at a full stop, question or exclamation mark before white space and a capital letter
or a digit. Duplicates and sentences outside of MIN to MAX words are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator

_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


def texts(path: str) -> Iterator[str]:
    """Texts of a file."""
    with open(path, "rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    opened = gzip.open if zipped else open
    with opened(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"] if line.startswith("{") else line


def main() -> None:
    """Prints the sentences of all files."""
    parser = argparse.ArgumentParser(description="Split texts into sentences.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--words", nargs=2, type=int, default=(3, 60), metavar=("MIN", "MAX"))
    parser.add_argument("--limit", type=int, metavar="N", help="sentences of each file, at most")
    args = parser.parse_args()
    seen: set[str] = set()
    for path in args.files:
        left = args.limit if args.limit is not None else -1
        for text in texts(path):
            for sentence in _BREAK.split(" ".join(text.split())):
                if left == 0:
                    break
                fits = args.words[0] <= len(sentence.split()) <= args.words[1]
                if fits and sentence not in seen:
                    seen.add(sentence)
                    sys.stdout.write(sentence + "\n")
                    left -= 1


if __name__ == "__main__":
    main()
