from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from xdistil_fast import nn
from xdistil_fast.train.alignment import IGNORED
from xdistil_fast.train.losses import crf_loss, hard_loss, logit_loss

P, C = 7, 3
RNG = np.random.default_rng(11)
EMISSIONS = RNG.standard_normal((P, C))
LOGITS = RNG.standard_normal((P, C))
TARGETS = np.array([0, 2, IGNORED, 1, IGNORED, IGNORED, 2])


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)


def test_hard_loss_is_cross_entropy_over_all_pieces() -> None:
    probabilities = np.exp(EMISSIONS) / np.exp(EMISSIONS).sum(axis=1, keepdims=True)
    known = [p for p in range(P) if TARGETS[p] != IGNORED]
    expected = -sum(np.log(probabilities[p, TARGETS[p]]) for p in known) / P
    assert hard_loss(tensor(EMISSIONS), tensor(TARGETS)).item() == pytest.approx(expected)


def test_hard_loss_leaves_unlabelled_pieces_alone() -> None:
    emissions = tensor(EMISSIONS).requires_grad_()
    hard_loss(emissions, tensor(TARGETS)).backward()
    assert emissions.grad is not None
    moved = emissions.grad.abs().sum(dim=1) > 0
    np.testing.assert_array_equal(moved.numpy(), TARGETS != IGNORED)


def test_hard_loss_of_no_label_is_zero() -> None:
    emissions = tensor(EMISSIONS).requires_grad_()
    loss = hard_loss(emissions, torch.full((P,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert emissions.grad is not None
    assert not emissions.grad.any()


def test_logit_loss_is_the_mean_square() -> None:
    expected = ((EMISSIONS - LOGITS) ** 2).mean()
    assert logit_loss(tensor(EMISSIONS), tensor(LOGITS)).item() == pytest.approx(expected)


def test_logit_loss_with_weights() -> None:
    weights = np.array([1.0, 0, 1, 1, 0, 0, 1])
    expected = ((EMISSIONS - LOGITS) ** 2 * weights[:, None]).sum() / (P * C)
    loss = logit_loss(tensor(EMISSIONS), tensor(LOGITS), tensor(weights))
    assert loss.item() == pytest.approx(expected)
    ones = torch.ones(P, dtype=torch.float64)
    plain = logit_loss(tensor(EMISSIONS), tensor(LOGITS))
    assert logit_loss(tensor(EMISSIONS), tensor(LOGITS), ones).item() == pytest.approx(plain.item())


def log_likelihood(crf: nn.CRF, emissions: np.ndarray, tags: list[int]) -> float:
    """By enumeration of all tag sequences."""
    start, end, moves = (
        p.detach().numpy() for p in (crf.start_transitions, crf.end_transitions, crf.transitions)
    )

    def score(path: tuple[int, ...]) -> float:
        total = start[path[0]] + end[path[-1]] + emissions[range(len(path)), path].sum()
        return float(total + sum(moves[a, b] for a, b in itertools.pairwise(path)))

    paths = itertools.product(range(C), repeat=len(tags))
    return score(tuple(tags)) - float(np.log(sum(np.exp(score(path)) for path in paths)))


# Sentences of 2, 2, 0 and 3 pieces: labelled, not, empty, labelled.
CU = np.array([0, 2, 4, 4, 7], np.int32)
CRF_TARGETS = np.array([0, 2, IGNORED, IGNORED, 1, 1, 2])


def make_crf() -> nn.CRF:
    torch.manual_seed(2)
    return nn.CRF(C, dtype=torch.float64)


def test_crf_loss_counts_labelled_sentences() -> None:
    crf = make_crf()
    expected = -log_likelihood(crf, EMISSIONS[:2], [0, 2]) / P
    expected -= log_likelihood(crf, EMISSIONS[4:], [1, 1, 2]) / P
    loss = crf_loss(crf, tensor(EMISSIONS), tensor(CRF_TARGETS), tensor(CU))
    assert loss.item() == pytest.approx(expected)


def test_crf_loss_leaves_unlabelled_sentences_alone() -> None:
    crf = make_crf()
    emissions = tensor(EMISSIONS).requires_grad_()
    crf_loss(crf, emissions, tensor(CRF_TARGETS), tensor(CU)).backward()
    assert emissions.grad is not None
    moved = emissions.grad.abs().sum(dim=1) > 0
    np.testing.assert_array_equal(moved.numpy(), CRF_TARGETS != IGNORED)


def test_crf_loss_of_partly_labelled_sentences_is_zero() -> None:
    crf = make_crf()
    targets = tensor(np.array([0, IGNORED, IGNORED, 1, 1, 2, IGNORED]))
    loss = crf_loss(crf, tensor(EMISSIONS).requires_grad_(), targets, tensor(CU))
    loss.backward()
    assert loss.item() == 0
    assert crf.transitions.grad is not None
    assert not crf.transitions.grad.any()
