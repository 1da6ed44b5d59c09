"""Hidden states of the teacher, reduced to their principal components.

A state of D float16 numbers a piece would make the cache a hundred times the size of one of logits.
The R strongest directions of the teacher's space, found on a sample of the labelled text, hold most
of what varies. They are kept beside the cache they were used for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xdistil_fast.train import runs

if TYPE_CHECKING:
    from xdistil_fast.train.config import DistillConfig
    from xdistil_fast.train.teacher import Teacher

FloatArray = npt.NDArray[np.float32]

SAMPLE_SENTENCES = 1024
COMPONENTS = 128  # kept where nothing else is asked for


@dataclass(frozen=True)
class Representation:
    """Which hidden states are cached.

    Attributes:
        layer: encoder layer, from 1.
        size: R, number of principal components; 0 for the states as they are.
    """

    layer: int
    size: int


@dataclass(frozen=True)
class Components:
    """Principal components, scaled as a whole so that a reduced state's elements have variance 1.

    Attributes:
        mean: [D].
        directions: [D, R].
    """

    mean: FloatArray
    directions: FloatArray

    def __call__(self, states: FloatArray) -> FloatArray:
        """Reduce states [n, D] to [n, R]."""
        return np.asarray((states - self.mean) @ self.directions, np.float32)


def principal_components(
    states: Callable[[Callable[[FloatArray], FloatArray]], object], size: int
) -> Components:
    """Find the strongest directions.

    Args:
        states: calls what it is given with states [n, D], batch after batch.
        size: R.

    Raises:
        ValueError: R is larger than D, or there are no states.
    """
    count = 0
    total = gram = np.zeros(0)

    def add(rows: FloatArray) -> FloatArray:
        nonlocal count, total, gram
        wide = rows.astype(np.float64)
        if not count:
            total, gram = np.zeros(wide.shape[1]), np.zeros((wide.shape[1],) * 2)
        count += len(wide)
        total += wide.sum(axis=0)
        gram += wide.T @ wide
        return rows[:, :0]

    states(add)
    if not count:
        raise ValueError("train: the tokeniser makes no piece of any of its words")
    if size > len(total):
        raise ValueError(
            f"representation_size is {size}; the teacher's states have {len(total)} elements; "
            f"allowed: 0 to {len(total)}"
        )
    mean = total / count
    values, vectors = np.linalg.eigh(gram / count - np.outer(mean, mean))
    order = np.argsort(values)[::-1][:size]
    directions = vectors[:, order]
    # An eigenvector's sign is free; fixed, the result is reproducible.
    pivots = np.abs(directions).argmax(axis=0)
    directions *= np.sign(directions[pivots, np.arange(size)])
    variance = float(values[order].mean())
    directions /= np.sqrt(variance) if variance > 0 else 1.0
    return Components(mean.astype(np.float32), directions.astype(np.float32))


def stored_components(path: Path, find: Callable[[], Components]) -> tuple[Components, str]:
    """Components of a file, found and stored where there are none that can be read.

    Returns:
        The components and the SHA-256 of their file.

    Raises:
        OSError: they cannot be stored.
    """
    try:
        blob = path.read_bytes()
        found = Components(**load(blob))
        if found.mean.ndim != 1 or found.directions.ndim != 2:
            raise ValueError("not of the shapes of components")
    except (FileNotFoundError, SafetensorError, TypeError, ValueError):
        found = find()
        blob = save({"mean": found.mean, "directions": np.ascontiguousarray(found.directions)})
        runs.write_file(path, blob)
    return found, hashlib.sha256(blob).hexdigest()


def spread(sentences: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """At most :data:`SAMPLE_SENTENCES` sentences, evenly spaced."""
    step = max(1, -(-len(sentences) // SAMPLE_SENTENCES))
    return list(sentences[::step])


def projection_width(config: DistillConfig, representation_width: int) -> int:
    """R of a student's projection: that of the cached states, else of a head that wants one.

    Args:
        config: all settings.
        representation_width: of the cache's representations; 0 where it has none.
    """
    return representation_width or (COMPONENTS if config.projected else 0)


def kept_components(config: DistillConfig, teacher: Teacher) -> int:
    """How many principal components of a teacher's hidden states are kept; 0 for the states.

    Raises:
        ValueError: more are asked for than the states have elements; naming both.
    """
    size, most = config.representation_size, teacher.hidden_size
    if size is None:
        return 0 if config.representation_loss == "kld" else min(COMPONENTS, most)
    if size > most:
        raise ValueError(
            f"representation_size is {size}; the teacher's hidden size is {most}; "
            f"allowed: 0 to {most}"
        )
    return size
