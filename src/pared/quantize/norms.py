"""Batch norms that no layer before them can take in, as depthwise 1x1 convolutions where integers surround them.

A norm behind a concat or a ReLU (DenseNet, pre-activation networks) would stay in float, with a conversion on each side
and the concat before it in float too. As a convolution of one weight a channel it runs in integers, takes in the ReLU
that follows, and its weight loses nothing: one scale a channel holds one number exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from pared.graph.capture import operator, owner
from pared.quantize.folding import folded, normalization, store, tensor_of
from pared.quantize.placement import active_joins, anchors_of, left_out
from pared.step import Scheme

CONVOLUTIONS: dict[int, Any] = {
    3: torch.ops.aten.conv1d.default,
    4: torch.ops.aten.conv2d.default,
    5: torch.ops.aten.conv3d.default,
}
NORM = "aten.batch_norm"
WAS_NORM = "was_norm"  # in the meta of a convolution made here: no work that the model's author would count


def write_norms_as_convolutions(
    graph: fx.GraphModule, scheme: Scheme, *, include: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    """Rewrite the norms with integers before and behind them, in place; all others stay.

    Args:
        graph: Captured, with all norms folded that can be.
        scheme: The runtime's rules; without `norms_as_convolutions` nothing changes.
        include: As in `place`: a norm whose module matches none stays.
        exclude: As in `place`: a norm whose module matches one stays.
    """
    if not scheme.norms_as_convolutions:
        return
    write_norms_alike(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    anchors = {anchor.node for anchor in anchors_of(nodes, scheme, include, exclude)[0]}
    widened = dataclasses.replace(scheme, joining=scheme.joining | {NORM})
    for name in active_joins(nodes, anchors, widened):
        norm = nodes[name]
        if operator(norm) == NORM and convertible(norm) and left_out(owner(norm), include, exclude) is None:
            convert(graph, norm)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def write_norms_alike(graph: fx.GraphModule) -> None:
    """Give norms in their functional form, which has three results, the usual one, in place."""
    for node in list(graph.graph.nodes):
        norm = normalization(node)
        if norm is None or norm is node:
            continue
        x, gamma, beta, mean, var, momentum, eps = norm.args
        with graph.graph.inserting_before(node):
            usual = graph.graph.call_function(
                torch.ops.aten.batch_norm.default, (x, gamma, beta, mean, var, False, momentum, eps, False)
            )
        usual.meta = {**norm.meta, "val": node.meta["val"]}
        node.replace_all_uses_with(usual)
    graph.graph.eliminate_dead_code()


def convertible(norm: fx.Node) -> bool:
    """True for stored statistics and inputs that a convolution takes."""
    stored = all(arg is None or (isinstance(arg, fx.Node) and arg.op == "get_attr") for arg in norm.args[1:5])
    return stored and None not in norm.args[3:5] and norm.meta["val"].ndim in CONVOLUTIONS


def convert(graph: fx.GraphModule, norm: fx.Node) -> None:
    """Put a convolution in a norm's place.

    With a weight of ones before it, the formula of folding (Jacob et al. 2018, arXiv:1712.05877, eq. 14) gives the
    norm's own factor and offset.
    """
    gamma, beta, mean, var = (None if arg is None else tensor_of(graph, arg) for arg in norm.args[1:5])
    eps: Any = norm.args[7]
    value = norm.meta["val"]
    spatial, channels = value.ndim - 2, int(value.shape[1])
    ones = torch.ones(channels, 1, *[1] * spatial, dtype=value.dtype)
    weight, bias = folded(ones, None, gamma, beta, mean, var, float(eps))
    with graph.graph.inserting_before(norm):
        weight_node = store(graph, f"{norm.name}_factor", weight, like=f"{owner(norm)}.weight".lstrip("."))
        bias_node = store(graph, f"{norm.name}_offset", bias)
        once, none = [1] * spatial, [0] * spatial
        layer = graph.graph.call_function(
            CONVOLUTIONS[value.ndim], (norm.args[0], weight_node, bias_node, once, none, once, channels)
        )
    layer.meta = {**norm.meta, WAS_NORM: True}
    norm.replace_all_uses_with(layer)
