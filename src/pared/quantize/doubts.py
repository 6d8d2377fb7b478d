"""What speaks against calibrated ranges: later calibration data, or validation data, that go far beyond them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import fx

from pared.activations import Extremes
from pared.errors import ParedWarning
from pared.graph.capture import owner
from pared.quantize.calibrate import first_samples, show
from pared.quantize.ranges import Range
from pared.step import Context

CHECKED = 16  # validation samples that are held against the ranges
# Later data go beyond the earlier range as a matter of course: each end of it with a chance of one in four where a
# quarter of the data follows three quarters. So only this much counts, in widths of the earlier range ...
FAR = 1.0  # ... for a single tensor,
USUAL = 0.25  # ... and for half of all tensors.


def warn(graph: fx.GraphModule, growth: Growth, samples: int, ctx: Context) -> list[str]:
    """Sentences with the evidence against the ranges, none as a rule; each is a `ParedWarning` too.

    Args:
        graph: What was calibrated.
        growth: Watched it.
        samples: How many calibration samples there were.
        ctx: Gives validation data, if there are any.
    """
    doubts = growth.doubts(graph) or validation_doubts(graph, growth.ends(), samples, ctx)
    for text in doubts:
        warnings.warn(text, ParedWarning, stacklevel=2)
    return doubts


class Growth:
    """How the extremes of tensors grew while data were counted in."""

    def __init__(self, observers: Mapping[str, Any]) -> None:
        self.observers = observers
        self.history: list[tuple[int, dict[str, Range]]] = []

    def ends(self) -> dict[str, Range]:
        """Lowest and highest value of every tensor so far."""
        extremes: dict[str, Extremes] = {
            name: seen if isinstance(seen, Extremes) else seen.extremes for name, seen in self.observers.items()
        }
        return {name: (seen.low, seen.high) for name, seen in extremes.items()}

    def look(self, samples: int) -> None:
        """Remember the extremes as they are after this many samples; of many looks, every second one is kept."""
        self.history.append((samples, self.ends()))
        if len(self.history) > 16:
            self.history = [*self.history[1:-1:2], self.history[-1]]

    def doubts(self, graph: fx.GraphModule) -> list[str]:
        """Whether the last quarter of the data, or somewhat more, goes far beyond what was seen before it."""
        total = self.history[-1][0] if self.history else 0
        earlier = [(samples, ends) for samples, ends in self.history if samples <= 0.75 * total]
        if not earlier:
            return []
        samples, ends = earlier[-1]
        text = f"the last {total - samples} of {total} calibration samples"
        advice = "give more of them, or shuffle them: the ranges chosen may be too narrow for what comes later"
        return doubt(graph, ends, self.ends(), f"{text} leave the range of the first {samples}", advice)


def validation_doubts(graph: fx.GraphModule, ends: Mapping[str, Range], samples: int, ctx: Context) -> list[str]:
    """Whether some of the validation data, where there are any, go far beyond the calibration data."""
    if ctx.task.validation is None:
        return []
    observers = {name: Extremes() for name in ends}
    count = show(graph, observers, first_samples(ctx.task.batches("validation"), CHECKED))
    later = {name: (seen.low, seen.high) for name, seen in observers.items()}
    text = f"{count} validation samples leave the range of the {samples} calibration samples"
    return doubt(graph, ends, later, text, "give more calibration data, prepared as the validation data are")


def doubt(
    graph: fx.GraphModule, earlier: Mapping[str, Range], later: Mapping[str, Range], text: str, advice: str
) -> list[str]:
    """A sentence with the evidence, where there is enough of it."""
    beyond = {name: excess(earlier[name], later[name]) for name in earlier}
    found = sorted(beyond.values())
    if not found or (found[-1] <= FAR and found[len(found) // 2] <= USUAL):
        return []
    nodes = {node.name: node for node in graph.graph.nodes}
    worst = sorted((name for name in beyond if beyond[name] > USUAL), key=lambda name: -beyond[name])
    shown = ", ".join(
        f"{owner(nodes[name]) or '(root)'} ({name}) [{earlier[name][0]:.4g}, {earlier[name][1]:.4g}] -> "
        f"[{later[name][0]:.4g}, {later[name][1]:.4g}]"
        for name in worst[:3]
    )
    return [
        f"{text} by over {USUAL:.0%} of its width in {len(worst)} of {len(beyond)} tensors, most in {shown}; {advice}"
    ]


def excess(earlier: Range, later: Range) -> float:
    """How far a range lies outside an earlier one, both widened to hold 0, in widths of the earlier one.

    Example:
        >>> excess((0.0, 2.0), (-1.0, 3.0))
        0.5
    """
    if later[0] > later[1]:
        return 0.0
    low, high = min(earlier[0], 0.0), max(earlier[1], 0.0)
    beyond = max(low - later[0], later[1] - high, 0.0)
    return beyond / (high - low) if high > low else float(beyond > 0) * 1e9
