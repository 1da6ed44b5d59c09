"""What the student is trained to make small. Each loss is a mean over pieces.

P is the number of pieces of a batch, C the number of labels, B the number of sentences, R the width
of a representation. Nothing is padded, so nothing is masked but what a loss does not apply to.
``weights`` [P] are 1 for pieces that the teacher has a say on, 0 for others; None stands for all 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xdistil_fast import nn
from xdistil_fast.train.alignment import IGNORED
from xdistil_fast.train.marginals import crf_log_marginals

KLD_EPSILON = 1e-7  # of Keras


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


def best_labels(teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The teacher's best label of each piece, to be learned as if it were gold: hard distillation.

    ``argmax_c logits_pc``, or ``IGNORED`` where ``w_p`` is 0; of equal logits one of them.

    Source: Lee, "Pseudo-Label", ICML 2013 workshop, equation 14; hard distillation of Mukherjee and
    Hassan Awadallah, 2019.

    Args:
        teacher_logits: [P, C].
        weights: [P] or None.

    Returns:
        [P] int64, for :func:`hard_loss` or :func:`crf_loss`.
    """
    best = teacher_logits.argmax(dim=1)
    return best if weights is None else best.masked_fill(weights == 0, IGNORED)


def logit_loss(emissions: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between the student's emissions and the teacher's logits.

    ``1/(P C) sum_p w_p ||emissions_p - logits_p||^2``.

    Source: Mukherjee and Hassan Awadallah, ACL 2020, L_LL (their equation 4), with the mean that
    their code takes in place of the half sum. No temperature: raw logits.

    Args:
        emissions: [P, C].
        teacher_logits: [P, C].
        weights: [P] or None.
    """
    if weights is None:
        return functional.mse_loss(emissions, teacher_logits)
    squares = (emissions - teacher_logits).square().sum(dim=1)
    return torch.dot(squares, weights) / max(1, emissions.numel())


def kl_loss(
    emissions: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence of the student's label distribution from the teacher's.

    ``T^2/P sum_p w_p sum_c q_pc (log q_pc - log s_pc)`` with ``q = softmax(logits / T)`` and
    ``s = softmax(emissions / T)``. The factor keeps gradients of one size whatever T is.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
    section 2.

    Args:
        emissions: [P, C].
        teacher_logits: [P, C].
        weights: [P] or None.
        temperature: T, above 0.
    """
    log_s = torch.log_softmax(emissions / temperature, dim=1)
    return _divergence(log_s, teacher_logits, weights, temperature)


def crf_marginal_loss(
    crf: nn.CRF,
    emissions: Tensor,
    teacher_logits: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence of a CRF's marginals from the teacher's label distribution.

    :func:`kl_loss` with ``s_p`` the marginal distribution at piece p of the CRF whose scores,
    emissions and transitions alike, are divided by T.

    Source: Wang et al., "Structure-Level Knowledge Distillation For Multilingual Sequence
    Labeling", ACL 2020, where teacher and student are both CRFs; here the teacher is a softmax.

    Args:
        crf: transition scores of C labels.
        emissions: [P, C].
        teacher_logits: [P, C].
        cu_seqlens: [B + 1] integers, where the sentences start; ends at P.
        weights: [P] or None.
        temperature: T, above 0.
    """
    log_s = crf_log_marginals(
        emissions / temperature,
        cu_seqlens,
        crf.start_transitions / temperature,
        crf.end_transitions / temperature,
        crf.transitions / temperature,
    )
    return _divergence(log_s, teacher_logits, weights, temperature)


def _divergence(
    log_s: Tensor, teacher_logits: Tensor, weights: Tensor | None, temperature: float
) -> Tensor:
    log_q = torch.log_softmax(teacher_logits / temperature, dim=1)
    rows = (log_q.exp() * (log_q - log_s)).sum(dim=1)
    return temperature**2 * _mean(rows, weights)


def representation_mse(values: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between projected and teacher's hidden states.

    ``1/(P R) sum_p w_p ||values_p - targets_p||^2``.

    Source: Romero et al., "FitNets", ICLR 2015, equation 3, as a mean.

    Args:
        values: [P, R].
        targets: [P, R].
        weights: [P] or None.
    """
    return logit_loss(values, targets, weights)


def representation_cosine(values: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """One minus the cosine of the angle between projected and teacher's hidden states.

    ``1/P sum_p w_p (1 - values_p . targets_p / (||values_p|| ||targets_p||))``.

    Source: Sanh et al., "DistilBERT", 2019, section 3, where it is one part of the loss.

    Args:
        values: [P, R].
        targets: [P, R].
        weights: [P] or None.
    """
    return _mean(1.0 - functional.cosine_similarity(values, targets, dim=1), weights)


def representation_kld(values: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """What XtremeDistil's code took for a Kullback-Leibler divergence of hidden states.

    ``1/P sum_p w_p sum_r t_pr log(t_pr / v_pr)``, t and v being targets and GELU(values) clipped to
    [1e-7, 1]. Neither is made a distribution first, so the sum may be negative; a component of the
    teacher's that is negative has no pull, and one above 1 pulls as 1 does. Kept to compare with.

    Source: Mukherjee and Hassan Awadallah, ACL 2020, L_RL (their equation 6), by the
    ``kullback_leibler_divergence`` of Keras that their code calls.

    Args:
        values: [P, R], before the GELU.
        targets: [P, R], as the teacher has them.
        weights: [P] or None.
    """
    t = targets.clamp(KLD_EPSILON, 1.0)
    v = functional.gelu(values).clamp(KLD_EPSILON, 1.0)
    return _mean((t * (t / v).log()).sum(dim=1), weights)


def _mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over all P pieces of a value [P] each, times its weight."""
    total = rows.sum() if weights is None else torch.dot(rows, weights)
    return total / max(1, rows.numel())


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
