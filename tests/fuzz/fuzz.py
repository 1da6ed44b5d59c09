"""Throws mutated input at what reads untrusted data; only documented errors may come out.

    python tests/fuzz/fuzz.py --seconds 60                   # each target in turn
    python tests/fuzz/fuzz.py tokenizer --seed 1 --case 734  # one case again

Every case follows from the seed and its number, so a failure is printed as the command that repeats
it. A target runs in a process of its own: a crash of compiled code is a failure like any other.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gzip
import itertools
import json
import multiprocessing
import random
import re
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast import Tagger
from xdistil_fast.model_io import FILES, ModelConfig, ModelError, load_tokenizer, save_folder
from xdistil_fast.tokenization import TextEncoder
from xdistil_fast.wordpiece import compile_wordpiece

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -0.0, 0.5),
    *("", "a", "[UNK]", "##", "\x00", "\ufffd", "\u0301", "\U0010ffff", "\ud800", "x" * 5000),
    *([], {}, [None], [[]], {"": 0}, {"type": "BertNormalizer"}, [0] * 100),
)
CHARACTERS = (
    "abcABC ,.[]#\t\n\x00\x07\x7f\xa0\xad\u00e9\u0130\u0301\u0323\u0344\u0f73\u1b44\u302e\u200d"
    "\u2028\u3000\ufeff\ufffd\uffff\ud800\udfff東\uf900\uac01\u1112\u1161\u11ab\U0001d15e\U0001d165"
    "\U0001f469\U0001f3fd\U000e0001\U0010ffff"
)
WORDS = ("abc", "ada", "wrote", "[UNK]", "[SEP]", "[SEP", "##b", "London", "東京")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few flips, cuts, copies and insertions."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 2, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:end]
        elif kind == 2:
            out[at:at] = out[end : end + rng.choice((1, 8, 64))]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 4:
            text = rng.choice(("\t", "\n", "\r", " ", "\x00", "\ufeff", '"', "{", "-", "9" * 30))
            out[at:end] = text.encode()
        else:
            del out[at:]
    return bytes(out)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """One place somewhere inside is replaced, taken out, or put in twice."""
    value = copy.deepcopy(value)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return value
        key = rng.choice(keys)
        child = node[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.85:
            node = child
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == 2 and isinstance(node, list):
            node.insert(key, copy.deepcopy(child))
        elif kind == 2:
            node[random_text(rng, 3)] = copy.deepcopy(child)
        elif isinstance(child, bool):
            node[key] = not child
        elif isinstance(child, int):
            node[key] = child + rng.choice((-1, 1, 1000))
        elif isinstance(child, str):
            node[key] = child + random_text(rng, 3)
        return value


def random_text(rng: random.Random, size: int) -> str:
    """Any text, surrogates among it."""
    return "".join(
        rng.choice(CHARACTERS)
        if rng.random() < 0.7
        else rng.choice(WORDS)
        if rng.random() < 0.7
        else chr(rng.randrange(0x110000))
        for _ in range(rng.randrange(size + 1))
    )


def base_tokenizer() -> dict[str, Any]:
    """A word-piece tokenizer of the kind that is compiled."""
    pieces = ["[PAD]", "[UNK]", "[SEP]", *"abcdlnortw", *(f"##{c}" for c in "abcdlnortwe")]
    pieces += ["ada", "wrote", "london", "##on", "東", "i", "\u1b44", "##\u1b44", "[", "]", "."]
    tokenizer = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def fuzz_tokenizer(rng: random.Random, folder: Path) -> None:
    """tokenizer.json to pieces: what compiles gives what the library gives."""
    spec = base_tokenizer()
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        spec = mutate_json(rng, spec)
    try:
        # A model has so many rows at most; the library takes memory by the largest id.
        tokenizer = load_tokenizer(json.dumps(spec), 1 << 20)
    except ModelError:
        return
    wordpiece = compile_wordpiece(tokenizer)
    texts = [random_text(rng, rng.choice((5, 40, 400))) for _ in range(4)]
    if wordpiece is None:
        return
    TextEncoder(tokenizer, 1).encode_texts(texts)
    ids, cu_pieces, _, _, _, starts, ends = wordpiece.encode_texts(texts, 1)
    for n, text in enumerate(texts):
        clean = re.sub("[\ud800-\udfff]", "\ufffd", text)
        theirs = tokenizer.encode(clean, add_special_tokens=False)
        part = slice(cu_pieces[n], cu_pieces[n + 1])
        spans = list(zip(starts[part].tolist(), ends[part].tolist(), strict=True))
        if ids[part].tolist() != theirs.ids or spans != theirs.offsets:
            raise AssertionError(f"{text!r}: {spans}, library {theirs.offsets}")


def base_model(folder: Path) -> dict[str, bytes]:
    """The files of a small model."""
    tokenizer = json.dumps(base_tokenizer())
    config = ModelConfig(
        labels=("O", "B-PER", "I-PER"),
        vocab_size=len(json.loads(tokenizer)["model"]["vocab"]),
        embedding_size=4,
        hidden_size=4,
        head="crf",
        window=16,
        stride=4,
    )
    random_state = np.random.default_rng(0)
    tensors = {
        name: random_state.normal(size=shape).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    path = save_folder(folder / "base", config, tensors, tokenizer, "# card\n", overwrite=True)
    return {name: (path / name).read_bytes() for name in FILES}


def fuzz_model(rng: random.Random, folder: Path) -> None:
    """A model folder to entities: it loads and tags, or is a ModelError."""
    files = base_model(folder)
    name = rng.choice(FILES[:3])
    data = files[name]
    if rng.random() < 0.4:
        data = mutate_bytes(rng, data)
    elif name.endswith(".json"):
        data = json.dumps(mutate_json(rng, json.loads(data))).encode()
    else:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + size]))).encode()
        data = struct.pack("<Q", len(header)) + header + data[8 + size :]
    target = folder / "mutated"
    target.mkdir(exist_ok=True)
    for other, content in files.items():
        (target / other).write_bytes(data if other == name else content)
    if rng.random() < 0.02:
        (target / name).unlink()
    try:
        tagger = Tagger.from_pretrained(target, threads=1)
    except ModelError:
        return
    texts = [random_text(rng, 60) for _ in range(3)]
    for text, entities in zip(texts, tagger(texts), strict=True):
        for entity in entities:
            if text[entity["start"] : entity["end"]] != entity["word"]:
                raise AssertionError(f"{text!r}: {entity}")


CORPUS = (
    "-DOCSTART- -X- O\n\nAda NNP B-PER\nLovelace NNP I-PER\nwrote VBD O\n. . O\n\n東京 NN B-LOC\n"
)


def fuzz_corpus(rng: random.Random, folder: Path) -> None:
    """A corpus to sentences: it is read, or is a ValueError."""
    from xdistil_fast.train.corpora import read_labelled, read_transfer

    text = CORPUS * rng.choice((1, 3))
    if rng.random() < 0.5:
        text = text.replace(" ", "\t")
    if rng.random() < 0.3:
        rows = [{"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]}, {"text": "Ada wrote."}]
        text = "".join(json.dumps(mutate_json(rng, row)) + "\n" for row in rows)
    data = mutate_bytes(rng, text.encode())
    if rng.random() < 0.2:
        data = gzip.compress(data, mtime=0)
        data = mutate_bytes(rng, data) if rng.random() < 0.7 else data
    path = folder / rng.choice(("a.conll", "a.jsonl", "a.txt", "a.tsv.gz", "a.parquet", "a.x"))
    path.write_bytes(data)
    for read in (read_labelled, lambda path: list(read_transfer([path]))):
        try:
            read(path)
        except ValueError:
            continue


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "tokenizer": fuzz_tokenizer,
    "model": fuzz_model,
    "corpus": fuzz_corpus,
}


def run_cases(target: str, seed: int, cases: Any, seconds: float, at: Any) -> None:
    """Runs cases until time is up; `at` tells the parent which one."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if time.monotonic() > end:
                break
            at.value = case
            try:
                TARGETS[target](random.Random(f"{seed}/{case}"), Path(folder))
            except Exception:
                traceback.print_exc()
                raise SystemExit(1) from None


def main() -> int:
    """Prints a line a target; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all without any")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"unknown target {sorted(unknown)[0]!r}; allowed: {', '.join(TARGETS)}")
    failed = False
    context = multiprocessing.get_context("fork")
    for target in args.targets or TARGETS:
        at = context.Value(ctypes.c_int64, 0)
        cases = itertools.count() if args.case is None else [args.case]
        worker = context.Process(
            target=run_cases, args=(target, args.seed, cases, args.seconds, at)
        )
        worker.start()
        worker.join()
        case = at.value
        if worker.exitcode == 0:
            print(f"{target}: {case + 1} cases, nothing found", flush=True)
            continue
        failed = True
        print(f"{target}: failed with exit code {worker.exitcode}; again with")
        print(f"  python tests/fuzz/fuzz.py {target} --seed {args.seed} --case {case}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
