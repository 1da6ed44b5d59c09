"""What the student is trained to make small. Each loss is a mean over pieces.

P is the number of pieces of a batch, C the number of labels, B the number of sentences. Nothing
is padded, so nothing is masked but what a loss does not apply to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xdistil_fast import nn
from xdistil_fast.train.alignment import IGNORED


def hard_loss(emissions: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the gold labels of the pieces that have one.

    ``-1/P sum_p log softmax(emissions_p)[target_p]``, the sum over labelled pieces only. It is
    divided by all P pieces of the batch, so that a labelled piece weighs the same whatever share
    of a batch is labelled.

    Source: Mukherjee and Hassan Awadallah, ACL 2020, equation of L_CE.

    Args:
        emissions: [P, C].
        targets: [P] int64 label ids, or ``IGNORED``.

    Returns:
        A scalar; 0 where no piece is labelled.
    """
    total = functional.cross_entropy(emissions, targets, ignore_index=IGNORED, reduction="sum")
    return total / max(1, targets.numel())


def logit_loss(emissions: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between the student's emissions and the teacher's logits.

    ``1/(P C) sum_p w_p ||emissions_p - logits_p||^2``.

    Source: Mukherjee and Hassan Awadallah, ACL 2020, L_LL (their equation 4), with the mean that
    their code takes in place of the half sum. No temperature: raw logits.

    Args:
        emissions: [P, C].
        teacher_logits: [P, C].
        weights: [P] 0 or 1: pieces the teacher has a say on; all of them if None.
    """
    if weights is None:
        return functional.mse_loss(emissions, teacher_logits)
    squares = (emissions - teacher_logits).square().sum(dim=1)
    return torch.dot(squares, weights) / max(1, emissions.numel())


def crf_loss(crf: nn.CRF, emissions: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Negative log-likelihood of the gold label sequences, by all pieces of the batch.

    ``-1/P sum_b log p(targets_b | emissions_b)``, b over sentences whose pieces are all labelled.

    Source: Lafferty et al., ICML 2001; Lample et al., NAACL 2016.

    Args:
        crf: transition scores of C labels.
        emissions: [P, C].
        targets: [P] int64; a sentence with an ``IGNORED`` piece takes no part.
        cu_seqlens: [B + 1] int32, where the sentences start; ends at P.

    Returns:
        A scalar; 0 where no sentence is labelled.
    """
    lengths = torch.diff(cu_seqlens)
    known = functional.pad(torch.cumsum(targets != IGNORED, dim=0), (1, 0))[cu_seqlens.long()]
    labelled = torch.diff(known) == lengths
    chosen = torch.repeat_interleave(labelled, lengths)
    starts = functional.pad(torch.cumsum(lengths[labelled], dim=0), (1, 0)).to(torch.int32)
    log_likelihood: Tensor = crf(emissions[chosen], targets[chosen], cu_seqlens=starts)
    return -log_likelihood / max(1, targets.numel())
