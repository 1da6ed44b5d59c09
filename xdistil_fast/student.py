"""The student as it runs: packed weights, pieces to logits, logits to tags.

Everything that touches a number goes through the compiled kernels. They take each row's sums in
one order whatever batch, tile or thread the row lands in, so a text tagged alone and the same text
tagged among others agree bit for bit; a NumPy product over a batch would not keep that promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdistil_fast import _core
from xdistil_fast.labels import OUTSIDE, bio_constraints, split_label
from xdistil_fast.model_io import ModelConfig

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# Pieces that one kernel call takes: enough rows to keep every core busy, and with E=100, H=200
# about 35 MB of activations however long the input is.
MAX_PIECES = 16_384
# More than any machine has; a slip of the keyboard must not start a million threads.
MAX_THREADS = 1_024


class Student:
    """A student's kernels for one model; safe to share between threads (a call owns its buffers).

    Args:
        config: sizes, labels and head.
        tensors: float32 arrays as `config.tensor_shapes()`.
        threads: kernel threads; 0 is every core the process may use.

    Raises:
        TypeError: `threads` is no int.
        ValueError: `threads` is out of range, or a tensor does not fit the kernels.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, NDArray[Any]], threads: int = 0
    ) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise TypeError(f"threads is {threads!r}; it must be an int, 0 for every core")
        if not 0 <= threads <= MAX_THREADS:
            raise ValueError(
                f"threads is {threads}; it must be from 0 (every core) to {MAX_THREADS}"
            )
        self.config = config
        self.threads = threads
        self._table = tensors["embedding.weight"]
        self._lstm = _core.BiLSTMWeights(
            [
                tensors[f"bilstm.{name}_l0{suffix}"]
                for suffix in ("", "_reverse")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
        )
        self._output = _core.LinearWeights(tensors["output.weight"], tensors["output.bias"])
        self._crf = config.head == "crf"
        start, transitions = bio_constraints(config.labels)
        end = np.zeros(len(config.labels), np.float32)
        if self._crf:
            start = start + tensors["crf.start_transitions"]
            transitions = transitions + tensors["crf.transitions"]
            end = end + tensors["crf.end_transitions"]
        self._moves = (start, end, transitions)
        types = [split_label(label)[1] for label in config.labels]
        self._begins = np.array(
            [config.labels.index(f"B-{name}" if name else OUTSIDE) for name in types], np.int32
        )

    def logits(
        self, ids: NDArray[np.int32], cu_seqlens: NDArray[np.int32], max_pieces: int = MAX_PIECES
    ) -> Floats:
        """Scores of every tag for every piece.

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
        if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or int(cu_seqlens[-1]) != len(ids):
            raise ValueError(f"cu_seqlens must end at the {len(ids)} pieces of ids")
        begin = 0
        while begin < len(cu_seqlens) - 1:
            base = int(cu_seqlens[begin])
            stop = int(np.searchsorted(cu_seqlens, base + max_pieces, side="right")) - 1
            stop = max(stop, begin + 1)
            limit = int(cu_seqlens[stop])
            self._run(ids[base:limit], cu_seqlens[begin : stop + 1] - base, out[base:limit])
            begin = stop
        return out

    def _run(self, ids: Ints, cu_seqlens: Ints, out: Floats) -> None:
        embedded = np.empty((len(ids), self.config.embedding_size), np.float32)
        hidden = np.empty((len(ids), 2 * self.config.hidden_size), np.float32)
        _core.embedding_gather(self._table, ids, embedded, self.threads)
        _core.bilstm_forward(self._lstm, embedded, cu_seqlens, hidden, self.threads)
        _core.linear(self._output, hidden, out, self.threads)

    def decode(self, emissions: Floats, cu_seqlens: Ints) -> Ints:
        """Best tag of every piece under IOB2 (and under the CRF, if the head is one).

        Args:
            emissions: float32 [total, C], from `logits`.
            cu_seqlens: int32 [B + 1].

        Returns:
            int32 [total]; each sequence is valid IOB2.
        """
        tags = np.empty(len(emissions), np.int32)
        scores = np.empty(len(cu_seqlens) - 1, np.float32)
        _core.crf_viterbi(emissions, cu_seqlens, *self._moves, tags, scores, self.threads)
        return tags

    def decode_words(
        self,
        emissions: Floats,
        cu_pieces: Ints,
        first: NDArray[np.int64],
        cu_words: Ints,
    ) -> Ints:
        """One tag a word, that of its first piece.

        Dropping the other pieces can leave an `I-X` after a word of another kind; it becomes
        `B-X`, so that each text's tags are valid IOB2 again.

        Args:
            emissions: float32 [total, C].
            cu_pieces: int32 [B + 1], where texts begin among the pieces.
            first: int64 [W], first piece of each word.
            cu_words: int32 [B + 1], where texts begin among the words.

        Returns:
            int32 [W].
        """
        tags = self.decode(emissions, cu_pieces)[first]
        begins = self._begins[tags]  # B-X for B-X and I-X, O for O: equal for equal types
        before = np.full_like(begins, -1)
        before[1:] = begins[:-1]
        before[cu_words[:-1][np.diff(cu_words) > 0]] = -1
        return np.where(before == begins, tags, begins)

    def probabilities(
        self,
        emissions: Floats,
        cu_pieces: Ints,
        first: NDArray[np.int64],
        tags: Ints,
    ) -> Floats:
        """How probable the model holds each word's tag.

        Args:
            emissions: float32 [total, C].
            cu_pieces: int32 [B + 1].
            first: int64 [W], first piece of each word.
            tags: int32 [W].

        Returns:
            float32 [W], 0 to 1: the softmax at the first piece, or the CRF's marginal there
            (everything else summed out).
        """
        if self._crf:
            everything = np.empty_like(emissions)
            _core.crf_marginals(emissions, cu_pieces, *self._moves, everything, self.threads)
            rows = everything[first]
        else:
            rows = np.empty((len(first), emissions.shape[1]), np.float32)
            _core.softmax(emissions[first], rows, self.threads)
        # Rounding may carry a certain tag past 1.
        chosen: Floats = rows[np.arange(len(first)), tags]
        np.minimum(chosen, np.float32(1), out=chosen)
        return chosen
