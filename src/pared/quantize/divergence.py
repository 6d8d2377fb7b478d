"""Where to clip: a histogram of float values, candidate ranges, and how far the quantized values' histogram is from it.

Arithmetic only: counts in, a pair of bin edges out. The calibrators in `ranges` are made of it.

The procedure is the classic one (Migacz 2017, "8-bit inference with TensorRT", GTC): for every candidate range take the
histogram P of the clipped values, in which what lies outside counts at the ends; take the histogram Q of the quantized
values inside, each integer's share spread evenly over the bins that hold values and fall to that integer; the range
with the smallest divergence of Q from P wins. Deviations: which integer a bin falls to is worked out by the affine
formula of the runtimes, for signed and unsigned, symmetric and affine grids alike, instead of by cutting the bins into
equal groups; the two ends are clipped each on its own where the grid is affine; and values that are exactly 0 are left
out, since every grid holds them exactly, which matters where a ReLU makes half of all values 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pared.activations import Histogram
from pared.quantize.affine import Grid, QParams, qparams_of_range, quantize

EPSILON = 1e-4
TINY = float(torch.finfo(torch.float64).tiny)
CANDIDATES = 128  # thresholds tried for one end
ROUNDS = 3  # of clipping one end and then the other
TIE = 1e-9  # divergences nearer than this are one, and the wider range wins


class Bins(NamedTuple):
    """Counts in equal bins with an edge at 0.

    Attributes:
        counts: float64, shape (bins,); what is exactly 0 is not counted.
        zero: How many of the bins lie below 0.
        width: Width of one.
        low: Lowest value, or 0 where all are positive.
        high: Highest value, or 0 where all are negative.
    """

    counts: Tensor
    zero: int
    width: float
    low: float
    high: float

    def edges(self, index: Tensor) -> Tensor:
        """Values of bin edges, none beyond the extremes."""
        return ((index - self.zero).double() * self.width).clamp(self.low, self.high)

    def centres(self) -> Tensor:
        """The middle of each bin's part between the extremes."""
        edges = self.edges(torch.arange(len(self.counts) + 1))
        return (edges[1:] + edges[:-1]) / 2


class Quantized(NamedTuple):
    """What candidate ranges make of the values in every bin; K candidates, N bins.

    Attributes:
        first: First bin of each range, int64 (K,).
        last: The bin after its last, int64 (K,).
        kept: Which bins lie inside, 1 or 0, float64 (K, N).
        level: Which of the integers the middle of a bin becomes, from 0, int64 (K, N).
        levels: How many integers there are.
        error: That middle after quantization, less the middle, float64 (K, N).
    """

    first: Tensor
    last: Tensor
    kept: Tensor
    level: Tensor
    levels: int
    error: Tensor


Score = Callable[[Tensor, Quantized], Tensor]


def bins_of(histogram: Histogram, limit: int) -> Bins:
    """The part of a histogram between its extremes and 0, neighbours merged so that there are at most `limit` bins.

    Example:
        >>> seen = Histogram(bins=16)
        >>> seen.update(torch.tensor([0.0, 0.5, 1.0, 1.0, 6.0, 7.0]))
        >>> bins = bins_of(seen, 4)
        >>> bins.counts.tolist(), bins.zero, bins.width
        ([3.0, 0.0, 0.0, 2.0], 0, 2.0)
    """
    half, width = histogram.bins // 2, histogram.width
    low, high = min(histogram.extremes.low, 0.0), max(histogram.extremes.high, 0.0)
    below, above = math.ceil(-low / width), math.floor(high / width) + (high > 0)
    group = math.ceil((below + above) / limit)
    while math.ceil(below / group) + math.ceil(above / group) > limit:
        group += 1
    counts = histogram.counts.clone()
    counts[half] -= histogram.zeros
    left, right = math.ceil(below / group), math.ceil(above / group)
    padded = torch.zeros((left + right) * group, dtype=torch.float64)
    start, stop = max(half - left * group, 0), min(half + right * group, histogram.bins)
    offset = start - (half - left * group)
    padded[offset : offset + stop - start] = counts[start:stop]
    return Bins(padded.reshape(-1, group).sum(1), left, width * group, low, high)


def best_range(bins: Bins, score: Score, numbers: Grid, *, symmetric: bool) -> tuple[int, int]:
    """The range with the smallest score, as its first bin and the one after its last.

    Args:
        bins: What was seen; at least one bin.
        score: `score(counts, quantized)`, one number for each candidate; the smallest wins.
        numbers: The integers that the range is for.
        symmetric: True clips both ends at the same distance from 0. False clips one end with the other fixed, then the
            other, until nothing changes.

    Returns:
        Bin indices. A range has at least as many bins as there are integers, as in the classic procedure; of ranges
        that score alike, the widest is taken.
    """
    levels = numbers.high - numbers.low + 1
    total, zero = len(bins.counts), bins.zero
    above = total - zero
    if symmetric:
        reach = thresholds(max(zero, above), math.ceil(levels / 2))
        first, last = (zero - reach).clamp(min=0), (zero + reach).clamp(max=total)
        best = pick(bins, score, numbers, first, last, symmetric=True)
        return int(first[best]), int(last[best])
    low, high = 0, total
    for turn in range(2 * ROUNDS):
        upper = turn % 2 == 0
        if (above if upper else zero) == 0:
            continue
        # An end whose other end stays where it was would be found again where it is.
        before = low, high
        if upper:
            last = zero + thresholds(above, max(levels - (zero - low), 0))
            high = int(last[pick(bins, score, numbers, torch.full_like(last, low), last, symmetric=False)])
        else:
            first = zero - thresholds(zero, max(levels - (high - zero), 0))
            low = int(first[pick(bins, score, numbers, first, torch.full_like(first, high), symmetric=False)])
        if ((low, high) == before and turn) or not (above and zero):
            break
    return low, high


def thresholds(most: int, least: int) -> Tensor:
    """Numbers of bins to try, from `most` down to `least`: all, or some that lie evenly apart.

    Example:
        >>> thresholds(6, 3).tolist()
        [6, 5, 4, 3]
        >>> thresholds(3, 6).tolist()
        [3]
    """
    least = min(least, most)
    count = min(most - least + 1, CANDIDATES)
    return torch.linspace(most, least, count, dtype=torch.float64).round().long()


def pick(bins: Bins, score: Score, numbers: Grid, first: Tensor, last: Tensor, *, symmetric: bool) -> int:
    """Index of the best of some ranges, which are given from the widest to the narrowest."""
    quantized = quantize_bins(bins, first, last, numbers, symmetric=symmetric)
    scores = score(bins.counts, quantized)
    smallest = scores.min()
    return int((scores <= smallest + TIE * (1 + smallest.abs())).nonzero()[0])


def quantize_bins(bins: Bins, first: Tensor, last: Tensor, numbers: Grid, *, symmetric: bool) -> Quantized:
    """What every bin becomes with each of some ranges."""
    index, centres = torch.arange(len(bins.counts)), bins.centres()
    qparams = qparams_of_range(bins.edges(first), bins.edges(last), numbers, symmetric=symmetric)
    column = QParams(qparams.scale.double()[:, None], qparams.zero_point[:, None])
    integers = quantize(centres, column, numbers)
    level = integers.long() - numbers.low
    kept = ((index >= first[:, None]) & (index < last[:, None])).double()
    levels = numbers.high - numbers.low + 1
    return Quantized(first, last, kept, level, levels, (integers.double() - column.zero_point) * column.scale - centres)


def distributions(counts: Tensor, quantized: Quantized) -> tuple[Tensor, Tensor]:
    """P and Q of each candidate range, each (K, N) with rows that sum to 1.

    Where nothing lies inside a range, Q is the same for all its bins.

    Args:
        counts: Values in every bin, (N,).
        quantized: What the ranges make of them.
    """
    first, last, level = quantized.first[:, None], quantized.last[:, None], quantized.level
    kept = quantized.kept
    inside = counts * kept
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    p = inside.scatter_add(1, first, before[first]).scatter_add(1, last - 1, before[-1] - before[last])
    holds = (inside > 0).double()
    empty = torch.zeros(len(first), quantized.levels, dtype=torch.float64)
    share = empty.scatter_add(1, level, inside) / empty.scatter_add(1, level, holds).clamp(min=1)
    q = share.gather(1, level) * holds
    total = q.sum(1, keepdim=True)
    q = torch.where(total > 0, q, kept)
    return p / before[-1], q / q.sum(1, keepdim=True)


def smoothed(p: Tensor, kept: Tensor) -> Tensor:
    """Each row mixed with the uniform distribution over its kept bins: (1 - e) p + e / n, e = 1e-4.

    An empty bin of Q, where P has what was clipped, would make the Kullback-Leibler divergence infinite.

    Source: Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data", with the
    uniform distribution as the one to fall back on.
    """
    return (1 - EPSILON) * p + EPSILON / kept.sum(1, keepdim=True) * kept


def kl(counts: Tensor, quantized: Quantized) -> Tensor:
    """KL(P || Q) of each candidate, both smoothed, in nats.

    Source: Kullback and Leibler 1951, sec. 2; see `smoothed` for empty bins.
    """
    p, q = (smoothed(part, quantized.kept) for part in distributions(counts, quantized))
    return (p * (log(p) - log(q))).sum(1)


def symmetric_kl(counts: Tensor, quantized: Quantized) -> Tensor:
    """KL(P || Q) + KL(Q || P) of each candidate, both smoothed, in nats.

    Source: Kullback and Leibler 1951, sec. 2 (the divergence J); see `smoothed` for empty bins.
    """
    p, q = (smoothed(part, quantized.kept) for part in distributions(counts, quantized))
    return ((p - q) * (log(p) - log(q))).sum(1)


def js(counts: Tensor, quantized: Quantized) -> Tensor:
    """(KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2, of each candidate, in nats. Finite without smoothing.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", sec. IV, with equal weights.
    """
    p, q = distributions(counts, quantized)
    middle = (p + q) / 2
    return ((p * log(p) + q * log(q)) / 2 - middle * log(middle)).sum(1)


def log(p: Tensor) -> Tensor:
    """Natural logarithms, finite for 0, by which they are multiplied; `xlogy` takes four times as long."""
    return p.clamp(min=TINY).log()


def squared_error(counts: Tensor, quantized: Quantized) -> Tensor:
    """Mean squared error that each candidate makes of all values, clipped ones too, taken at the middle of their bins.

    The spread within a bin adds the same to every candidate, and is left out.

    Source: Nagel et al. 2021, arXiv:2106.08295, sec. 3.1 (range setting by mean squared error).
    """
    return (counts * quantized.error.square()).sum(1) / counts.sum().clamp(min=1)
