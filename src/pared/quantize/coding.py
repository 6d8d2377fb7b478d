"""Coding: the integers of each layer's weight, with its scale and bias, worked out once for simulation and emission."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from pared.errors import QuantizeError
from pared.graph.capture import operator
from pared.quantize.affine import Grid, QParams, choose_qparams, dequantize, fit_bias, qparams_of_range
from pared.quantize.folding import TRANSPOSED, tensor_of
from pared.quantize.formats import Activations, Weights
from pared.quantize.placement import Anchor, Placement, activations, behind, tensor_after
from pared.quantize.rounding import nearest
from pared.quantize.saturation import groups_of, safe_scale
from pared.step import Scheme

Ranges = Mapping[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Code:
    """A layer's weight in integers.

    Attributes:
        values: int8, the weight's shape.
        scale: float32, one for each index of `axis`.
        zero_point: int32, the same shape.
        axis: The axis of output channels.
        bias: float32, corrected where a repair says so; None where the layer has none.
        key: What layers that may share the stored integers have in common.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    bias: Tensor | None
    key: tuple[Any, ...]

    @property
    def weight(self) -> Tensor:
        """The real numbers that the integers stand for, float32."""
        return dequantize(self.values, QParams(self.along(self.scale), self.along(self.zero_point)))

    def along(self, values: Tensor) -> Tensor:
        """Numbers of the channels, in a shape that broadcasts against the weight."""
        shape = [1] * self.values.ndim
        shape[self.axis] = -1
        return values.reshape(shape)


def activation_qparams(
    graph: fx.GraphModule, placement: Placement, ranges: Ranges, form: Activations, scheme: Scheme
) -> tuple[dict[str, QParams], Grid]:
    """Scale and zero point of every quantized activation by its node, and their integers.

    Raises:
        QuantizeError: A range is missing: the plan belongs to another model or version.
    """
    numbers, symmetric = form.grid(scheme), form.is_symmetric(scheme)
    missing = sorted(set(placement.tensors.values()) - set(ranges))
    if missing:
        raise QuantizeError(
            f"the plan has no range for {missing[0]}; it belongs to another model or version: plan again"
        )
    nodes = {node.name: node for node in graph.graph.nodes}
    roots: dict[str, QParams] = {}
    for root, ends in shared_ranges(nodes, placement, ranges, scheme).items():
        low, high = (torch.tensor(end) for end in ends)
        roots[root] = qparams_of_range(low, high, numbers, symmetric=symmetric)
    return {name: roots[root] for name, root in placement.tensors.items()}, numbers


def shared_ranges(
    nodes: Mapping[str, fx.Node], placement: Placement, ranges: Ranges, scheme: Scheme
) -> dict[str, tuple[float, float]]:
    """Ranges, widened to one for the inputs and the output of each operator that needs the same integers on all sides.

    Returns:
        For each root tensor, the smallest range that holds those of all roots that it must agree with.
    """
    return {
        root: (min(ranges[other][0] for other in group), max(ranges[other][1] for other in group))
        for root, group in sharing_groups(nodes, placement, scheme).items()
    }


def sharing_groups(nodes: Mapping[str, fx.Node], placement: Placement, scheme: Scheme) -> dict[str, list[str]]:
    """The root tensors that each root tensor must have one scale and zero point with, itself included, in order."""
    groups = {root: {root} for root in dict.fromkeys(placement.tensors.values())}
    for name in placement.joins:
        if operator(nodes[name]) not in scheme.sharing:
            continue
        sides = [nodes[name], *(behind(arg) for arg in activations(nodes[name])), tensor_after(nodes[name], scheme)]
        roots = {placement.tensors[side.name] for side in sides if side.name in placement.tensors}
        merged = set().union(*(groups[root] for root in roots))
        groups |= dict.fromkeys(merged, merged)
    return {root: [other for other in groups if other in group] for root, group in groups.items()}


def tensors_of(graph: fx.GraphModule, node: fx.Node, anchor: Anchor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer. Raises: QuantizeError where they are no stored tensors."""
    weight_node, x_node = node.args[1], node.args[0]
    if not isinstance(weight_node, fx.Node) or not isinstance(x_node, fx.Node):
        raise QuantizeError(f"{anchor.module}: its weight or input is not a tensor of the graph; plan again")
    bias = tensor_of(graph, node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    return tensor_of(graph, weight_node), bias


def encode(
    graph: fx.GraphModule,
    placement: Placement,
    qparams: Mapping[str, QParams],
    form: Weights,
    scheme: Scheme,
    *,
    any_cpu: bool = False,
    up: Mapping[str, Tensor] = MappingProxyType({}),
    corrections: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Code]:
    """The code of every layer of a placement, by its node.

    Args:
        graph: The graph that was placed. Not changed.
        qparams: Of the activations, by node; a layer's bias is coded in units of its input's scale.
        form: How weights become integers.
        scheme: The runtime's rules.
        any_cpu: Keep weights so small that their products saturate on no processor.
        up: Roundings other than to the nearest, by node: True where a weight goes up.
        corrections: What to add to biases, by node.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    return {
        anchor.node: encode_one(
            graph,
            nodes[anchor.node],
            anchor,
            qparams,
            form,
            scheme,
            any_cpu=any_cpu,
            up=up.get(anchor.node),
            correction=corrections.get(anchor.node),
        )
        for anchor in placement.anchors
    }


def encode_one(
    graph: fx.GraphModule,
    node: fx.Node,
    anchor: Anchor,
    qparams: Mapping[str, QParams],
    form: Weights,
    scheme: Scheme,
    *,
    any_cpu: bool,
    up: Tensor | None,
    correction: Tensor | None,
) -> Code:
    """The code of one layer."""
    weight, bias = tensors_of(graph, node, anchor)
    axis = 1 if operator(node) in TRANSPOSED else 0
    numbers = form.grid()
    chosen = choose_qparams(
        weight, numbers, symmetric=form.symmetric, axis=axis if form.granularity == "channel" else None
    )
    channels = weight.shape[axis]
    scale, zero_point = (part.flatten().expand(channels).contiguous() for part in chosen)
    if any_cpu and scheme.saturating != "no":
        by_channel, any_pair = weight.transpose(0, axis), scheme.saturating == "any" or axis == 1
        scale = torch.maximum(scale, safe_scale(by_channel, groups=groups_of(node), any_pair=any_pair))
        scale = scale if form.granularity == "channel" else scale.max().expand(channels).contiguous()
    if form.granularity == "channel":
        # By the bias as it was: a correction must not change the grid that it corrects.
        scale = room_for_bias(scale, bias, qparams[behind(node.args[0]).name].scale, scheme)  # type: ignore[arg-type]
    if up is not None and up.shape != weight.shape:
        raise QuantizeError(f"{anchor.module}: the plan rounds a weight of another shape; plan again")
    if correction is not None:
        bias = correction if bias is None else bias + correction
    values = integers_of(weight, QParams(scale, zero_point), axis, numbers, up)
    key = (str(node.args[1]), scale.numpy().tobytes(), None if up is None else up.numpy().tobytes())
    return Code(values, scale, zero_point, axis, bias, key)


def room_for_bias(scale: Tensor, bias: Tensor | None, input_scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales of the channels, widened where the runtime's integers for the bias would overflow."""
    if bias is None or bias.numel() != scale.numel() or scheme.bias_dtype != "int32":
        return scale
    return fit_bias(scale, bias, input_scale)


def integers_of(weight: Tensor, qparams: QParams, axis: int, numbers: Grid, up: Tensor | None = None) -> Tensor:
    """The integers of a weight, rounded to the nearest, or up and down as `up` says.

    Args:
        weight: Real.
        qparams: One scale and zero point for each index of `axis`.
        axis: The axis of output channels.
        numbers: The integers to use.
        up: True where a weight goes up, False where it goes down.
    """
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = weight.double() / qparams.scale.double().reshape(shape)
    values = torch.floor(steps) + (nearest(steps) if up is None else up) + qparams.zero_point.reshape(shape)
    return values.clamp(numbers.low, numbers.high).to(numbers.dtype)
