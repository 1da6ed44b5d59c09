"""The student's vocabulary: the teacher's, cut to what the student will meet.

Kept are the pieces seen in the texts, the special tokens, and as fallback for the unseen every
single character that the teacher has a piece for. Text seen is then cut into the very pieces the
teacher cuts it into; an unseen word is spelled with shorter pieces.

Why that holds for text seen. WordPiece takes the longest match at each place: the teacher's match
is kept, and nothing longer was added. Unigram takes the best-scoring path: the teacher's path is
kept, and no score changes. Its penalty for unknown characters hangs on the lowest score of the
vocabulary, so a piece of that score is kept too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

CUT_MODELS = ("WordPiece", "Unigram")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of V pieces and its way from the teacher's.

    Attributes:
        tokenizer_json: the student's ``tokenizer.json``.
        teacher_ids: [V] the teacher's id of each piece, ascending.
        spelling: [N] the student's ids of all teacher pieces, one behind the other.
        spelling_starts: [V_teacher + 1] where those of each teacher piece start. One for a kept
            piece; several for a dropped one, which is spelled with shorter ones; none for a piece
            that no text held.
    """

    tokenizer_json: str
    teacher_ids: npt.NDArray[np.int64]
    spelling: npt.NDArray[np.int32]
    spelling_starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.teacher_ids)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The student's tokeniser."""
        return tokenizers.Tokenizer.from_str(self.tokenizer_json)

    def respell(
        self, ids: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Turn the teacher's piece ids into the student's.

        Args:
            ids: [P] pieces that the texts held.

        Returns:
            [P'] the student's ids, and for each the position in ``ids`` of what it spells, [P'].
        """
        lengths = np.diff(self.spelling_starts)[ids]
        source = np.repeat(np.arange(len(ids)), lengths)
        within = np.arange(len(source)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.spelling[self.spelling_starts[ids][source] + within], source

    def pieces(self) -> list[str]:
        """The V pieces by id."""
        tokenizer = self.tokenizer()
        return [tokenizer.id_to_token(i) or "" for i in range(len(self))]


def cut_vocabulary(
    tokenizer: tokenizers.Tokenizer, counts: npt.NDArray[np.integer], min_count: int = 1
) -> Vocabulary:
    """Cut a tokeniser to the pieces that occur.

    Args:
        tokenizer: the teacher's. WordPiece and Unigram are cut; of other kinds every piece is
            kept, as their merges build upon each other.
        counts: [V_teacher] how often each piece was seen.
        min_count: pieces seen less often are dropped, save the fallback ones.

    Raises:
        ValueError: ``counts`` is shorter than the vocabulary, or ``min_count`` above 1 for a kind
            of tokeniser that is not cut.
    """
    spec = json.loads(tokenizer.to_str())
    # What only wraps or shapes a whole input; the student reads pieces as they come.
    spec.update(post_processor=None, truncation=None, padding=None)
    model: dict[str, Any] = spec["model"]
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocab.values()) + 1
    if len(counts) < size:
        raise ValueError(f"counts has {len(counts)} entries; the tokeniser has {size} ids")
    kind = model.get("type")
    check_cut(tokenizer, min_count)
    if kind not in CUT_MODELS:
        kept = np.arange(size)
    else:
        always = {token["id"] for token in spec["added_tokens"]}
        always |= _fallback_wordpiece(model) if kind == "WordPiece" else _fallback_unigram(model)
        wanted = counts[:size] >= min_count
        wanted[sorted(always)] = True
        exists = np.zeros(size, bool)
        exists[list(vocab.values())] = True
        kept = np.flatnonzero(wanted & exists)
        _renumber(spec, kept)
    new_id = np.full(len(counts), -1, np.int64)
    new_id[kept] = np.arange(len(kept))
    spelled: list[list[int]] = [[i] if i >= 0 else [] for i in new_id.tolist()]
    dropped = np.flatnonzero((counts > 0) & (new_id < 0)).tolist()
    names = {i: piece for piece, i in vocab.items()}
    spell = _spell_wordpiece if kind == "WordPiece" else _spell_unigram
    for i, ids in zip(dropped, spell([names[i] for i in dropped], model), strict=True):
        spelled[i] = ids
    starts = np.zeros(len(spelled) + 1, np.int64)
    np.cumsum([len(ids) for ids in spelled], out=starts[1:])
    return Vocabulary(
        tokenizer_json=json.dumps(spec, ensure_ascii=False),
        teacher_ids=kept,
        spelling=np.array([i for ids in spelled for i in ids], np.int32),
        spelling_starts=starts,
    )


def check_cut(tokenizer: tokenizers.Tokenizer, min_count: int) -> None:
    """Refuse a ``min_count`` above 1 for a kind of tokeniser that is not cut (ValueError)."""
    kind = type(tokenizer.model).__name__
    if kind not in CUT_MODELS and min_count > 1:
        raise ValueError(
            f"min_piece_count is {min_count}, but a tokeniser of type {kind} is not cut; "
            f"allowed: 1 (cut are {', '.join(CUT_MODELS)})"
        )


def _fallback_wordpiece(model: Mapping[str, Any]) -> set[int]:
    prefix = model["continuing_subword_prefix"]
    keep = {i for piece, i in model["vocab"].items() if len(piece.removeprefix(prefix)) == 1}
    if model["unk_token"] in model["vocab"]:
        keep.add(model["vocab"][model["unk_token"]])
    return keep


def _fallback_unigram(model: Mapping[str, Any]) -> set[int]:
    vocab: list[tuple[str, float]] = model["vocab"]
    keep = {i for i, (piece, _) in enumerate(vocab) if len(piece) == 1}
    if model.get("byte_fallback"):
        keep |= {i for i, (piece, _) in enumerate(vocab) if _is_byte(piece)}
    if model.get("unk_id") is not None:
        keep.add(model["unk_id"])
    keep.add(min(range(len(vocab)), key=lambda i: vocab[i][1]))
    return keep


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _renumber(spec: dict[str, Any], kept: npt.NDArray[np.integer]) -> None:
    """Give the kept pieces the ids 0, 1, ... in the order of their old ids."""
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    model = spec["model"]
    if model["type"] == "WordPiece":
        pieces = sorted(model["vocab"].items(), key=lambda item: item[1])
        model["vocab"] = {piece: new_id[i] for piece, i in pieces if i in new_id}
    else:
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_id[model["unk_id"]]
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]


def _spell_wordpiece(pieces: Sequence[str], model: Mapping[str, Any]) -> list[list[int]]:
    """Kept pieces that make up each dropped one: the longest match at each place."""
    vocab, prefix, unknown = model["vocab"], model["continuing_subword_prefix"], model["unk_token"]
    out = []
    for piece in pieces:
        lead = prefix if piece.startswith(prefix) else ""
        rest = piece.removeprefix(prefix)
        ids: list[int] = []
        while rest:
            lengths = range(len(rest), 0, -1)
            match = next((n for n in lengths if lead + rest[:n] in vocab), 0)
            if not match:
                ids = []
                break
            ids.append(vocab[lead + rest[:match]])
            rest, lead = rest[match:], prefix
        out.append(ids or [vocab[unknown]])
    return out


def _spell_unigram(pieces: Sequence[str], model: Mapping[str, Any]) -> list[list[int]]:
    """Kept pieces that make up each dropped one: the best path."""
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    bare: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        **dict.fromkeys(parts),
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(pieces))]
