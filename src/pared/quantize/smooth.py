"""Migration of difficulty from activations to weights (SmoothQuant), between a layer norm and the layers it feeds.

A few channels behind a layer norm are many times larger than the others; one scale for all then wastes the integers.
The layer norm divides each channel by a factor, the linear layers multiply it back: the network computes the same.
Where something else reads the norm too (a residual sum behind a post-norm), a multiplication of its own divides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
from torch import Tensor, fx

from pared.errors import QuantizeError
from pared.graph.capture import operator
from pared.quantize.folding import LINEAR, store, tensor_of
from pared.quantize.placement import Anchor, behind
from pared.step import settings

SMALLEST = 1e-5
MOST = 0.7  # of the spread, where the reach is not measured; chosen on MiniLM-L6
ROOM = "room_for_migration"  # in the meta of a multiplication made here
NORM = "aten.layer_norm"


@settings
class Migrate:
    """Migrate the spread of channels behind layer norms into the linear layers that they feed."""

    kind: Literal["migrate"] = "migrate"
    alpha: Annotated[
        float, pydantic.Field(ge=0, le=1, description="0 leaves activations as they are, 1 makes all channels equal.")
    ] = 0.5


class Reach(Protocol):
    """Largest magnitude of each channel, shape (channels,)."""

    reach: Tensor


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


def readers_of(graph: fx.GraphModule) -> dict[str, int]:
    """How many times each stored tensor is read."""
    readers: dict[str, int] = {}
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                readers[str(source.target)] = readers.get(str(source.target), 0) + 1
    return readers


def make_room(graph: fx.GraphModule, anchors: Sequence[Anchor]) -> None:
    """Put a multiplication by ones between layer norms that others read too and the integer linear layers behind.

    Args:
        graph: Prepared; changed in place, and computes the same to the last bit.
        anchors: The layers that become integers. What becomes of the new tensors a new placement says.
    """
    names, readers = {anchor.node for anchor in anchors}, readers_of(graph)
    direct = {norm for norm, _, _ in norms(graph, anchors)}
    behind_norm: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.name not in names or operator(node) != LINEAR or readers[str(node.args[1].target)] != 1:
            continue
        norm = behind(node.args[0])
        if operator(norm) == NORM and norm not in direct:
            behind_norm.setdefault(norm, []).append(node)
    for norm, layers in behind_norm.items():
        with graph.graph.inserting_before(norm.next):
            ones = store(graph, f"{norm.name}_factor", torch.ones(norm.meta["val"].shape[-1]))
            scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (norm, ones))
        scaled.meta = {**norm.meta, ROOM: True}
        for layer in layers:
            layer.args = (scaled, *layer.args[1:])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def norms(graph: fx.GraphModule, anchors: Sequence[Anchor]) -> list[tuple[fx.Node, list[fx.Node], list[fx.Node]]]:
    """What can divide its channels: layer norms with a weight and a bias of their own, and what `make_room` put in.

    Returns:
        Each with the linear layers that it feeds, and nothing but these, and the stored tensors to divide.
    """
    names, readers = {anchor.node for anchor in anchors}, readers_of(graph)
    found = []
    for node in graph.graph.nodes:
        own = list(node.args[1:2] if ROOM in node.meta else node.args[2:4] if operator(node) == NORM else ())
        if len(own) < (1 if ROOM in node.meta else 2) or not all(isinstance(arg, fx.Node) for arg in own):
            continue
        layers = list(node.users)
        owned = [*own, *(layer.args[1] for layer in layers if operator(layer) == LINEAR)]
        alone = all(readers.get(str(arg.target)) == 1 for arg in owned)
        if layers and alone and all(layer.name in names and operator(layer) == LINEAR for layer in layers):
            found.append((node, layers, own))
    return found


def migrate(
    graph: fx.GraphModule, anchors: Sequence[Anchor], reaches: Mapping[str, Reach], alpha: float
) -> dict[str, Tensor]:
    """Migrate behind every layer norm that allows it, in place.

    Returns:
        Factor of each channel, by the node that divides; `apply_migration` applies it.
    """
    scales = {}
    for norm, layers, _ in norms(graph, anchors):
        weights = torch.stack([tensor_of(graph, layer.args[1]).abs().amax(0) for layer in layers]).amax(0)
        scales[norm.name] = migration_scales(reaches[norm.name].reach, weights, alpha)
    apply_migration(graph, anchors, scales)
    return scales


def migrate_without_data(graph: fx.GraphModule, anchors: Sequence[Anchor]) -> set[str]:
    """Migrate most of the spread behind every layer norm, in place, by the reach that its own parameters give.

    Returns:
        Names of the nodes that divide and whose rows are of one size: the norm is over the last dimension alone.
    """
    make_room(graph, anchors)
    reaches = {norm.name: ExpectedReach(graph, norm) for norm, _, _ in norms(graph, anchors)}
    migrate(graph, anchors, reaches, MOST)
    return {name for name, reach in reaches.items() if reach.dimensions == 1}


class ExpectedReach:
    """Magnitude that each channel behind a layer norm reaches, without data: four deviations from its mean.

    Attributes:
        reach: Shape (channels,), of the last dimension.
        dimensions: How many the norm is over.
    """

    def __init__(self, graph: fx.GraphModule, node: fx.Node) -> None:
        norm = node.args[0] if ROOM in node.meta else node
        if not isinstance(norm, fx.Node):
            raise QuantizeError(f"{node.name}: it divides no layer norm; plan again")
        given = [tensor_of(graph, arg).abs() if isinstance(arg, fx.Node) else None for arg in norm.args[2:4]]
        sizes: Any = norm.args[1]
        weight, bias = (*given, None, None)[:2]
        reach = 4 * (torch.ones(sizes) if weight is None else weight) + (0 if bias is None else bias)
        self.reach, self.dimensions = reach.reshape(-1, sizes[-1]).amax(0), len(sizes)


def apply_migration(graph: fx.GraphModule, anchors: Sequence[Anchor], scales: Mapping[str, Tensor]) -> None:
    """Divide by the factors and multiply the layers behind, in place: the same function as before."""
    for norm, layers, own in norms(graph, anchors):
        if norm.name not in scales:
            continue
        scale = scales[norm.name].double()
        for arg in own:
            tensor = tensor_of(graph, arg)
            tensor.copy_(tensor.double() / scale)
        for layer in layers:
            weight = tensor_of(graph, layer.args[1])
            weight.copy_(weight.double() * scale)
