"""The student in other runtimes: piece ids to logits, on padded batches.

Padding and sorting the pieces is done beforehand and is not in the peers' time. All arrays are
time-major: torch's default layout and the only one ONNX Runtime's LSTM takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench.onnx_models import operators, quantize, student_model
from bench.onnx_sessions import bind, onnx_session
from bench.peers import (
    ONNX_RUNTIME,
    ONNX_RUNTIME_INT8,
    OPENVINO,
    OPENVINO_BF16,
    TORCH,
    openvino_compile,
    openvino_has_bfloat16,
)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
# Runs all batches, returns logits [T, B, C] of each.
Logits = Callable[[], list[FloatArray]]

# How sequences of different lengths come into batches.
GIVEN, BY_LENGTH, EQUAL = "as they come", "by length", "equal lengths"

_SPINNING = {"spinning": True, "not spinning": False}
_AGREEMENT_SLACK = 0.02
_REST_SECONDS = 0.05


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences padded to the longest of them.

    Attributes:
        ids: int64 [T, B], 0 behind the end of a sequence.
        lengths: int32 [B].
        rows: for each sequence the indices of its pieces in the ragged batch.
    """

    ids: npt.NDArray[np.int64]
    lengths: IntArray
    rows: list[npt.NDArray[np.int64]]


def padded_batches(
    ids: IntArray, cu_seqlens: IntArray, size: int, order: str = GIVEN
) -> list[PaddedBatch]:
    """Cuts a ragged batch into padded ones; empty sequences are left out.

    Args:
        ids: int32 [total].
        cu_seqlens: int32 [B + 1].
        size: most sequences of a batch.
        order: `GIVEN`, `BY_LENGTH`, or `EQUAL`: a batch holds one length only and no padding.
    """
    lengths = np.diff(cu_seqlens)
    chosen = np.flatnonzero(lengths)
    if order != GIVEN:
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    groups = [chosen]
    if order == EQUAL:
        groups = np.split(chosen, np.flatnonzero(np.diff(lengths[chosen])) + 1)
    parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    return [_padded(ids, cu_seqlens, part) for part in parts]


def _padded(ids: IntArray, cu_seqlens: IntArray, chosen: npt.NDArray[np.int64]) -> PaddedBatch:
    rows = [np.arange(cu_seqlens[i], cu_seqlens[i + 1], dtype=np.int64) for i in chosen]
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((int(lengths.max()), len(chosen)), np.int64)
    for column, row in enumerate(rows):
        padded[: len(row), column] = ids[row]
    return PaddedBatch(padded, lengths, rows)


def ragged_logits(outputs: Sequence[FloatArray], batches: Sequence[PaddedBatch]) -> FloatArray:
    """Logits [total, C] in the order of the ragged batch."""
    total = sum(int(batch.lengths.sum()) for batch in batches)
    out = np.empty((total, outputs[0].shape[2]), np.float32)
    for output, batch in zip(outputs, batches, strict=True):
        for column, row in enumerate(batch.rows):
            out[row] = output[: len(row), column]
    return out


def same_tags(logits: FloatArray, expected: FloatArray) -> float:
    """Share of the pieces with the same best tag."""
    return float(np.mean(logits.argmax(1) == expected.argmax(1)))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _TorchStudent(nn.Module):
    def __init__(self, tensors: Mapping[str, FloatArray]) -> None:
        super().__init__()
        table, output = tensors["embedding.weight"], tensors["output.weight"]
        hidden = tensors["bilstm.weight_hh_l0"].shape[1]
        self.embedding = nn.Embedding(*table.shape)
        self.bilstm = nn.LSTM(table.shape[1], hidden, bidirectional=True)
        projected = "projection.weight" in tensors
        self.projection = nn.Linear(2 * hidden, output.shape[1]) if projected else None
        self.output = nn.Linear(output.shape[1], output.shape[0])
        state = {name: torch.from_numpy(tensors[name]) for name in self.state_dict()}
        self.load_state_dict(state)
        self.eval()

    def _logits(self, states: Tensor) -> Tensor:
        if self.projection is not None:
            states = nn.functional.gelu(self.projection(states), approximate="tanh")
        return self.output(states)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        return self._logits(self.bilstm(self.embedding(ids))[0])

    def forward_packed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        embedded = pack_padded_sequence(self.embedding(ids), lengths, enforce_sorted=False)
        states, _ = self.bilstm(embedded)
        logits = PackedSequence(
            self._logits(states.data),
            states.batch_sizes,
            states.sorted_indices,
            states.unsorted_indices,
        )
        return pad_packed_sequence(logits)[0]


def _by_torch(model: _TorchStudent, batches: Sequence[PaddedBatch], packed: bool) -> Logits:
    inputs = [(torch.from_numpy(b.ids), torch.from_numpy(b.lengths).long()) for b in batches]

    def run() -> list[FloatArray]:
        with torch.inference_mode():
            return [
                (model.forward_packed(ids, lengths) if packed else model(ids)).numpy()
                for ids, lengths in inputs
            ]

    return run


def _onnx_inputs(batch: PaddedBatch, ragged: bool) -> dict[str, npt.NDArray[np.int64] | IntArray]:
    return {"ids": batch.ids, "lengths": batch.lengths} if ragged else {"ids": batch.ids}


def _by_onnx(
    model: bytes, batches: Sequence[PaddedBatch], tags: int, ragged: bool, threads: int, spin: bool
) -> Logits:
    session = onnx_session(model, threads, spin)
    runs = [
        bind(
            session,
            _onnx_inputs(batch, ragged),
            "logits",
            np.empty((*batch.ids.shape, tags), np.float32),
        )
        for batch in batches
    ]
    return lambda: [run() for run in runs]


def _by_openvino(
    model: bytes, batches: Sequence[PaddedBatch], threads: int, precision: str, pinned: bool
) -> Logits:
    import openvino

    # One shape alone is one it can plan for.
    shapes = {"ids": list(batches[0].ids.shape)} if len(batches) == 1 else None
    request = openvino_compile(model, threads, precision, pinned, shapes).create_infer_request()
    feeds = [{"ids": openvino.Tensor(batch.ids, shared_memory=True)} for batch in batches]

    def run() -> list[FloatArray]:
        # Its output tensor is used again by the next batch, so each is copied, as a caller would.
        return [request.infer(feed, share_inputs=True)["logits"] for feed in feeds]

    return run


def _int8_candidates(model: bytes) -> dict[str, bytes]:
    """Quantised variants of a student whose LSTM and output layer really became int8."""
    from onnxruntime.quantization import QuantType

    out = {}
    for name, options in {
        "signed weights": {"weight_type": QuantType.QInt8},
        "signed weights by channel": {"weight_type": QuantType.QInt8, "per_channel": True},
        "signed 7-bit weights": {"weight_type": QuantType.QInt8, "reduce_range": True},
        "signed 7-bit weights by channel": {
            "weight_type": QuantType.QInt8, "reduce_range": True, "per_channel": True,
        },
        "unsigned weights": {"weight_type": QuantType.QUInt8},
    }.items():  # fmt: skip
        quantized = quantize(model, op_types_to_quantize=["LSTM", "MatMul"], **options)
        found = operators(quantized)
        if "DynamicQuantizeLSTM" in found and "LSTM" not in found and "MatMul" not in found:
            out[name] = quantized
    assert out, "ONNX Runtime quantised no LSTM"
    return out


class StudentPeers:
    """One student in every other runtime; models are built and quantised once.

    Args:
        tensors: as of a model folder.
        threads: of every runtime.
    """

    def __init__(self, tensors: Mapping[str, FloatArray], threads: int) -> None:
        self._tensors = tensors
        self._threads = threads
        self._tags = len(tensors["output.bias"])
        self._torch = _TorchStudent(tensors)
        # By whether sequences of a batch may differ in length.
        self._models: dict[bool, bytes] = {}
        self._int8_models: dict[bool, dict[str, bytes]] = {}

    def _model(self, ragged: bool) -> bytes:
        if ragged not in self._models:
            self._models[ragged] = student_model(self._tensors, ragged)
        return self._models[ragged]

    def _int8(self, ragged: bool) -> dict[str, bytes]:
        if ragged not in self._int8_models:
            self._int8_models[ragged] = _int8_candidates(self._model(ragged))
        return self._int8_models[ragged]

    def _fastest_int8(
        self, batches: Sequence[PaddedBatch], ragged: bool, expected: FloatArray
    ) -> tuple[str, bytes]:
        """The int8 variant that runs these batches fastest among those that compute well.

        Without VNNI, full-range weights overflow ONNX Runtime's 16-bit sums and tags go wrong, so
        a variant must agree with float32 nearly as often as the best of them.
        """
        runs = {
            name: _by_onnx(model, batches, self._tags, ragged, self._threads, True)
            for name, model in self._int8(ragged).items()
        }
        agreement = {
            name: same_tags(ragged_logits(run(), batches), expected) for name, run in runs.items()
        }
        seconds: dict[str, float] = {}
        for name, run in runs.items():
            if agreement[name] >= max(agreement.values()) - _AGREEMENT_SLACK:
                time.sleep(_REST_SECONDS)
                seconds[name] = min(_timed(run) for _ in range(5))
        best = min(seconds, key=seconds.__getitem__)
        return best, self._int8(ragged)[best]

    def for_text(self, ids: IntArray, cu_seqlens: IntArray, expected: FloatArray) -> bytes:
        """The int8 model for batches of these sequences, sorted by length."""
        batches = padded_batches(ids, cu_seqlens, 32, BY_LENGTH)
        return self._fastest_int8(batches, True, expected)[1]

    def torch(self, batches: Sequence[PaddedBatch], ragged: bool) -> dict[str, Logits]:
        """Padded batches, except where lengths differ: the reverse direction would go wrong."""
        out = {"packed": _by_torch(self._torch, batches, packed=True)}
        if not ragged:
            out["padded"] = _by_torch(self._torch, batches, packed=False)
        return out

    def onnx(self, batches: Sequence[PaddedBatch], ragged: bool) -> dict[str, Logits]:
        """ONNX Runtime in float32."""
        return {
            name: _by_onnx(self._model(ragged), batches, self._tags, ragged, self._threads, spin)
            for name, spin in _SPINNING.items()
        }

    def onnx_int8(
        self, batches: Sequence[PaddedBatch], ragged: bool, expected: FloatArray
    ) -> dict[str, Logits]:
        """ONNX Runtime, dynamically quantised, in its fastest variant."""
        variant, model = self._fastest_int8(batches, ragged, expected)
        return {
            f"{variant}, {name}": _by_onnx(model, batches, self._tags, ragged, self._threads, spin)
            for name, spin in _SPINNING.items()
        }

    def openvino(self, batches: Sequence[PaddedBatch], precision: str) -> dict[str, Logits]:
        """OpenVINO in "f32" or "bf16".

        Only for batches without padding: given lengths, its reverse direction computes something
        else.
        """
        return {
            name: _by_openvino(self._model(False), batches, self._threads, precision, pinned)
            for name, pinned in (("pinned", True), ("not pinned", False))
        }

    def all(
        self, batches: Sequence[PaddedBatch], ragged: bool, expected: FloatArray
    ) -> dict[str, dict[str, Logits]]:
        """Every peer with its settings.

        Args:
            batches: what they are to run.
            ragged: whether lengths within a batch may differ.
            expected: logits [total, C] in float32, by which int8 variants are judged.
        """
        peers = {
            TORCH: self.torch(batches, ragged),
            ONNX_RUNTIME: self.onnx(batches, ragged),
            ONNX_RUNTIME_INT8: self.onnx_int8(batches, ragged, expected),
        }
        if not ragged:
            peers[OPENVINO] = self.openvino(batches, "f32")
            if openvino_has_bfloat16():
                peers[OPENVINO_BF16] = self.openvino(batches, "bf16")
        return peers
