"""Cross-layer equalization: scale channels between two layers so that both weights use their integers evenly.

ReLU and pooling by maximum or mean let a positive factor of a channel pass: what one layer's output channel is divided
by, the next layer's input channel is multiplied with, and the network computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, fx

from pared.graph.capture import operator
from pared.quantize.folding import CONVOLUTIONS, LINEAR, tensor_of
from pared.quantize.placement import TRANSPARENT, Anchor, harmless
from pared.step import settings

# Let a positive factor of a channel through, and keep channels where they are.
PASSING = frozenset(
    {"aten.relu", "aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.mean", "aten.leaky_relu"}
)


@settings
class Equalize:
    """Scale the channels between two layers so that the ranges of both weights match.

    Works through ReLU and pooling, not through ReLU6 or any other activation whose shape depends on the scale.
    """

    kind: Literal["equalize"] = "equalize"
    rounds: Annotated[int, pydantic.Field(ge=1, description="Most passes over all pairs of layers.")] = 20


def equalizing_scales(first: Tensor, second: Tensor) -> Tensor:
    """Factor of each channel between two layers: the first is divided by it, the second multiplied.

    Args:
        first: Largest magnitude of each output channel's weights, shape (channels,), not negative.
        second: Largest magnitude of what reads each of these channels, the same shape.

    Returns:
        float64: sqrt(first / second), after which both ranges are equal; 1 where either is zero.

    Source: Nagel et al. 2019, arXiv:1906.04721, eq. 11 (s_i = sqrt(r1 r2) / r2).

    Example:
        >>> equalizing_scales(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 2.0])).tolist()
        [2.0, 1.0]
    """
    usable = (first > 0) & (second > 0)
    ratio = torch.where(usable, first.double() / second.double().clamp(min=1e-300), torch.ones((), dtype=torch.float64))
    return ratio.sqrt()


def pairs(graph: fx.GraphModule, anchors: Sequence[Anchor]) -> list[tuple[fx.Node, fx.Node]]:
    """Layers joined by nothing but operators that let a factor pass, whose weights no one else reads."""
    nodes = {node.name: node for node in graph.graph.nodes}
    names = {anchor.node for anchor in anchors}
    readers: dict[str, int] = {}
    for node in nodes.values():
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                readers[str(source.target)] = readers.get(str(source.target), 0) + 1
    found = []
    for name in names:
        node = nodes[name]
        following = next_layer(node, names)
        if following is not None and all(owns(layer, readers) for layer in (node, following)):
            found.append((node, following))
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    return sorted(found, key=lambda pair: order[pair[0]])


def owns(layer: fx.Node, readers: Mapping[str, int]) -> bool:
    """True where a layer, of a kind whose channels we know, is the only reader of its weight and bias."""
    known = operator(layer) in CONVOLUTIONS or operator(layer) == LINEAR
    return known and all(readers[str(arg.target)] == 1 for arg in layer.args[1:3] if isinstance(arg, fx.Node))


def next_layer(layer: fx.Node, names: set[str]) -> fx.Node | None:
    """The one layer that reads an output through operators that let a factor pass, or None."""
    node = layer
    while len(node.users) == 1:
        (node,) = node.users
        if node.name in names:
            return node if matches(layer, node) else None
        if not passes(layer, node):
            return None
    return None


def passes(layer: fx.Node, node: fx.Node) -> bool:
    """True for an operator behind `layer` that keeps its channels apart and lets a positive factor through."""
    name = operator(node)
    if name in {"aten.view", "aten.reshape", "aten.flatten"}:
        source: Any = node.args[0]
        # Only where it drops a space of one pixel.
        value, before = node.meta.get("val"), source.meta.get("val")
        return before is not None and value is not None and value.ndim == 2 and tuple(before.shape[2:]) == (1, 1)
    if name == "aten.mean":
        axes: Any = node.args[1] or [1]
        return operator(layer) in CONVOLUTIONS and all(axis % layer.meta["val"].ndim > 1 for axis in axes)
    return name in PASSING or (name in TRANSPARENT and harmless(node))


def matches(layer: fx.Node, following: fx.Node) -> bool:
    """True where the second layer reads as many channels as the first writes."""
    first, second = layer.args[1].meta["val"], following.args[1].meta["val"]  # type: ignore[union-attr]
    groups = groups_of(following)
    same_kind = operator(layer) == LINEAR or operator(following) != LINEAR or layer.meta["val"].ndim == 4
    return bool(first.shape[0] == second.shape[1] * groups) and same_kind


def groups_of(node: fx.Node) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    groups: Any = node.args[6] if operator(node) != LINEAR and len(node.args) > 6 else 1
    return int(groups)


def output_reach(weight: Tensor) -> Tensor:
    """Largest magnitude of each output channel's weights."""
    return weight.abs().flatten(1).amax(1)


def input_reach(weight: Tensor, groups: int) -> Tensor:
    """Largest magnitude of the weights that read each input channel."""
    grouped = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.amax((1, 3)).flatten()


def equalize(graph: fx.GraphModule, anchors: Sequence[Anchor], step: Equalize) -> dict[str, Tensor]:
    """Equalize all pairs of layers, in place.

    Returns:
        Factor of each output channel of the first layer of a pair, float32, by its node; `rescale` applies it.
    """
    found = pairs(graph, anchors)
    total = {first.name: torch.ones(first.args[1].meta["val"].shape[0], dtype=torch.float64) for first, _ in found}  # type: ignore[union-attr]
    weights = {node: tensor_of(graph, node.args[1]).double() for pair in found for node in pair}
    for _ in range(step.rounds):
        largest = 0.0
        for first, second in found:
            groups = groups_of(second)
            scale = equalizing_scales(output_reach(weights[first]), input_reach(weights[second], groups))
            weights[first] = divide_outputs(weights[first], scale)
            weights[second] = multiply_inputs(weights[second], scale, groups)
            total[first.name] *= scale
            largest = max(largest, (scale.log().abs()).max().item())
        if largest < 1e-3:
            break
    scales = {name: scale.float() for name, scale in total.items()}
    rescale(graph, anchors, scales)
    return scales


def rescale(graph: fx.GraphModule, anchors: Sequence[Anchor], scales: Mapping[str, Tensor]) -> None:
    """Divide output channels by their factors, and multiply what reads them, in place: the same function as before."""
    for first, second in pairs(graph, anchors):
        if first.name not in scales:
            continue
        scale = scales[first.name].double()
        for arg in first.args[1:3]:
            if isinstance(arg, fx.Node):
                tensor = tensor_of(graph, arg)
                tensor.copy_(divide_outputs(tensor.double(), scale))
        weight = tensor_of(graph, second.args[1])
        weight.copy_(multiply_inputs(weight.double(), scale, groups_of(second)))


def divide_outputs(tensor: Tensor, scale: Tensor) -> Tensor:
    """A weight or bias with each output channel divided by its factor."""
    return tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1))


def multiply_inputs(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """A weight with what reads each input channel multiplied by the channel's factor."""
    shape = weight.shape
    grouped = weight.reshape(groups, shape[0] // groups, shape[1], -1)
    return (grouped * scale.reshape(groups, 1, shape[1], 1)).reshape(shape)
