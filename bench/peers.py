"""The other side of each benchmark: the same computation by the strongest rivals at hand.

Each peer is given its favourite layout (time-major, contiguous), its weights prepared beforehand
and as many threads as ours, so that a ratio is about the kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import nn

from xdistil_fast import _core

TORCH = "torch.nn.LSTM"
ONNX_RUNTIME = "ONNX Runtime"
TORCH_CRF = "pytorch-crf"
TORCH_LSTM_CRF = "torch.nn.LSTM + pytorch-crf"

FloatArray = npt.NDArray[np.float32]


def versions() -> dict[str, str]:
    """Of everything that took part."""
    peers = ("torch", "onnxruntime", "onnx", "pytorch-crf", "numpy", "tokenizers")
    return {"xdistil-fast": _core.__version__} | {name: metadata.version(name) for name in peers}


def random_lstm(input_size: int, hidden_size: int, seed: int = 0) -> nn.LSTM:
    """A BiLSTM with torch's usual start, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.LSTM(input_size, hidden_size, bidirectional=True).eval()


def lstm_weights(lstm: nn.LSTM) -> list[FloatArray]:
    """The 8 parameters in torch's order: w_ih, w_hh, b_ih, b_hh, then those of the reverse."""
    return [parameter.detach().numpy() for parameter in lstm.parameters()]


def _onnx_gates(rows: FloatArray) -> FloatArray:
    """Gate rows in ONNX's order i, o, f, c from torch's i, f, g, o."""
    i, f, g, o = np.split(rows, 4)
    return np.concatenate([i, o, f, g])


def onnx_lstm(lstm: nn.LSTM) -> bytes:
    """The same BiLSTM as an ONNX model of one node.

    Input x [T, B, I], output y [T, 2, B, H]: ONNX's own layouts, with no transpose around them.
    """
    w_ih, w_hh, b_ih, b_hh = (
        np.stack([_onnx_gates(forward), _onnx_gates(backward)])
        for forward, backward in zip(lstm_weights(lstm)[:4], lstm_weights(lstm)[4:], strict=True)
    )
    node = helper.make_node(
        "LSTM",
        ["x", "w", "r", "b"],
        ["y"],
        direction="bidirectional",
        hidden_size=lstm.hidden_size,
    )
    graph = helper.make_graph(
        [node],
        "bilstm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", lstm.input_size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 2, "B", lstm.hidden_size])],
        [
            onnx.numpy_helper.from_array(w_ih, "w"),
            onnx.numpy_helper.from_array(w_hh, "r"),
            onnx.numpy_helper.from_array(np.concatenate([b_ih, b_hh], axis=1), "b"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="bench"
    )
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def onnx_forward(
    lstm: nn.LSTM, x: FloatArray, threads: int, spinning: bool
) -> tuple[Callable[[], object], FloatArray]:
    """A call that runs the BiLSTM in ONNX Runtime, and the array that it fills.

    Args:
        lstm: the model.
        x: [T, B, I].
        threads: intra-op threads.
        spinning: whether idle workers spin; which is faster depends on the machine.

    Returns:
        The call, and the output y [T, 2, B, H], bound once and written by each call.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session = onnxruntime.InferenceSession(
        onnx_lstm(lstm), options, providers=["CPUExecutionProvider"]
    )
    y = np.empty((x.shape[0], 2, x.shape[1], lstm.hidden_size), np.float32)
    binding = session.io_binding()
    for bind, name, array in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    return lambda: session.run_with_iobinding(binding), y
