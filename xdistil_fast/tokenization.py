"""Text to word pieces, words and windows.

Offsets are code points of the original string. They are kept through every normaliser
(lower-casing, NFD, stripped accents), but leave out characters it drops; csrc/text/spans.h finishes
the spans of words and entities.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from xdistil_fast.wordpiece import compile_wordpiece

_SURROGATE = re.compile("[\ud800-\udfff]")
# Marks by which SentencePiece, byte-level BPE and WordPiece say "begins" or "continues a word".
_PIECE_MARKS = ("\u2581", "\u0120", "##")


@dataclass(frozen=True)
class Encoded:
    """Word pieces of N texts, ragged.

    Attributes:
        ids: int32 [total], ids of all pieces.
        cu_pieces: int32 [N + 1], where each text's pieces begin; the last entry is total.
        first: int64 [W], index of the first piece of every word.
        cu_words: int32 [N + 1], where each text's words begin in `first`.
        positions: int64 [W], which word of its text it is: for pre-tokenised text the index of the
            input word (one without any piece is missing here), else the tokenizer's own count.
        starts: int32 [total], first character of each piece, in code points of its text as the
            tokenizer reports them (of its word, for pre-tokenised text).
        ends: int32 [total], one past the last.
    """

    ids: NDArray[np.int32]
    cu_pieces: NDArray[np.int32]
    first: NDArray[np.int64]
    cu_words: NDArray[np.int32]
    positions: NDArray[np.int64]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]

    @property
    def word_starts(self) -> NDArray[np.int32]:
        """Int32 [W], the first character of every word."""
        return self.starts[self.first]

    @property
    def word_ends(self) -> NDArray[np.int32]:
        """Int32 [W], one past the last."""
        last = np.append(self.first[1:], len(self.ids))[: len(self.first)] - 1
        ends: NDArray[np.int32] = self.ends[last]
        return ends


@dataclass(frozen=True)
class Window:
    """Pieces `start` to `stop` are read, `core_start` to `core_stop` are kept."""

    start: int
    stop: int
    core_start: int
    core_stop: int


@dataclass(frozen=True)
class Windows:
    """How N texts are read in W windows.

    Attributes:
        read: int64 [total], the pieces of all windows.
        cu_seqlens: int32 [W + 1], where each window begins in `read`.
        cu_windows: int32 [N + 1], where each text's windows begin.
        cores: int32 [W, 2], first and one past the last entry of `read` that is kept of each
            window; every piece of a text is kept once.
    """

    read: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    cu_windows: NDArray[np.int32]
    cores: NDArray[np.int32]


class TextEncoder:
    """Turns batches of texts into ragged pieces.

    Tokenizers of BERT's kind run as compiled code, others by the `tokenizers` library.

    A word of running text is a word of the tokenizer's pre-tokenizer. Where that one leaves
    punctuation attached (SentencePiece cuts at white space only), pieces of punctuation stand
    alone, as they do in the corpora the models learn from.

    Args:
        tokenizer: truncation and padding off, never changed after this.
        threads: 0 is every core the process may use, 1 keeps to the calling thread. Of others the
            `tokenizers` library, where it is used, only knows that they are not 1.
        compiled: False leaves all to the library; for comparisons.
    """

    def __init__(self, tokenizer: Tokenizer, threads: int = 0, *, compiled: bool = True) -> None:
        self._tokenizer = tokenizer
        self._threads = threads
        self._wordpiece = compile_wordpiece(tokenizer) if compiled else None
        self._breaks = _punctuation_pieces(tokenizer)

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """Encodes N running texts; a lone surrogate is read as U+FFFD, offsets stay."""
        if self._wordpiece is not None:
            return Encoded(*self._wordpiece.encode_texts(texts, self._threads))
        try:
            encodings = self._encode(texts)
        except TypeError:
            # What it says of a str with lone surrogates, which no UTF-8 can carry.
            encodings = self._encode([_SURROGATE.sub("\ufffd", text) for text in texts])
        return self._ragged(encodings, split=True)

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> Encoded:
        """Encodes N texts that are already split; a word without any piece has none here."""
        if self._wordpiece is not None:
            return Encoded(*self._wordpiece.encode_words(sentences, self._threads))
        try:
            encodings = self._encode(sentences)
        except TypeError:
            clean = [[_SURROGATE.sub("\ufffd", word) for word in words] for words in sentences]
            encodings = self._encode(clean)
        return self._ragged(encodings, split=False)

    def _encode(self, batch: Sequence[str] | Sequence[Sequence[str]]) -> list[Encoding]:
        words = bool(batch) and not isinstance(batch[0], str)
        if self._threads == 1:
            return [
                self._tokenizer.encode(item, is_pretokenized=words, add_special_tokens=False)
                for item in batch
            ]
        encodings: list[Encoding] = self._tokenizer.encode_batch(
            list(batch), is_pretokenized=words, add_special_tokens=False
        )
        return encodings

    def _ragged(self, encodings: list[Encoding], split: bool) -> Encoded:
        lengths = [len(encoding) for encoding in encodings]
        cu_pieces = np.zeros(len(encodings) + 1, np.int64)
        np.cumsum(lengths, out=cu_pieces[1:])
        total = int(cu_pieces[-1])
        if total > np.iinfo(np.int32).max:
            raise ValueError(f"texts have {total} pieces together; at most 2**31 - 1 are allowed")
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, total)
        words = np.fromiter(
            # None: a piece outside any word, its own word here.
            chain.from_iterable(
                (-1 - at if word is None else word for at, word in enumerate(e.word_ids))
                for e in encodings
            ),
            np.int64,
            total,
        )
        starts = np.ones(total, bool)
        starts[1:] = words[1:] != words[:-1]
        if split and self._breaks is not None:
            breaks, bare = self._breaks
            starts[1:] |= (breaks[ids[1:]] | breaks[ids[:-1]]) & ~bare[ids[:-1]]
        starts[cu_pieces[:-1][np.diff(cu_pieces) > 0]] = True
        first = np.flatnonzero(starts)
        return Encoded(
            ids,
            cu_pieces.astype(np.int32),
            first,
            np.searchsorted(first, cu_pieces).astype(np.int32),
            words[first],
            *_offsets(encodings, total),
        )


def _offsets(encodings: list[Encoding], total: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    flat = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
    pairs = np.fromiter(flat, np.int32, 2 * total).reshape(total, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def plan_windows(
    length: int, window: int, stride: int, word_starts: NDArray[np.int64]
) -> list[Window]:
    """Cuts a long text into overlapping windows, at word borders where there are any.

    Every piece is in the core of exactly one window, and unless it is near an end of the text has
    about `stride // 2` pieces of context on either side. Depends on this text alone.

    Args:
        length: pieces of the text.
        window: most pieces of one window.
        stride: pieces two neighbours share; at most half of `window`.
        word_starts: ascending piece indices at which words begin.

    Returns:
        Windows in order; one covering everything if `length` is at most `window`, none for 0.
    """
    if length == 0:
        return []
    left = stride // 2
    right = stride - left
    out: list[Window] = []
    core = 0
    while True:
        start = max(0, core - left)
        if start + window >= length:  # the last one takes all the context that fits
            start = max(0, length - window)
            out.append(Window(_word_at_or_after(word_starts, start, core), length, core, length))
            return out
        start = _word_at_or_after(word_starts, start, core)
        stop = min(start + window, length)
        core_stop = _word_at_or_before(word_starts, stop - right, core)
        out.append(Window(start, _word_at_or_before(word_starts, stop, core_stop), core, core_stop))
        core = core_stop


def read_in_windows(encoded: Encoded, window: int, stride: int) -> Windows:
    """`plan_windows` for every text of a batch; a short text is one window, an empty one none."""
    cu_pieces, cu_words = encoded.cu_pieces.tolist(), encoded.cu_words.tolist()
    read: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    cores: list[tuple[int, int]] = []
    cu_seqlens, cu_windows = [0], [0]
    for index in range(len(cu_pieces) - 1):
        base = cu_pieces[index]
        starts = encoded.first[cu_words[index] : cu_words[index + 1]] - base
        for part in plan_windows(cu_pieces[index + 1] - base, window, stride, starts):
            shift = cu_seqlens[-1] - part.start
            read.append(np.arange(base + part.start, base + part.stop))
            cores.append((part.core_start + shift, part.core_stop + shift))
            cu_seqlens.append(part.stop + shift)
        cu_windows.append(len(cores))
    return Windows(
        np.concatenate(read),
        np.array(cu_seqlens, np.int32),
        np.array(cu_windows, np.int32),
        np.array(cores, np.int32).reshape(-1, 2),
    )


def _word_at_or_after(word_starts: NDArray[np.int64], piece: int, limit: int) -> int:
    at = int(np.searchsorted(word_starts, piece))
    found = int(word_starts[at]) if at < len(word_starts) else limit + 1
    return found if found <= limit else piece


def _word_at_or_before(word_starts: NDArray[np.int64], piece: int, above: int) -> int:
    at = int(np.searchsorted(word_starts, piece, side="right")) - 1
    found = int(word_starts[at]) if at >= 0 else above
    return found if found > above else piece


def _punctuation_pieces(
    tokenizer: Tokenizer,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """By id: pieces of punctuation only, and bare word marks; None if words never hold both."""
    splitter = tokenizer.pre_tokenizer
    if splitter is not None and len(splitter.pre_tokenize_str("a,b")) == 3:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    breaks, bare = np.zeros(size, bool), np.zeros(size, bool)
    for piece, index in vocabulary.items():
        core = piece
        for mark in _PIECE_MARKS:
            core = core.removeprefix(mark)
        bare[index] = not core
        breaks[index] = bool(core) and all(unicodedata.category(c)[0] in "PS" for c in core)
    return breaks, bare
