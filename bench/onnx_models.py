"""The models of both sides as ONNX graphs, in float32 and quantised to int8.

Built by hand rather than exported, so that each is the graph its runtime likes best: the BiLSTM as
one LSTM node, the transformer in the fused operators that ONNX Runtime's own optimiser for BERT
would find.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

FloatArray = npt.NDArray[np.float32]

_MICROSOFT = "com.microsoft"


def _model(
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    constants: Mapping[str, npt.NDArray[Any]],
) -> Any:
    graph = helper.make_graph(
        nodes,
        "bench",
        inputs,
        outputs,
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="bench")


def _gates(rows: FloatArray) -> FloatArray:
    """Gate rows in ONNX's order i, o, f, c from torch's i, f, g, o."""
    i, f, g, o = np.split(rows, 4)
    return np.concatenate([i, o, f, g])


def _lstm_constants(weights: Sequence[FloatArray]) -> dict[str, FloatArray]:
    """Inputs W, R and B of an LSTM node from torch's 8 parameters."""
    w_ih, w_hh, b_ih, b_hh = (
        np.stack([_gates(forward), _gates(backward)])
        for forward, backward in zip(weights[:4], weights[4:], strict=True)
    )
    return {"w": w_ih, "r": w_hh, "b": np.concatenate([b_ih, b_hh], axis=1)}


def lstm_model(weights: Sequence[FloatArray]) -> bytes:
    """A BiLSTM as a model of one node.

    Input x [T, B, I], output y [T, 2, B, H]: ONNX's own layouts, with no transpose around them.

    Args:
        weights: w_ih [4H, I], w_hh [4H, H], b_ih, b_hh [4H] of the forward direction, then those
            of the reverse, gates in torch's order.
    """
    hidden = weights[1].shape[1]
    node = helper.make_node(
        "LSTM", ["x", "w", "r", "b"], ["y"], direction="bidirectional", hidden_size=hidden
    )
    model = _model(
        [node],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", weights[0].shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 2, "B", hidden])],
        _lstm_constants(weights),
    )
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def _linear(layer: str, x: str, out: str) -> list[Any]:
    """Nodes of a linear layer; its constants are `{layer}_weight` and `{layer}_bias`."""
    return [
        helper.make_node("MatMul", [x, f"{layer}_weight"], [f"{layer}_product"], name=layer),
        helper.make_node("Add", [f"{layer}_product", f"{layer}_bias"], [out]),
    ]


def _gelu(x: str, out: str) -> list[Any]:
    """Nodes of a GELU in its tanh form, as the optimisers of the runtimes look for it."""
    steps = [
        ("Mul", [x, x], "square"),
        ("Mul", ["square", x], "cube"),
        ("Mul", ["cube", "gelu_cubic"], "cubic"),
        ("Add", [x, "cubic"], "sum"),
        ("Mul", ["sum", "gelu_linear"], "inner"),
        ("Tanh", ["inner"], "tanh"),
        ("Add", ["tanh", "gelu_one"], "share"),
        ("Mul", [x, "share"], "double"),
        ("Mul", ["double", "gelu_half"], out),
    ]
    return [helper.make_node(operator, inputs, [to]) for operator, inputs, to in steps]


def student_model(tensors: Mapping[str, FloatArray], ragged: bool) -> bytes:
    """A student: embedding, BiLSTM, perhaps a projection with GELU, output layer.

    Inputs ids int64 [T, B] and, if `ragged`, lengths int32 [B]; output logits [T, B, C].

    Args:
        tensors: as of a model folder.
        ragged: whether sequences of a batch may differ in length.
    """
    weights = [
        tensors[f"bilstm.{name}_l0{suffix}"]
        for suffix in ("", "_reverse")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    hidden = weights[1].shape[1]
    constants: dict[str, npt.NDArray[Any]] = {
        "table": tensors["embedding.weight"],
        **_lstm_constants(weights),
        "rows": np.array([0, 0, 2 * hidden], np.int64),
    }
    layers = [name for name in ("projection", "output") if f"{name}.weight" in tensors]
    for name in layers:
        constants[f"{name}_weight"] = tensors[f"{name}.weight"].T
        constants[f"{name}_bias"] = tensors[f"{name}.bias"]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node(
            "LSTM",
            ["x", "w", "r", "b", "lengths"] if ragged else ["x", "w", "r", "b"],
            ["y"],
            name="lstm",
            direction="bidirectional",
            hidden_size=hidden,
        ),
        helper.make_node("Transpose", ["y"], ["by_time"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["by_time", "rows"], ["states"]),
    ]
    if "projection" in layers:
        gelu = {"linear": (2 / np.pi) ** 0.5, "cubic": 0.044715, "one": 1.0, "half": 0.5}
        constants |= {f"gelu_{name}": np.array(v, np.float32) for name, v in gelu.items()}
        nodes += [*_linear("projection", "states", "projected"), *_gelu("projected", "g")]
    nodes += _linear("output", "g" if "projection" in layers else "states", "logits")
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["T", "B"])]
    if ragged:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]))
    tags = len(tensors["output.bias"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", "B", tags])
    model = _model(nodes, inputs, [output], constants)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def bert_model(state: Mapping[str, FloatArray], heads: int, epsilon: float) -> Any:
    """A BERT token classifier in ONNX Runtime's fused operators.

    Inputs ids and mask int32 [B, T] (mask 1 on pieces, 0 on padding behind them), output logits
    [B, T, C].

    Args:
        state: transformers' `BertForTokenClassification.state_dict()` as arrays.
        heads: attention heads.
        epsilon: of the layer norms.
    """
    constants: dict[str, npt.NDArray[Any]] = {}
    nodes: list[Any] = []

    def constant(name: str, value: npt.NDArray[Any]) -> str:
        constants[name] = value
        return name

    def weight(name: str) -> str:
        """A parameter of the state; matrices are turned to [in, out]."""
        value = state[name]
        return constant(name, value.T if value.ndim == 2 else value)

    def norm(name: str) -> list[str]:
        return [weight(f"{name}.LayerNorm.weight"), weight(f"{name}.LayerNorm.bias")]

    def dense(source: str, name: str, target: str) -> str:
        nodes.append(helper.make_node("MatMul", [source, weight(name)], [target], name=target))
        return target

    def fused(operator: str, inputs: list[str], target: str, **attributes: Any) -> str:
        nodes.append(
            helper.make_node(
                operator, inputs, [target], name=target, domain=_MICROSOFT, **attributes
            )
        )
        return target

    tables = [
        constant(name, state[f"bert.embeddings.{name}.weight"])
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    nodes.append(
        helper.make_node(
            "EmbedLayerNormalization",
            ["ids", "types", *tables, *norm("bert.embeddings"), "mask"],
            ["embedded", "mask_index"],
            name="embedding",
            domain=_MICROSOFT,
            epsilon=epsilon,
        )
    )
    nodes.insert(0, helper.make_node("Sub", ["ids", "ids"], ["types"]))
    hidden = "embedded"
    for layer in range(sum(name.endswith("attention.self.query.weight") for name in state)):
        prefix, short = f"bert.encoder.layer.{layer}", f"layer{layer}"
        parts = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = constant(
            f"{short}.qkv", np.concatenate([state[f"{part}.weight"].T for part in parts], 1)
        )
        bias = constant(
            f"{short}.qkv_bias", np.concatenate([state[f"{part}.bias"] for part in parts])
        )
        attended = fused(
            "Attention", [hidden, qkv, bias, "mask_index"], f"{short}.attention", num_heads=heads
        )
        output = f"{prefix}.attention.output"
        projected = dense(attended, f"{output}.dense.weight", f"{short}.projected")
        inner = fused(
            "SkipLayerNormalization",
            [projected, hidden, *norm(output), weight(f"{output}.dense.bias")],
            f"{short}.inner",
            epsilon=epsilon,
        )
        wide = dense(inner, f"{prefix}.intermediate.dense.weight", f"{short}.wide")
        active = fused(
            "BiasGelu", [wide, weight(f"{prefix}.intermediate.dense.bias")], f"{short}.active"
        )
        narrow = dense(active, f"{prefix}.output.dense.weight", f"{short}.narrow")
        hidden = fused(
            "SkipLayerNormalization",
            [
                narrow, inner, *norm(f"{prefix}.output"), weight(f"{prefix}.output.dense.bias"),
            ],
            f"{short}.output",
            epsilon=epsilon,
        )  # fmt: skip
    scores = dense(hidden, "classifier.weight", "scores")
    nodes.append(helper.make_node("Add", [scores, weight("classifier.bias")], ["logits"]))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT32, ["B", "T"])
        for name in ("ids", "mask")
    ]
    tags = len(state["classifier.bias"])
    output_info = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", tags])
    return _model(nodes, inputs, [output_info], constants)


def quantize(model: bytes | Path, target: Path | None = None, **options: Any) -> bytes:
    """Dynamic int8 quantisation by ONNX Runtime's own tool.

    Args:
        model: serialised model, or a file of one.
        target: file to write; in a temporary folder if None.
        options: of `onnxruntime.quantization.quantize_dynamic`.

    Returns:
        The serialised quantised model, empty where `target` is given.
    """
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, bytes):
            source = Path(folder, "float32.onnx")
            source.write_bytes(model)
        else:
            source = model
        path = target or Path(folder, "int8.onnx")
        logging.disable(logging.WARNING)  # it recommends shapes that its LSTM has no use for
        try:
            quantize_dynamic(
                source, path, extra_options={"DefaultTensorType": TensorProto.FLOAT}, **options
            )
        finally:
            logging.disable(logging.NOTSET)
        return b"" if target else path.read_bytes()


def operators(model: bytes | Path) -> set[str]:
    """Names of the operators of a model."""
    if isinstance(model, Path):
        loaded = onnx.load(str(model), load_external_data=False)
    else:
        loaded = onnx.load_from_string(model)
    return {node.op_type for node in loaded.graph.node}
