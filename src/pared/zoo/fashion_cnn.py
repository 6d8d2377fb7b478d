"""The demo's network: small enough to train in a minute on two cores, wide enough that int8 pays."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

# Multiples of 16: what integer kernels work on at a time.
WIDTHS = (16, 32, 96, 128)


class Residual(nn.Module):
    """Two 3x3 convolutions, and the input added to their result.

    Source: He et al. 2016, arXiv:1512.03385, figure 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


def convolution(inside: int, outside: int, stride: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


def fashion_cnn(classes: int = 10) -> nn.Module:
    """An untrained network for images of (N, 1, 28, 28).

    Args:
        classes: Width of the output.

    Example:
        >>> import torch
        >>> fashion_cnn().eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    stages: list[nn.Module] = [convolution(1, WIDTHS[0], 1)]
    for inside, outside in itertools.pairwise(WIDTHS):
        stages += [convolution(inside, outside, 2), Residual(outside)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes))
