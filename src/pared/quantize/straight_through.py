"""Fake quantization that gradients pass through. Tensors in, tensors out; no modules here.

The forward pass is the affine map of `affine`; only its derivatives are of this file. It is made of a few vectorized
passes over the tensor, which on CPUs take less time than PyTorch's own fake quantization.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pared.quantize.affine import Grid, choose_qparams


class FakeQuantize(torch.autograd.Function):
    """See `fake_quantize_trained`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """Round to multiples of the scale, between `low` and `high` of them."""
        steps = torch.div(x, scale)
        output = torch.round(steps).clamp_(low, high).mul_(scale)
        ctx.low, ctx.high = low, high
        ctx.save_for_backward(steps, scale, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Of `x`: passed where it was not clipped. Of the scale: see `fake_quantize_trained`."""
        steps, scale, output = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(gradient, steps, ctx.low - 0.5, ctx.high + 0.5)
        if not ctx.needs_input_grad[1]:
            return passed, None, None, None
        if scale.numel() == 1:
            moved = torch.dot(gradient.flatten(), output.flatten()) / scale
            return passed, moved - torch.dot(passed.flatten(), steps.flatten()).reshape(scale.shape), None, None
        dims = [d for d in range(steps.ndim) if scale.shape[d] == 1]
        moved = (gradient * output).sum(dims, keepdim=True) / scale
        return passed, moved - (passed * steps).sum(dims, keepdim=True), None, None


def fake_quantize_trained(x: Tensor, scale: Tensor, zero_point: int, numbers: Grid) -> Tensor:
    """What `x` becomes when it is stored in integers, with derivatives to train by.

    To `x` the gradient passes unchanged where the value is not clipped, and not at all where it is (straight-through
    estimator). The derivative by the scale is round(x / s) - x / s inside, and the number of steps at the end where
    clipped, which is (output - x) / s and output / s: so one scalar product of the gradient with the output and one of
    the passed gradient with `x` give it.

    Args:
        x: float32, any shape.
        scale: > 0, of one element, or with 1 everywhere but along the channels.
        zero_point: On the grid, so that zero is exact.
        numbers: The integers to use.

    Returns:
        float32, the shape of `x`.

    Source: Bengio et al. 2013, arXiv:1308.3432; Esser et al. 2020, arXiv:1902.08153 (LSQ), eq. 1 to 5. Deviations:
        the grid may have a zero point; values pass up to half a step beyond its ends, where rounding still reaches it;
        the scale's gradient is not divided by the root of how many values share it (sec. 2.2), for the modules train
        the scale's logarithm.

    Example:
        >>> x = torch.tensor([0.24, 0.9], requires_grad=True)
        >>> fake_quantize_trained(x, torch.tensor(0.1), 0, Grid(0, 7, torch.uint8)).sum().backward()
        >>> x.grad.tolist()
        [1.0, 0.0]
    """
    # With the zero point taken off the ends there is nothing to add and take off the values.
    ends = numbers.low - zero_point, numbers.high - zero_point
    found: Tensor = FakeQuantize.apply(x.float(), scale, *ends)  # type: ignore[no-untyped-call]
    return found


def closest_scale(weight: Tensor, numbers: Grid, axis: int) -> Tensor:
    """For each channel the symmetric scale that leaves the least squared error, of those that clip up to 70 %.

    Args:
        weight: Finite.
        numbers: The integers to use, signed.
        axis: The axis kept.

    Returns:
        float32, 1 everywhere but `axis`; that of the largest value at 8 bits, where clipping gains nothing.

    Example:
        >>> closest_scale(torch.tensor([[3.0, 1.0, 0.0]]), Grid(-1, 1, torch.int8), axis=0).item()
        3.0
    """
    whole = choose_qparams(weight, numbers, symmetric=True, axis=axis).scale
    if numbers.high >= 127:
        return whole
    dims = [d for d in range(weight.ndim) if d != axis]
    best, least = whole, torch.full_like(whole, math.inf)
    for share in torch.linspace(1.0, 0.3, 29).tolist():
        scale = whole * share
        rounded = torch.round(weight / scale).clamp(numbers.low, numbers.high) * scale
        error = (rounded - weight).square().sum(dims, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
