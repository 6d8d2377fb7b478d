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

    Bins lie on multiples of a width that is a power of two; when a value falls outside, the width doubles and
    neighbouring bins merge, so that counts stay exact and memory constant.

    Attributes:
        bins: Number of bins; even.
        width: Width of one bin.
        first: Index of the lowest bin: it covers [first * width, (first + 1) * width).
        counts: float64, shape (bins,).

    Example:
        >>> h = Histogram(bins=4)
        >>> h.update(torch.tensor([0.0, 1.0, 2.0, 3.5]))
        >>> h.counts.tolist(), h.width
        ([1.0, 1.0, 1.0, 1.0], 1.0)
    """

    def __init__(self, bins: int = 8192) -> None:
        self.bins = bins
        self.width = 0.0
        self.first = 0
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.extremes = Extremes()

    def update(self, x: Tensor) -> None:
        """Count a tensor of any shape in. Raises: DataError for NaN or infinity."""
        if x.numel() == 0:
            return
        batch = Extremes()
        batch.update(x)
        self.extremes.update(x)
        self.cover(batch.low, batch.high)
        if self.width == 0.0:
            self.counts[0] += x.numel()
            return
        # float64 keeps bin edges exact: the width is a power of two.
        index = torch.floor(x.detach().flatten().double() / self.width).long() - self.first
        self.counts += torch.bincount(index, minlength=self.bins)[: self.bins]

    def cover(self, low: float, high: float) -> None:
        """Make the range hold [low, high], merging bins where it must grow."""
        if self.width == 0.0:
            reach = max(abs(low), abs(high), abs(self.extremes.low), abs(self.extremes.high))
            if reach == 0.0:
                return  # zeros alone so far: bin 0 counts them
            zeros = self.counts.sum().item()
            span = max(high, 0.0) - min(low, 0.0)
            self.width = 2.0 ** math.ceil(math.log2(span / self.bins))
            self.counts = torch.zeros_like(self.counts)
            self.first = self.start(min(low, 0.0))
            while not self.holds(low, high):
                self.width *= 2
                self.first = self.start(min(low, 0.0))
            self.counts[-self.first] = zeros
            return
        low, high = min(low, self.first * self.width), max(high, (self.first + self.used()) * self.width)
        while not self.holds(low, high):
            self.shift_or_merge(low, high)

    def used(self) -> int:
        """One past the highest bin that counted anything."""
        filled = torch.nonzero(self.counts)
        return int(filled[-1].item()) if len(filled) else 0

    def start(self, low: float) -> int:
        return math.floor(low / self.width)

    def holds(self, low: float, high: float) -> bool:
        return self.first <= self.start(low) and self.start(high) < self.first + self.bins

    def shift_or_merge(self, low: float, high: float) -> None:
        """Move the window to `low` where it then fits, else merge pairs of bins."""
        first = self.start(low)
        if self.start(high) < first + self.bins:
            moved = torch.zeros_like(self.counts)
            shift = self.first - first
            keep = self.bins - abs(shift)
            if shift >= 0:
                moved[shift:] = self.counts[:keep]
            else:
                moved[:keep] = self.counts[-shift:]
            self.counts, self.first = moved, first
            return
        indices = torch.arange(self.bins) + self.first
        merged_first = self.first // 2
        merged = torch.zeros_like(self.counts)
        merged.index_add_(0, torch.div(indices, 2, rounding_mode="floor") - merged_first, self.counts)
        self.counts, self.first, self.width = merged, merged_first, self.width * 2

    def quantile(self, q: float) -> float:
        """Value below which a fraction `q` of all values lies, to within a bin, never beyond the extremes."""
        if self.width == 0.0:
            return 0.0
        cumulative = torch.cumsum(self.counts, 0)
        index = int(torch.searchsorted(cumulative, q * cumulative[-1].item()).clamp(max=self.bins - 1).item())
        before = cumulative[index - 1].item() if index else 0.0
        inside = (q * cumulative[-1].item() - before) / max(self.counts[index].item(), 1.0)
        value = (self.first + index + inside) * self.width
        return min(max(value, self.extremes.low), self.extremes.high)
