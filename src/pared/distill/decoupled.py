"""Decoupled distillation: the divergence of the classes in two parts, so that the second counts however sure the
teacher is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decoupled_divergence(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, beta: float
) -> Tensor:
    """Divergence of (target's class, all others) + beta * divergence among the others, times the temperature squared.

    With beta = 1 - (the teacher's probability of the target's class) it is the plain divergence (equation 5).

    Args:
        student: Logits, shape (samples, classes), at least 2 classes.
        teacher: Logits of the same shape.
        target: Class indices, shape (samples,).
        temperature: Above 0.
        beta: Weight of the second part, at least 0.

    Returns:
        One value a sample, shape (samples,), at least 0 but for rounding.

    Source: Zhao et al. 2022, arXiv:2203.08679, equation 7 with alpha = 1. Deviation: no warm-up of its weight over the
        first 20 epochs, which its appendix has for long trainings.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> decoupled_divergence(*logits, torch.tensor([0]), temperature=1.0, beta=2.0)
        tensor([0.2391])
    """
    log_p, log_q = F.log_softmax(teacher / temperature, 1), F.log_softmax(student / temperature, 1)
    hit = target[:, None] == torch.arange(student.shape[1], device=target.device)
    others_p, others_q = (log.masked_fill(hit, -torch.inf).logsumexp(1) for log in (log_p, log_q))
    hit_p, hit_q = (log.gather(1, target[:, None])[:, 0] for log in (log_p, log_q))
    first = hit_p.exp() * (hit_p - hit_q) + others_p.exp() * (others_p - others_q)
    # Normalised among the others. The target's own column would overflow where the teacher is sure; at 0 it adds none.
    pairs = ((log_p, others_p), (log_q, others_q))
    rest_p, rest_q = ((log - total[:, None]).masked_fill(hit, 0) for log, total in pairs)
    second = (rest_p.exp() * (rest_p - rest_q)).sum(1)
    return (first + beta * second) * temperature**2
