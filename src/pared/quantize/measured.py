"""The choice of ranges by measured effect: what each calibrator's range of a tensor costs the output of the network.

Every candidate comes from one histogram of the tensor. First all tensors are quantized by one and the same calibrator,
for each of them. Then each tensor alone is quantized by each of its candidates, with everything before it taken from a
float run and only what depends on it computed anew; the candidate with the least noise at the output is its choice.
Last, all choices together are held against the best single calibrator, and the better of the two is kept. So `auto` is
never worse, on the samples it measures on, than the best of the calibrators that it tried.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, fx

from pared.activations import Histogram
from pared.quantize.affine import Grid, fake_quantize, qparams_of_range
from pared.quantize.calibrate import CHUNK, first_samples, one_core_each
from pared.quantize.coding import shared_ranges
from pared.quantize.placement import Placement
from pared.quantize.ranges import Auto, Range
from pared.sensitivity import Kept, dependents, flat
from pared.step import Context

Change = Callable[[Tensor], Tensor]
Ranges = Mapping[str, Range]


class Changed(fx.Interpreter):
    """Runs a graph with some values changed on their way to their users."""

    def __init__(self, graph: fx.GraphModule, changes: Mapping[str, Change]) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.changes = changes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        change = self.changes.get(n.name)
        return value if change is None else change(value)


def find_ranges(
    calibrator: Any,
    graph: fx.GraphModule,
    placement: Placement,
    observers: Mapping[str, Any],
    numbers: Grid,
    ctx: Context,
    *,
    symmetric: bool,
) -> tuple[dict[str, Range], dict[str, Any]]:
    """The range of each root tensor by any calibrator; of `auto`, also facts with what it measured."""
    if isinstance(calibrator, Auto):
        ranges, facts = measured_ranges(calibrator, graph, placement, observers, numbers, ctx, symmetric=symmetric)
        return ranges, {"auto": facts}
    with one_core_each() as pool:
        found = pool.map(lambda seen: calibrator.range(seen, numbers, symmetric=symmetric), observers.values())
        return dict(zip(observers, found, strict=True)), {}


def measured_ranges(
    auto: Auto,
    graph: fx.GraphModule,
    placement: Placement,
    observers: Mapping[str, Histogram],
    numbers: Grid,
    ctx: Context,
    *,
    symmetric: bool,
) -> tuple[dict[str, Range], dict[str, Any]]:
    """The range of each root tensor, and what was measured.

    Args:
        auto: What to try, and for how long.
        graph: The graph that was placed, in float.
        placement: Which tensors become integers.
        observers: What was seen of each root tensor.
        numbers: The integers of activations.
        ctx: Its task gives the validation data, its deadline counts too.
        symmetric: Whether their zero point is fixed.

    Returns:
        Ranges, and facts: `sqnr_db` of the output with all tensors quantized by each calibrator, and as `measured`
        chose; `kept`, which of these it is; `chosen`, the calibrator of each tensor; `tensors` to choose for and how
        many were `measured`; `samples`; `seconds`.
    """
    start = time.monotonic()
    deadline = min(start + auto.seconds, math.inf if ctx.deadline is None else ctx.deadline)
    measure = Measurement(graph, placement, numbers, ctx, auto.samples, symmetric=symmetric)
    with one_core_each() as pool:
        found = pool.map(lambda seen: auto.ranges(seen, numbers, symmetric=symmetric), observers.values())
        options = dict(zip(observers, found, strict=True))
        tried: tuple[str, ...] = auto.tried
        uniform = {kind: {name: ranges[kind] for name, ranges in options.items()} for kind in tried}
        noise = dict.fromkeys(tried, 0.0)
        parts = 0
        for part in range(len(measure.parts)):
            for kind, cost in zip(uniform, pool.map(measure.all(part), uniform.values()), strict=True):
                noise[kind] += cost
            parts += 1
            if time.monotonic() > deadline:
                break
        best = min(noise, key=lambda kind: noise[kind])
        chosen = dict.fromkeys(options, best)
        alone = measure_alone(measure, pool, options, best, range(parts), deadline)
        for name, costs in alone.items():
            chosen[name] = min(costs, key=lambda kind: costs[kind])
        ranges = {name: options[name][kind] for name, kind in chosen.items()}
        noise["measured"] = sum(pool.map(lambda part: measure.all(part)(ranges), range(parts)))
    kept = "measured" if noise["measured"] < noise[best] else best
    signal = sum(measure.signals)
    facts = {
        "sqnr_db": {kind: 10 * math.log10(signal / cost) if signal and cost else None for kind, cost in noise.items()},
        "kept": kept,
        "chosen": chosen if kept == "measured" else dict.fromkeys(options, best),
        "tensors": sum(len(measure.distinct(ranges)) > 1 for ranges in options.values()),
        "measured": len(alone),
        "samples": sum(inputs.size for inputs in measure.parts[:parts]),
        "seconds": round(time.monotonic() - start, 3),
    }
    return (ranges if kept == "measured" else uniform[best]), facts


def measure_alone(
    measure: Measurement,
    pool: Executor,
    options: Mapping[str, Ranges],
    best: str,
    parts: Sequence[int],
    deadline: float,
) -> dict[str, dict[str, float]]:
    """Noise at the output for each tensor that has a choice, by calibrator, as far as the time goes.

    Tensors whose ranges differ most come first. All candidates of a tensor see the same samples.
    """
    distinct = {name: measure.distinct(ranges, first=best) for name, ranges in options.items()}
    width = {name: [high - low for low, high in ranges.values()] for name, ranges in distinct.items()}
    order = sorted(
        (name for name in distinct if len(distinct[name]) > 1), key=lambda name: min(width[name]) / max(width[name])
    )
    noise: dict[str, dict[str, float]] = {}

    def cost(kept: Kept, part: int, name: str) -> dict[str, float] | None:
        if time.monotonic() > deadline:
            return None
        return {kind: measure.one(kept, part, name, ends) for kind, ends in distinct[name].items()}

    for part in parts:
        if time.monotonic() > deadline:
            break
        kept = Kept(measure.graph, measure.parts[part])
        for name, costs in zip(order, pool.map(functools.partial(cost, kept, part), order), strict=True):
            if costs is not None:
                noise[name] = {kind: noise.get(name, {}).get(kind, 0.0) + more for kind, more in costs.items()}
    return noise


class Measurement:
    """What ranges cost the output, on a few validation samples."""

    def __init__(
        self,
        graph: fx.GraphModule,
        placement: Placement,
        numbers: Grid,
        ctx: Context,
        samples: int,
        *,
        symmetric: bool,
    ) -> None:
        self.graph, self.placement, self.numbers, self.symmetric = graph, placement, numbers, symmetric
        self.scheme, self.task = ctx.target.scheme, ctx.task
        batches = first_samples(ctx.task.batches("validation", 'QuantizeStatic(ranges="auto")'), samples)
        self.parts = [part for batch in batches for part in batch.inputs.chunks(CHUNK)]
        self.nodes = {node.name: node for node in graph.graph.nodes}
        self.found: dict[str, list[fx.Node]] = {}
        with torch.no_grad():
            self.floats = [ctx.task.pick(Changed(graph, {}).run(*flat(graph, inputs))) for inputs in self.parts]
        self.signals = [sum_of_squares(output) for output in self.floats]

    def change(self, ends: Range) -> Change:
        """Quantization with a range."""
        low, high = (torch.tensor(end) for end in ends)
        qparams = qparams_of_range(low, high, self.numbers, symmetric=self.symmetric)
        return lambda x: fake_quantize(x, qparams, self.numbers)

    def distinct(self, ranges: Ranges, first: str = "") -> dict[str, Range]:
        """Ranges that give other integers than those before them; the one named comes first."""
        found: dict[tuple[float, float], str] = {}
        for kind in sorted(ranges, key=lambda kind: kind != first):
            low, high = (torch.tensor(end) for end in ranges[kind])
            qparams = qparams_of_range(low, high, self.numbers, symmetric=self.symmetric)
            found.setdefault((qparams.scale.item(), qparams.zero_point.item()), kind)
        return {kind: ranges[kind] for kind in found.values()}

    def all(self, part: int) -> Callable[[Ranges], float]:
        """Noise at the output with every tensor quantized, as a function of the ranges."""

        def noise(ranges: Ranges) -> float:
            shared = shared_ranges(self.nodes, self.placement, ranges, self.scheme)
            changes = {name: self.change(shared[root]) for name, root in self.placement.tensors.items()}
            with torch.no_grad():
                raw = Changed(self.graph, changes).run(*flat(self.graph, self.parts[part]))
            return sum_of_squares(self.task.pick(raw) - self.floats[part])

        return noise

    def below(self, name: str) -> list[fx.Node]:
        """What depends on a tensor; every candidate and part asks again."""
        if name not in self.found:
            self.found[name] = dependents(self.graph, [name])
        return self.found[name]

    def one(self, kept: Kept, part: int, name: str, ends: Range) -> float:
        """Noise at the output with one tensor quantized."""
        change = self.change(ends)
        raw = kept.replay({name: lambda value, _: change(value)}, self.below(name))
        return sum_of_squares(self.task.pick(raw) - self.floats[part])


def sum_of_squares(x: Tensor) -> float:
    """In float64."""
    return float(x.double().square().sum().item())
