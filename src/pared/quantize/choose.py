"""Everything that a static quantization decides on data: repairs, ranges, roundings, corrections. Facts of the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pared.activations import SecondMoments, input_rows
from pared.quantize.calibrate import CHUNK, calibrate, first_samples, tell
from pared.quantize.coding import Code, activation_qparams, encode
from pared.quantize.correction import CorrectBias, InputMean, correct_fast, correct_full, correctable
from pared.quantize.doubts import Growth, warn
from pared.quantize.equalize import Equalize, equalize, rescale
from pared.quantize.facts import from_fact, to_fact
from pared.quantize.folding import tensor_of
from pared.quantize.formats import Activations, Weights
from pared.quantize.measured import find_ranges
from pared.quantize.placement import Placement
from pared.quantize.ranges import Auto
from pared.quantize.repair import Repair
from pared.quantize.rounding import AdaRound, Stochastic, adaround, stochastic
from pared.quantize.simulate import Numbers
from pared.quantize.smooth import ChannelReach, Migrate, apply_migration, migrate, norms
from pared.step import Context, Scheme

STEP = "QuantizeStatic"


@dataclasses.dataclass(frozen=True)
class Formats:
    """What is asked for, and the runtime's rules."""

    weights: Weights
    activations: Activations
    scheme: Scheme
    any_cpu: bool


class Several:
    """Observers of one tensor."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def update(self, x: Tensor) -> None:
        """Show the tensor to each of them."""
        for part in self.parts:
            part.update(x)

    def update_at(self, x: Tensor, first: int, samples: int) -> None:
        """The same, with their place in the data."""
        for part in self.parts:
            tell(part, x, first, samples)


class InputMoments:
    """Second moments of what a layer multiplies by its weight."""

    def __init__(self, node: fx.Node, positions: int) -> None:
        self.node = node
        self.positions = positions
        self.moments = SecondMoments()

    def update(self, x: Tensor) -> None:
        """Count the layer's input in."""
        self.moments.update(input_rows(self.node, x, self.positions))


def named(fact: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a plan, by node."""
    return {name: from_fact(value) for name, value in fact.items()}


def transform(graph: fx.GraphModule, placement: Placement, facts: Mapping[str, Any]) -> None:
    """Do to a prepared graph what the plan's repairs did before ranges were chosen, in place."""
    rescale(graph, placement.anchors, named(facts.get("equalized", {})))
    apply_migration(graph, placement.anchors, named(facts.get("migrated", {})))


def numbers_of(graph: fx.GraphModule, placement: Placement, facts: Mapping[str, Any], formats: Formats) -> Numbers:
    """What a plan's facts make of a transformed graph in integers. Raises: QuantizeError where they do not fit it."""
    ranges = {name: (float(low), float(high)) for name, (low, high) in facts["ranges"].items()}
    qparams, grid = activation_qparams(graph, placement, ranges, formats.activations, formats.scheme)
    codes = encode(
        graph,
        placement,
        qparams,
        formats.weights,
        formats.scheme,
        any_cpu=formats.any_cpu,
        up=named(facts.get("up", {})),
        corrections=named(facts.get("corrections", {})),
    )
    return Numbers(placement, qparams, grid, codes)


@dataclasses.dataclass
class Choice:
    """The decisions of one plan, one after another.

    Attributes:
        graph: Prepared; repairs that keep its function change it in place.
        placement: What becomes integers.
        ranges: The calibrator.
        formats: How numbers become integers.
        repairs: Each kind once; their order makes no difference.
        samples: Most calibration samples.
        ctx: Of the step.
        facts: What was decided, filled in as it comes.
        step: What asks for the data, for messages.
    """

    graph: fx.GraphModule
    placement: Placement
    ranges: Any
    formats: Formats
    repairs: Sequence[Repair]
    samples: int | None
    ctx: Context
    facts: dict[str, Any]
    step: str = STEP

    def all(self) -> None:
        """Decide everything."""
        # In the order of `transform`, whatever the order given: a replay must round alike.
        for repair in self.repairs:
            if isinstance(repair, Equalize):
                self.equalize(repair)
        for repair in self.repairs:
            if isinstance(repair, Migrate):
                self.migrate(repair)
        inputs = self.calibrate()
        self.round(inputs)
        self.correct(inputs)

    def batches(self) -> Any:
        """Calibration data, as many as asked for."""
        return first_samples(self.ctx.task.batches("calibration", self.step), self.samples)

    def equalize(self, repair: Equalize) -> None:
        """Cross-layer equalization; needs no data."""
        scales = equalize(self.graph, self.placement.anchors, repair)
        self.facts["equalized"] = {name: to_fact(scale) for name, scale in scales.items()}

    def migrate(self, repair: Migrate) -> None:
        """Migration behind layer norms, from the reach of each of their channels."""
        reaches = {norm.name: ChannelReach() for norm, _, _ in norms(self.graph, self.placement.anchors)}
        if reaches:
            calibrate(self.graph, reaches, self.batches(), self.ctx.progress)
        scales = migrate(self.graph, self.placement.anchors, reaches, repair.alpha)
        self.facts["migrated"] = {name: to_fact(scale) for name, scale in scales.items()}

    def calibrate(self) -> dict[str, Any]:
        """Ranges of activations, and on the way what roundings and corrections want to know of each layer's input."""
        if isinstance(self.ranges, Auto):
            self.ctx.task.require("validation", 'QuantizeStatic(ranges="auto")')
        observers = {name: self.ranges.observer() for name in dict.fromkeys(self.placement.tensors.values())}
        inputs = self.input_observers()
        shown: dict[str, list[Any]] = {name: [observer] for name, observer in observers.items()}
        nodes = {node.name: node for node in self.graph.graph.nodes}
        for name, observer in inputs.items():
            shown.setdefault(nodes[name].args[0].name, []).append(observer)
        together = {name: parts[0] if len(parts) == 1 else Several(parts) for name, parts in shown.items()}
        growth = Growth(observers)
        ordered = isinstance(self.formats.weights.rounding, AdaRound)
        self.facts["samples"] = calibrate(
            self.graph, together, self.batches(), self.ctx.progress, growth.look, ordered=ordered
        )
        form, scheme = self.formats.activations, self.formats.scheme
        ranges, measured = find_ranges(
            self.ranges,
            self.graph,
            self.placement,
            observers,
            form.grid(scheme),
            self.ctx,
            symmetric=form.is_symmetric(scheme),
        )
        self.facts["ranges"] = {name: list(ends) for name, ends in ranges.items()}
        self.facts |= measured
        self.facts["warnings"] = warn(self.graph, growth, self.facts["samples"], self.ctx)
        return inputs

    def input_observers(self) -> dict[str, Any]:
        """What to watch of each layer's input, by the layer's node."""
        nodes = {node.name: node for node in self.graph.graph.nodes}
        rounding = self.formats.weights.rounding
        found: dict[str, Any] = {}
        for anchor in self.placement.anchors:
            node = nodes[anchor.node]
            if isinstance(rounding, AdaRound) and columns_of(node) <= rounding.widest:
                found[anchor.node] = InputMoments(node, rounding.positions)
            elif self.correction("fast") and correctable(node):
                found[anchor.node] = InputMean(node)
        return found

    def correction(self, method: str) -> CorrectBias | None:
        """The bias correction of a method, where it was asked for."""
        found = (repair for repair in self.repairs if isinstance(repair, CorrectBias) and repair.method == method)
        return next(found, None)

    def round(self, inputs: Mapping[str, Any]) -> None:
        """Choose the direction of every weight, where it is not the nearest."""
        rounding = self.formats.weights.rounding
        if not isinstance(rounding, (Stochastic, AdaRound)):
            return
        codes = numbers_of(self.graph, self.placement, self.facts, self.formats).codes
        nodes = {node.name: node for node in self.graph.graph.nodes}
        up = {}
        for name, code in codes.items():
            steps = steps_of(self.graph, nodes[name], code)
            if isinstance(rounding, Stochastic):
                up[name] = stochastic(steps, self.ctx.seed, name)
            elif isinstance(seen := inputs.get(name), InputMoments):  # not of the widest layers
                up[name] = self.adaround(nodes[name], steps, seen.moments, rounding)
        self.facts["up"] = {name: to_fact(value) for name, value in up.items()}

    def adaround(self, node: fx.Node, steps: Tensor, moments: SecondMoments, rounding: AdaRound) -> Tensor:
        """The rounding of one layer, each group of channels by the moments of its own inputs."""
        # Where the bias takes back the mean error, only what varies about the mean is left to care for.
        corrected = any(isinstance(repair, CorrectBias) for repair in self.repairs) and correctable(node)
        known = moments.covariance if corrected else moments.second
        known = known if known.ndim == 3 else known.unsqueeze(0)
        rows = steps.reshape(len(known), len(steps) // len(known), -1)
        highest = self.formats.weights.grid().high
        chosen = [adaround(part, own, highest, sweeps=rounding.sweeps) for part, own in zip(rows, known, strict=True)]
        return torch.stack(chosen).reshape(steps.shape)

    def correct(self, inputs: Mapping[str, Any]) -> None:
        """Correct biases, if asked for."""
        full = self.correction("full")
        if full is None and self.correction("fast") is None:
            return
        numbers = numbers_of(self.graph, self.placement, self.facts, self.formats)
        if full is not None:
            parts = [
                part for batch in first_samples(self.batches(), full.samples) for part in batch.inputs.chunks(CHUNK)
            ]
            found = correct_full(self.graph, numbers, parts)
        else:
            means = {name: seen.moments if isinstance(seen, InputMoments) else seen for name, seen in inputs.items()}
            found = correct_fast(self.graph, self.placement.anchors, numbers.codes, means)
        self.facts["corrections"] = {name: to_fact(value) for name, value in found.items()}


def columns_of(node: fx.Node) -> int:
    """Weights of one output channel of a layer."""
    weight: Any = node.args[1]
    shape = weight.meta["val"].shape
    return int(shape[1:].numel())


def steps_of(graph: fx.GraphModule, node: fx.Node, code: Code) -> Tensor:
    """A layer's weight in units of its scale, float64."""
    return tensor_of(graph, node.args[1]).double() / code.along(code.scale).double()
