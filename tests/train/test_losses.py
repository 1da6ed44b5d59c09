from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from xdistil_fast import nn
from xdistil_fast.train.alignment import IGNORED
from xdistil_fast.train.losses import (
    best_labels,
    crf_loss,
    crf_marginal_loss,
    hard_loss,
    kl_loss,
    logit_loss,
    representation_cosine,
    representation_kld,
    representation_mse,
)

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


WEIGHTS = np.array([1.0, 0, 1, 1, 0, 0, 1])


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values)
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def test_best_labels_are_learned_as_gold_ones() -> None:
    best = best_labels(tensor(LOGITS))
    np.testing.assert_array_equal(best.numpy(), LOGITS.argmax(axis=1))
    some = best_labels(tensor(LOGITS), tensor(WEIGHTS))
    np.testing.assert_array_equal(some.numpy()[WEIGHTS == 1], best.numpy()[WEIGHTS == 1])
    assert (some.numpy()[WEIGHTS == 0] == IGNORED).all()
    log_s = np.log(softmax(EMISSIONS))[np.arange(P), LOGITS.argmax(axis=1)]
    loss = hard_loss(tensor(EMISSIONS), some).item()
    assert loss == pytest.approx(-float((log_s * WEIGHTS).sum()) / P)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_loss(temperature: float, weights: np.ndarray | None) -> None:
    q, s = softmax(LOGITS / temperature), softmax(EMISSIONS / temperature)
    rows = temperature**2 * (q * np.log(q / s)).sum(axis=1)
    expected = float((rows * (1 if weights is None else weights)).sum() / P)
    given = None if weights is None else tensor(weights)
    loss = kl_loss(tensor(EMISSIONS), tensor(LOGITS), given, temperature=temperature)
    assert loss.item() == pytest.approx(expected)
    assert kl_loss(tensor(LOGITS), tensor(LOGITS) + 5).item() == pytest.approx(0, abs=1e-12)


def marginals(crf: nn.CRF, emissions: np.ndarray, temperature: float) -> np.ndarray:
    """By enumeration of all label sequences."""
    start, end, moves = (
        p.detach().numpy() for p in (crf.start_transitions, crf.end_transitions, crf.transitions)
    )
    found = np.zeros_like(emissions)
    for path in itertools.product(range(C), repeat=len(emissions)):
        score = start[path[0]] + end[path[-1]] + emissions[range(len(path)), path].sum()
        score += sum(moves[a, b] for a, b in itertools.pairwise(path))
        for piece, label in enumerate(path):
            found[piece, label] += math.exp(score / temperature)
    return np.asarray(found / found.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_crf_marginal_loss(temperature: float, weights: np.ndarray | None) -> None:
    crf = make_crf()
    parts = [slice(0, 2), slice(2, 4), slice(4, 7)]
    s = np.concatenate([marginals(crf, EMISSIONS[part], temperature) for part in parts])
    q = softmax(LOGITS / temperature)
    rows = temperature**2 * (q * np.log(q / s)).sum(axis=1)
    expected = float((rows * (1 if weights is None else weights)).sum() / P)
    loss = crf_marginal_loss(
        crf,
        tensor(EMISSIONS),
        tensor(LOGITS),
        tensor(CU),
        None if weights is None else tensor(weights),
        temperature=temperature,
    )
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    for parameter in crf.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


R = 4
STATES = RNG.standard_normal((P, R))
TARGET_STATES = 2 * RNG.standard_normal((P, R))


def numpy_mse(v: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.asarray(((v - t) ** 2).mean(axis=1))


def numpy_cosine(v: np.ndarray, t: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(v, axis=1) * np.linalg.norm(t, axis=1)
    return np.asarray(1 - (v * t).sum(axis=1) / norms)


def numpy_kld(v: np.ndarray, t: np.ndarray) -> np.ndarray:
    gelu = np.array([[x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in row] for row in v])
    t, gelu = np.clip(t, 1e-7, 1), np.clip(gelu, 1e-7, 1)
    return np.asarray((t * np.log(t / gelu)).sum(axis=1))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        (representation_mse, numpy_mse),
        (representation_cosine, numpy_cosine),
        (representation_kld, numpy_kld),
    ],
)
def test_representation_losses(
    loss: Callable[..., Tensor],
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray],
    weights: np.ndarray | None,
) -> None:
    expected = float((rows(STATES, TARGET_STATES) * (1 if weights is None else weights)).sum() / P)
    given = None if weights is None else tensor(weights)
    found = loss(tensor(STATES), tensor(TARGET_STATES), given).item()
    assert found == pytest.approx(expected)


def test_the_papers_divergence_ignores_negative_components_of_the_teacher() -> None:
    values = tensor(STATES).requires_grad_()
    representation_kld(values, tensor(TARGET_STATES)).backward()
    assert values.grad is not None
    pulled = np.abs(values.grad.numpy()) > 1e-6
    assert not pulled[TARGET_STATES < 0].any()
    assert pulled[(TARGET_STATES > 0.1) & (STATES > 0.1) & (STATES < 1)].all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda e, w: kl_loss(e, tensor(LOGITS), w, temperature=2.0),
        lambda e, w: crf_marginal_loss(make_crf(), e, tensor(LOGITS), tensor(CU), w),
        lambda e, w: representation_mse(e, tensor(LOGITS), w),
        lambda e, w: representation_cosine(e, tensor(LOGITS), w),
        lambda e, w: representation_kld(e, tensor(LOGITS), w),
    ],
)
def test_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    emissions = tensor(EMISSIONS).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: loss(e, tensor(WEIGHTS)), [emissions])
