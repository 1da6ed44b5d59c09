"""Text to word pieces with offsets: the compiled WordPiece and the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Encoding, Tokenizer

import xdistil_fast
from bench.duel import Call, Case, Turns, duel
from xdistil_fast.tokenization import TextEncoder

TOKENIZERS = "tokenizers"
# The model that comes with the library, and text in which some words are cut.
_FILE = Path(xdistil_fast.__file__).parent / "models" / "en-ner" / "tokenizer.json"
_SENTENCES = (
    "The shipping company Maersk opened an office in Nairobi, where Zoë Achieng (44) will lead it.",
    "Shareholders of the Danish group had asked for that since 2019; nobody listened, she said.",
    "On Tuesday the harbour authorities of Mombasa, Kenya, declined to comment on the arrangement.",
    "Negotiations about the transshipment terminal at Lamu are said to resume in mid-September.",
)
_BATCH = 256
_NO_PRECISION = "-"  # there are no numbers in it


def bench_wordpiece(benchmark: BenchmarkFixture, turns: Turns, threads: int) -> None:
    tokenizer = Tokenizer.from_file(str(_FILE))
    texts = [" ".join(_SENTENCES[: 1 + n % 4]) for n in range(_BATCH)]
    encoder = TextEncoder(tokenizer, threads)

    def encodings() -> list[Encoding]:
        return tokenizer.encode_batch(texts, add_special_tokens=False)

    def arrays() -> tuple[np.ndarray, np.ndarray]:
        found = encodings()
        ids = np.concatenate([np.array(encoding.ids, np.int32) for encoding in found])
        offsets = np.concatenate([np.array(encoding.offsets, np.int32) for encoding in found])
        return ids, offsets

    encoded = encoder.encode_texts(texts)
    ids, offsets = arrays()
    np.testing.assert_array_equal(encoded.ids, ids)
    np.testing.assert_array_equal(np.stack([encoded.starts, encoded.ends], 1), offsets)

    case = Case(
        group="text to entities",
        task="WordPiece, ids and offsets",
        batch=_BATCH,
        length=None,
        pieces=len(ids),
        sizes={"vocabulary": tokenizer.get_vocab_size()},
        threads=threads,
        aims={_NO_PRECISION: {TOKENIZERS: 5.0}},
    )
    ours: dict[str, Call] = {_NO_PRECISION: lambda: encoder.encode_texts(texts)}
    peers: dict[str, dict[str, Call]] = {
        TOKENIZERS: {"into arrays": arrays, "encodings only": encodings}
    }
    duel(benchmark, case, ours, peers, turns)
