"""What an integer program computes on an x86 processor without VNNI: products that saturate in 16 bits.

The arithmetic first: exact integer sums of u8 times s8, and what saturation takes off them. Then `Emulation`, which
runs a whole emitted program as ONNX Runtime's kernels would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from pared.graph.capture import operator
from pared.measure.saturation import HIGHEST, LOWEST, is_depthwise, neighbours, reach
from pared.quantize.folding import CONVOLUTIONS

# Two weights of one sign that sum to 126 steps sum to 128 at most, whichever way each is rounded; 255 * 128 < 2^15.
SAFE_STEPS = 126
# A sum of so many products of a byte and a signed byte is below 2^24, so float32 holds it and all its parts exactly.
EXACT = 512
# Elements of an intermediate result: they stay in the cache.
BLOCK = 2**17


def exact_product(weight: Tensor, columns: Tensor) -> Tensor:
    """The matrix product of integers, exact.

    Args:
        weight: (out, k), -128 to 127.
        columns: (k, positions), 0 to 255.

    Returns:
        int32 (out, positions).
    """
    total = torch.zeros(len(weight), columns.shape[1], dtype=torch.int32)
    for start in range(0, weight.shape[1], EXACT):
        part = weight[:, start : start + EXACT].float() @ columns[start : start + EXACT].float()
        total += part.to(torch.int32)
    return total


def lost(weight: Tensor, columns: Tensor) -> Tensor:
    """What saturation takes off a matrix product: the sum over pairs of (pair - pair in 16 bits).

    Few pairs can saturate: both weights must be large and of one sign, and the activations large. The others are never
    looked at.

    Args:
        weight: int8 (out, k), in the order of the kernel.
        columns: (k, positions), 0 to 255.

    Returns:
        int32 (out, positions).
    """
    taken = torch.zeros(len(weight), columns.shape[1], dtype=torch.int32)
    pairs = torch.from_numpy(neighbours(weight.numpy())).to(torch.int32)
    values = columns.to(torch.int32)
    if len(values) % 2:
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    top = values.amax(1).reshape(-1, 2)
    most = (pairs.clamp(min=0) * top).sum(-1)
    least = (pairs.clamp(max=0) * top).sum(-1)
    outs, places = ((most > HIGHEST) | (least < LOWEST)).nonzero(as_tuple=True)
    size = max(BLOCK // max(values.shape[1], 1), 1)
    for out, place in zip(torch.split(outs, size), torch.split(places, size), strict=True):
        chosen = pairs[out, place].unsqueeze(-1)
        sums = values.index_select(0, 2 * place).mul_(chosen[:, 0])
        sums.addcmul_(values.index_select(0, 2 * place + 1), chosen[:, 1])
        taken.index_add_(0, out, sums.sub_(sums.clamp(LOWEST, HIGHEST)))
    return taken


def linear_sums(x: Tensor, weight: Tensor, *, saturate: bool) -> Tensor:
    """The sums of a linear layer, x @ weight.T, before zero point and bias.

    Args:
        x: uint8 (..., in).
        weight: int8 (out, in).
        saturate: As without VNNI.

    Returns:
        int32 (..., out).
    """
    columns = x.reshape(-1, x.shape[-1]).T
    sums = exact_product(weight, columns)
    if saturate:
        sums -= lost(weight, columns)
    return sums.T.reshape(*x.shape[:-1], len(weight))


def convolution_sums(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    saturate: bool,
) -> Tensor:
    """The sums of a convolution without padding, before zero point and bias.

    Padding belongs to the activations here: a kernel reads the zero point there, and multiplies it like any other.

    Args:
        x: uint8 (n, in, *size).
        weight: int8 (out, in / groups, *kernel).
        stride: One number a dimension.
        dilation: The same.
        groups: Must divide both numbers of channels.
        saturate: As without VNNI; no depthwise layer does.

    Returns:
        int32 (n, out, *size).
    """
    kernel = weight.shape[2:]
    windows = x
    for axis, (width, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        windows = windows.unfold(axis, (width - 1) * gap + 1, step)[..., ::gap]
    places = windows.shape[2 : 2 + len(kernel)]
    # (kernel, channel, sample, place): the order in which a kernel reads a window, then what it is read for.
    dims = (*range(2 + len(kernel), 2 + 2 * len(kernel)), 1, 0, *range(2, 2 + len(kernel)))
    ordered = windows.permute(dims).reshape(math.prod(kernel), x.shape[1], -1)
    rows = weight.movedim(1, -1).reshape(len(weight), -1, weight.shape[1])
    inside, outside = weight.shape[1], len(weight) // groups
    saturate = saturate and not is_depthwise(weight.numpy(), groups)
    sums = []
    for group in range(groups):
        columns = ordered[:, group * inside : (group + 1) * inside].reshape(-1, ordered.shape[-1])
        own = rows[group * outside : (group + 1) * outside].reshape(outside, -1)
        sums.append(exact_product(own, columns))
        if saturate:
            sums[-1] -= lost(own, columns)
    return torch.cat(sums).reshape(len(weight), len(x), *places).transpose(0, 1)


def groups_of(layer: fx.Node) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    groups = layer.args[6] if operator(layer) in CONVOLUTIONS and len(layer.args) > 6 else 1
    return groups if isinstance(groups, int) else 1


def safe_scale(weight: Tensor, *, groups: int, any_pair: bool) -> Tensor:
    """The smallest scale of each channel with which no pair of its products can saturate.

    Most channels lose little: their two largest neighbours of one sign are seldom twice their largest weight, which is
    what weights of 7 bits would provide for.

    Args:
        weight: Real, the output channels first.
        groups: Of a convolution, for depthwise ones need none; 1 for a linear layer.
        any_pair: As for `measure.saturation.reach`.

    Returns:
        float32 (channels,), 0 where every scale is safe.
    """
    values = weight.double().numpy()
    if is_depthwise(values, groups) and not any_pair:
        return torch.zeros(len(values))
    return (torch.from_numpy(reach(values, any_pair=any_pair)) / SAFE_STEPS).float()
