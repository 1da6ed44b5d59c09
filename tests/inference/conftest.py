"""A small student with random weights, and a word-piece tokenizer for several scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast.labels import make_labels
from xdistil_fast.model_io import ModelConfig, save_folder
from xdistil_fast.tagger import Tagger

SENTENCES = (
    "Ada Lovelace wrote to Charles Babbage from London in 1843.",
    "The office of Zoë Müller in Zürich isn't far from the Café Odéon!",
    "Мария поехала из Москвы в Санкт-Петербург на поезде.",
    "東京で田中さんが会社を作りました。北京也有一家。",
    "سافرت ليلى من القاهرة إلى دمشق مع أخيها.",
    "דוד גר בירושלים ועובד בחיפה.",
    "अनीता दिल्ली में काम करती है और मुंबई जाएगी।",
    "김민수는 서울에서 부산까지 갔다.",
)
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


def build_tokenizer() -> Tokenizer:
    """WordPiece with every character of the sentences, alone and inside a word, and some words."""
    text = "".join(SENTENCES)
    chars = sorted(set(text + text.lower()) - {" "})
    words = sorted({word for word in " ".join(SENTENCES).lower().split() if word.isalpha()})
    pieces = ["[PAD]", "[UNK]", *chars, *(f"##{char}" for char in chars)]
    pieces += [word for word in words[::2] if word not in pieces]
    tokenizer = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # As teachers' files have it: both would change results, both must be ignored.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    tensors = {
        name: random.normal(0, 0.7, shape).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    # Every tag now and then: no gate and no tag is favoured, but the pieces decide.
    for name, value in tensors.items():
        if "bias" in name:
            value[:] = 0
    tensors["output.weight"] *= 3
    tensors["output.bias"][0] = 1
    return tensors


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return build_tokenizer().to_str()


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    return SENTENCES


@pytest.fixture(scope="session")
def make_model(tokenizer_json: str) -> Callable[..., Path]:
    """Writes a model folder: `make_model(path, head=, seed=, tokenizer=, **config)`."""

    def make(
        path: Path,
        *,
        head: str = "softmax",
        seed: int = 0,
        tokenizer: str = tokenizer_json,
        **changes: Any,
    ) -> Path:
        config = ModelConfig(
            **{
                "labels": tuple(make_labels(["PER", "LOC", "ORG"])),
                "vocab_size": len(json.loads(tokenizer)["model"]["vocab"]),
                "embedding_size": 12,
                "hidden_size": 10,
                "head": head,
                "window": 24,
                "stride": 8,
                **changes,
            }
        )
        return save_folder(path, config, random_tensors(config, seed), tokenizer, "# card\n")

    return make


@pytest.fixture(scope="session")
def softmax_folder(make_model: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "softmax")


@pytest.fixture(scope="session")
def crf_folder(make_model: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "crf", head="crf")


@pytest.fixture(scope="session", params=["softmax", "crf"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Either model."""
    path: Path = request.getfixturevalue(f"{request.param}_folder")
    return path


@pytest.fixture(scope="session")
def tagger(folder: Path) -> Tagger:
    """Either model, on every core."""
    return Tagger.from_pretrained(folder)
