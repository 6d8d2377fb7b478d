"""What one change of a captured graph costs, by replaying cached activations. It knows no technique.

A change is an override of some nodes' values (one layer quantized, one channel off). Instead of running the whole
graph for each change, the graph runs once on a few samples with every value kept, and a change recomputes only what
depends on it. Memory does not grow with the number of samples: they go through a few at a time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pared.errors import ModelError
from pared.measure.fidelity import Comparison
from pared.metrics import Metric
from pared.report.data import Agreement
from pared.task import Batch, Inputs

# Given a node's value and arguments as they are, the value that it has instead.
Override = Callable[[Any, tuple[Any, ...]], Any]
CHUNK = 4  # samples whose activations are kept at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a change did to the output.

    Attributes:
        agreement: With the output as it was.
        metrics: After the change, by name; empty without labelled data.
        samples: How many were looked at.
    """

    agreement: Agreement
    metrics: Mapping[str, float]
    samples: int


class Tally:
    """Outputs counted in, of one change."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = metrics
        self.comparison = Comparison()
        self.states = [metric.start() for metric in metrics]
        self.samples = 0

    def update(self, reference: Tensor, found: Tensor, target: Any) -> None:
        """Count the outputs of some samples in."""
        self.comparison.update(reference.numpy(), found.numpy())
        self.samples += len(found)
        for metric, state in zip(self.metrics, self.states, strict=True):
            metric.update(state, found, target)

    def result(self) -> Cost:
        """The figures over everything counted."""
        measured = {metric.name: metric.result(state) for metric, state in zip(self.metrics, self.states, strict=True)}
        return Cost(agreement=self.comparison.result(), metrics=measured, samples=self.samples)


def costs(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    changes: Mapping[str, Mapping[str, Override]],
    pick: Callable[[Any], Tensor],
    *,
    metrics: Sequence[Metric] = (),
    samples: int = 64,
    deadline: float | None = None,
) -> dict[str, Cost]:
    """What each change alone costs, against the graph as it is.

    Args:
        graph: A captured graph. Not changed.
        batches: Data, labelled where `metrics` are given.
        changes: By a name of the caller's: {node: override}.
        pick: The tensor that counts, out of the graph's output.
        metrics: Taken on the outputs of every change.
        samples: Look at this many at most.
        deadline: `time.monotonic()` at which to stop; what was seen by then counts, the first samples always.

    Returns:
        The cost of each change, all on the same samples.

    Raises:
        ModelError: A change names a node that the graph lacks, or there are no data.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    for name, overrides in changes.items():
        for node in overrides:
            if node not in nodes:
                raise ModelError(f"change {name!r}: the graph has no node {node!r}")
    below = {name: dependents(graph, overrides) for name, overrides in changes.items()}
    tallies = {name: Tally(metrics) for name in changes}
    seen = 0
    for batch in batches:
        for start in range(0, min(batch.inputs.size, samples - seen), CHUNK):
            part = batch.inputs.part(start, min(start + CHUNK, samples - seen + start))
            target = part_of(batch.target, start, start + part.size)
            kept = Kept(graph, part)
            for name, overrides in changes.items():
                tallies[name].update(pick(kept.result), pick(kept.replay(overrides, below[name])), target)
            seen += part.size
            if seen >= samples or (deadline is not None and time.monotonic() > deadline):
                return {name: tally.result() for name, tally in tallies.items()}
    if not seen:
        raise ModelError("there are no data to measure a change on; give Task(validation=...)")
    return {name: tally.result() for name, tally in tallies.items()}


def part_of(target: Any, start: int, stop: int) -> Any:
    """The labels of some samples."""
    return target[start:stop] if isinstance(target, Tensor) else target


def dependents(graph: fx.GraphModule, changed: Iterable[str]) -> list[fx.Node]:
    """The changed nodes and all that follow from them, in graph order."""
    start, found = set(changed), dict[fx.Node, None]()
    for node in graph.graph.nodes:
        if node.name in start or any(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)


class Kept:
    """One run of a graph on some samples, with every value kept. Replays may go on side by side.

    Attributes:
        values: Of each node.
        result: What the graph returned.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Inputs) -> None:
        self.graph = graph
        runner = fx.Interpreter(graph, garbage_collect_values=False)
        runner.extra_traceback = False
        with torch.no_grad():
            self.result = runner.run(*flat(graph, inputs))
        self.values = dict(runner.env)

    def replay(self, overrides: Mapping[str, Override], below: Sequence[fx.Node]) -> Any:
        """What the graph returns where some nodes have another value.

        Args:
            overrides: The other value of each changed node.
            below: `dependents` of these nodes.
        """
        runner = fx.Interpreter(self.graph, garbage_collect_values=False)
        runner.extra_traceback = False
        runner.env = dict(self.values)
        found = self.result
        with torch.no_grad():  # a thread has its own
            for node in below:
                override = overrides.get(node.name)
                if node.op == "output":
                    found = self.graph.graph.process_outputs(runner.run_node(node))
                elif override is None:
                    runner.env[node] = runner.run_node(node)
                else:
                    runner.env[node] = override(self.values[node], runner.fetch_args_kwargs_from_env(node)[0])
        return found


def flat(graph: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """The arguments of an interpreter's `run`: positional ones, then keywords in the order of the example inputs."""
    keywords: list[str] = graph._in_spec.child(1).context
    return [*inputs.args, *(inputs.kwargs[name] for name in keywords)]
