"""Contrastive distillation: a student's embedding is nearest to the teacher's of the same sample, among many others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    others: Tensor | None = None,
    *,
    temperature: float,
    allowed: Tensor | None = None,
) -> Tensor:
    """Cross entropy of picking the teacher's embedding of the same sample, by cosine similarity.

    Args:
        student: Embeddings, shape (samples, dimension); scaled to length 1 here.
        teacher: The same shape; row i belongs to the same sample.
        others: Further embeddings of the teacher's to pick from, shape (more, dimension).
        temperature: Above 0; what similarities are divided by.
        allowed: Which candidates each sample is told apart from, boolean, shape (samples, samples + more). Its own
            embedding always is one. None: all.

    Returns:
        The mean over samples, a scalar.

    Source: Tian, Krishnan, Isola 2020, arXiv:1910.10699. Deviations: one cross entropy over the candidates instead of
        binary ones with a constant for the noise; the negatives come from the batch and a queue of the teacher's last
        embeddings, instead of a bank with an entry for every sample of the data; only the student's embeddings are told
        apart, not the teacher's.

    Example:
        >>> one = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> contrastive_loss(one, one, temperature=1.0)
        tensor(0.3133)
    """
    candidates = teacher if others is None else torch.cat([teacher, others])
    similar = F.normalize(student, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    own = torch.arange(len(student), device=student.device)
    if allowed is not None:
        positive = own[:, None] == torch.arange(similar.shape[1], device=own.device)
        similar = similar.masked_fill(~(allowed | positive), -torch.inf)
    return F.cross_entropy(similar, own)
