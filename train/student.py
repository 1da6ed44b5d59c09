"""The student as a torch module: embedding, BiLSTM, linear layer, optional CRF.

Everything is ragged: P pieces of B sentences in one row after the other, ``cu_seqlens`` [B + 1]
saying where each sentence starts. Nothing is padded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xdistil_fast import nn, student, torch_ops
from xdistil_fast._backend import DeviceError, device_info
from xdistil_fast.labels import outside_of
from xdistil_fast.train.alignment import Alignment
from xdistil_fast.train.schedules import GROUPS

FloatArray = npt.NDArray[np.float32]


class Dropout(Protocol):
    """Source of dropout: a NumPy generator, or the part of one that belongs to some rows."""

    def bytes(self, length: int, /) -> bytes:
        """Random bytes."""


class Student(torch.nn.Module):
    """Tagger of C labels over V pieces.

    Args:
        embeddings: [V, E] start of the table.
        hidden_size: H of each direction.
        num_labels: C.
        head: ``softmax``, or ``crf`` for transition scores on top.
        projection_size: R, width of the projection that is trained on the teacher's hidden states;
            0 for none.
        projected: whether the output layer reads the GELU of the projection, and not the states;
            the projection is then served.
        dropout: share of embedding and BiLSTM output elements dropped in training.
        precision: ``float32``, or ``bfloat16`` for what the BiLSTM's products take.
        seed: of all other start values.
    """

    def __init__(
        self,
        embeddings: FloatArray,
        hidden_size: int,
        num_labels: int,
        *,
        head: str = "softmax",
        projection_size: int = 0,
        projected: bool = False,
        dropout: float = 0.0,
        precision: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert projection_size or not projected
        self.projected = projected
        self.dropout = dropout
        self.precision = precision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            table = torch.from_numpy(np.array(embeddings, np.float32))
            self.embedding = torch.nn.Embedding(len(table), table.shape[1], _weight=table)
            self.bilstm = nn.BiLSTM(embeddings.shape[1], hidden_size)
            self.output = nn.Linear(projection_size if projected else 2 * hidden_size, num_labels)
            self.crf = nn.CRF(num_labels) if head == "crf" else None
            # Last, so that all other start values are the same with it and without.
            self.projection = (
                nn.Linear(2 * hidden_size, projection_size) if projection_size else None
            )

    def forward(self, ids: Tensor, cu_seqlens: Tensor, generator: Dropout | None = None) -> Tensor:
        """Emissions of a batch, [P, C]; the arguments are those of :meth:`encode`."""
        return self.emissions(self.encode(ids, cu_seqlens, generator))

    def emissions(self, states: Tensor) -> Tensor:
        """Emissions of states [n, 2H], [n, C]."""
        if self.projected:
            assert self.projection is not None
            states = torch.nn.functional.gelu(self.projection(states), approximate="tanh")
        emissions: Tensor = self.output(states)
        return emissions

    def encode(self, ids: Tensor, cu_seqlens: Tensor, generator: Dropout | None = None) -> Tensor:
        """States of the BiLSTM, which ``emissions`` and ``projection`` read.

        Args:
            ids: [P] int32 pieces.
            cu_seqlens: [B + 1] int32.
            generator: source of dropout; without it nothing is dropped.

        Returns:
            [P, 2H].
        """
        values = torch_ops.embedding(self.embedding.weight, ids)
        values = self._drop(values, generator)
        return self._drop(self._states(values, cu_seqlens), generator)

    def _states(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Of the BiLSTM, the only layer that bfloat16 is for: losses stay float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            states: Tensor = self.bilstm(values, cu_seqlens)
        return states

    def _drop(self, values: Tensor, generator: Dropout | None) -> Tensor:
        # 16 random bits an element: the mask costs a tenth of one from torch's generator.
        dropped = round(self.dropout * 65536)
        if generator is None or not dropped:
            return values
        bits = np.frombuffer(generator.bytes(2 * values.numel()), np.uint16).reshape(values.shape)
        scale = np.float32(65536 / (65536 - dropped))
        mask = np.multiply(bits >= dropped, scale, dtype=np.float32)
        return values * self.on_device(mask)

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches must be."""
        device: torch.device = self.embedding.weight.device
        return device

    def on_device(self, array: npt.NDArray[Any]) -> Tensor:
        """A part of a batch as a tensor where the parameters are; on the CPU it shares memory."""
        return torch.from_numpy(array).to(self.device)

    def groups(self) -> dict[str, list[str]]:
        """Names of the parameters of each layer, by its name in ``schedules.GROUPS``."""
        found: dict[str, list[str]] = {group: [] for group in GROUPS}
        for name, _ in self.named_parameters():
            layer = name.partition(".")[0]
            found["output" if layer == "crf" else layer].append(name)
        return found

    def tensors(self) -> dict[str, FloatArray]:
        """All parameters, those served by the names of the model folder, as copies on the CPU."""
        return {
            name: value.detach().cpu().numpy().copy() for name, value in self.named_parameters()
        }

    def load(self, tensors: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Set all parameters from arrays as :meth:`tensors` gives them."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(torch.from_numpy(np.asarray(tensors[name], np.float32)))


def student_device(device: str) -> torch.device:
    """Where a student is trained.

    Under ``torchrun`` each process of a machine needs a GPU of its own.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: the current GPU if there is one for each process,
            and torch and the extension ``_cuda`` run on it; else the CPU.

    Raises:
        DeviceError: ``cuda`` is not to be had, and why.
    """
    if device == "cpu":
        return torch.device("cpu")
    try:
        if not torch.cuda.is_available():
            raise DeviceError("device is 'cuda', but torch finds no GPU or was built without CUDA")
        count, needed = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if count < needed:
            raise DeviceError(f"device is 'cuda': {needed} processes train on {count} GPUs")
        number = torch.cuda.current_device()
        device_info(number)
    except DeviceError:
        if device == "auto":
            return torch.device("cpu")
        raise
    return torch.device("cuda", number)


def stored_tensors(
    tensors: Mapping[str, FloatArray], table_dtype: str, projected: bool
) -> dict[str, Any]:
    """Weights as they are stored and served: without a projection that no output layer reads.

    Args:
        tensors: of :meth:`Student.tensors`.
        table_dtype: of the embedding table, ``float32`` or ``float16``.
        projected: as for :class:`Student`.
    """
    served: dict[str, Any] = {
        name: value
        for name, value in tensors.items()
        if projected or not name.startswith("projection.")
    }
    return {**served, "embedding.weight": tensors["embedding.weight"].astype(table_dtype)}


def tag_words(
    tagger: student.Student, alignment: Alignment, labels: Sequence[str]
) -> list[list[str]]:
    """Tags of the words of all sentences, by the code that users run.

    Args:
        tagger: the student as it is served.
        alignment: sentences in the student's pieces.
        labels: C labels.

    Returns:
        One list of tags a sentence; words without pieces get ``O``, or ``_`` where labels have
        no ``O``.
    """
    with_pieces = alignment.first_piece >= 0
    cu_words = np.concatenate([[0], np.cumsum(with_pieces)])[alignment.cu_words].astype(np.int32)
    cu_pieces = alignment.cu_pieces.astype(np.int32)
    emissions = tagger.logits(alignment.ids, cu_pieces)
    first = alignment.first_piece[with_pieces]
    found, _ = tagger.decode_words(emissions, cu_pieces, first, cu_words)
    tags = np.full(len(with_pieces), outside_of(labels), dtype=object)
    tags[with_pieces] = np.array(labels, dtype=object)[found]
    return [list(part) for part in np.split(tags, alignment.cu_words[1:-1])]
