"""Several processes as one run: ``torchrun --nproc-per-node N -m xdistil_fast distill ...``.

torchrun starts N times the same command and says to each which one it is (its rank). Ranks label
shards of the cache in turn, and train on parts of the same batches: gradients are summed with the
weights that one process would give them, so the result is that of one process up to the order of
float sums. Rank 0 alone scores, writes and prints. What one rank dies of ends all: torchrun sees to
that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch import distributed as dist

from xdistil_fast.train.student import student_device

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are; with 1 every method is what one process would do.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one scores, writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier()

    def first_does(self, work: Callable[[], Value]) -> Value:
        """Have rank 0 do some work; all get its result, which must be plain data."""
        if self.size == 1:
            return work()
        result = [work() if self.first else None]
        dist.broadcast_object_list(result, src=0)
        return cast("Value", result[0])

    def first_goes_ahead(self, work: Callable[[], Value]) -> Value:
        """All do the work, rank 0 before the others."""
        if self.first:
            result = work()
        self.wait()
        return result if self.first else work()

    def gather(self, values: Sequence[int]) -> npt.NDArray[np.int64]:
        """Numbers of all ranks, [size, len(values)]."""
        own = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return own.numpy()[None]
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return torch.stack(every).numpy()

    def part(self, batch: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """This rank's sentences of a batch: a run of them without gaps.

        A batch of fewer sentences than ranks is taken by each of them as a whole.
        """
        if self.size == 1 or len(batch) < self.size:
            return batch
        return np.array_split(batch, self.size)[self.rank]

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors the same as rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def average(
        self, share: float, parameters: Sequence[Tensor], values: Sequence[float]
    ) -> list[float]:
        """Weighted mean over ranks of gradients, in place, and of values.

        Args:
            share: weight of this rank; those of all sum to 1.
            parameters: whose ``grad`` is averaged. One that has none counts as 0, and stays
                without where no rank has one.
            values: numbers, such as losses.

        Returns:
            The means of ``values``.
        """
        if self.size == 1:
            return list(values)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad * share for p in parameters]
        known = [float(p.grad is not None) for p in parameters]
        tail = torch.tensor([*known, *(share * value for value in values)])
        flat = torch.cat([*(part.reshape(-1) for part in parts), tail.to(parts[0].device)])
        dist.all_reduce(flat)
        counted, means = flat[-len(tail) :][: len(known)], flat[len(flat) - len(values) :]
        start = 0
        for parameter, count in zip(parameters, counted.tolist(), strict=True):
            gradient = flat[start : start + parameter.numel()].view_as(parameter)
            parameter.grad = gradient if count else None
            start += parameter.numel()
        return cast("list[float]", means.tolist())


class SharedGenerator:
    """The part of one generator's dropout that belongs to a rank's rows.

    All ranks draw for all rows of the batch, as one process would, and keep their own.

    Args:
        generator: the same on all ranks.
        ranks: the processes; all of them draw, in the same order.
    """

    def __init__(self, generator: np.random.Generator, ranks: Ranks) -> None:
        self._generator, self._ranks = generator, ranks

    def bytes(self, length: int) -> bytes:
        """As ``numpy.random.Generator.bytes``; ``length`` is for this rank's rows."""
        lengths = self._ranks.gather([length])[:, 0].tolist()
        whole = self._generator.bytes(sum(lengths))
        return whole[sum(lengths[: self._ranks.rank]) :][:length]


def processes() -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        ValueError: its environment is damaged.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE is {text!r}; torchrun sets it to a whole number from 1")
    return int(text)


def one_process_only(command: str) -> None:
    """Refuse to run a command that knows nothing of other processes.

    Raises:
        ValueError: torchrun started several.
    """
    if (count := processes()) > 1:
        raise ValueError(
            f"{command} runs in one process and torchrun started {count}; start it without "
            "torchrun (xdistil distill takes several)"
        )


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The processes that torchrun started, connected until the end of the block.

    CPU tensors go by gloo, those of GPUs by NCCL; each process takes the GPU of its local rank.

    Args:
        device: of the student, see :func:`~xdistil_fast.train.student.student_device`.

    Raises:
        DeviceError: the device is not to be had.
    """
    size = processes()
    if size == 1:
        yield Ranks()
        return
    if device != "cpu" and torch.cuda.is_available():
        # Where the student does not fit the GPUs, teachers share them.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    cuda = student_device(device).type == "cuda"
    options: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo"}
    dist.init_process_group(**options)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
