"""BiLSTM forward, inference, dense batches: our kernel, torch.nn.LSTM, ONNX Runtime."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.duel import Case, Turns, duel
from bench.peers import ONNX_RUNTIME, TORCH_LSTM, lstm_weights, onnx_forward, random_lstm
from xdistil_fast import _core

# In batch no slower than the better of the two; one sentence at least 3 times torch.
_BATCH_AIMS = {TORCH_LSTM: 1.0, ONNX_RUNTIME: 1.0}
_SENTENCE_AIMS = {TORCH_LSTM: 3.0}


@pytest.mark.parametrize(
    ("batch", "length", "aims"),
    [(32, 128, _BATCH_AIMS), (1, 32, _SENTENCE_AIMS)],
    ids=["32x128", "1x32"],
)
@pytest.mark.parametrize(
    ("input_size", "hidden_size"), [(100, 200), (300, 600)], ids=["E100-H200", "E300-H600"]
)
def bench_bilstm_forward(
    benchmark: BenchmarkFixture,
    turns: Turns,
    threads: int,
    input_size: int,
    hidden_size: int,
    batch: int,
    length: int,
    aims: dict[str, float],
) -> None:
    lstm = random_lstm(input_size, hidden_size)
    random = np.random.default_rng(1)
    x = random.standard_normal((batch, length, input_size), dtype=np.float32)
    time_major = np.ascontiguousarray(x.transpose(1, 0, 2))
    total = batch * length

    precisions = {"float32": False}
    if _core.multiplies_bfloat16():
        precisions["bfloat16"] = True
    packed = {
        name: _core.BiLSTMWeights(lstm_weights(lstm), bfloat16=bfloat16)
        for name, bfloat16 in precisions.items()
    }
    values = x.reshape(total, input_size)
    cu_seqlens = np.arange(0, total + 1, length, dtype=np.int32)
    out = np.empty((total, 2 * hidden_size), np.float32)

    def ours(precision: str) -> None:
        _core.bilstm_forward(packed[precision], values, cu_seqlens, out, threads)

    torch_x = torch.from_numpy(time_major)

    def by_torch() -> torch.Tensor:
        with torch.inference_mode():
            return lstm(torch_x)[0]  # type: ignore[no-any-return]

    by_onnx = {
        name: onnx_forward(lstm, time_major, threads, spinning)
        for name, spinning in (("spinning", True), ("not spinning", False))
    }

    exact = by_torch().numpy()
    if "bfloat16" in packed:
        ours("bfloat16")
        rounded = out.reshape(batch, length, 2 * hidden_size).transpose(1, 0, 2)
        assert np.linalg.norm(rounded - exact) <= 2.0**-7 * np.linalg.norm(exact)
    ours("float32")
    padded = out.reshape(batch, length, 2 * hidden_size).transpose(1, 0, 2)
    np.testing.assert_allclose(padded, exact, rtol=1e-4, atol=2e-6)
    for run in by_onnx.values():
        directions = run().transpose(0, 2, 1, 3).reshape(padded.shape)
        np.testing.assert_allclose(padded, directions, rtol=1e-4, atol=2e-6)

    case = Case(
        group="kernels",
        task="BiLSTM forward",
        batch=batch,
        length=length,
        pieces=total,
        sizes={"E": input_size, "H": hidden_size},
        threads=threads,
        aims={"float32": aims},
    )
    duel(
        benchmark,
        case,
        {precision: partial(ours, precision) for precision in packed},
        {TORCH_LSTM: {"": by_torch}, ONNX_RUNTIME: by_onnx},
        turns,
    )
