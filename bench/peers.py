"""Names of the peers, their versions, and how they are set up.

Every peer is given its favourite layout, its weights prepared beforehand, as many threads as ours,
and whichever of its settings turns out fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bench.onnx_models import lstm_model
from bench.onnx_sessions import bind, onnx_session
from xdistil_fast import _core

TORCH = "torch"
ONNX_RUNTIME = "ONNX Runtime"
ONNX_RUNTIME_INT8 = "ONNX Runtime int8"
OPENVINO = "OpenVINO"
OPENVINO_BF16 = "OpenVINO bfloat16"
TORCH_LSTM = "torch.nn.LSTM"
TORCH_CRF = "pytorch-crf"
TORCH_LSTM_CRF = "torch.nn.LSTM + pytorch-crf"

FloatArray = npt.NDArray[np.float32]

_PACKAGES = (
    "torch", "onnxruntime", "onnx", "openvino", "transformers", "tokenizers", "spacy",
    "pytorch-crf", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of everything that took part."""
    found = {"xdistil-fast": _core.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def random_lstm(input_size: int, hidden_size: int, seed: int = 0) -> nn.LSTM:
    """A BiLSTM with torch's usual start, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.LSTM(input_size, hidden_size, bidirectional=True).eval()


def lstm_weights(lstm: nn.LSTM) -> list[FloatArray]:
    """The 8 parameters in torch's order: w_ih, w_hh, b_ih, b_hh, then those of the reverse."""
    return [parameter.detach().numpy() for parameter in lstm.parameters()]


def onnx_forward(
    lstm: nn.LSTM, x: FloatArray, threads: int, spinning: bool
) -> Callable[[], FloatArray]:
    """A call that runs the BiLSTM alone in ONNX Runtime.

    Args:
        lstm: the model.
        x: [T, B, I].
        threads: intra-op threads.
        spinning: as for `onnx_session`.

    Returns:
        The call; its result y [T, 2, B, H] is bound once and written by each call.
    """
    session = onnx_session(lstm_model(lstm_weights(lstm)), threads, spinning)
    y = np.empty((x.shape[0], 2, x.shape[1], lstm.hidden_size), np.float32)
    return bind(session, {"x": x}, "y", y)


def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU; else it runs float32 whatever is asked."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_compile(
    model: bytes,
    threads: int,
    precision: str,
    pinned: bool,
    shapes: dict[str, list[int]] | None = None,
) -> Any:
    """A model compiled by OpenVINO for the CPU, for the latency of one caller.

    Args:
        model: serialised ONNX model.
        threads: of inference.
        precision: "f32" or "bf16".
        pinned: whether its threads are bound to cores.
        shapes: of the inputs; left open where None.
    """
    import openvino

    core = openvino.Core()
    read = core.read_model(model=model, weights=b"")
    if shapes is not None:
        read.reshape(shapes)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": pinned,
    }
    return core.compile_model(read, "CPU", settings)
