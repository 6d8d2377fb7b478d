"""A budget of latency: the ratio of channels at which a measured model is as fast as wanted, in a few measurements.

Pure search: how a choice is made is `budgets`'s work, how it is measured is the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Fit:
    """A choice found by measuring.

    Attributes:
        ratio: That it was made with.
        latency: Measured of it.
        met: Whether that is within the tolerance.
        journal: Every measurement, in order: (ratio, latency).
    """

    ratio: float
    latency: float
    met: bool
    journal: tuple[tuple[float, float], ...]


def fit_latency(
    measure: Callable[[Tensor], float],
    wanted: float,
    path: Callable[[float], Tensor],
    *,
    start: float,
    tries: int = 10,
    tolerance: float = 0.05,
) -> Fit:
    """The ratio at which a measured latency is what is wanted, found in a few measurements.

    Latency falls with the ratio in noisy steps, since kernels work on whole tiles. So the wanted one is bracketed, the
    next ratio is where the line between both ends meets it, and each third time the middle of the bracket. The first
    guess takes work to fall as the square of the widths. A choice that was measured before is not measured again.

    Args:
        measure: Latency of a choice, in the unit of `wanted`.
        wanted: Latency to reach.
        path: The choice of each ratio, 0 to 1, where larger ratios remove more.
        start: Latency of the model as it is.
        tries: Most measurements.
        tolerance: Largest relative distance at which the search ends.

    Returns:
        The measured choice nearest to `wanted` of those within the tolerance, else the slowest one below it, else the
        fastest one.
    """
    journal: list[tuple[float, float]] = []
    seen: dict[bytes, float] = {}
    low, high = (0.0, start), (1.0, 0.0)  # slower and faster than wanted; nothing at all takes no time
    turn = 0
    while len(journal) < tries and high[0] - low[0] > 1e-4:
        share = (low[1] - wanted) / max(low[1] - high[1], 1e-12)
        ratio = low[0] + (high[0] - low[0]) * min(max(share, 0.05), 0.95)
        if turn == 0:
            ratio = 1 - min(max(wanted / start, 0.0), 1.0) ** 0.5
        elif turn % 3 == 2:
            ratio = (low[0] + high[0]) / 2
        turn += 1
        keep = path(ratio)
        key = keep.numpy().tobytes()
        if key not in seen:
            seen[key] = measure(keep)
            journal.append((ratio, seen[key]))
        latency = seen[key]
        if abs(latency / wanted - 1) <= tolerance:
            break
        low, high = ((ratio, latency), high) if latency > wanted else (low, (ratio, latency))
    return best_of(journal, wanted, tolerance)


def best_of(journal: Sequence[tuple[float, float]], wanted: float, tolerance: float) -> Fit:
    """The measurement to go by: see `fit_latency`."""
    near = [pair for pair in journal if abs(pair[1] / wanted - 1) <= tolerance]
    below = [pair for pair in journal if pair[1] < wanted]
    if near:
        ratio, latency = min(near, key=lambda pair: abs(pair[1] - wanted))
    elif below:
        ratio, latency = max(below, key=lambda pair: pair[1])
    else:
        ratio, latency = min(journal, key=lambda pair: pair[1])
    return Fit(ratio, latency, bool(near), tuple(journal))
