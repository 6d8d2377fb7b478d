"""Streaming statistics of tensors: extremes, histograms, second moments. Constant memory, one pass; shared by all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pared.errors import DataError
from pared.graph.capture import operator

PART = 2**18
EXACT = 2.0**-100, 1.0  # widths of bins by which float32 numbers of any size divide without rounding


class Extremes:
    """Lowest and highest value seen.

    Example:
        >>> seen = Extremes()
        >>> seen.update(torch.tensor([1.0, -2.0]))
        >>> seen.low, seen.high
        (-2.0, 1.0)
    """

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")

    def update(self, x: Tensor) -> None:
        """Count a tensor of any shape in. Raises: DataError for NaN or infinity."""
        if x.numel() == 0:
            return
        low, high = (end.item() for end in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise DataError(f"values are not finite: lowest {low}, highest {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)


class Histogram:
    """Counts of values in equal bins over a range that grows as the data demands.

    The window is [-reach, reach), where reach is the least power of two above every value seen. When it grows, pairs of
    neighbouring bins merge, so that counts stay exact and memory constant; and since the window follows from the
    extremes alone, the order of the data makes no difference.

    Attributes:
        bins: Number of bins: a power of two, at least 4. Bin i covers [i - bins / 2, i + 1 - bins / 2) * width.
        width: Width of one bin, a power of two; 0 as long as nothing but zeros was seen.
        counts: float64, shape (bins,).
        zeros: How many of the values were exactly 0, which every integer grid holds without error.

    Example:
        >>> h = Histogram(bins=8)
        >>> h.update(torch.tensor([0.0, 1.0, 2.0, 3.5]))
        >>> h.counts.tolist(), h.width
        ([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 1.0)
    """

    def __init__(self, bins: int = 16384) -> None:
        self.bins = bins
        self.width = 0.0
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.zeros = 0
        self.extremes = Extremes()

    def update(self, x: Tensor) -> None:
        """Count a float32 tensor (or a narrower one) of any shape in. Raises: DataError for NaN or infinity."""
        if x.numel() == 0:
            return
        self.extremes.update(x)
        self.widen(max(-self.extremes.low, self.extremes.high))
        if self.width == 0.0:
            self.counts[self.bins // 2] += x.numel()  # zeros lie in this bin, whatever the width will be
            self.zeros += x.numel()
            return
        # In parts that stay in the cache from one operator to the next.
        for part in torch.split(x.detach().flatten().float(), PART):
            self.zeros += part.numel() - int(np.count_nonzero(part.numpy()))  # PyTorch's own takes ten times as long
            # The width is a power of two: float32 divides exactly, except where a quotient is too small for it.
            scaled = part * (1 / self.width) if EXACT[0] <= self.width <= EXACT[1] else part.double() / self.width
            index = scaled.floor_().add_(self.bins // 2).to(torch.int16 if self.bins <= 2**15 else torch.int64)
            self.counts += torch.bincount(index, minlength=self.bins)

    def widen(self, reach: float) -> None:
        """Make the window hold [-reach, reach], merging pairs of bins where it must grow."""
        if reach == 0.0:
            return
        width = math.ldexp(1.0, math.frexp(reach)[1]) / (self.bins // 2)
        self.width = self.width or width
        while self.width < width:
            merged = torch.zeros_like(self.counts)
            merged[self.bins // 4 : -self.bins // 4] = self.counts.reshape(-1, 2).sum(1)
            self.counts, self.width = merged, self.width * 2

    def quantile(self, q: float) -> float:
        """Value below which a fraction `q` of all values lies, to within a bin, never beyond the extremes."""
        if self.width == 0.0:
            return 0.0
        cumulative = torch.cumsum(self.counts, 0)
        index = int(torch.searchsorted(cumulative, q * cumulative[-1].item()).clamp(max=self.bins - 1).item())
        before = cumulative[index - 1].item() if index else 0.0
        inside = (q * cumulative[-1].item() - before) / max(self.counts[index].item(), 1.0)
        value = (index + inside - self.bins // 2) * self.width
        return min(max(value, self.extremes.low), self.extremes.high)


class RunningExtremes:
    """Lowest and highest value of each sample, averaged over the samples in the order of the data.

    The average is the plain mean of the first 1 / `momentum` samples, and moves by `momentum` with each later one, so
    that no single sample weighs more than another at the start. Samples may be counted in out of order, as threads
    finish them: each waits for those before it, which makes the result the same whatever the threads do.

    Example:
        >>> seen = RunningExtremes(momentum=0.01)
        >>> seen.update_at(torch.tensor([[-3.0, 6.0]]), first=1, samples=1)
        >>> seen.update_at(torch.tensor([[-1.0, 2.0]]), first=0, samples=1)
        >>> seen.low, seen.high
        (-2.0, 4.0)
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.low = 0.0
        self.high = 0.0
        self.samples = 0
        self.extremes = Extremes()
        self.waiting: dict[int, tuple[int, list[list[float]]]] = {}
        self.counted = 0

    def update(self, x: Tensor) -> None:
        """Count the next samples in, the first dimension's. Raises: DataError for NaN or infinity."""
        self.update_at(x, self.samples, x.shape[0] if x.ndim else 1)

    def update_at(self, x: Tensor, first: int, samples: int) -> None:
        """Count samples in by their position in the data.

        Args:
            x: Any shape. Where the first dimension is no multiple of `samples`, all have the same extremes.
            first: How many samples come before these.
            samples: How many these are.

        Raises:
            DataError: NaN or infinity.
        """
        self.extremes.update(x)
        ends: list[list[float]] = []
        if x.numel():
            apart = x.ndim > 0 and x.shape[0] % samples == 0
            low, high = torch.aminmax(x.detach().reshape(samples if apart else 1, -1), dim=1)
            ends = torch.stack([low, high], 1).double().expand(samples, 2).tolist()
        self.waiting[first] = (samples, ends)
        while self.samples in self.waiting:
            samples, ends = self.waiting.pop(self.samples)
            self.samples += samples
            for low_end, high_end in ends:
                self.counted += 1
                step = max(1 / self.counted, self.momentum)
                self.low += step * (low_end - self.low)
                self.high += step * (high_end - self.high)


class SecondMoments:
    """Sums of x and of x x^T over observations, in one pass; memory does not grow with their number.

    Everything is float64, in which products of two float32 numbers are exact: means can be taken off afterwards.

    Attributes:
        count: Observations seen.
        total: Sum of x, shape (..., columns).
        products: Sum of x x^T, shape (..., columns, columns).

    Example:
        >>> seen = SecondMoments()
        >>> seen.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> seen.mean.tolist(), seen.second.tolist()
        ([2.0, 3.0], [[5.0, 7.0], [7.0, 10.0]])
    """

    ROWS = 1024  # at once, so that their float64 copy stays small

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.products = torch.zeros(())

    def update(self, rows: Tensor) -> None:
        """Count observations in: shape (n, columns), or (groups, n, columns), each group with moments of its own.

        Raises:
            DataError: NaN or infinity, or another number of columns than before.
        """
        rows = rows.detach()
        shape = (*rows.shape[:-2], rows.shape[-1])
        if self.count and shape != tuple(self.total.shape):
            raise DataError(f"observations have the shape {shape}, those before {tuple(self.total.shape)}")
        if not self.count:
            self.total = torch.zeros(shape, dtype=torch.float64)
            self.products = torch.zeros(*shape, shape[-1], dtype=torch.float64)
        for part in torch.split(rows, self.ROWS, dim=-2):
            x = part.double()
            total = x.sum(-2)
            if not bool(torch.isfinite(total).all()):
                raise DataError("values are not finite")
            self.total += total
            self.products += x.mT @ x
        self.count += rows.shape[-2]

    @property
    def mean(self) -> Tensor:
        """Mean of x. Raises: DataError where nothing was seen."""
        return self.total / self.seen()

    @property
    def second(self) -> Tensor:
        """Mean of x x^T. Raises: DataError where nothing was seen."""
        return self.products / self.seen()

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T. Raises: DataError where nothing was seen."""
        mean = self.mean
        return self.second - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def seen(self) -> int:
        """Number of observations. Raises: DataError for none."""
        if not self.count:
            raise DataError("no observations were seen; give calibration data")
        return self.count


def linear_rows(x: Tensor) -> Tensor:
    """What a linear layer multiplies by its weight, one row a product: shape (n, in_features)."""
    return x.reshape(-1, x.shape[-1])


def convolution_rows(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str = "valid",
    dilation: Sequence[int],
    groups: int = 1,
    positions: int | None = None,
) -> Tensor:
    """What a convolution multiplies by its weight: the patch under the kernel at each output position.

    Args:
        x: Input, shape (batch, channels, *space).
        kernel: Size of the kernel along each dimension of space.
        stride: As of the layer, one number a dimension.
        padding: As of the layer; numbers, "valid" or "same". Zeros only.
        dilation: As of the layer, one number a dimension.
        groups: Of the layer.
        positions: At most this many output positions of each sample, spread evenly and the same at every call; None
            takes all.

    Returns:
        Shape (groups, batch * positions, channels / groups * kernel), so that output channel o of group g is
        rows[g] @ weight[o].flatten().

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 4)
        >>> convolution_rows(x, [2], stride=[2], dilation=[1]).tolist()
        [[[0.0, 1.0], [2.0, 3.0]]]
    """
    space = len(kernel)
    patches = torch.nn.functional.pad(x, pads(kernel, padding, dilation))
    for d in range(space):
        patches = patches.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])
        patches = patches[..., :: dilation[d]]
    size = tuple(patches.shape[2 : 2 + space])
    # (batch, channels, *size, *kernel) -> (batch, channels, n, *kernel); only the patches wanted leave their view.
    wanted: tuple[Any, ...] = (..., *torch.unravel_index(spread(math.prod(size), positions), size))
    patches = patches.movedim(tuple(range(2 + space, 2 + 2 * space)), tuple(range(space)))[wanted]
    patches = patches.movedim(tuple(range(space)), tuple(range(-space, 0)))
    patches = patches.reshape(x.shape[0], groups, -1, *patches.shape[2:])
    return patches.movedim((1, 0, 3), (0, 1, 2)).reshape(groups, x.shape[0] * patches.shape[3], -1)


def convolution_mean(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str = "valid",
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Mean of `convolution_rows` over samples and positions, without making the rows.

    Returns:
        float64, shape (groups, channels / groups * kernel).

    Example:
        >>> convolution_mean(torch.arange(4.0).reshape(1, 1, 4), [2], stride=[2], dilation=[1]).tolist()
        [[1.0, 2.0]]
    """
    space = len(kernel)
    image = torch.nn.functional.pad(x.mean(0), pads(kernel, padding, dilation))
    means = []
    for tap in itertools.product(*map(range, kernel)):
        part = image
        for d in range(space):
            first = tap[d] * dilation[d]
            count = (image.shape[1 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            part = part.narrow(1 + d, first, (count - 1) * stride[d] + 1)
            part = part[(slice(None),) * (1 + d) + (slice(None, None, stride[d]),)]
        means.append(part.flatten(1).mean(1, dtype=torch.float64))
    return torch.stack(means, 1).reshape(groups, -1)


def pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """A convolution's padding as `torch.nn.functional.pad` takes it: before and after, last dimension first."""
    sides = []
    for d in reversed(range(len(kernel))):
        if isinstance(padding, str):
            both = dilation[d] * (kernel[d] - 1) if padding == "same" else 0
            sides += [both // 2, both - both // 2]
        else:
            sides += [padding[d], padding[d]]
    return sides


def spread(total: int, limit: int | None) -> Tensor:
    """At most `limit` of the indices below `total`, in an order without the regular steps that would align with rows.

    Multiples of a number near the golden section of `total`, and prime to it, visit each index once and evenly.

    Example:
        >>> spread(10, 4).tolist()
        [0, 7, 4, 1]
    """
    if limit is None or limit >= total:
        return torch.arange(total)
    step = max(1, round(total * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, total) != 1:
        step += 1
    return torch.arange(limit) * step % total


def input_rows(node: fx.Node, x: Tensor, positions: int | None = None) -> Tensor:
    """The observations of the input `x` of a captured linear layer or convolution, as `SecondMoments` takes them.

    Args:
        node: Calls aten.linear or aten.conv1d, conv2d, conv3d.
        x: Its input.
        positions: See `convolution_rows`.

    Returns:
        (n, columns) for a linear layer, (groups, n, columns) for a convolution.
    """
    if operator(node) == "aten.linear":
        return linear_rows(x)
    kernel, given = geometry(node)
    x = x if x.ndim == len(kernel) + 2 else x.unsqueeze(0)
    return convolution_rows(x, kernel, **given, positions=positions)


def input_mean(node: fx.Node, x: Tensor) -> Tensor:
    """Mean of `input_rows`, float64: shape (columns,) for a linear layer, (groups, columns) for a convolution."""
    if operator(node) == "aten.linear":
        return linear_rows(x).mean(0, dtype=torch.float64)
    kernel, given = geometry(node)
    x = x if x.ndim == len(kernel) + 2 else x.unsqueeze(0)
    return convolution_mean(x, kernel, **given)


def geometry(node: fx.Node) -> tuple[list[int], dict[str, Any]]:
    """A captured convolution's kernel, and its settings one number a dimension, as `convolution_rows` takes them."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    kernel = list(given["weight"].meta["val"].shape[2:])

    def each(name: str, default: int) -> Any:
        value = given.get(name, default)
        if isinstance(value, int):
            return [value] * len(kernel)
        return value * len(kernel) if not isinstance(value, str) and len(value) == 1 else value

    return kernel, {
        "stride": each("stride", 1),
        "padding": each("padding", 0),
        "dilation": each("dilation", 1),
        "groups": given.get("groups", 1),
    }
