"""Streaming statistics of tensors: extremes and histograms in constant memory, one pass. Shared by the techniques."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pared.errors import DataError


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
        self.extremes = Extremes()

    def update(self, x: Tensor) -> None:
        """Count a float32 tensor (or a narrower one) of any shape in. Raises: DataError for NaN or infinity."""
        if x.numel() == 0:
            return
        self.extremes.update(x)
        self.widen(max(-self.extremes.low, self.extremes.high))
        if self.width == 0.0:
            self.counts[self.bins // 2] += x.numel()  # zeros lie in this bin, whatever the width will be
            return
        # float64 keeps bin edges exact: the width is a power of two.
        index = torch.floor(x.detach().flatten().double() / self.width).long() + self.bins // 2
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
