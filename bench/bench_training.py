"""Training and decoding: our modules against torch.nn.LSTM and pytorch-crf, dense batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torchcrf
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.duel import Case, Turns, duel
from bench.peers import TORCH_CRF, TORCH_LSTM_CRF, random_lstm
from xdistil_fast import _core
from xdistil_fast.nn import CRF, BiLSTM, Linear

_BATCH, _LENGTH, _INPUT_SIZE, _HIDDEN_SIZE, _NUM_TAGS = 32, 64, 100, 200, 9


class _Tagger(nn.Module):
    """BiLSTM, linear layer, CRF, from either library; the loss is the summed NLL."""

    def __init__(self, bilstm: nn.Module, output: nn.Linear, crf: nn.Module) -> None:
        super().__init__()
        self.bilstm = bilstm
        self.output = output
        self.crf = crf


# pytorch-crf makes itself a byte mask, which torch has come to dislike.
pytestmark = pytest.mark.filterwarnings("ignore:where received a uint8 condition tensor")


@dataclass
class _Batch:
    """The same batch in both layouts."""

    values: Tensor
    tags: Tensor
    cu_seqlens: Tensor

    @property
    def padded_values(self) -> Tensor:
        return _time_major(self.values)

    @property
    def padded_tags(self) -> Tensor:
        return _time_major(self.tags)


def _time_major(ragged: Tensor) -> Tensor:
    """[total, ...] of equal lengths to [T, B, ...], contiguous."""
    return ragged.reshape(_BATCH, _LENGTH, *ragged.shape[1:]).transpose(0, 1).contiguous()


def _batch(width: int) -> _Batch:
    random = np.random.default_rng(2)
    total = _BATCH * _LENGTH
    return _Batch(
        torch.from_numpy(random.standard_normal((total, width), dtype=np.float32)),
        torch.from_numpy(random.integers(0, _NUM_TAGS, total)),
        torch.arange(0, total + 1, _LENGTH, dtype=torch.int32),
    )


def _crfs() -> tuple[CRF, torchcrf.CRF]:
    torch.manual_seed(3)
    theirs = torchcrf.CRF(_NUM_TAGS)
    ours = CRF(_NUM_TAGS)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = dict(theirs.named_parameters())
    got = dict(ours.named_parameters())
    assert got.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert parameter.grad is not None
        # Sums over 2,048 pieces in different orders: relative to the largest entry.
        atol = 1e-4 * float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name].grad, parameter.grad, rtol=1e-3, atol=atol)


def _case(task: str, sizes: dict[str, int], threads: int, aims: dict[str, float]) -> Case:
    return Case(
        group="training and decoding",
        task=task,
        batch=_BATCH,
        length=_LENGTH,
        pieces=_BATCH * _LENGTH,
        sizes=sizes,
        threads=threads,
        aims={"float32": aims},
        headline=True,
    )


@pytest.mark.parametrize("optimizer", [False, True], ids=["forward-backward", "with-adam"])
def bench_training_step(
    benchmark: BenchmarkFixture, turns: Turns, threads: int, optimizer: bool
) -> None:
    batch = _batch(_INPUT_SIZE)
    padded_values, padded_tags = batch.padded_values, batch.padded_tags
    our_crf, their_crf = _crfs()
    lstm = random_lstm(_INPUT_SIZE, _HIDDEN_SIZE).train()
    output = nn.Linear(2 * _HIDDEN_SIZE, _NUM_TAGS)
    our_output = Linear(2 * _HIDDEN_SIZE, _NUM_TAGS)
    our_output.load_state_dict(output.state_dict())
    theirs = _Tagger(lstm, output, their_crf)
    ours = _Tagger(BiLSTM.from_torch(lstm), our_output, our_crf)
    our_adam, their_adam = (
        torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True) for model in (ours, theirs)
    )

    def our_loss(bfloat16: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            states = ours.bilstm(batch.values, batch.cu_seqlens)
        emissions = ours.output(states)
        return -ours.crf(emissions, batch.tags, cu_seqlens=batch.cu_seqlens)  # type: ignore[no-any-return]

    def their_loss() -> Tensor:
        emissions = theirs.output(theirs.bilstm(padded_values)[0])
        return -theirs.crf(emissions, padded_tags)  # type: ignore[no-any-return]

    def our_step(bfloat16: bool = False) -> Tensor:
        our_adam.zero_grad()
        loss = our_loss(bfloat16)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer:
            our_adam.step()
        return loss

    def their_step() -> Tensor:
        their_adam.zero_grad()
        loss = their_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer:
            their_adam.step()
        return loss

    for loss in (our_loss(), their_loss()):
        loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(our_loss(), their_loss(), rtol=1e-5, atol=0.0)
    _assert_same_gradients(ours, theirs)

    case = _case(
        "BiLSTM-CRF training step" + (" with Adam" if optimizer else ""),
        {"E": _INPUT_SIZE, "H": _HIDDEN_SIZE, "tags": _NUM_TAGS},
        threads,
        {TORCH_LSTM_CRF: 1.5},
    )
    steps: dict[str, Callable[[], Tensor]] = {"float32": our_step}
    if _core.multiplies_bfloat16():
        torch.testing.assert_close(our_loss(bfloat16=True), our_loss(), rtol=1e-3, atol=0.0)
        steps["bfloat16"] = partial(our_step, bfloat16=True)
    duel(benchmark, case, steps, {TORCH_LSTM_CRF: {"": their_step}}, turns)


def bench_crf_loss(benchmark: BenchmarkFixture, turns: Turns, threads: int) -> None:
    batch = _batch(_NUM_TAGS)
    ours, theirs = _crfs()
    our_emissions = batch.values.requires_grad_()
    their_emissions = batch.padded_values.detach().requires_grad_()
    padded_tags = batch.padded_tags

    def our_loss() -> Tensor:
        our_emissions.grad = None
        ours.zero_grad()
        loss: Tensor = -ours(our_emissions, batch.tags, cu_seqlens=batch.cu_seqlens)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def their_loss() -> Tensor:
        their_emissions.grad = None
        theirs.zero_grad()
        loss: Tensor = -theirs(their_emissions, padded_tags)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    torch.testing.assert_close(our_loss(), their_loss(), rtol=1e-5, atol=0.0)
    _assert_same_gradients(ours, theirs)
    assert our_emissions.grad is not None
    torch.testing.assert_close(
        _time_major(our_emissions.grad), their_emissions.grad, rtol=1e-3, atol=1e-6
    )

    case = _case("CRF loss and gradient", {"tags": _NUM_TAGS}, threads, {TORCH_CRF: 20.0})
    duel(benchmark, case, {"float32": our_loss}, {TORCH_CRF: {"": their_loss}}, turns)


def bench_viterbi(benchmark: BenchmarkFixture, turns: Turns, threads: int) -> None:
    batch = _batch(_NUM_TAGS)
    ours, theirs = _crfs()
    padded_emissions = batch.padded_values

    def our_tags() -> list[list[int]]:
        return ours.decode(batch.values, cu_seqlens=batch.cu_seqlens)

    def their_tags() -> list[list[int]]:
        with torch.no_grad():
            return theirs.decode(padded_emissions)  # type: ignore[no-any-return]

    assert our_tags() == their_tags()

    case = _case("CRF Viterbi", {"tags": _NUM_TAGS}, threads, {TORCH_CRF: 20.0})
    duel(benchmark, case, {"float32": our_tags}, {TORCH_CRF: {"": their_tags}}, turns)
