"""Ranges (calibrators): what interval of an activation the integers cover. A new one is a class and a row in RANGES."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import pydantic

from pared.activations import Extremes, Histogram
from pared.step import settings


class Observer(Protocol):
    """Streaming statistics of one tensor."""

    def update(self, x: object) -> None: ...


@settings
class MinMax:
    """The lowest and the highest value seen."""

    kind: Literal["minmax"] = "minmax"

    def observer(self) -> Extremes:
        """An empty statistic for one tensor."""
        return Extremes()

    def range(self, seen: Extremes) -> tuple[float, float]:
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

    def range(self, seen: Histogram) -> tuple[float, float]:
        """The interval to cover."""
        return seen.quantile(1 - self.percentile / 100), seen.quantile(self.percentile / 100)


RANGES = {"minmax": MinMax, "percentile": Percentile}
