"""The teacher's part of `xdistil bench`: transformers on torch, and ONNX Runtime if installed."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from xdistil_fast.commands import footprint
from xdistil_fast.commands.bench import TASKS, Latency, Step, latency
from xdistil_fast.train.teacher import Teacher, quiet_transformers

_BATCH = 16
_TOLERANCE = 1e-3

Feed = tuple[NDArray[np.int64], NDArray[np.int64]]


def load_pipeline(teacher: str, threads: int) -> Callable[[list[str]], object]:
    """A `footprint.Factory` of transformers' pipeline."""
    torch.set_num_threads(threads)
    return _pipeline(Teacher.from_pretrained(teacher, "cpu"))


def _pipeline(teacher: Teacher) -> Callable[[list[str]], object]:
    with quiet_transformers():
        pipeline = transformers.pipeline(
            "token-classification",
            model=teacher.model,
            tokenizer=teacher.hf_tokenizer,
            aggregation_strategy="simple",
            device="cpu",
        )
    return lambda texts: pipeline(texts, batch_size=_BATCH)


class TeacherBench:
    """A teacher to be measured, in float32 on the CPU.

    Args:
        name: folder or Hub id.
        threads: of torch and of ONNX Runtime.

    Raises:
        ValueError: it does not load; see `Teacher.from_pretrained`.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._threads = threads
        torch.set_num_threads(threads)
        self._teacher = Teacher.from_pretrained(name, "cpu")

    count = 9

    def steps(self, texts: Sequence[str], seconds: float) -> Iterator[Step]:
        """Measures in torch, and in ONNX Runtime if installed.

        Args:
            texts: to tag; longer ones than the model takes are cut.
            seconds: per figure.
        """
        teacher = self._teacher
        name = "teacher, torch float32"
        encodings = teacher.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = [np.array(e.ids[: teacher.max_pieces], np.int64) for e in encodings]
        pieces = [len(row) for row in ids]
        feeds = [teacher.collate(ids[i : i + _BATCH]) for i in range(0, len(ids), _BATCH)]
        singles = [teacher.collate([row]) for row in ids]
        yield from _logits_latencies(name, self._torch, feeds, singles, pieces, seconds)

        tag = _pipeline(teacher)
        whole = [lambda: tag(list(texts))]
        name = "teacher, transformers pipeline"
        yield latency(name, TASKS[1], whole, [sum(pieces)], len(texts), seconds)
        parts = [lambda text=text: tag([text]) for text in texts]
        yield latency(name, TASKS[1], parts, pieces, 1, seconds)
        yield self._footprint(name, texts)
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            yield f"the teacher was not measured in ONNX Runtime: {error.name} is not installed"
            return
        yield from self._onnx_latencies(feeds, singles, pieces, seconds)

    def _footprint(self, name: str, texts: Sequence[str]) -> dict[str, Any]:
        costs = footprint.measure(
            f"{__name__}:load_pipeline",
            {"teacher": self._name, "threads": self._threads},
            texts,
        )
        size = sum(p.numel() * p.element_size() for p in self._teacher.model.parameters())
        return {"model": name, "disk_bytes": size, **asdict(costs)}

    def _torch(self, feed: Feed) -> Callable[[], NDArray[np.float32]]:
        ids, mask = map(torch.from_numpy, feed)

        def run() -> NDArray[np.float32]:
            with torch.inference_mode():
                logits = self._teacher.model(input_ids=ids, attention_mask=mask).logits
            return logits.numpy()  # type: ignore[no-any-return]

        return run

    def _onnx_latencies(
        self, feeds: list[Feed], singles: list[Feed], pieces: list[int], seconds: float
    ) -> Iterator[Latency | str]:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        def session(path: Path) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )

        with tempfile.TemporaryDirectory() as folder:
            exact, small = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
            try:
                _export(self._teacher, exact)
            except Exception as error:  # the exporter raises whatever it likes
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                yield f"the teacher was not measured in ONNX Runtime: export failed ({reason})"
                return
            with _quiet():
                quantize_dynamic(
                    exact, small, op_types_to_quantize=["MatMul", "Gemm"],
                    weight_type=QuantType.QInt8,
                )  # fmt: skip
            for name, path in (("float32", exact), ("int8", small)):
                loaded = session(path)

                def by_onnx(feed: Feed, loaded: Any = loaded) -> Callable[[], Any]:
                    inputs = {"input_ids": feed[0], "attention_mask": feed[1]}
                    return lambda: loaded.run(["logits"], inputs)[0]

                if name == "float32":
                    expected, got = self._torch(feeds[0])(), by_onnx(feeds[0])()
                    difference = float(np.abs(expected - got)[feeds[0][1] > 0].max())
                    if difference > _TOLERANCE * max(1.0, float(np.abs(expected).max())):
                        yield (
                            "the teacher was not measured in ONNX Runtime: exported, its logits "
                            f"differ by {difference:.1g}"
                        )
                        return
                yield from _logits_latencies(
                    f"teacher, ONNX Runtime {name}", by_onnx, feeds, singles, pieces, seconds
                )


def _logits_latencies(
    name: str,
    runner: Callable[[Feed], Callable[[], object]],
    feeds: list[Feed],
    singles: list[Feed],
    pieces: list[int],
    seconds: float,
) -> Iterator[Latency]:
    batches = [runner(feed) for feed in feeds]

    def whole() -> None:
        for run in batches:
            run()

    yield latency(name, TASKS[0], [whole], [sum(pieces)], len(singles), seconds)
    yield latency(name, TASKS[0], [runner(feed) for feed in singles], pieces, 1, seconds)


class _Logits(torch.nn.Module):
    """A model that takes and returns tensors alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # type: ignore[no-any-return]


def _export(teacher: Teacher, path: Path) -> None:
    """Writes the teacher as an ONNX model with both axes open."""
    # Two of each, as the exporter takes an axis of length 1 for a constant.
    ids, mask = map(torch.from_numpy, teacher.collate([np.arange(6), np.arange(3)]))
    axes = {0: "batch", 1: "length"}
    with _quiet():
        torch.onnx.export(
            _Logits(teacher.model),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps exporter and quantiser from talking of their own affairs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
