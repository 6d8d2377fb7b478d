"""Folding of batch normalization into the convolution or linear layer before it, on a captured graph.

The folded layer computes the same function up to rounding. Integers need it: between the two no rounding may happen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.errors import QuantizeError
from pared.graph.capture import operator, owner

CONVOLUTIONS = frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d"})
TRANSPOSED = frozenset({"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"})
LINEAR = "aten.linear"
FUNCTIONAL_BATCH_NORM = "aten._native_batch_norm_legit_no_training"
# Settings and names of what went into a fold -> the nodes that read the folded weight and bias.
Stored = dict[tuple[str | None, ...], tuple[fx.Node, fx.Node]]


def fold_batch_norms(graph: fx.GraphModule) -> list[str]:
    """Fold every batch norm whose input comes from one convolution or linear layer alone, in place.

    A layer's meta says under "takes_in" which node's value its own has become.

    Returns:
        Names of the batch norm modules that were taken in.
    """
    folded = []
    stored: Stored = {}
    for node in list(graph.graph.nodes):
        norm = normalization(node)
        if norm is None:
            continue
        layer = norm.args[0]
        if isinstance(layer, fx.Node) and foldable(layer, norm):
            fold(graph, layer, norm, stored)
            layer.meta["takes_in"] = node.name
            node.replace_all_uses_with(layer)
            folded.append(owner(norm))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return folded


def normalization(node: fx.Node) -> fx.Node | None:
    """The batch norm whose result `node` is (the operator itself, or the first output of its functional form)."""
    if operator(node) == "aten.batch_norm" and node.args[5] is False:
        return node
    if operator(node) == "getitem" and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        return source if operator(source) == FUNCTIONAL_BATCH_NORM else None
    return None


def foldable(layer: fx.Node, norm: fx.Node) -> bool:
    """True where `norm` is the only user of a layer whose weight is a stored tensor."""
    if len(layer.users) != 1:
        return False
    kind = operator(layer)
    if kind not in CONVOLUTIONS and kind not in TRANSPOSED and kind != LINEAR:
        return False
    # A linear layer's channels are its last dimension, a batch norm's the second one: they agree in 2-D alone.
    if kind == LINEAR and layer.meta["val"].ndim != 2:
        return False
    stored = [layer.args[1], *layer.args[2:3], *norm.args[1:5]]
    return all(item is None or (isinstance(item, fx.Node) and item.op == "get_attr") for item in stored)


def fold(graph: fx.GraphModule, layer: fx.Node, norm: fx.Node, stored: Stored) -> None:
    """Give `layer` the weight and bias that do `norm`'s work too: one pair for all uses of the same two modules."""
    inputs: list[Any] = [layer.args[1], *layer.args[2:3], *norm.args[1:5]]
    settings = operator(layer), repr(layer.args[3:]), repr(norm.args[5:])
    key = (*settings, *(item and str(item.target) for item in inputs))
    if key not in stored:
        stored[key] = fold_tensors(graph, layer, norm)
    layer.args = (layer.args[0], *stored[key], *layer.args[3:])


def fold_tensors(graph: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Folded weight and bias, stored before `layer`."""
    weight_node: Any = layer.args[1]
    bias = tensor_of(graph, layer.args[2]) if len(layer.args) > 2 and layer.args[2] is not None else None
    gamma, beta, mean, var = (None if arg is None else tensor_of(graph, arg) for arg in norm.args[1:5])
    eps: Any = norm.args[7] if operator(norm) == "aten.batch_norm" else norm.args[6]
    groups: Any = None
    if operator(layer) in TRANSPOSED:
        groups = layer.args[6] if len(layer.args) > 6 else 1
    weight, bias = folded(
        tensor_of(graph, weight_node), bias, gamma, beta, mean, var, float(eps), transposed_groups=groups
    )
    with graph.graph.inserting_before(layer):
        weight_node = store(graph, f"{layer.name}_folded_weight", weight, like=str(weight_node.target))
        return weight_node, store(graph, f"{layer.name}_folded_bias", bias)


def folded(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    *,
    transposed_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that also does the batch norm after it, computed in float64.

    w' = w * gamma / sqrt(var + eps);  b' = (b - mean) * gamma / sqrt(var + eps) + beta

    Args:
        weight: (out, in / groups, ...); for a transposed convolution (in, out / groups, ...).
        transposed_groups: The groups of a transposed convolution; None for every other layer.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 14.
    """
    if mean is None or var is None:
        raise QuantizeError(
            "a batch norm without running statistics cannot be folded; train it with track_running_stats"
        )
    std = torch.sqrt(var.double() + eps)
    factor = (gamma.double() if gamma is not None else torch.ones_like(std)) / std
    start = bias.double() if bias is not None else torch.zeros_like(std)
    new_bias = (start - mean.double()) * factor + (beta.double() if beta is not None else 0.0)
    if transposed_groups is None:
        scaled = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:
        inside = weight.double().reshape(transposed_groups, -1, weight.shape[1], *weight.shape[2:])
        per_group = factor.reshape(transposed_groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        scaled = (inside * per_group).reshape(weight.shape)
    return scaled.to(weight.dtype), new_bias.to(weight.dtype)


def tensor_of(graph: fx.GraphModule, node: Any) -> Tensor:
    """The parameter or buffer behind a `get_attr` node."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value.detach()


def store(graph: fx.GraphModule, name: str, value: Tensor, like: str = "") -> fx.Node:
    """A new stored tensor and the node that reads it, at the graph's insertion point.

    Args:
        like: Name of the parameter it stands for, kept in the node's meta as "stands_for".
    """
    if value.is_floating_point():
        graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        graph.register_buffer(name, value)
    node = graph.graph.get_attr(name)
    node.meta = {"stands_for": like, "val": value}
    return node
