"""The student on a GPU, without torch: the same calls as `Student`, scores from the device.

The embedding, the input half and the biases are a table, a row [8H] for each piece, made on the
device when the model is loaded; where it would pass `max_memory`, a call makes the rows of its own
pieces.
One kernel then runs all steps of all sequences in both directions, another the output layer. Words
are decoded on the CPU, from the scores. Of a classifier a third one pools the states before the
output layer: those of each window, then those of a text's windows.

Precisions: "float32" (multiply-adds, sums as on the CPU but for their order), "bfloat16" (tensor
cores: weights and hidden states in bfloat16, table in float16, sums and cell states in float32) and
"int8" (tensor cores, the CPU's bytes and exact sums; gates in float32, so that where a hidden state
lies next to the middle between two levels it may be rounded to the other one).

This has been compiled and, in emulation on the CPU, tested, but never yet run on a GPU.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdistil_fast import _backend
from xdistil_fast.model_config import TEXT_CLASSIFICATION
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.quantization import as_bytes, as_floats
from xdistil_fast.student import MAX_PIECES, Floats, Ints, Student, groups

_STREAM = 0  # the default one, on which copies wait for kernels and kernels for copies
_FLOAT = 4
_STATE_NBYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_HIDDEN_LEVELS = np.float32(63)  # of int8: round(63 h)
_TABLE_CHUNK = 8_192  # pieces whose embeddings are on the device at once while the table is made


def device_number(device: str) -> int | None:
    """The GPU that a device names, after a look whether it is there.

    Args:
        device: "cpu", "cuda" (the first GPU) or "cuda:N".

    Returns:
        Its number; None for the CPU.

    Raises:
        TypeError: `device` is no string.
        ValueError: another name, or there is no such GPU.
        RuntimeError: CUDA was not built, or does not run here.
    """
    if not isinstance(device, str):
        raise TypeError(f"device is {device!r}; it must be a string")
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device, re.ASCII)
    if match is None:
        raise ValueError(f"device is {device!r}; allowed: 'cpu', 'cuda', 'cuda:N'")
    number = int(match[1] or 0)
    _backend.device_info(number)
    return number


def student_on(
    device: str,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    threads: int = 0,
    precision: str | None = None,
    max_memory: int | None = None,
) -> Student:
    """A `Student` on a device.

    Args:
        device: see `device_number`.
        config: as of `Student`; the same with all that follow.
        tensors: weights.
        threads: of what runs on the CPU.
        precision: None is the model's own.
        max_memory: of the input table.

    Raises:
        TypeError: `device` is no string, or see `Student`.
        ValueError: an unknown device, a precision that it does not have, or see `Student`.
        RuntimeError: CUDA was not built, or does not run here.
        MemoryError: the device's memory does not suffice.
    """
    number = device_number(device)
    if number is None:
        return Student(config, tensors, threads, precision, max_memory)
    return CudaStudent(config, tensors, threads, precision, max_memory, number)


class _Buffer:
    """Memory of a device that grows by doubling and is kept between calls."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._memory: Any = None

    def of(self, nbytes: int) -> Any:
        """At least so many bytes; what was in it before is lost when it grows."""
        have = 0 if self._memory is None else self._memory.nbytes
        if nbytes > have:
            self._memory = None  # first, so that both need not fit
            self._memory = _backend.cuda().Memory(max(nbytes, 2 * have), self._device)
        return self._memory

    def holding(self, array: NDArray[Any]) -> int:
        """Address of a copy of `array`."""
        memory = self.of(max(array.nbytes, 16))
        memory.write(np.ascontiguousarray(array))
        return int(memory.address)


def _interleave(forward: Floats, reverse: Floats) -> Floats:
    """Rows of both directions, gate by gate as in torch, to [direction, unit, gate]."""
    both = np.stack([forward, reverse])
    hidden = both.shape[1] // 4
    both = both.reshape(2, 4, hidden, *both.shape[2:]).swapaxes(1, 2)
    return np.ascontiguousarray(both.reshape(8 * hidden, *forward.shape[1:]), np.float32)


def _check_offsets(name: str, offsets: Ints, total: int) -> None:
    ends = offsets[[0, -1]].tolist() if offsets.ndim == 1 and len(offsets) else None
    if ends != [0, total] or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name} must ascend from 0 to {total}")


class CudaStudent(Student):
    """A student on a GPU; safe to share between threads, which take turns.

    Args:
        config: as of `Student`; the same with the next four.
        tensors: weights.
        threads: of what runs on the CPU.
        precision: "float32", "bfloat16" or "int8"; None is what the model is stored in.
        max_memory: bytes of the device that the input table may take; None is 256 MiB.
        device: number of the GPU.

    Raises:
        ValueError: no such device, or see `Student`.
        RuntimeError: CUDA was not built, or does not run here.
        MemoryError: the device's memory does not suffice.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[Any]],
        threads: int = 0,
        precision: str | None = None,
        max_memory: int | None = None,
        device: int = 0,
    ) -> None:
        self._number = device
        self.device = f"cuda:{device}"
        self._lock = threading.Lock()
        super().__init__(config, tensors, threads, precision, max_memory)

    def _load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        _backend.device_info(self._number)  # first of all whether there is such a GPU
        extension, at = _backend.cuda(), (self._number, _STREAM)
        names = [
            (f"bilstm.weight_ih_l0{end}", f"bilstm.weight_hh_l0{end}", f"bilstm.bias_ih_l0{end}")
            for end in ("", "_reverse")
        ]
        self._embedding = as_floats(tensors, "embedding.weight")
        biases = [tensors[bias] + tensors[bias.replace("_ih_", "_hh_")] for _, _, bias in names]
        hidden, in_bytes = self.config.hidden_size, self.precision == "int8"

        def kept(array: NDArray[Any], dtype: Any = np.float32) -> Any:
            array = np.ascontiguousarray(array, dtype)
            memory = extension.Memory(max(array.nbytes, 16), self._number)
            memory.write(array)
            return memory

        self._input = kept(_interleave(*(as_floats(tensors, name[0]) for name in names)))
        self._bias = kept(_interleave(*biases))
        # The layer over hidden states, and after a projection the output layer.
        layers = ["projection", "output"] if self.config.projection_size else ["output"]
        self._layer_biases = [kept(np.asarray(tensors[f"{name}.bias"])) for name in layers]
        self._scales: Any = None
        if in_bytes:
            levels_of_layers = [as_bytes(tensors, f"{name}.weight") for name in layers]
            matrices = [levels * scales[:, None] for levels, scales in levels_of_layers]
            matrices[0] /= _HIDDEN_LEVELS
            weights = [as_bytes(tensors, name[1]) for name in names]
            self._scales = kept(_interleave(*(scales / _HIDDEN_LEVELS for _, scales in weights)))
            forward, reverse = (kept(levels, np.int8) for levels, _ in weights)
        else:
            matrices = [as_floats(tensors, f"{name}.weight") for name in layers]
            forward, reverse = (kept(as_floats(tensors, name[1])) for name in names)
        self._layers = [kept(matrix) for matrix in matrices]
        elements = extension.lstm_packed_size(self.precision, False, hidden)
        self._packed = extension.Memory(elements * _STATE_NBYTES[self.precision], self._number)
        extension.lstm_pack(
            self.precision,
            False,
            hidden,
            not in_bytes,
            forward.address,
            reverse.address,
            self._packed.address,
            *at,
        )
        self._row_nbytes = 8 * hidden * (_FLOAT if self.precision == "float32" else 2)
        self._embeddings, self._rows, self._ids, self._offsets, self._order = (
            _Buffer(self._number) for _ in range(5)
        )
        self._bounds, self._divisors, self._states, self._of_windows, self._of_texts = (
            _Buffer(self._number) for _ in range(5)
        )
        self._projected, self._logits = _Buffer(self._number), _Buffer(self._number)
        self._table: Any = None
        self.table_rows = 0
        vocab_size = self.config.vocab_size
        if vocab_size * self._row_nbytes <= self.max_memory:
            self._table = extension.Memory(vocab_size * self._row_nbytes, self._number)
            for begin in range(0, vocab_size, _TABLE_CHUNK):
                rows = self._embedding[begin : begin + _TABLE_CHUNK]
                self._make_rows(rows, self._table.address + begin * self._row_nbytes)
            self.table_rows = vocab_size
        # Waits: the weights as they came, freed when this returns, have been read.
        self._bias.read(np.empty(1, np.float32))

    def _make_rows(self, embeddings: Floats, to: int) -> None:
        extension = _backend.cuda()
        extension.linear(
            "float32",
            "float32" if self.precision == "float32" else "float16",
            len(embeddings),
            8 * self.config.hidden_size,
            self.config.embedding_size,
            self._embeddings.holding(embeddings),
            self._input.address,
            self._bias.address,
            to,
            self._number,
            _STREAM,
        )

    def _check(self, ids: Ints, cu_seqlens: Ints) -> None:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size):
            raise ValueError(f"ids must be 0 to {self.config.vocab_size - 1}")
        _check_offsets("cu_seqlens", cu_seqlens, len(ids))

    def _scores(self, ids: Ints, cu_seqlens: Ints, out: Floats) -> None:
        if self.config.task == TEXT_CLASSIFICATION:
            raise ValueError("this student pools its states; class_logits has its scores")
        self._check(ids, cu_seqlens)
        if len(ids) == 0:
            return
        with self._lock:
            self._apply_output(self._encode(ids, cu_seqlens), self.precision, out)

    def class_logits(
        self,
        ids: NDArray[np.int32],
        cu_seqlens: NDArray[np.int32],
        cu_windows: NDArray[np.int32] | None = None,
        cores: NDArray[np.int32] | None = None,
    ) -> Floats:
        """See `Student.class_logits`."""
        if self.config.task != TEXT_CLASSIFICATION:
            raise ValueError("this student has no pooling; logits has its scores")
        if (cu_windows is None) != (cores is None):
            raise ValueError("cu_windows must be given with cores")
        self._check(ids, cu_seqlens)
        own = np.stack([cu_seqlens[:-1], cu_seqlens[1:]], axis=1)
        if cu_windows is None or cores is None:
            cu_windows, cores = np.arange(len(own) + 1, dtype=np.int32), own
        _check_offsets("cu_windows", cu_windows, len(own))
        ascending = np.stack([own[:, 0], cores[:, 0], cores[:, 1], own[:, 1]], axis=1)
        if (np.diff(ascending, axis=1) < 0).any():
            raise ValueError("cores must ascend within their windows")
        out = np.empty((len(cu_windows) - 1, len(self.config.labels)), np.float32)
        if len(out):
            with self._lock:
                self._classify(ids, cu_seqlens, cu_windows, cores, out)
        return out

    def _classify(
        self, ids: Ints, cu_seqlens: Ints, cu_windows: Ints, cores: Ints, out: Floats
    ) -> None:
        """Pools the core of each window, then the windows of each text; those without any are 0."""
        pieces = cores[:, 1] - cores[:, 0]
        # Windows with a core, and how many of them there are before each one.
        kept = pieces > 0
        before = np.concatenate([[0], np.cumsum(kept)])
        width = 2 * self.config.hidden_size
        states = self._of_windows.of(max(int(before[-1]) * width * _FLOAT, 16)).address
        for begin, stop in groups(cu_seqlens, MAX_PIECES):
            base, limit = int(cu_seqlens[begin]), int(cu_seqlens[stop])
            bounds = cores[begin:stop][kept[begin:stop]] - base
            if len(bounds):
                x = self._encode(ids[base:limit], cu_seqlens[begin : stop + 1] - base)
                to = states + int(before[begin]) * width * _FLOAT
                self._pool(self.precision, x, limit - base, bounds, to)
        texts = before[cu_windows]
        bounds = np.stack([texts[:-1], texts[1:]], axis=1)
        counts = np.diff(np.concatenate([[0], np.cumsum(pieces)])[cu_windows])
        pooled = self._of_texts.of(max(len(out) * width * _FLOAT, 16)).address
        self._pool("float32", states, int(before[-1]), bounds, pooled, counts)
        self._apply_output(pooled, "float32", out)

    def _pool(
        self, kind: str, x: int, rows: int, bounds: Any, out: int, counts: Any = None
    ) -> None:
        """Pools runs [n, 2] of `rows` states at x; a mean only where there are counts [n]."""
        mean = self.config.pooling == "mean"
        divisors = 0
        if mean and counts is not None:
            divisors = self._divisors.holding(np.maximum(counts, 1).astype(np.int32))
        _backend.cuda().pool_rows(
            "sum" if mean else self.config.pooling,
            kind,
            rows,
            len(bounds),
            2 * self.config.hidden_size,
            self._bounds.holding(bounds.astype(np.int32)),
            divisors,
            x,
            out,
            0,
            self._number,
            _STREAM,
        )

    def _encode(self, ids: Ints, cu_seqlens: Ints) -> int:
        """Address of the states [total, 2H] of some pieces, in the precision's type.

        In int8 they are levels, which the weights of the output layer take as they are.
        """
        extension, hidden = _backend.cuda(), self.config.hidden_size
        total, batch = len(ids), len(cu_seqlens) - 1
        table = self._table
        if table is None:
            distinct, rows = np.unique(ids, return_inverse=True)
            ids = rows.astype(np.int32)
            table = self._rows.of(len(distinct) * self._row_nbytes)
            self._make_rows(self._embedding[distinct], table.address)
        plan = _backend.lstm_plan(self.precision, False, hidden, batch, self._number)
        offsets = self._offsets.holding(np.asarray(cu_seqlens, np.int32))
        order = self._order.of(4 * batch).address
        nbytes = total * 2 * hidden * _STATE_NBYTES[self.precision]
        states = int(self._states.of(nbytes).address)
        extension.order_by_length(batch, total, offsets, order, self._number, _STREAM)
        extension.lstm_forward(
            self.precision,
            hidden,
            plan,
            batch,
            total,
            offsets,
            order,
            self._packed.address,
            table.address,
            "float32" if self.precision == "float32" else "float16",
            self._ids.holding(np.asarray(ids, np.int32)),
            states,
            0,
            0,
            self._number,
            _STREAM,
            0 if self._scales is None else self._scales.address,
        )
        return states

    def _apply_output(self, states: int, kind: str, out: Floats) -> None:
        """Writes the scores [n, C] of states [n, 2H] of a type."""
        logits = self._logits.of(out.nbytes)
        rows, columns, width = len(out), out.shape[1], self.config.projection_size
        if width:
            projected = self._projected.of(max(rows * width * _FLOAT, 16)).address
            self._apply_layer(
                0, kind, (rows, width, 2 * self.config.hidden_size), states, projected
            )
            self._apply_layer(1, "float32", (rows, columns, width), projected, logits.address)
        else:
            sizes = (rows, columns, 2 * self.config.hidden_size)
            self._apply_layer(0, kind, sizes, states, logits.address)
        logits.read(out)

    def _apply_layer(
        self, layer: int, kind: str, sizes: tuple[int, int, int], x: int, out: int
    ) -> None:
        """Writes [rows, N] of x [rows, K] of a type; of all layers but the last its GELU."""
        _backend.cuda().linear(
            kind,
            "float32",
            *sizes,
            x,
            self._layers[layer].address,
            self._layer_biases[layer].address,
            out,
            self._number,
            _STREAM,
            layer + 1 < len(self._layers),
        )

    @property
    def table_nbytes(self) -> int:
        """Bytes of the input table, on the device."""
        return self.table_rows * self._row_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, without the input table, on the device."""
        parts = [self._packed, self._input, self._bias, *self._layers, *self._layer_biases]
        parts += [] if self._scales is None else [self._scales]
        return sum(int(part.nbytes) for part in parts)
