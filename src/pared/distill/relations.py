"""Relation losses: what is between a teacher's layers (flow), and between samples (distances, angles, similarities)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12


def flow(first: Tensor, second: Tensor) -> Tensor:
    """The Gram matrix between two layers: how each channel of one goes with each channel of the other.

    Args:
        first: Shape (samples, m, height, width), or (samples, m).
        second: Shape (samples, n, height, width) of the same places, or (samples, n).

    Returns:
        Shape (samples, m, n): the mean over places of the products.

    Source: Yim et al., CVPR 2017, "A Gift from Knowledge Distillation", equation 1.

    Example:
        >>> flow(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
        tensor([[[3.],
                 [6.]]])
    """
    first, second = (x[:, :, None] if x.ndim == 2 else x.flatten(2) for x in (first, second))
    return torch.einsum("bmp,bnp->bmn", first, second) / first.shape[2]


def flow_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared difference of two flows of the same shape.

    Source: Yim et al., CVPR 2017, equation 2 with equal weights. Deviations: the mean over the matrix instead of its
        sum; trained together with the task instead of in a stage before it.

    Example:
        >>> one = torch.tensor([[1.0]])
        >>> flow_loss((one, one), (one, 3 * one))
        tensor(4.)
    """
    return F.mse_loss(flow(*student), flow(*teacher))


def distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances of all pairs of samples, as multiples of their mean.

    Args:
        embeddings: Shape (samples, ...), flattened here.

    Returns:
        Shape (samples, samples), 0 on the diagonal; the mean over pairs of different samples is 1.

    Source: Park et al. 2019, arXiv:1904.05068, equations 5 and 6.

    Example:
        >>> distances(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([[0.0000, 0.5000, 1.5000],
                [0.5000, 0.0000, 1.0000],
                [1.5000, 1.0000, 0.0000]])
    """
    flat = embeddings.flatten(1)
    # Not by the products, in which samples that lie close lose their digits; equal ones get no gradient.
    found = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return found / (found.sum() / max(1, len(flat) * (len(flat) - 1))).clamp(min=EPSILON)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the distances of a student's embeddings and those of a teacher's.

    Args:
        student: Shape (samples, ...).
        teacher: As many samples, of any shape.

    Source: arXiv:1904.05068, equations 5 to 7. Deviation: the mean over all pairs instead of the sum.

    Example:
        >>> distance_loss(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor(0.)
    """
    return F.smooth_l1_loss(distances(student), distances(teacher))


def angles(embeddings: Tensor) -> Tensor:
    """Cosines of the angles that each sample sees between two others.

    Returns:
        Shape (samples, samples, samples): entry [j, i, k] is the cosine at j between i and k; 0 where i or k is j.

    Source: arXiv:1904.05068, equation 8.

    Example:
        >>> angles(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).round(decimals=4)[0, 1, 2]
        tensor(0.)
    """
    flat = embeddings.flatten(1)
    lines = F.normalize(flat[None] - flat[:, None], dim=2, eps=EPSILON)
    return lines @ lines.transpose(1, 2)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the angles of a student's embeddings and those of a teacher's.

    Memory grows with samples^2 * dimension and samples^3.

    Source: arXiv:1904.05068, equations 8 and 9. Deviation: the mean over all triples instead of the sum.

    Example:
        >>> corner, line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        >>> angle_loss(corner, 3 * corner).round(decimals=6), angle_loss(corner, line) > 0
        (tensor(0.), tensor(True))
    """
    return F.smooth_l1_loss(angles(student), angles(teacher))


def similarities(embeddings: Tensor) -> Tensor:
    """Inner products of all pairs of samples, each row scaled to length 1.

    Source: Tung and Mori 2019, arXiv:1907.09682, equations 1 and 2.

    Example:
        >>> similarities(torch.tensor([[3.0], [4.0]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000]])
    """
    flat = embeddings.flatten(1)
    return F.normalize(flat @ flat.T, dim=1, eps=EPSILON)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two similarity matrices.

    Args:
        student: Shape (samples, ...).
        teacher: As many samples, of any shape.

    Source: arXiv:1907.09682, equation 4, for one pair of layers.

    Example:
        >>> similarity_loss(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.3000)
    """
    return F.mse_loss(similarities(student), similarities(teacher))
