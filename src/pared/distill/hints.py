"""Feature losses that compare one layer of a student with one of a teacher: hints and attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two features.

    Args:
        student: Any shape; where it differed from the teacher's, an adapter has made it the same.
        teacher: The same shape.

    Returns:
        A scalar: the mean over all values.

    Source: Romero et al. 2015, arXiv:1412.6550, equation 3. Deviations: the mean instead of half the sum, so that
        layers of all sizes weigh the same; trained together with the task, not in a stage before it; the regressor is a
        1x1 convolution, and only there where shapes differ.

    Example:
        >>> hint_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(2.)
    """
    return F.mse_loss(student, teacher)


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: the sum of squares over channels at each place, scaled to length 1.

    Args:
        features: Shape (samples, channels, height, width...), or (samples, positions, channels) of a transformer.

    Returns:
        Shape (samples, places); all 0 where the features are.

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928, section 3.1, F_sum^2.

    Example:
        >>> attention_map(torch.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]]))
        tensor([[0., 1.]])
    """
    energy = features.square().sum(-1 if features.ndim == 3 else 1).flatten(1)
    return F.normalize(energy, dim=1, eps=EPSILON)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two attention maps, the mean over samples.

    Args:
        student: As `attention_map` takes them, with any number of channels.
        teacher: The same places.

    Returns:
        A scalar, 0 to 2: both maps have length 1 and no negative value.

    Source: arXiv:1612.03928, equation 2. Deviation: the distance is squared, as in the authors' published code; without
        the square its gradient has no limit where the maps meet.

    Example:
        >>> one, other = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
        >>> attention_loss(one, other)
        tensor(2.)
    """
    return (attention_map(student) - attention_map(teacher)).square().sum(1).mean()


def resize(features: Tensor, size: tuple[int, ...]) -> Tensor:
    """Features at another spatial size: averaged where it is smaller, interpolated in lines where it is larger.

    Args:
        features: (samples, channels, height, width), or (samples, positions, channels).
        size: Height and width, or the number of positions.

    Example:
        >>> resize(torch.tensor([[[[1.0, 3.0]]]]), (1, 1))
        tensor([[[[2.]]]])
    """
    if features.ndim == 3:
        moved = features.movedim(1, 2)
        same = F.interpolate(moved, size=size[0], mode="linear", align_corners=False)
        return same.movedim(1, 2)
    if features.shape[2:] == torch.Size(size):
        return features
    if all(new <= old for new, old in zip(size, features.shape[2:], strict=True)):
        return F.adaptive_avg_pool2d(features, (size[0], size[1]))
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
