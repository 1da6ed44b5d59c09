"""Marginals of a linear-chain CRF that carry a gradient.

``xdistil_fast.torch_ops.crf_marginals`` is fast and has none: the gradient of a marginal is a
second derivative of log Z, for which there is no kernel. Here forward and backward sums are plain
torch, in log space, and autograd does the rest. A batch is padded inside.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crf_log_marginals(
    emissions: Tensor, cu_seqlens: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """Log-probability of each label at each piece, differentiable in all scores.

    With ``alpha_t(j)`` the log of the sum over all beginnings that end with label j at piece t, and
    ``beta_t(i)`` that over all ways on from label i, ``log m_t = log_softmax(alpha_t + beta_t)``:
    log Z is the same sum at every piece.

    Source: Rabiner, "A Tutorial on Hidden Markov Models", 1989, section III; Sutton and McCallum,
    "An Introduction to Conditional Random Fields", 2012, section 4.1.

    Args:
        emissions: [P, C].
        cu_seqlens: [B + 1] integers, where the sentences start; ends at P.
        start: [C], finite.
        end: [C], finite.
        transitions: [C, C], from row to column, finite.

    Returns:
        [P, C]; exp of a row sums to 1.
    """
    lengths = torch.diff(cu_seqlens.long())
    sentence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    step = torch.arange(len(emissions), device=lengths.device) - cu_seqlens.long()[sentence]
    steps = int(lengths.max()) if len(lengths) else 0
    if not steps:
        return emissions
    padded = emissions.new_zeros(steps, len(lengths), emissions.shape[1])
    padded = padded.index_put((step, sentence), emissions)
    alphas = [start + padded[0]]
    for t in range(1, steps):
        moves = alphas[-1][:, :, None] + transitions
        alphas.append(torch.logsumexp(moves, dim=1) + padded[t])
    betas = [end.expand(len(lengths), -1)]
    for t in range(steps - 2, -1, -1):
        moves = transitions + (padded[t + 1] + betas[-1])[:, None, :]
        # A sentence whose last piece is t, or that ended before, begins its sums here.
        goes_on = (lengths > t + 1)[:, None]
        betas.append(torch.where(goes_on, torch.logsumexp(moves, dim=2), end))
    both = torch.stack(alphas) + torch.stack(betas[::-1])
    return torch.log_softmax(both[step, sentence], dim=1)
