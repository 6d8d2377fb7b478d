"""Ranges (calibrators): what interval of an activation the integers cover. A new one is a class and a row in RANGES.

All but two read the same histogram, so that `auto` can try them on one pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Protocol

import pydantic

from pared.activations import Extremes, Histogram, RunningExtremes
from pared.quantize.affine import Grid
from pared.quantize.divergence import Score, best_range, bins_of, js, kl, squared_error, symmetric_kl
from pared.step import settings

Range = tuple[float, float]
Bins = Annotated[
    int, pydantic.Field(ge=512, le=16384, description="Most bins between the lowest and the highest value, and 0.")
]


class Observer(Protocol):
    """Streaming statistics of one tensor."""

    def update(self, x: object) -> None: ...


class Calibrator(Protocol):
    """Chooses the range of a tensor from what was seen of it."""

    def observer(self) -> Any:
        """An empty statistic for one tensor."""

    def range(self, seen: Any, numbers: Grid, *, symmetric: bool) -> Range:
        """The interval to cover, between the extremes. It need not hold 0: it is widened to, when it is used."""


@settings
class MinMax:
    """The lowest and the highest value seen."""

    kind: Literal["minmax"] = "minmax"

    def observer(self) -> Extremes:
        """An empty statistic for one tensor."""
        return Extremes()

    def range(self, seen: Extremes | Histogram, numbers: Grid, *, symmetric: bool) -> Range:
        """The interval to cover."""
        extremes = seen.extremes if isinstance(seen, Histogram) else seen
        return extremes.low, extremes.high


@settings
class MovingAverage:
    """Each sample's lowest and highest value, averaged over the samples in the order of the data.

    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 3.1. Deviation: one step for each sample, whatever the batches,
    and a plain mean until 1 / momentum samples are seen.
    """

    kind: Literal["moving_average"] = "moving_average"
    momentum: Annotated[float, pydantic.Field(gt=0, le=1, description="How far a new sample moves the average.")] = 0.01

    def observer(self) -> RunningExtremes:
        """An empty statistic for one tensor."""
        return RunningExtremes(self.momentum)

    def range(self, seen: RunningExtremes, numbers: Grid, *, symmetric: bool) -> Range:
        """The interval to cover."""
        return seen.low, seen.high


@settings
class Percentile:
    """The interval that leaves a small, equal fraction of values out at each end.

    Source: McKinstry et al. 2018, arXiv:1809.04191, sec. 3. Deviation: each end is clipped on its own, so one-sided
    data keep their zero.
    """

    kind: Literal["percentile"] = "percentile"
    percentile: Annotated[
        float, pydantic.Field(gt=50, le=100, description="Percent of values that lie inside each end.")
    ] = 99.99

    def observer(self) -> Histogram:
        """An empty statistic for one tensor."""
        return Histogram()

    def range(self, seen: Histogram, numbers: Grid, *, symmetric: bool) -> Range:
        """The interval to cover."""
        return seen.quantile(1 - self.percentile / 100), seen.quantile(self.percentile / 100)


class Searching:
    """A calibrator that tries thresholds on a histogram, and takes the best by its `score`."""

    score: ClassVar[Score]
    bins: int

    def observer(self) -> Histogram:
        """An empty statistic for one tensor."""
        return Histogram()

    def range(self, seen: Histogram, numbers: Grid, *, symmetric: bool) -> Range:
        """The interval to cover. Where the grid is affine, each end is clipped on its own; else both alike."""
        low, high = seen.extremes.low, seen.extremes.high
        if seen.width == 0.0 or low == high:
            return low, high
        bins = bins_of(seen, self.bins)
        first, last = best_range(bins, type(self).score, numbers, symmetric=symmetric)
        return max(low, (first - bins.zero) * bins.width), min(high, (last - bins.zero) * bins.width)


@settings
class MSE(Searching):
    """The interval whose integers are nearest to the values, in the mean of squares.

    Source: Nagel et al. 2021, arXiv:2106.08295, sec. 3.1.
    """

    score: ClassVar[Score] = staticmethod(squared_error)

    kind: Literal["mse"] = "mse"
    bins: Bins = 2048


@settings
class KL(Searching):
    """The interval whose integers keep the distribution of the values: smallest Kullback-Leibler divergence.

    Source: Migacz 2017, "8-bit inference with TensorRT"; `pared.quantize.divergence` says where this departs from it.
    """

    score: ClassVar[Score] = staticmethod(kl)

    kind: Literal["kl"] = "kl"
    bins: Bins = 2048


@settings
class SymmetricKL(Searching):
    """As `kl`, by the sum of the Kullback-Leibler divergences in both directions."""

    score: ClassVar[Score] = staticmethod(symmetric_kl)

    kind: Literal["symmetric_kl"] = "symmetric_kl"
    bins: Bins = 2048


@settings
class JS(Searching):
    """As `kl`, by the Jensen-Shannon divergence."""

    score: ClassVar[Score] = staticmethod(js)

    kind: Literal["js"] = "js"
    bins: Bins = 2048


Tried = Literal["minmax", "percentile", "mse", "kl", "symmetric_kl", "js"]


@settings
class Auto:
    """For each tensor, the calibrator that costs the output least, measured on `validation` data.

    `pared.quantize.measured` says how.
    """

    kind: Literal["auto"] = "auto"
    tried: Annotated[tuple[Tried, ...], pydantic.Field(min_length=1, description="Calibrators to choose from.")] = (
        "minmax",
        "percentile",
        "mse",
        "kl",
        "symmetric_kl",
        "js",
    )
    samples: Annotated[int, pydantic.Field(ge=1, description="Validation samples to measure on, at most.")] = 16
    seconds: Annotated[
        float, pydantic.Field(ge=0, description="Stop measuring after this time, with the best found so far.")
    ] = 60.0

    def observer(self) -> Histogram:
        """An empty statistic for one tensor."""
        return Histogram()

    def ranges(self, seen: Histogram, numbers: Grid, *, symmetric: bool) -> dict[str, Range]:
        """What each calibrator would choose."""
        return {kind: RANGES[kind]().range(seen, numbers, symmetric=symmetric) for kind in self.tried}


RANGES: dict[str, Callable[[], Any]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "kl": KL,
    "symmetric_kl": SymmetricKL,
    "js": JS,
    "auto": Auto,
}
AnyRanges = MinMax | MovingAverage | Percentile | MSE | KL | SymmetricKL | JS | Auto
