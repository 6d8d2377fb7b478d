"""Streaming statistics of tensors: extremes and histograms in constant memory, one pass. Shared by the techniques."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pared.errors import DataError

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
        x = x.detach().flatten().float()
        self.zeros += x.numel() - int(np.count_nonzero(x.numpy()))  # PyTorch's own takes ten times as long
        # The width is a power of two, so that float32 divides exactly, except where a quotient is too small for it.
        scaled = x * (1 / self.width) if EXACT[0] <= self.width <= EXACT[1] else x.double() / self.width
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
