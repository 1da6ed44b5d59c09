"""From words to word pieces and back: ragged, vectorised.

The first piece of a word carries the word's tag. Its other pieces carry ``I-X`` for ``B-X`` and
``I-X``, and ``O`` for ``O``; a plain tag stands on all pieces. A word's predicted tag is the one of
its first piece.

Some words yield no piece at all (only control characters, say). They take no part in training;
their predicted tag is ``O`` (``_`` of plain tags), and their gold tag still counts in the scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import tokenizers

from xdistil_fast.labels import outside_of

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

IGNORED = -100  # target of a piece that is not trained: torch's default ignore_index
_CHUNK = 1024  # sentences given to the tokeniser at once; bounds its memory


@dataclass(frozen=True, slots=True)
class Alignment:
    """Word pieces of N sentences with W words and P pieces in all.

    Attributes:
        ids: [P] piece ids, no special tokens.
        cu_pieces: [N + 1] where each sentence's pieces start in ``ids``; ends at P.
        word_of_piece: [P] word of each piece, counted over all sentences (0..W-1), ascending.
        cu_words: [N + 1] where each sentence's words start; ends at W.
        first_piece: [W] first piece of each word as an index into ``ids``; -1 for none.
    """

    ids: Int32Array
    cu_pieces: Int64Array
    word_of_piece: Int64Array
    cu_words: Int64Array
    first_piece: Int64Array

    def __len__(self) -> int:
        return len(self.cu_pieces) - 1

    def pieces(self, sentence: int) -> Int32Array:
        """Piece ids of one sentence, a view."""
        return self.ids[self.cu_pieces[sentence] : self.cu_pieces[sentence + 1]]

    def split(self, values: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """Cut ``values`` [P, ...] into one view a sentence."""
        return [values[a:b] for a, b in pairwise(self.cu_pieces)]


def plain_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that neither truncates nor pads, whatever its ``tokenizer.json`` says."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def align(tokenizer: tokenizers.Tokenizer, sentences: Sequence[Sequence[str]]) -> Alignment:
    """Tokenise sentences given as words.

    Args:
        tokenizer: used as it is, save that a truncating or padding one is copied without.
        sentences: words; a sentence may be empty.
    """
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = plain_tokenizer(tokenizer)
    ids: list[int] = []
    local: list[int] = []  # word of each piece within its sentence
    pieces_per_sentence: list[int] = []
    for start in range(0, len(sentences), _CHUNK):
        chunk = [list(words) for words in sentences[start : start + _CHUNK]]
        for encoding in tokenizer.encode_batch(
            chunk, is_pretokenized=True, add_special_tokens=False
        ):
            ids.extend(encoding.ids)
            local.extend(cast("list[int]", encoding.word_ids))
            pieces_per_sentence.append(len(encoding.ids))
    cu_pieces = _cumulative(pieces_per_sentence)
    cu_words = _cumulative([len(words) for words in sentences])
    word_of_piece = np.array(local, dtype=np.int64)
    word_of_piece += np.repeat(cu_words[:-1], np.diff(cu_pieces))
    first_piece = np.full(int(cu_words[-1]), -1, dtype=np.int64)
    # Assigned from the back, so that the first piece of a word is what stays.
    first_piece[word_of_piece[::-1]] = np.arange(len(ids), dtype=np.int64)[::-1]
    return Alignment(
        ids=np.array(ids, dtype=np.int32),
        cu_pieces=cu_pieces,
        word_of_piece=word_of_piece,
        cu_words=cu_words,
        first_piece=first_piece,
    )


def tag_ids(tags: Iterable[Sequence[str]], labels: Sequence[str]) -> Int64Array:
    """Label ids of the words of all sentences, [W].

    Raises:
        ValueError: a tag that is not among ``labels``.
    """
    index = {label: position for position, label in enumerate(labels)}
    try:
        return np.array([index[tag] for sentence in tags for tag in sentence], dtype=np.int64)
    except KeyError as error:
        raise ValueError(
            f"tag {error.args[0]!r} is not among the labels {list(labels)}; a label map can "
            "rename types or make them O"
        ) from None


def inside_of(labels: Sequence[str]) -> Int64Array:
    """Label that the further pieces of a word get, by the word's label, [C].

    Raises:
        ValueError: a label ``B-X`` without its ``I-X``.
    """
    index = {label: position for position, label in enumerate(labels)}
    try:
        return np.array(
            [index["I-" + label[2:] if label[:2] == "B-" else label] for label in labels],
            dtype=np.int64,
        )
    except KeyError as error:
        raise ValueError(f"labels {list(labels)} lack {error.args[0]!r}") from None


def piece_targets(
    alignment: Alignment,
    word_tags: Int64Array,
    labels: Sequence[str],
    pieces: Literal["all", "first"] = "all",
) -> Int64Array:
    """Training target of every piece, [P].

    Args:
        alignment: of the sentences.
        word_tags: [W] label ids, see :func:`tag_ids`.
        labels: label names.
        pieces: ``all``, or ``first`` to leave all but first pieces at :data:`IGNORED`.

    Raises:
        ValueError: ``word_tags`` of another length, or ``pieces`` of another value.
    """
    if pieces not in ("all", "first"):
        raise ValueError(f"pieces is {pieces!r}; allowed: 'all', 'first'")
    if word_tags.shape != alignment.first_piece.shape:
        raise ValueError(
            f"word_tags has shape {word_tags.shape}; the alignment has "
            f"{len(alignment.first_piece)} words"
        )
    tags = word_tags[alignment.word_of_piece]
    rest = inside_of(labels)[tags] if pieces == "all" else np.full_like(tags, IGNORED)
    is_first = alignment.first_piece[alignment.word_of_piece] == np.arange(len(alignment.ids))
    return np.where(is_first, tags, rest)


def words_from_pieces(
    alignment: Alignment, piece_tags: npt.NDArray[np.integer], labels: Sequence[str]
) -> list[list[str]]:
    """Tag of every word from the tags predicted for the pieces.

    Args:
        alignment: of the sentences.
        piece_tags: [P] label ids.
        labels: label names; words without pieces get ``O``, or ``_`` where labels have no ``O``.

    Raises:
        ValueError: ``piece_tags`` of another length.
    """
    if piece_tags.shape != alignment.ids.shape:
        raise ValueError(
            f"piece_tags has shape {piece_tags.shape}; the alignment has "
            f"{len(alignment.ids)} pieces"
        )
    names = np.array([*labels, outside_of(labels)], dtype=object)
    with_none = np.append(piece_tags.astype(np.int64), len(labels))
    words = names[with_none[alignment.first_piece]]
    return [words[a:b].tolist() for a, b in pairwise(alignment.cu_words)]


def split_points(alignment: Alignment, sentence: int, max_pieces: int) -> list[tuple[int, int]]:
    """Cut one sentence into runs of at most ``max_pieces`` pieces, at word borders.

    Only a word that is longer by itself is cut inside. Nothing is dropped.

    Returns:
        ``(start, stop)`` into ``alignment.ids``, in order and without gaps; none for a sentence
        without pieces.
    """
    if max_pieces < 1:
        raise ValueError(f"max_pieces is {max_pieces}; allowed: 1 or more")
    start, end = map(int, alignment.cu_pieces[sentence : sentence + 2])
    runs: list[tuple[int, int]] = []
    while end - start > max_pieces:
        stop = start + max_pieces
        border = int(alignment.first_piece[alignment.word_of_piece[stop]])
        stop = border if border > start else stop
        runs.append((start, stop))
        start = stop
    if end > start:
        runs.append((start, end))
    return runs


def _cumulative(lengths: Sequence[int]) -> Int64Array:
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.array(lengths, dtype=np.int64), out=out[1:])
    return out


def align_text(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Alignment:
    """Tokenise running text; a word is what the tokeniser's pre-tokeniser takes for one."""
    lengths: list[int] = []
    ids_of, words_of = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        encodings = tokenizer.encode_batch(chunk, add_special_tokens=False)
        lengths += [len(encoding.ids) for encoding in encodings]
        ids_of.append(np.array([i for e in encodings for i in e.ids], np.int32))
        # A piece without a word (an added token that stands in the text) is a word by itself.
        words = [-1 if w is None else w for e in encodings for w in e.word_ids]
        words_of.append(np.array(words, np.int64))
    cu_pieces = _cumulative(lengths)
    ids, local = np.concatenate(ids_of), np.concatenate(words_of)
    begins = np.ones(len(ids), bool)
    begins[1:] = (local[1:] != local[:-1]) | (local[1:] < 0)
    begins[cu_pieces[:-1][np.diff(cu_pieces) > 0]] = True
    first_piece = np.flatnonzero(begins)
    return Alignment(
        ids=ids,
        cu_pieces=cu_pieces,
        word_of_piece=np.cumsum(begins) - 1,
        cu_words=np.searchsorted(first_piece, cu_pieces),
        first_piece=first_piece,
    )


def windows_of(length: int, size: int) -> list[tuple[int, int, int, int]]:
    """Windows over ``length`` pieces: (start, stop, first kept, one past the last kept)."""
    if length <= size:
        return [(0, length, 0, length)] if length else []
    overlap = size // 4
    starts = [*range(0, length - size, size - overlap), length - size]
    stops = [start + size for start in starts]
    borders = [(a + b) // 2 for a, b in zip(starts[1:], stops[:-1], strict=True)]
    return list(zip(starts, stops, [0, *borders], [*borders, length], strict=True))
