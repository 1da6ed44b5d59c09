"""Names of the peers, their versions, and how ONNX Runtime and OpenVINO are set up.

Every peer is given its favourite layout, its weights prepared beforehand, as many threads as ours,
and whichever of its settings turns out fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from bench.onnx_models import lstm_model
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


def onnx_session(model: bytes | Path, threads: int, spinning: bool) -> Any:
    """A session of ONNX Runtime on the CPU.

    Args:
        model: serialised model, or a file of one.
        threads: intra-op threads.
        spinning: whether idle workers spin; which is faster depends on the machine.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def bind(
    session: Any, inputs: dict[str, npt.NDArray[Any]], output: str, out: FloatArray
) -> Callable[[], FloatArray]:
    """A call that runs a session on these inputs into `out`; nothing is copied or allocated."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output(output, "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def run() -> FloatArray:
        # The binding holds addresses only: the arrays must live as long as this call.
        _ = inputs
        session.run_with_iobinding(binding)
        return out

    return run


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
    model: bytes, threads: int, precision: str, shapes: dict[str, list[int]] | None = None
) -> Any:
    """A model compiled by OpenVINO for the CPU, for the latency of one caller.

    Args:
        model: serialised ONNX model.
        threads: of inference.
        precision: "f32" or "bf16".
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
    }
    return core.compile_model(read, "CPU", settings)
