"""Sessions of ONNX Runtime, set up as they are fastest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

FloatArray = npt.NDArray[np.float32]


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
