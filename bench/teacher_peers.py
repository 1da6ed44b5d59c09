"""Teachers: transformers of usual sizes with random weights, in torch and in ONNX Runtime.

Speed does not depend on the weights. The heads say `O` whatever they are given, so that no teacher
spends time on entities that random weights would find everywhere.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
import transformers

from bench.onnx_models import bert_model, operators, quantize
from bench.onnx_sessions import bind, onnx_session

FloatArray = npt.NDArray[np.float32]
Logits = Callable[[], FloatArray]

_LABELS = ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER")


@dataclass(frozen=True)
class TeacherSize:
    """Size of a BERT: name in the tables, vocabulary, layers, heads, width."""

    name: str
    vocabulary: int
    layers: int
    heads: int
    width: int


MBERT = TeacherSize("mBERT-size teacher", 119_547, 12, 12, 768)
MINILM = TeacherSize("MiniLM-L6-H384", 30_522, 6, 12, 384)


class TeacherPeers:
    """One teacher in several runtimes; use as a context manager, its files are large.

    Args:
        size: of the model.
        threads: of every runtime.
    """

    def __init__(self, size: TeacherSize, threads: int) -> None:
        self.size = size
        self._threads = threads
        self.model = _random_bert(size)
        self._folder = Path(tempfile.mkdtemp(prefix="bench-teacher-"))
        self._int8: Path | None = None
        self._float32: Path | None = None

    def __enter__(self) -> TeacherPeers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Deletes the files."""
        shutil.rmtree(self._folder)

    @property
    def parameters(self) -> int:
        """Number of them."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def torch(self, ids: npt.NDArray[np.int64], bfloat16: bool = False) -> Logits:
        """Logits [B, T, C] of a batch without padding, as transformers runs it by default."""
        inputs = torch.from_numpy(ids)

        def run() -> FloatArray:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, bfloat16):
                logits = self.model(input_ids=inputs).logits
            return logits.float().numpy()  # type: ignore[no-any-return]

        return run

    def onnx(self, ids: npt.NDArray[np.int64], int8: bool) -> dict[str, Logits]:
        """Logits [B, T, C] of a batch without padding."""
        feed = {"ids": ids.astype(np.int32), "mask": np.ones(ids.shape, np.int32)}
        return {
            name: bind(
                onnx_session(self.onnx_file(int8), self._threads, spin),
                feed,
                "logits",
                np.empty((*ids.shape, len(_LABELS)), np.float32),
            )
            for name, spin in (("spinning", True), ("not spinning", False))
        }

    @contextlib.contextmanager
    def saved(self, tokenizer: Any) -> Iterator[Path]:
        """The teacher as a folder of transformers, for as long as it is needed."""
        folder = self._folder / "transformers"
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder
        shutil.rmtree(folder)

    def onnx_file(self, int8: bool) -> Path:
        """The teacher as an ONNX file, made when first asked for."""
        if self._float32 is None:
            self._float32 = self._folder / "float32.onnx"
            state = {name: value.numpy() for name, value in self.model.state_dict().items()}
            config = self.model.config
            model = bert_model(state, self.size.heads, config.layer_norm_eps)
            onnx.save_model(model, str(self._float32))
            del model, state
            gc.collect()
        if not int8:
            return self._float32
        if self._int8 is None:
            self._int8 = self._folder / "int8.onnx"
            quantize(
                self._float32,
                self._int8,
                op_types_to_quantize=["MatMul", "Attention"],
                reduce_range=True,
            )
            found = operators(self._int8)
            assert "QAttention" in found, sorted(found)
            assert not {"MatMul", "Attention"} & found, sorted(found)
        return self._int8


def _random_bert(size: TeacherSize) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            id2label=dict(enumerate(_LABELS)),
        )
        model: Any = transformers.BertForTokenClassification(config)
    with torch.no_grad():
        model.classifier.bias[0] = 100.0
    return model.eval().requires_grad_(False)
