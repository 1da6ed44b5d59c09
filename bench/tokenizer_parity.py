"""Compares the compiled WordPiece with the `tokenizers` library over all text under some paths.

    python -m bench.tokenizer_parity --tokenizer TOKENIZER.json --tokenizer VOCAB.txt PATH...

A `.txt` is a vocabulary, one piece a line, cased. Of the paths every gzipped or plain file of
lines, CoNLL columns or JSON lines is read; each text is compared as running text and, in CoNLL, as
words: ids, offsets and words. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast.tokenization import TextEncoder
from xdistil_fast.wordpiece import compile_wordpiece

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BATCH = 1024


def load(path: Path) -> Tokenizer:
    """A tokenizer.json, or a cased vocabulary."""
    if path.suffix != ".txt":
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    pieces = path.read_text(encoding="utf-8").split("\n")
    vocabulary = {piece: index for index, piece in enumerate(pieces) if piece}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    return tokenizer


def read(path: Path) -> Iterator[tuple[str, list[str] | None]]:
    """Texts of a file, with their words where it has columns."""
    name = path.name.removesuffix(".gz")
    words: list[str] = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if name.endswith(".jsonl"):
                yield json.loads(line)["text"], None
            elif not name.endswith(".conll"):
                yield line, None
            elif line:
                words.append(line.split("\t")[0])
            elif words:
                yield " ".join(words), words
                words = []
    if words:
        yield " ".join(words), words


def first_difference(ours: TextEncoder, theirs: TextEncoder, items: list[Any]) -> Any:
    """The first item of which the encoders make different things; None if there is none."""
    is_split = bool(items) and not isinstance(items[0], str)
    a, b = (e.encode_words(items) if is_split else e.encode_texts(items) for e in (ours, theirs))
    if all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)):
        return None
    if len(items) == 1:
        return items[0]
    middle = len(items) // 2
    found = first_difference(ours, theirs, items[:middle])
    return found if found is not None else first_difference(ours, theirs, items[middle:])


def compare(tokenizer: Tokenizer, files: list[Path], threads: int) -> tuple[int, int, int]:
    """Texts and pieces compared, batches that differ; a text of each of those is printed."""
    if compile_wordpiece(tokenizer) is None:
        raise SystemExit("this tokenizer is left to the library: there is nothing to compare")
    ours = TextEncoder(tokenizer, threads)
    theirs = TextEncoder(tokenizer, threads, compiled=False)
    texts = pieces = different = 0
    for path in files:
        rows = list(read(path))
        for at in range(0, len(rows), _BATCH):
            batch = rows[at : at + _BATCH]
            running = [text for text, _ in batch]
            split = [words for _, words in batch if words is not None]
            texts += len(running) + len(split)
            pieces += len(ours.encode_texts(running).ids) + len(ours.encode_words(split).ids)
            for items in (running, split):
                found = first_difference(ours, theirs, items)
                if found is not None:
                    print(f"{path}: {found!r}", file=sys.stderr)
                    different += 1
    return texts, pieces, different


def main() -> int:
    """Prints a line a tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, action="append", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("paths", type=Path, nargs="+")
    args = parser.parse_args()
    files = [
        file
        for path in args.paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.is_file() and file.name.removesuffix(".gz").endswith((".txt", ".conll", ".jsonl"))
    ]
    failed = False
    for path in args.tokenizer:
        texts, pieces, different = compare(load(path), files, args.threads)
        print(
            f"{path}: {len(files)} files, {texts} texts, {pieces} pieces, "
            f"{different} batches differ"
        )
        failed |= different > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
