"""Bias correction: rounding weights and activations shifts the mean of each output channel; the bias takes it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
from torch import Tensor, fx

from pared.activations import input_mean
from pared.graph.capture import operator
from pared.quantize.coding import Code
from pared.quantize.folding import tensor_of
from pared.quantize.placement import Anchor
from pared.quantize.simulate import Numbers, Simulation
from pared.sensitivity import flat
from pared.step import settings
from pared.task import Inputs


@settings
class CorrectBias:
    """Take the mean error of each layer's output back by its bias.

    `fast` works it out from the mean input of each layer in the float network, taken while calibrating: it repairs
    what rounding the weights shifts. `full` runs the quantized network layer by layer beside the float one, on a few
    samples, and repairs what all layers before a layer have shifted too.
    """

    kind: Literal["correct_bias"] = "correct_bias"
    method: Annotated[Literal["fast", "full"], pydantic.Field(description="fast or full.")] = "fast"
    samples: Annotated[
        int, pydantic.Field(ge=1, description="Calibration samples that the full method holds in memory at once.")
    ] = 32


class Mean(Protocol):
    """Knows the mean of a layer's input."""

    @property
    def mean(self) -> Tensor: ...


class InputMean:
    """Mean of what a layer multiplies by its weight: one number for each column of the weight.

    Every sample counts alike, whatever its size. Contributions are rounded to a grid so fine that it does not matter,
    on which float64 adds without rounding: so the order of the samples makes no difference.
    """

    GRID = 2.0**-28

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Count the layer's input in."""
        samples = len(x)
        self.total = self.total + torch.round(input_mean(self.node, x) * samples / self.GRID) * self.GRID
        self.count += samples

    @property
    def mean(self) -> Tensor:
        """Shape (columns,) for a linear layer, (groups, columns) for a convolution."""
        return self.total / self.count


def shift_of(error: Tensor, mean: Tensor) -> Tensor:
    """What a weight error adds to the mean of each output channel.

    Args:
        error: Weight as it should be less as it is, shape (channels, ...), its columns flattened as `mean` has them.
        mean: Mean input, shape (columns,), or (groups, columns) where each group of channels has inputs of its own.

    Returns:
        float64, shape (channels,): what to add to the bias.

    Source: Nagel et al. 2019, arXiv:1906.04721, sec. 4.2: E[y] - E[y'] = (W - W') E[x].

    Example:
        >>> shift_of(torch.tensor([[0.5, 0.0], [0.0, -1.0]]), torch.tensor([2.0, 3.0])).tolist()
        [1.0, -3.0]
    """
    groups = mean.shape[0] if mean.ndim == 2 else 1
    rows = error.double().reshape(groups, error.shape[0] // groups, -1)
    return (rows @ mean.double().reshape(groups, -1, 1)).reshape(-1)


def correctable(node: fx.Node) -> bool:
    """True where a correction costs nothing at run time: for convolutions, and linear layers that have a bias."""
    return operator(node) != "aten.linear" or (len(node.args) > 2 and node.args[2] is not None)


def correct_fast(
    graph: fx.GraphModule, anchors: Sequence[Anchor], codes: Mapping[str, Code], means: Mapping[str, Mean]
) -> dict[str, Tensor]:
    """What to add to each bias for the rounding of the layer's own weight, float32, by node."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = {}
    for anchor in anchors:
        node = nodes[anchor.node]
        if correctable(node) and anchor.node in means:
            error = tensor_of(graph, node.args[1]).double() - codes[anchor.node].weight.double()
            found[anchor.node] = shift_of(error, means[anchor.node].mean).float()
    return found


def correct_full(graph: fx.GraphModule, numbers: Numbers, parts: Sequence[Inputs]) -> dict[str, Tensor]:
    """What to add to each bias so that every layer has the mean output of the float network, float32, by node.

    The float graph and the simulated one go side by side, layer after layer, over all samples; each layer is corrected
    before the next one runs.

    Args:
        graph: The graph that was placed. Not changed.
        numbers: What becomes integers, biases not yet corrected.
        parts: Samples; what they need in memory at one time is the activations alive at one point of the graph.

    Source: Nagel et al. 2019, arXiv:1906.04721, sec. 4.2 and appendix D (empirical bias correction).
    """
    pairs = []
    for part in parts:
        exactly, roughly = fx.Interpreter(graph), Simulation(graph, numbers)
        for runner in (exactly, roughly):
            drive(runner, flat(graph, part))
        pairs.append((exactly, roughly))
    found: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        exact = [exactly.run_node(node) for exactly, _ in pairs]
        rough = [roughly.raw(node) for _, roughly in pairs]
        if node.name in numbers.codes and correctable(node):
            axis = -1 if operator(node) == "aten.linear" else 1
            found[node.name] = mean_difference(exact, rough, axis).float()
            shape = [1] * rough[0].ndim
            shape[axis] = -1
            rough = [value + found[node.name].reshape(shape) for value in rough]
        for (exactly, roughly), a, b in zip(pairs, exact, rough, strict=True):
            keep(exactly, node, a)
            keep(roughly, node, numbers.activation(node.name, b) if isinstance(b, Tensor) else b)
    return found


def mean_difference(exact: Sequence[Tensor], rough: Sequence[Tensor], axis: int) -> Tensor:
    """Mean of exact - rough for each index of an axis, over everything else and all parts, float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for a, b in zip(exact, rough, strict=True):
        difference = (a.double() - b.double()).movedim(axis, 0).flatten(1)
        total = total + difference.sum(1)
        count += difference.shape[1]
    return total / count


def drive(runner: fx.Interpreter, args: Sequence[Any]) -> None:
    """Make an interpreter ready to be driven node by node."""
    runner.extra_traceback = False
    graph: Any = runner.module.graph
    runner.args_iter = iter(graph.process_inputs(*args))


def keep(runner: fx.Interpreter, node: fx.Node, value: Any) -> None:
    """Hold a node's value, and let go of what no later node needs."""
    runner.env[node] = value
    for done in runner.user_to_last_uses.get(node, []):
        del runner.env[done]
