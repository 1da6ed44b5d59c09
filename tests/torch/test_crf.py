"""nn.CRF against the pytorch-crf package, its own definition, and in each form of batch."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xdistil_fast.nn import CRF, cu_seqlens_of

LENGTHS = [4, 9, 1, 6]
TAGS = 5


def torchcrf() -> Any:
    return pytest.importorskip(
        "torchcrf", reason="pytorch-crf (extra 'test') is not installed: nothing to compare with"
    )


def make_batch(
    lengths: list[int], num_tags: int = TAGS, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded emissions [T, B, C], tags [T, B], mask [T, B]."""
    generator = torch.Generator().manual_seed(7)
    steps = max(lengths)
    emissions = torch.randn(steps, len(lengths), num_tags, generator=generator, dtype=dtype)
    tags = torch.randint(num_tags, (steps, len(lengths)), generator=generator)
    mask = torch.arange(steps)[:, None] < torch.tensor(lengths)
    return emissions, tags, mask


def ragged(padded: Tensor, mask: Tensor) -> Tensor:
    return padded.transpose(0, 1)[mask.t()]


def score(crf: CRF, emissions: Tensor, path: tuple[int, ...]) -> Tensor:
    """Score of one path over one sequence, by the definition."""
    total = crf.start_transitions[path[0]] + crf.end_transitions[path[-1]]
    for t, tag in enumerate(path):
        total = total + emissions[t, tag]
    for before, after in itertools.pairwise(path):
        total = total + crf.transitions[before, after]
    return total


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_equals_enumeration_of_all_paths(steps: int) -> None:
    crf = CRF(3, dtype=torch.float64)
    emissions = torch.randn(steps, 3, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, steps])
    paths = list(itertools.product(range(3), repeat=steps))
    scores = torch.stack([score(crf, emissions, path) for path in paths])
    probabilities = scores.softmax(0)
    for k in (0, len(paths) // 2, len(paths) - 1):
        got = crf(emissions, torch.tensor(paths[k]), cu_seqlens=cu_seqlens)
        torch.testing.assert_close(got, probabilities[k].log())
    assert crf.decode(emissions, cu_seqlens=cu_seqlens) == [list(paths[int(scores.argmax())])]
    marginals = torch.zeros(steps, 3, dtype=torch.float64)
    for path, probability in zip(paths, probabilities, strict=True):
        marginals[torch.arange(steps), torch.tensor(path)] += probability
    torch.testing.assert_close(
        crf.marginals(emissions, cu_seqlens=cu_seqlens), marginals.detach(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
def test_equals_pytorch_crf(batch_first: bool, reduction: str) -> None:
    torch.manual_seed(8)
    theirs = torchcrf().CRF(TAGS, batch_first=batch_first).double()
    ours = CRF(TAGS, batch_first=batch_first, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    emissions, tags, mask = make_batch(LENGTHS, dtype=torch.float64)
    if batch_first:
        emissions, tags, mask = (t.transpose(0, 1).contiguous() for t in (emissions, tags, mask))
    results = []
    for crf in (theirs, ours):
        leaf = emissions.clone().requires_grad_()
        result = crf(leaf, tags, mask, reduction)  # positional, as drop-in code calls it
        weight = torch.arange(1.0, 1 + result.numel(), dtype=torch.float64).reshape(result.shape)
        grads = torch.autograd.grad((result * weight).sum(), [leaf, *crf.parameters()])
        results.append([result, *grads])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert ours.decode(emissions, mask) == theirs.decode(emissions, mask)
    # Its own default mask is of bytes, which torch warns of.
    assert ours.decode(emissions) == theirs.decode(emissions, torch.ones_like(mask))


@pytest.mark.parametrize("num_tags", [2, 9, 33])
def test_error_is_within_twice_that_of_pytorch_crf(num_tags: int) -> None:
    torch.manual_seed(9)
    theirs = torchcrf().CRF(num_tags)
    ours = CRF(num_tags)
    ours.load_state_dict(theirs.state_dict())
    emissions, tags, mask = make_batch([40, 3, 25, 1], num_tags)
    results = []
    for crf in (copy.deepcopy(theirs).double(), theirs, ours):
        leaf = emissions.to(crf.transitions.dtype).requires_grad_()
        result = crf(leaf, tags, mask, "none")
        results.append([result, *torch.autograd.grad(result.sum(), [leaf, *crf.parameters()])])
    for want, other, got in zip(*results, strict=True):
        floor = 8 * torch.finfo(torch.float32).eps * want.abs().max()
        bound = 2 * (other - want).abs().max() + floor
        assert (got - want).abs().max() <= bound


def test_parameters_are_those_of_pytorch_crf() -> None:
    torch.manual_seed(10)
    theirs = dict(torchcrf().CRF(TAGS).named_parameters())
    torch.manual_seed(10)
    ours = CRF(TAGS)
    assert list(ours.state_dict()) == list(theirs)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_state_dict_goes_both_ways() -> None:
    ours = CRF(TAGS, constraints=(np.zeros(TAGS), np.zeros((TAGS, TAGS))))
    theirs = torchcrf().CRF(TAGS)
    theirs.load_state_dict(ours.state_dict())  # strict: constraints are not part of it
    again = CRF(TAGS)
    again.load_state_dict(theirs.state_dict())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])


# --- forms of batch ----------------------------------------------------------------------------


def test_padded_equals_ragged_to_the_bit() -> None:
    crf = CRF(TAGS)
    emissions, tags, mask = make_batch(LENGTHS)
    cu_seqlens = cu_seqlens_of(torch.tensor(LENGTHS))
    values, gold = ragged(emissions, mask), ragged(tags, mask)
    # What lies in the padding does not matter, not even what is no tag at all.
    emissions[~mask] = math.nan
    tags[~mask] = -100
    for reduction in ("none", "sum", "mean", "token_mean"):
        padded = crf(emissions, tags, mask=mask, reduction=reduction)
        assert torch.equal(padded, crf(values, gold, cu_seqlens=cu_seqlens, reduction=reduction))
    assert crf.decode(emissions, mask) == crf.decode(values, cu_seqlens=cu_seqlens)
    marginals = crf.marginals(emissions, mask)
    assert marginals.shape == emissions.shape
    assert torch.equal(ragged(marginals, mask), crf.marginals(values, cu_seqlens=cu_seqlens))
    assert not marginals[~mask].any()


def test_reductions() -> None:
    crf = CRF(TAGS)
    emissions, tags, mask = make_batch(LENGTHS)
    each = crf(emissions, tags, mask, "none")
    assert each.shape == (len(LENGTHS),)
    assert (each < 0).all()
    torch.testing.assert_close(crf(emissions, tags, mask), each.sum())
    torch.testing.assert_close(crf(emissions, tags, mask, "mean"), each.sum() / len(LENGTHS))
    torch.testing.assert_close(crf(emissions, tags, mask, "token_mean"), each.sum() / sum(LENGTHS))


def test_empty_sequences() -> None:
    crf = CRF(TAGS)
    emissions, tags, mask = make_batch([3, 5])
    values, gold = ragged(emissions, mask), ragged(tags, mask)
    cu_seqlens = torch.tensor([0, 0, 3, 3, 8, 8])
    got = crf(values, gold, cu_seqlens=cu_seqlens, reduction="none")
    want = crf(values, gold, cu_seqlens=torch.tensor([0, 3, 8]), reduction="none")
    assert torch.equal(got[[1, 3]], want)
    assert not got[[0, 2, 4]].any()
    assert [len(path) for path in crf.decode(values, cu_seqlens=cu_seqlens)] == [0, 3, 0, 5, 0]


def test_marginals_are_probabilities_and_carry_no_gradient() -> None:
    crf = CRF(TAGS)
    emissions, _, mask = make_batch(LENGTHS)
    marginals = crf.marginals(emissions.requires_grad_(), mask)
    assert not marginals.requires_grad
    sums = marginals.sum(-1)[mask]
    torch.testing.assert_close(sums, torch.ones_like(sums))


# --- constraints -------------------------------------------------------------------------------


def bio() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """O, B-X, I-X, B-Y, I-Y: I follows B or I of its kind only."""
    start = np.zeros(5, dtype=np.float32)
    transitions = np.zeros((5, 5), dtype=np.float32)
    for inside in (2, 4):
        start[inside] = -np.inf
        transitions[:, inside] = -np.inf
        transitions[[inside - 1, inside], inside] = 0
    return start, transitions


def test_constraints_hold() -> None:
    start, transitions = bio()
    free, bound = CRF(TAGS), CRF(TAGS, constraints=bio())
    bound.load_state_dict(free.state_dict())
    torch.manual_seed(12)
    emissions = 4 * torch.randn(400, TAGS)
    cu_seqlens = cu_seqlens_of(torch.tensor([20] * 20))

    def violations(paths: list[list[int]]) -> int:
        return sum(
            int(np.isinf(start[path[0]]))
            + sum(int(np.isinf(transitions[a, b])) for a, b in itertools.pairwise(path))
            for path in paths
        )

    assert violations(free.decode(emissions, cu_seqlens=cu_seqlens)) > 0
    paths = bound.decode(emissions, cu_seqlens=cu_seqlens)
    assert violations(paths) == 0
    marginals = bound.marginals(emissions, cu_seqlens=cu_seqlens)
    assert not marginals[::20, [2, 4]].any()
    assert marginals.isfinite().all()
    # A path that is allowed gets likelier; one that is not is impossible.
    gold = torch.tensor([tag for path in paths for tag in path])
    likely = bound(emissions, gold, cu_seqlens=cu_seqlens, reduction="none")
    assert (likely >= free(emissions, gold, cu_seqlens=cu_seqlens, reduction="none")).all()
    gold[40] = 2
    broken = bound(emissions, gold, cu_seqlens=cu_seqlens, reduction="none")
    assert broken[2] == -math.inf
    assert broken[[0, 1, 3]].isfinite().all()


def test_constraints_leave_finite_gradients() -> None:
    crf = CRF(TAGS, constraints=bio())
    emissions = torch.randn(8, TAGS, requires_grad=True)
    gold = torch.tensor([0, 1, 2, 2, 0, 3, 4, 1])
    crf(emissions, gold, cu_seqlens=torch.tensor([0, 8])).backward()
    for tensor in (emissions, *crf.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert crf.transitions.grad is not None
    assert crf.transitions.grad[0, 2] == 0
    assert crf.start_transitions.grad is not None
    assert crf.start_transitions.grad[4] == 0


def test_constraints_move_with_the_module() -> None:
    crf = CRF(TAGS, constraints=bio()).double()
    emissions = torch.randn(8, TAGS, dtype=torch.float64)
    assert crf.marginals(emissions, cu_seqlens=torch.tensor([0, 8])).dtype == torch.float64


@pytest.mark.parametrize(
    ("start", "transitions", "message"),
    [
        (np.zeros(4), np.zeros((5, 5)), r"start must have shape \[5\], got \[4\]"),
        (np.zeros(5), np.zeros((5, 4)), r"transitions must have shape \[5, 5\], got \[5, 4\]"),
        (np.full(5, 0.5), np.zeros((5, 5)), "start must hold 0 .* or -inf"),
        (np.zeros(5), np.full((5, 5), np.nan), "transitions must hold 0 .* or -inf"),
        (np.zeros(5), np.full((5, 5), np.inf), "transitions must hold 0 .* or -inf"),
    ],
)
def test_bad_constraints(start: Any, transitions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRF(TAGS, constraints=(start, transitions))


# --- as a module -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"emissions": torch.zeros(4, 5)}, "give cu_seqlens"),
        (
            {"emissions": torch.zeros(4, 5), "mask": torch.tensor([0, 4])},
            "give cu_seqlens=, not mask",
        ),
        (
            {"emissions": torch.zeros(4, 1, 5), "cu_seqlens": torch.tensor([0, 4])},
            "give mask, not cu_seqlens",
        ),
        ({"emissions": torch.zeros(4, 1, 6)}, r"5 .*got \[4, 1, 6\]"),
        ({"emissions": torch.zeros(5)}, r"got \[5\]"),
        ({"emissions": torch.zeros(4, 2, 5), "mask": torch.ones(4, 1)}, "mask must have shape"),
        (
            {"emissions": torch.zeros(3, 1, 5), "mask": torch.tensor([[1], [0], [1]])},
            "without holes",
        ),
    ],
)
def test_bad_forms_of_batch(arguments: dict[str, Any], message: str) -> None:
    crf = CRF(TAGS)
    emissions = arguments["emissions"]
    tags = torch.zeros(emissions.shape[:-1], dtype=torch.int64)
    for function in (crf.decode, crf.marginals, lambda **given: crf(tags=tags, **given)):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_bad_tags_and_reduction() -> None:
    crf = CRF(TAGS)
    emissions, tags, mask = make_batch(LENGTHS)
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'avg'"):
        crf(emissions, tags, mask, "avg")
    with pytest.raises(ValueError, match="tags must have shape"):
        crf(emissions, tags[1:], mask)
    for wrong in (-1, TAGS):
        tags[3, 1] = wrong
        with pytest.raises(ValueError, match=f"tags.*{wrong}"):
            crf(emissions, tags, mask)
    tags[3, 1] = 0
    tags[8, 2] = TAGS  # in the padding of a sequence of length 1
    assert crf(emissions, tags, mask).isfinite()


@pytest.mark.parametrize("num_tags", [0, -3])
def test_bad_num_tags(num_tags: int) -> None:
    with pytest.raises(ValueError, match=f"num_tags must be at least 1, got {num_tags}"):
        CRF(num_tags)


def test_one_tag() -> None:
    crf = CRF(1)
    emissions = torch.randn(6, 1)
    cu_seqlens = torch.tensor([0, 2, 6])
    got = crf(emissions, torch.zeros(6, dtype=torch.int64), cu_seqlens=cu_seqlens, reduction="none")
    torch.testing.assert_close(got, torch.zeros(2), atol=1e-5, rtol=0)
    assert crf.decode(emissions, cu_seqlens=cu_seqlens) == [[0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low: torch.dtype) -> None:
    crf = CRF(TAGS, constraints=bio())
    emissions, _, mask = make_batch(LENGTHS)
    tags = torch.zeros(mask.shape, dtype=torch.int64)
    with torch.autocast("cpu", dtype=low):
        got = crf(emissions.to(low), tags, mask)
    assert got.dtype == torch.float32
    assert torch.equal(got, crf(emissions.to(low).float(), tags, mask))


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    crf = CRF(TAGS, constraints=bio())
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
    for steps in (4, 7):
        emissions = torch.randn(2 * steps, TAGS)
        gold = torch.zeros(2 * steps, dtype=torch.int64)
        cu_seqlens = torch.tensor([0, steps, 2 * steps])
        got = compiled(emissions, gold, cu_seqlens=cu_seqlens)
        want = crf(emissions, gold, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got, list(crf.parameters()))
        for ours, theirs in zip(
            grads, torch.autograd.grad(want, list(crf.parameters())), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
