"""The affine map between real numbers and integers. Tensors in, tensors out; no modules here.

One formula for the whole project, that of ONNX `QuantizeLinear`:
q = saturate(round_half_to_even(x / scale) + zero_point).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pared.errors import QuantizeError

INT32_MAX = 2**31 - 1


class Grid(NamedTuple):
    """The integers of a quantized tensor: lowest, highest, storage type."""

    low: int
    high: int
    dtype: torch.dtype


class QParams(NamedTuple):
    """Scale and zero point, broadcastable against the tensor they belong to."""

    scale: Tensor
    zero_point: Tensor


def grid(*, bits: int, signed: bool, symmetric: bool) -> Grid:
    """The integers of a width. Signed symmetric grids leave out the lowest one, so that -x is as exact as x.

    Raises:
        QuantizeError: `bits` outside 2..8.

    Example:
        >>> grid(bits=8, signed=True, symmetric=True)
        Grid(low=-127, high=127, dtype=torch.int8)
        >>> grid(bits=8, signed=False, symmetric=False)
        Grid(low=0, high=255, dtype=torch.uint8)
    """
    if not 2 <= bits <= 8:
        raise QuantizeError(f"bits must be 2 to 8, found {bits}")
    if signed:
        top = 2 ** (bits - 1) - 1
        return Grid(-top if symmetric else -top - 1, top, torch.int8)
    return Grid(0, 2**bits - 1, torch.uint8)


def qparams_of_range(low: Tensor, high: Tensor, numbers: Grid, *, symmetric: bool) -> QParams:
    """Scale and zero point that cover the ranges [low, high].

    Each range is widened to contain 0, so real zero is exact; a range that holds 0 alone gets scale 1.

    Args:
        low: Lower ends, any shape, finite.
        high: Upper ends, the same shape, `high >= low`.
        numbers: The integers to use.
        symmetric: True centres the range on 0: zero point 0 on signed integers, the middle one on unsigned.

    Returns:
        `scale` > 0 float32 and `zero_point` int32, in the shape of `low`.

    Raises:
        QuantizeError: A range is not finite or upside down.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1 and sec. 3.1. Deviation: zero points may be signed.

    Example:
        >>> numbers = grid(bits=4, signed=False, symmetric=False)
        >>> p = qparams_of_range(torch.tensor(0.0), torch.tensor(1.5), numbers, symmetric=False)
        >>> round(p.scale.item(), 3), p.zero_point.item()
        (0.1, 0)
    """
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise QuantizeError(
            "a range to quantize is not finite; look for NaN or infinity in the data or the layer before"
        )
    if bool((low > high).any()):
        raise QuantizeError(f"a range to quantize is upside down: low {low.max().item()}, high {high.min().item()}")
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if symmetric:
        reach = torch.maximum(-low, high)
        middle = (numbers.low + numbers.high + 1) // 2
        scale = positive(2 * reach / (numbers.high - numbers.low))
        return QParams(scale, torch.full_like(scale, middle, dtype=torch.int32))
    scale = positive((high - low) / (numbers.high - numbers.low))
    zero_point = (numbers.low - torch.round(low / scale.double())).clamp(numbers.low, numbers.high)
    return QParams(scale, zero_point.to(torch.int32))


def positive(scale: Tensor) -> Tensor:
    """float32 scales, with 1 for those that are 0 or too small to divide by in float32."""
    single = scale.float()
    return torch.where(single < torch.finfo(torch.float32).tiny, torch.ones_like(single), single)


def choose_qparams(x: Tensor, numbers: Grid, *, symmetric: bool, axis: int | None = None) -> QParams:
    """Scale and zero point from a tensor's smallest and largest values.

    Args:
        x: Finite values. With `axis`, one pair is chosen for each index of that axis.
        numbers: The integers to use.
        symmetric: See `qparams_of_range`.
        axis: The axis kept.

    Returns:
        Shape () or, with `axis`, 1 everywhere but `axis`.

    Raises:
        QuantizeError: `x` is empty or not finite.

    Example:
        >>> w = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
        >>> numbers = grid(bits=8, signed=True, symmetric=True)
        >>> choose_qparams(w, numbers, symmetric=True, axis=0).scale.flatten().tolist()
        [0.015748031437397003, 1.0]
    """
    if x.numel() == 0:
        raise QuantizeError("an empty tensor cannot be quantized")
    dims = [d for d in range(x.ndim) if d != axis] if axis is not None else list(range(x.ndim))
    low, high = (x.amin(dims, keepdim=axis is not None), x.amax(dims, keepdim=axis is not None)) if dims else (x, x)
    return qparams_of_range(low, high, numbers, symmetric=symmetric)


def quantize(x: Tensor, qparams: QParams, numbers: Grid) -> Tensor:
    """Integers of `x`: saturate(round_half_to_even(x / scale) + zero_point), stored as `numbers.dtype`.

    Example:
        >>> qparams = QParams(torch.tensor(0.1), torch.tensor(0))
        >>> quantize(torch.tensor([0.05, 0.15, 9.0]), qparams, Grid(0, 15, torch.uint8)).tolist()
        [0, 2, 15]
    """
    steps = torch.round(x / qparams.scale) + qparams.zero_point
    return steps.clamp(numbers.low, numbers.high).to(numbers.dtype)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Real numbers of integers: (q - zero_point) * scale, float32.

    Example:
        >>> dequantize(torch.tensor([3], dtype=torch.uint8), QParams(torch.tensor(0.5), torch.tensor(1))).tolist()
        [1.0]
    """
    return (q.to(torch.int32) - qparams.zero_point).to(torch.float32) * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams, numbers: Grid) -> Tensor:
    """`dequantize(quantize(x))`: what `x` becomes when it is stored in integers."""
    return dequantize(quantize(x, qparams, numbers), qparams)


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A bias as int32 in units of the accumulator, input_scale * weight_scale.

    Args:
        bias: Shape (channels,).
        input_scale: Shape ().
        weight_scale: Shape (channels,).

    Returns:
        int32 bias and its float32 scale, both (channels,).

    Raises:
        QuantizeError: A bias does not fit int32; `fit_bias` widens the weight scale beforehand.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 11.
    """
    scale = (input_scale.double() * weight_scale.double()).float()
    steps = torch.round(bias.double() / scale.double())
    if bool((steps.abs() > INT32_MAX).any()):
        raise QuantizeError("a bias does not fit int32 in units of input scale x weight scale")
    return steps.to(torch.int32), scale


def fit_bias(weight_scale: Tensor, bias: Tensor, input_scale: Tensor) -> Tensor:
    """Weight scales, widened where the bias would overflow int32.

    A channel whose weights are all but zero has a tiny scale, in whose units its bias may exceed int32: the result
    would be wrong by orders of magnitude, silently. Half the range is kept for the sum itself. Nor may the unit itself
    be too small for float32.
    """
    unit = (bias.double().abs() / (INT32_MAX // 2)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(weight_scale.double(), unit / input_scale.double()).float()
