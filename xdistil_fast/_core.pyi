"""Type stubs of the compiled kernels, kept equal to the module by mypy.stubtest.

All arrays are C-contiguous NumPy arrays of one dtype, float32 or float64; outputs are allocated by
the caller. `cu_seqlens` is int32 [B+1], starts at 0, ascends and ends at `total`. `threads=0` means
`default_threads()`. Results depend neither on `threads` nor on what else is in the batch. Bad input
raises ValueError or TypeError before any work; csrc/xdf/kernels.h holds the contracts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.floating[Any]]
_Ints = npt.NDArray[np.int32]

__version__: str

def isas_compiled() -> list[str]: ...
def isas_available() -> list[str]: ...
def active_isa() -> str: ...
def multiplies_bfloat16() -> bool: ...
def set_isa(name: str) -> None: ...
def default_threads() -> int: ...

class _pybind11_type(type): ...

class BiLSTMWeights(metaclass=_pybind11_type):
    def __init__(
        self, weights: Sequence[_Floats], training: bool = False, bfloat16: bool = False
    ) -> None: ...
    @property
    def input_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...

def bilstm_forward(
    weights: BiLSTMWeights, x: _Floats, cu_seqlens: _Ints, out: _Floats, threads: int = 0
) -> None: ...
def bilstm_reserve_size(total: int, hidden_size: int) -> int: ...
def bilstm_forward_train(
    weights: BiLSTMWeights,
    x: _Floats,
    cu_seqlens: _Ints,
    out: _Floats,
    reserve: _Floats,
    threads: int = 0,
) -> None: ...
def bilstm_backward(
    weights: BiLSTMWeights,
    x: _Floats,
    cu_seqlens: _Ints,
    out: _Floats,
    reserve: _Floats,
    grad_out: _Floats,
    grad_x: _Floats | None,
    grad_weights: Sequence[_Floats],
    threads: int = 0,
) -> None: ...

# A matrix [N, K]; for "int8" bytes as `quantize_rows` makes them, with the scales [N] of its rows.
_Matrix = npt.NDArray[np.float32] | tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]

class StudentWeights(metaclass=_pybind11_type):
    # bilstm: w_ih [4H, E], w_hh [4H, H] (a _Matrix), bias [4H], then those of the reverse;
    # output: weight [C, 2H] (a _Matrix), bias [C]; table_ids: whose rows of the table are kept;
    # pooling: None scores every piece, "max", "mean" or "last" every text; projection: weight
    # [R, 2H] (a _Matrix), bias [R]; the output layer, [C, R], then reads its GELU.
    def __init__(
        self,
        precision: str,
        embedding: npt.NDArray[np.float32],
        bilstm: Sequence[Any],
        output: tuple[_Matrix, npt.NDArray[np.float32]],
        table_ids: _Ints,
        threads: int = 0,
        pooling: str | None = None,
        projection: tuple[_Matrix, npt.NDArray[np.float32]] | None = None,
    ) -> None: ...
    @property
    def precision(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def table_nbytes(self) -> int: ...
    @staticmethod
    def table_row_nbytes(precision: str, hidden_size: int) -> int: ...

def student_scores(
    weights: StudentWeights,
    ids: _Ints,
    cu_seqlens: _Ints,
    out: npt.NDArray[np.float32],
    threads: int = 0,
) -> None: ...

# out [texts, C]. A sequence is a text, or a window of one: text t has the windows cu_windows[t] to
# cu_windows[t + 1], of which the pieces cores[w, 0] to cores[w, 1] are pooled.
def student_class_scores(
    weights: StudentWeights,
    ids: _Ints,
    cu_seqlens: _Ints,
    out: npt.NDArray[np.float32],
    cu_windows: _Ints | None = None,
    cores: _Ints | None = None,
    threads: int = 0,
) -> None: ...
def quantize_rows(
    weight: npt.NDArray[np.float32],
    out: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
) -> None: ...

# Values [n] to their GELU, in its tanh form.
def gelu(values: _Floats) -> None: ...

# Whether bytes are such as `quantize_rows` makes: no kernel's sums overflow.
def valid_int8_rows(weight: npt.NDArray[np.int8]) -> bool: ...

class LinearWeights(metaclass=_pybind11_type):
    def __init__(self, weight: _Floats, bias: _Floats | None = None) -> None: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...

def linear(weights: LinearWeights, x: _Floats, out: _Floats, threads: int = 0) -> None: ...
def linear_grad(
    x: _Floats, grad_out: _Floats, grad_weight: _Floats, grad_bias: _Floats, threads: int = 0
) -> None: ...
def decode_words(
    emissions: npt.NDArray[np.float32],
    cu_seqlens: _Ints,
    start: npt.NDArray[np.float32],
    end: npt.NDArray[np.float32],
    transitions: npt.NDArray[np.float32],
    first: npt.NDArray[np.int64],
    cu_words: _Ints,
    begins: _Ints,
    outside: int,
    marginals: bool,
    tags: _Ints,
    probabilities: npt.NDArray[np.float32] | None = None,
    threads: int = 0,
) -> None: ...
def softmax(logits: _Floats, out: _Floats, threads: int = 0) -> None: ...
def embedding_gather(table: _Floats, ids: _Ints, out: _Floats, threads: int = 0) -> None: ...
def embedding_grad(
    ids: _Ints, grad_out: _Floats, grad_table: _Floats, threads: int = 0
) -> None: ...
def crf_log_likelihood(
    emissions: _Floats,
    cu_seqlens: _Ints,
    tags: _Ints,
    start: _Floats,
    end: _Floats,
    transitions: _Floats,
    out: _Floats,
    threads: int = 0,
) -> None: ...
def crf_log_likelihood_grad(
    emissions: _Floats,
    cu_seqlens: _Ints,
    tags: _Ints,
    start: _Floats,
    end: _Floats,
    transitions: _Floats,
    grad_out: _Floats,
    grad_emissions: _Floats,
    grad_start: _Floats,
    grad_end: _Floats,
    grad_transitions: _Floats,
    threads: int = 0,
) -> None: ...
def crf_marginals(
    emissions: _Floats,
    cu_seqlens: _Ints,
    start: _Floats,
    end: _Floats,
    transitions: _Floats,
    out: _Floats,
    threads: int = 0,
) -> None: ...
def crf_viterbi(
    emissions: _Floats,
    cu_seqlens: _Ints,
    start: _Floats,
    end: _Floats,
    transitions: _Floats,
    tags: _Ints,
    scores: _Floats,
    threads: int = 0,
) -> None: ...

_Pieces = tuple[
    npt.NDArray[np.int32],  # ids [total]
    npt.NDArray[np.int32],  # cu_pieces [N + 1]
    npt.NDArray[np.int64],  # first [W]
    npt.NDArray[np.int32],  # cu_words [N + 1]
    npt.NDArray[np.int64],  # positions [W]
    npt.NDArray[np.int32],  # starts [total]
    npt.NDArray[np.int32],  # ends [total]
]

class WordPiece(metaclass=_pybind11_type):
    def __init__(
        self,
        vocabulary: dict[str, int],
        added_tokens: dict[str, int],
        *,
        unk_token: str,
        continuing_subword_prefix: str,
        max_input_chars_per_word: int,
        clean_text: bool,
        handle_chinese_chars: bool,
        strip_accents: bool,
        lowercase: bool,
    ) -> None: ...
    def encode_texts(self, texts: Sequence[str], threads: int = 0) -> _Pieces: ...
    def encode_words(self, sentences: Sequence[Sequence[str]], threads: int = 0) -> _Pieces: ...

def finish_words(
    texts: Sequence[str], cu_words: _Ints, word_starts: _Ints, word_ends: _Ints
) -> tuple[_Ints, _Ints]: ...
def join_entities(
    texts: Sequence[str],
    cu_words: _Ints,
    word_starts: _Ints,
    word_ends: _Ints,
    tags: _Ints,
    probabilities: npt.NDArray[np.float32],
    labels: Sequence[str],
) -> list[list[Any]]: ...
