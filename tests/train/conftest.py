from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
PEOPLE = ["Ilsa Vore", "Tam Okko", "Runa Belt", "Odd Marl", "Pia"]
PLACES = ["Quarne", "Aalwick", "Port Brell", "Lindes", "Dovre Sund"]
FRAMES = [
    "{p} lives in {l} .",
    "In {l} , {p} met {q} .",
    "The mayor of {l} thanked {p} .",
    "{p} and {q} left for {l} .",
    "It rains in {l} again .",
]


def sentences(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        frame = FRAMES[rng.integers(len(FRAMES))]
        words: list[str] = []
        tags: list[str] = []
        for word in frame.split():
            kind = {"{p}": "PER", "{q}": "PER", "{l}": "LOC"}.get(word)
            if kind is None:
                words.append(word)
                tags.append("O")
                continue
            names = PEOPLE if kind == "PER" else PLACES
            parts = names[rng.integers(len(names))].split()
            words += parts
            tags += [f"{'I' if i else 'B'}-{kind}" for i in range(len(parts))]
        out.append((words, tags))
    return out


def write_conll(path: Path, rows: list[tuple[list[str], list[str]]]) -> str:
    lines = ["".join(f"{w}\t{t}\n" for w, t in zip(*row, strict=True)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def make_teacher(folder: Path) -> str:
    """A random tiny BERT over single letters and a few words."""
    torch.manual_seed(1)
    letters = sorted(set("".join(PEOPLE + PLACES + FRAMES)) - set(" {}"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    pieces += ["in", "and", "Port", "##ick", "left", "##arl", "unused", "##zzz"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    settings = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=80, initializer_range=0.4,
        id2label=dict(enumerate(LABELS)), label2id={v: k for k, v in enumerate(LABELS)},
    )  # fmt: skip
    transformers.BertForTokenClassification(settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Paths of a teacher and of texts that a tiny student learns in seconds."""
    folder = tmp_path_factory.mktemp("inputs")
    raw = folder / "raw.txt"
    lines = [" ".join(words) for words, _ in sentences(60, 5)]
    raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "teacher": make_teacher(folder / "teacher"),
        "train": [write_conll(folder / "train.conll", sentences(120, 1))],
        "dev": [write_conll(folder / "dev.conll", sentences(40, 2))],
        "transfer": [str(raw)],
    }


@pytest.fixture
def torchrun() -> Callable[[list[str], Path], subprocess.Popen[str]]:
    """Starts ``xdistil`` in two processes, in a folder; shards of 16 sentences."""

    def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
        program = folder / "program.py"
        program.write_text(
            "import sys\n"
            "from xdistil_fast.cli import main\n"
            "from xdistil_fast.train import shards\n"
            "shards.SHARD_SENTENCES = 16\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-addr", "127.0.0.1", "--master-port", str(port), str(program), *arguments,
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                 "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start
