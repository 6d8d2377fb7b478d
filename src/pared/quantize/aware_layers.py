"""The modules of a graph that trains with fake quantization: activations, layers with weights, batch norms.

A layer takes its weight, and the tensors of the batch norm folded into it, as arguments: they are parameters of the
model that trains, wherever it holds them. What is of these modules alone are the scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.quantize.affine import Grid, QParams, choose_qparams, qparams_of_range
from pared.quantize.straight_through import closest_scale, fake_quantize_trained

# How far a batch moves a range that follows the data.
FOLLOW = 0.01
# Smallest share of a batch norm's scale in a folded weight: a channel that it switches off must not divide by 0.
LEAST = 1e-6


class Freezable(nn.Module):
    """A module whose statistics follow the data of training until they are frozen."""

    frozen = False

    @property
    def follows(self) -> bool:
        """Whether statistics move with this batch."""
        return self.training and not self.frozen


class Activation(Freezable):
    """Fake quantization of one activation, or of several that share a range.

    Args:
        low: Lowest value of the range to start with.
        high: The highest.
        numbers: The integers to use.
        symmetric: As `qparams_of_range`.
        learned: Whether the scale is trained; else the range follows the data. The zero point stays either way where
            the scale is trained.
    """

    start: Tensor
    ends: Tensor

    def __init__(self, low: float, high: float, numbers: Grid, *, symmetric: bool, learned: bool) -> None:
        super().__init__()
        self.numbers, self.symmetric, self.learned = numbers, symmetric, learned
        start = qparams_of_range(torch.tensor(low), torch.tensor(high), numbers, symmetric=symmetric)
        self.register_buffer("start", start.scale)
        self.register_buffer("ends", torch.tensor([low, high]))
        self.zero_point = int(start.zero_point.item())
        self.log = nn.Parameter(torch.zeros(())) if learned else None

    def qparams(self) -> QParams:
        """Scale and zero point as they are."""
        if self.log is not None:
            scale = self.start * torch.exp(self.log)
            return QParams(scale, torch.tensor(self.zero_point, dtype=torch.int32))
        low, high = self.ends.unbind()
        return qparams_of_range(low, high, self.numbers, symmetric=self.symmetric)

    def forward(self, x: Tensor) -> Tensor:
        """`x` as its integers have it, float32."""
        if not self.learned and self.follows:
            with torch.no_grad():
                self.ends.lerp_(torch.stack(torch.aminmax(x.detach().float())), FOLLOW)
        scale, zero_point = self.qparams()
        return fake_quantize_trained(x, scale, int(zero_point), self.numbers)


class BatchNorm(Freezable):
    """A batch norm that stands alone, its mode at choice again; capture had fixed it."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None
    ) -> Tensor:
        """The norm, by the batch's statistics until they are frozen."""
        training = self.follows or mean is None
        return F.batch_norm(x, mean, var, gamma, beta, training, self.momentum, self.eps)


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator with a weight.

    Attributes:
        function: Called as function(x, weight, bias, *rest, **named).
        axis: The weight's axis of output channels.
    """

    function: Any
    rest: tuple[Any, ...]
    named: Mapping[str, Any]
    axis: int = 0


class Layer(Freezable):
    """A convolution or linear layer with a fake quantized weight, and the batch norm behind it folded in.

    The weight is quantized as it is shipped, scaled by the norm's running statistics. While these follow the data, the
    scaling is taken back, so that the norm sees what it would see in float; once they are frozen, the norm is a weight
    and a bias, as in the exported file.

    Args:
        call: The operator.
        weight: As folded at the start; chooses the scales to start with.
        numbers: The integers to use, signed and symmetric.
        learned: Whether scales are trained; else they follow the largest weight of each channel.
        norm: The batch norm; its tensors come with every call.

    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 3.2; Krishnamoorthi 2018, arXiv:1806.08342, sec. 3.2.2.
    """

    start: Tensor

    def __init__(self, call: Call, weight: Tensor, numbers: Grid, *, learned: bool, norm: BatchNorm | None) -> None:
        super().__init__()
        self.call, self.numbers, self.norm = call, numbers, norm
        self.register_buffer("start", closest_scale(weight, numbers, call.axis))
        self.log = nn.Parameter(torch.zeros_like(self.start)) if learned else None

    def scale(self, weight: Tensor) -> Tensor:
        """The scales, 1 everywhere but along the channels."""
        if self.log is None:
            return choose_qparams(weight.detach(), self.numbers, symmetric=True, axis=self.call.axis).scale
        return self.start * torch.exp(self.log)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operator."""
        found: Tensor = self.call.function(x, weight, bias, *self.call.rest, **self.call.named)
        return found

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *norm: Tensor | None) -> Tensor:
        """What the layer, with its norm, computes from fake quantized weights."""
        if self.norm is None:
            return self.run(x, fake_quantize_trained(weight, self.scale(weight), 0, self.numbers), bias)
        factor, shift = self.fold(bias, *norm)
        shape = [1] * weight.ndim
        shape[self.call.axis] = -1
        factor = factor.reshape(shape)
        if not self.norm.follows:
            folded = weight * factor
            return self.run(x, fake_quantize_trained(folded, self.scale(folded), 0, self.numbers), shift)
        # Rounded as folded, and the folding taken back: which is to be rounded with so much smaller a scale.
        factor = factor.detach()
        scale = self.scale(weight * factor) / factor.abs()
        normed: Tensor = self.norm(self.run(x, fake_quantize_trained(weight, scale, 0, self.numbers), bias), *norm)
        return normed

    def fold(
        self,
        bias: Tensor | None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the norm's running statistics multiply each channel by, and what they add."""
        if self.norm is None or mean is None or var is None:
            raise TypeError("only a norm with running statistics is folded")
        factor = torch.rsqrt(var.detach() + self.norm.eps)
        if gamma is not None:
            factor = factor * gamma
        factor = torch.where(factor.abs() < LEAST, torch.full_like(factor, LEAST), factor)
        start = -mean if bias is None else bias - mean
        shift = start * factor
        return factor, shift if beta is None else shift + beta
