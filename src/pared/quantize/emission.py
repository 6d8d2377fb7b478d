"""Emission: a placed graph with chosen ranges becomes one with quantize and dequantize operators and integer weights.

The operators are PyTorch's `quantized_decomposed` ones, which its ONNX exporter and compilers understand. This is the
only file that imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - importing it registers the operators

from pared.errors import QuantizeError
from pared.graph.capture import operator
from pared.quantize.affine import (
    Grid,
    QParams,
    choose_qparams,
    fit_bias,
    grid,
    qparams_of_range,
    quantize,
    quantize_bias,
)
from pared.quantize.folding import TRANSPOSED, store, tensor_of
from pared.quantize.placement import Anchor, Placement, behind, clip_of
from pared.quantize.saturation import groups_of, safe_scale
from pared.step import Saturating, Scheme

OPERATORS = torch.ops.quantized_decomposed
Ranges = Mapping[str, tuple[float, float]]


def emit(graph: fx.GraphModule, placement: Placement, ranges: Ranges, scheme: Scheme, *, any_cpu: bool = False) -> None:
    """Write the quantization into the graph, in place.

    Args:
        graph: The graph that was placed, batch norms folded.
        placement: What becomes integers.
        ranges: Lowest and highest value of each root tensor in `placement.tensors`.
        scheme: The runtime's rules.
        any_cpu: Keep weights so small that their products saturate on no processor.

    Raises:
        QuantizeError: A range is missing: the plan belongs to another model or version.
    """
    numbers = grid(bits=8, signed=scheme.activation_dtype == "int8", symmetric=scheme.activation_symmetric)
    nodes = {node.name: node for node in graph.graph.nodes}
    qparams = {}
    for root in set(placement.tensors.values()):
        if root not in ranges:
            raise QuantizeError(f"the plan has no range for {root}; it belongs to another model or version: plan again")
        low, high = (torch.tensor(end) for end in ranges[root])
        qparams[root] = qparams_of_range(low, high, numbers, symmetric=scheme.activation_symmetric)
    inputs = {name: qparams[root] for name, root in placement.tensors.items()}
    emit_weights(graph, placement.anchors, inputs, scheme.saturating if any_cpu else "no")
    for name, root in placement.tensors.items():
        emit_activation(graph, nodes[name], qparams[root], numbers)
    drop_implied_clips(nodes, placement, qparams, numbers, scheme)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    graph.delete_all_unused_submodules()
    drop_unused_tensors(graph)


def emit_activation(graph: fx.GraphModule, node: fx.Node, qparams: QParams, numbers: Grid) -> None:
    """Quantize and dequantize right after a node, for all its users."""
    scale, zero_point = qparams.scale.item(), int(qparams.zero_point.item())
    users = list(node.users)
    settings = (scale, zero_point, numbers.low, numbers.high, numbers.dtype)
    with graph.graph.inserting_after(node):
        q = graph.graph.call_function(OPERATORS.quantize_per_tensor.default, (node, *settings))
    with graph.graph.inserting_after(q):
        d = graph.graph.call_function(OPERATORS.dequantize_per_tensor.default, (q, *settings))
    for user in users:
        user.replace_input_with(node, d)


def emit_weights(
    graph: fx.GraphModule, anchors: tuple[Anchor, ...], inputs: Mapping[str, QParams], saturating: Saturating
) -> None:
    """Store each anchor's weight as int8 and its bias as int32; layers that share a tensor go on sharing it."""
    numbers = grid(bits=8, signed=True, symmetric=True)
    nodes = {node.name: node for node in graph.graph.nodes}
    stored: dict[tuple[Any, ...], fx.Node] = {}
    for anchor in anchors:
        node = nodes[anchor.node]
        weight_node, x_node = node.args[1], node.args[0]
        if not isinstance(weight_node, fx.Node) or not isinstance(x_node, fx.Node):
            raise QuantizeError(f"{anchor.module}: its weight or input is not a tensor of the graph; plan again")
        weight = tensor_of(graph, weight_node)
        bias = tensor_of(graph, node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
        x_scale = inputs[behind(x_node).name].scale
        axis = 1 if operator(node) in TRANSPOSED else 0
        scale = choose_qparams(weight, numbers, symmetric=True, axis=axis).scale.flatten()
        if saturating != "no":
            by_channel, any_pair = weight.transpose(0, axis), saturating == "any" or axis == 1
            scale = torch.maximum(scale, safe_scale(by_channel, groups=groups_of(node), any_pair=any_pair))
        with graph.graph.inserting_before(node):
            if bias is not None and scale.numel() == bias.numel():
                scale = fit_bias(scale, bias, x_scale)
            key = (weight_node.target, scale.numpy().tobytes())
            if key not in stored:
                stored[key] = emit_weight(graph, node, weight, scale, axis, numbers)
            dequantized = stored[key]
            args = [node.args[0], dequantized, *node.args[2:]]
            if bias is not None and scale.numel() == bias.numel():
                args[2] = emit_bias(graph, node.name, bias, x_scale, scale)
        node.args = tuple(args)


def emit_weight(
    graph: fx.GraphModule, layer: fx.Node, weight: Tensor, scale: Tensor, axis: int, numbers: Grid
) -> fx.Node:
    """Integer weight, its scales, and the operator that dequantizes it."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    zero = torch.zeros((), dtype=torch.int32)
    values = quantize(weight.double(), QParams(scale.double().reshape(shape), zero), numbers)
    weight_node = store(graph, f"{layer.name}_weight", values)
    scale_node = store(graph, f"{layer.name}_weight_scale", scale)
    zero_node = None
    if operator(layer) == "aten.linear":
        # ONNX Runtime fuses a Gemm into integers only where the weight's zero point is written out.
        zero_node = store(graph, f"{layer.name}_weight_zero_point", torch.zeros(len(scale), dtype=torch.int64))
    return graph.graph.call_function(
        OPERATORS.dequantize_per_channel.default,
        (weight_node, scale_node, zero_node, axis, numbers.low, numbers.high, numbers.dtype),
    )


def emit_bias(graph: fx.GraphModule, name: str, bias: Tensor, x_scale: Tensor, weight_scale: Tensor) -> fx.Node:
    """Integer bias in units of the accumulator, and the operator that dequantizes it."""
    values, scale = quantize_bias(bias, x_scale, weight_scale)
    bias_node = store(graph, f"{name}_bias", values)
    scale_node = store(graph, f"{name}_bias_scale", scale)
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    return graph.graph.call_function(
        OPERATORS.dequantize_per_channel.default, (bias_node, scale_node, None, 0, low, high, torch.int32)
    )


def drop_implied_clips(
    nodes: dict[str, fx.Node],
    placement: Placement,
    qparams: Mapping[str, QParams],
    numbers: Grid,
    scheme: Scheme,
) -> None:
    """Take out activations that the saturation of the quantize operator after them already does.

    ReLU before unsigned integers with zero point 0 is one: the result is the same to the last bit. A runtime that does
    not see through the clip would leave the whole layer in float.
    """
    for name, root in placement.tensors.items():
        node = nodes[name]
        bounds = clip_of(node)
        if bounds is None or operator(node) not in scheme.absorbed or not isinstance(node.args[0], fx.Node):
            continue
        scale, zero_point = qparams[root].scale.item(), qparams[root].zero_point.item()
        lowest, highest = ((end - zero_point) * scale for end in (numbers.low, numbers.high))
        # An end of the grid no further than half a quantum beyond a bound is as near to it as rounding gets.
        slack = 0.501 * scale
        if lowest >= bounds[0] - slack and highest <= bounds[1] + slack:
            node.replace_all_uses_with(node.args[0])


def drop_unused_tensors(graph: fx.GraphModule) -> None:
    """Remove parameters and buffers that no node reads any more: float weights that became integers."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for module_name, module in graph.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key in list(tensors):
                if (f"{module_name}.{key}" if module_name else key) not in used:
                    del tensors[key]
