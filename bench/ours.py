"""Our side: students in each precision, and random ones of given sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from xdistil_fast.labels import make_labels
from xdistil_fast.model_config import PRECISIONS
from xdistil_fast.model_io import ModelConfig, Tensors
from xdistil_fast.student import Student

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

_VOCABULARY = 30_000


def random_student(
    embedding_size: int, hidden_size: int, projection_size: int = 0, seed: int = 0
) -> tuple[ModelConfig, Tensors]:
    """A student of nine tags with torch's usual start; speed does not depend on the weights."""
    config = ModelConfig(
        labels=tuple(make_labels(["PER", "ORG", "LOC", "MISC"])),
        vocab_size=_VOCABULARY,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        projection_size=projection_size,
    )
    random = np.random.default_rng(seed)
    bound = hidden_size**-0.5
    tensors = {
        name: random.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    tensors["embedding.weight"] = random.standard_normal(
        (_VOCABULARY, embedding_size), dtype=np.float32
    )
    return config, tensors


def our_calls(
    config: ModelConfig, tensors: Tensors, threads: int, ids: IntArray, cu_seqlens: IntArray
) -> dict[str, Callable[[], FloatArray]]:
    """Pieces to logits [total, C] in each precision."""

    def call(student: Student) -> Callable[[], FloatArray]:
        return lambda: student.logits(ids, cu_seqlens)

    return {name: call(Student(config, tensors, threads, name)) for name in PRECISIONS}
