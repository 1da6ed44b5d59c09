"""The student as it runs: packed weights, pieces to logits, logits to tags or to classes.

Everything that touches a number goes through the compiled kernels. They take each row's sums in
one order whatever batch, tile or thread the row lands in, so a text tagged alone and the same text
tagged among others agree bit for bit; a NumPy product over a batch would not keep that promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdistil_fast import _core
from xdistil_fast.labels import OUTSIDE, bio_constraints, scheme_of, split_label
from xdistil_fast.model_config import PRECISIONS, TOKEN_CLASSIFICATION
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.quantization import as_bytes, as_floats

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# Pieces that one kernel call takes: enough rows to keep every core busy, and with H=200 about 26 MB
# of activations (int8: 7 MB) however long the input is.
MAX_PIECES = 16_384
# Bytes of input table if nobody says otherwise.
MAX_TABLE = 256 << 20
# More than any machine has; a slip of the keyboard must not start a million threads.
MAX_THREADS = 1_024


def groups(cu_seqlens: Ints, max_pieces: int) -> Iterator[tuple[int, int]]:
    """Cuts a batch into groups of whole sequences.

    Args:
        cu_seqlens: int32 [B + 1].
        max_pieces: about how many pieces a group has; a longer sequence is a group by itself.

    Returns:
        First sequence, and one past the last, of each group.
    """
    begin = 0
    while begin < len(cu_seqlens) - 1:
        limit = int(cu_seqlens[begin]) + max_pieces
        stop = max(int(np.searchsorted(cu_seqlens, limit, side="right")) - 1, begin + 1)
        yield begin, stop
        begin = stop


def _pack(
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    precision: str,
    table_rows: int,
    threads: int,
) -> _core.StudentWeights:
    weight = as_bytes if precision == "int8" else as_floats
    bilstm: list[Any] = []
    for suffix in ("", "_reverse"):
        bias = tensors[f"bilstm.bias_ih_l0{suffix}"] + tensors[f"bilstm.bias_hh_l0{suffix}"]
        bilstm += [
            as_floats(tensors, f"bilstm.weight_ih_l0{suffix}"),
            weight(tensors, f"bilstm.weight_hh_l0{suffix}"),
            bias,
        ]
    projection = None
    if config.projection_size:
        projection = (weight(tensors, "projection.weight"), tensors["projection.bias"])
    return _core.StudentWeights(
        precision,
        as_floats(tensors, "embedding.weight"),
        bilstm,
        (weight(tensors, "output.weight"), tensors["output.bias"]),
        np.arange(table_rows, dtype=np.int32),
        threads,
        config.pooling,
        projection,
    )


class Student:
    """A student's kernels for one model; safe to share between threads (a call owns its buffers).

    Args:
        config: sizes, labels and head.
        tensors: arrays as `config.tensor_shapes()`.
        threads: kernel threads; 0 is every core the process may use.
        precision: "float32", "bfloat16" or "int8"; None is what the model is stored in.
        max_memory: bytes that the input table may take: what a piece adds to the gates,
            W_ih e + b, depends on its id alone and is kept for as many pieces as fit, the lowest
            ids first (vocabularies are by frequency); for others it is computed as they come.
            Changes speed and memory, never a result. None is 256 MiB.

    Raises:
        TypeError: `threads` or `max_memory` is no int.
        ValueError: an argument is out of range, or a tensor does not fit the kernels.
    """

    device = "cpu"
    table_rows: int

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[Any]],
        threads: int = 0,
        precision: str | None = None,
        max_memory: int | None = None,
    ) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise TypeError(f"threads is {threads!r}; it must be an int, 0 for every core")
        if not 0 <= threads <= MAX_THREADS:
            raise ValueError(
                f"threads is {threads}; it must be from 0 (every core) to {MAX_THREADS}"
            )
        precision = config.precision if precision is None else precision
        if precision not in PRECISIONS:
            allowed = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"precision is {precision!r}; allowed: {allowed}")
        max_memory = MAX_TABLE if max_memory is None else max_memory
        if isinstance(max_memory, bool) or not isinstance(max_memory, int):
            raise TypeError(f"max_memory is {max_memory!r}; it must be an int, a number of bytes")
        if max_memory < 0:
            raise ValueError(f"max_memory is {max_memory}; it must not be negative")
        self.config = config
        self.threads = threads
        self.precision = precision
        self.max_memory = max_memory
        self._load(tensors)
        if config.task == TOKEN_CLASSIFICATION:
            self._prepare_decoding(config, tensors)

    def _prepare_decoding(self, config: ModelConfig, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._crf = config.head == "crf"
        start, transitions = bio_constraints(config.labels)
        end = np.zeros(len(config.labels), np.float32)
        if self._crf:
            start = start + tensors["crf.start_transitions"]
            transitions = transitions + tensors["crf.transitions"]
            end = end + tensors["crf.end_transitions"]
        self._moves = (start, end, transitions)
        self._outside = config.labels.index(OUTSIDE) if OUTSIDE in config.labels else -1
        if scheme_of(config.labels) == "tags":
            self._begins = np.arange(len(config.labels), dtype=np.int32)
        else:
            types = [split_label(label)[1] for label in config.labels]
            self._begins = np.array(
                [config.labels.index(f"B-{name}" if name else OUTSIDE) for name in types], np.int32
            )

    def _load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Packs the weights; sets `table_rows`."""
        row = _core.StudentWeights.table_row_nbytes(self.precision, self.config.hidden_size)
        self.table_rows = min(self.config.vocab_size, self.max_memory // row)
        self._weights = _pack(self.config, tensors, self.precision, self.table_rows, self.threads)

    def _scores(self, ids: Ints, cu_seqlens: Ints, out: Floats) -> None:
        """Writes the scores of one group of sequences."""
        _core.student_scores(self._weights, ids, cu_seqlens, out, self.threads)

    def logits(
        self, ids: NDArray[np.int32], cu_seqlens: NDArray[np.int32], max_pieces: int = MAX_PIECES
    ) -> Floats:
        """Scores of every tag for every piece; of a student without pooling.

        Args:
            ids: int32 [total], below the vocabulary size.
            cu_seqlens: int32 [B + 1], ascending from 0 to total; sequences may be empty.
            max_pieces: sequences are given to the kernels in groups of about so many pieces, which
                bounds memory and changes no result.

        Returns:
            float32 [total, C].

        Raises:
            ValueError: an id out of range, or `cu_seqlens` that do not fit.
        """
        out = np.empty((len(ids), len(self.config.labels)), np.float32)
        ends = cu_seqlens[[0, -1]].tolist() if cu_seqlens.ndim == 1 and len(cu_seqlens) else None
        if ends != [0, len(ids)]:
            raise ValueError(f"cu_seqlens must be one row from 0 to the {len(ids)} pieces of ids")
        for begin, stop in groups(cu_seqlens, max_pieces):
            base, limit = int(cu_seqlens[begin]), int(cu_seqlens[stop])
            bounds = cu_seqlens[begin : stop + 1] - base
            self._scores(ids[base:limit], bounds, out[base:limit])
        return out

    def class_logits(
        self,
        ids: NDArray[np.int32],
        cu_seqlens: NDArray[np.int32],
        cu_windows: NDArray[np.int32] | None = None,
        cores: NDArray[np.int32] | None = None,
    ) -> Floats:
        """Scores of every class for every text; of a student with pooling.

        A text is a sequence, or several: the windows in which it is read. Max and mean are then
        taken over the cores of its windows as if they were one sequence, without any rounding in
        between. A text without pieces has the pooled state 0, so its scores are the bias.

        Args:
            ids: int32 [total], below the vocabulary size.
            cu_seqlens: int32 [W + 1], ascending from 0 to total; sequences may be empty.
            cu_windows: int32 [B + 1], where texts begin among the sequences; None: each is a text.
            cores: int32 [W, 2], first and one past the last of the pieces of each sequence that
                are pooled; None: all.

        Returns:
            float32 [B, C].

        Raises:
            ValueError: an id out of range, or offsets that do not fit.
        """
        texts = len(cu_seqlens if cu_windows is None else cu_windows) - 1
        out = np.empty((max(texts, 0), len(self.config.labels)), np.float32)
        _core.student_class_scores(
            self._weights, ids, cu_seqlens, out, cu_windows, cores, self.threads
        )
        return out

    @property
    def table_nbytes(self) -> int:
        """Bytes of the input table."""
        return self._weights.table_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, without the input table."""
        return self._weights.nbytes

    def decode_words(
        self,
        emissions: Floats,
        cu_pieces: Ints,
        first: NDArray[np.int64],
        cu_words: Ints,
        *,
        probabilities: bool = False,
    ) -> tuple[Ints, Floats]:
        """One tag a word, that of its first piece on the best path through all pieces.

        The path is valid in the labels' scheme (and the CRF's, if the head is one). Dropping the
        other pieces can leave an `I-X` after a word of another kind; it becomes `B-X`, so that each
        text's tags are valid IOB2 again.

        Args:
            emissions: float32 [total, C], from `logits`.
            cu_pieces: int32 [B + 1], where texts begin among the pieces.
            first: int64 [W], first piece of each word.
            cu_words: int32 [B + 1], where texts begin among the words.
            probabilities: also say how probable the model holds the tags.

        Returns:
            int32 [W] tags, and float32 [W] probabilities, 0 to 1: the softmax at the first piece,
            or the CRF's marginal there (everything else summed out); 0 for words that are `O`,
            which nobody is told the score of. Empty unless asked for.
        """
        tags = np.empty(len(first), np.int32)
        shares = np.empty(len(first) if probabilities else 0, np.float32)
        _core.decode_words(
            emissions,
            cu_pieces,
            *self._moves,
            first,
            cu_words,
            self._begins,
            self._outside,
            self._crf,
            tags,
            shares if probabilities else None,
            self.threads,
        )
        return tags, shares

    def probabilities(self, emissions: Floats, cu_pieces: Ints) -> Floats:
        """Probability of every tag for every piece.

        Args:
            emissions: float32 [total, C], from `logits`.
            cu_pieces: int32 [B + 1], where texts begin among the pieces.

        Returns:
            float32 [total, C], rows of sum 1: the softmax, or the CRF's marginals.
        """
        out = np.empty_like(emissions)
        if self._crf:
            start, end, transitions = self._moves
            _core.crf_marginals(emissions, cu_pieces, start, end, transitions, out, self.threads)
        else:
            _core.softmax(emissions, out, self.threads)
        return out
