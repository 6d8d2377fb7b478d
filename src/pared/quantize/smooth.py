"""Migration of difficulty from activations to weights (SmoothQuant), between a layer norm and the layers it feeds.

A few channels behind a layer norm are many times larger than the others; one scale for all then wastes the integers.
The layer norm divides each channel by a factor, the linear layers multiply it back: the network computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, fx

from pared.graph.capture import operator
from pared.quantize.folding import LINEAR, tensor_of
from pared.quantize.placement import Anchor
from pared.step import settings

SMALLEST = 1e-5


@settings
class Migrate:
    """Migrate the spread of channels behind layer norms into the linear layers that they feed."""

    kind: Literal["migrate"] = "migrate"
    alpha: Annotated[
        float, pydantic.Field(ge=0, le=1, description="0 leaves activations as they are, 1 makes all channels equal.")
    ] = 0.5


class ChannelReach:
    """Largest magnitude of each index of the last dimension."""

    def __init__(self) -> None:
        self.reach = torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Count a tensor in."""
        self.reach = torch.maximum(self.reach, x.detach().abs().flatten(0, -2).amax(0))


def migration_scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Factor of each channel: the activation is divided by it, the weights that read it are multiplied.

    Args:
        activations: Largest magnitude of each channel, shape (channels,), not negative.
        weights: Largest magnitude of the weights that read it, the same shape.
        alpha: How much goes over to the weights, 0 to 1.

    Returns:
        float32, positive: a^alpha / w^(1 - alpha); 1 where a channel is never used.

    Source: Xiao et al. 2022, arXiv:2211.10438, eq. 4.

    Example:
        >>> migration_scales(torch.tensor([16.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5).tolist()
        [4.0, 1.0]
    """
    used = (activations > 0) & (weights > 0)
    a, w = activations.double().clamp(min=SMALLEST), weights.double().clamp(min=SMALLEST)
    scale = a.pow(alpha) / w.pow(1 - alpha)
    return torch.where(used, scale, torch.ones_like(scale)).clamp(min=SMALLEST).float()


def norms(graph: fx.GraphModule, anchors: Sequence[Anchor]) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Layer norms with a weight and a bias of their own that feed linear layers alone, and these layers."""
    names = {anchor.node for anchor in anchors}
    readers: dict[str, int] = {}
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                readers[str(source.target)] = readers.get(str(source.target), 0) + 1
    found = []
    for node in graph.graph.nodes:
        if operator(node) != "aten.layer_norm" or not all(isinstance(arg, fx.Node) for arg in node.args[2:4]):
            continue
        layers = list(node.users)
        owned = [*node.args[2:4], *(layer.args[1] for layer in layers if operator(layer) == LINEAR)]
        alone = len(node.args) >= 4 and all(readers[str(arg.target)] == 1 for arg in owned)
        if layers and alone and all(layer.name in names and operator(layer) == LINEAR for layer in layers):
            found.append((node, layers))
    return found


def migrate(
    graph: fx.GraphModule, anchors: Sequence[Anchor], reaches: Mapping[str, ChannelReach], alpha: float
) -> dict[str, Tensor]:
    """Migrate behind every layer norm that allows it, in place.

    Returns:
        Factor of each channel of the layer norm, by its node; `apply_migration` applies it.
    """
    scales = {}
    for norm, layers in norms(graph, anchors):
        weights = torch.stack([tensor_of(graph, layer.args[1]).abs().amax(0) for layer in layers]).amax(0)
        scales[norm.name] = migration_scales(reaches[norm.name].reach, weights, alpha)
    apply_migration(graph, anchors, scales)
    return scales


def apply_migration(graph: fx.GraphModule, anchors: Sequence[Anchor], scales: Mapping[str, Tensor]) -> None:
    """Divide layer norms by their factors and multiply the layers behind, in place: the same function as before."""
    for norm, layers in norms(graph, anchors):
        if norm.name not in scales:
            continue
        scale = scales[norm.name].double()
        for arg in norm.args[2:4]:
            tensor = tensor_of(graph, arg)
            tensor.copy_(tensor.double() / scale)
        for layer in layers:
            weight = tensor_of(graph, layer.args[1])
            weight.copy_(weight.double() * scale)
