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

from pared.graph.capture import operator
from pared.quantize.affine import Grid, QParams, quantize_bias
from pared.quantize.coding import Code
from pared.quantize.folding import store
from pared.quantize.placement import Anchor, Placement, behind, clip_of
from pared.step import Scheme

OPERATORS = torch.ops.quantized_decomposed


def emit(
    graph: fx.GraphModule,
    placement: Placement,
    qparams: Mapping[str, QParams],
    grids: Mapping[str, Grid],
    codes: Mapping[str, Code],
    scheme: Scheme,
) -> None:
    """Write the quantization into the graph, in place.

    Args:
        graph: The graph that was placed, batch norms folded.
        placement: What becomes integers.
        qparams: Scale and zero point of every activation in `placement.tensors`, by node.
        grids: The integers of the same activations.
        codes: The integers of every anchor's weight, by node.
        scheme: The runtime's rules.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    emit_weights(graph, placement.anchors, qparams, codes, scheme)
    for name in placement.tensors:
        emit_activation(graph, nodes[name], qparams[name], grids[name])
    drop_implied_clips(nodes, placement, qparams, grids, scheme)
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
    stored = torch.iinfo(numbers.dtype)
    if numbers.high < stored.max:
        # No format of a runtime knows narrower integers than those it stores: it would not clip at their ends.
        with graph.graph.inserting_after(q):
            q = graph.graph.call_function(torch.ops.aten.clamp.default, (q, numbers.low, numbers.high))
    with graph.graph.inserting_after(q):
        d = graph.graph.call_function(OPERATORS.dequantize_per_tensor.default, (q, *settings))
    for user in users:
        user.replace_input_with(node, d)


def emit_weights(
    graph: fx.GraphModule,
    anchors: tuple[Anchor, ...],
    inputs: Mapping[str, QParams],
    codes: Mapping[str, Code],
    scheme: Scheme,
) -> None:
    """Store each anchor's weight as int8 and its bias as the runtime wants it; layers that share a tensor go on so."""
    nodes = {node.name: node for node in graph.graph.nodes}
    stored: dict[tuple[Any, ...], fx.Node] = {}
    for anchor in anchors:
        node, code = nodes[anchor.node], codes[anchor.node]
        x_scale = inputs[behind(node.args[0]).name].scale
        with graph.graph.inserting_before(node):
            if code.key not in stored:
                # ONNX Runtime fuses a Gemm into integers only where the weight's zero point is written out.
                zeros = scheme.weight_zero_points or operator(node) == "aten.linear"
                stored[code.key] = emit_weight(graph, node, code, zeros=zeros)
            args = [node.args[0], stored[code.key], *node.args[2:]]
            if code.bias is not None:
                apart = code.bias.numel() == code.scale.numel()
                args[2:3] = [
                    emit_bias(graph, node.name, code.bias, x_scale, code.scale)
                    if scheme.bias_dtype == "int32" and apart and adds_integers(node)
                    else store(graph, f"{node.name}_bias", code.bias)
                ]
        node.args = tuple(args)


def adds_integers(layer: fx.Node) -> bool:
    """True where a layer's bias is added to its accumulator.

    A linear layer over more than two dimensions is written as a product of matrices and an addition in float, which
    would only turn an integer bias back at every call.
    """
    return operator(layer) != "aten.linear" or bool(layer.meta["val"].ndim == 2)


def emit_weight(graph: fx.GraphModule, layer: fx.Node, code: Code, *, zeros: bool) -> fx.Node:
    """Integer weight, its scales, its zero points where `zeros` or not zero, and the operator that dequantizes it."""
    weight_node = store(graph, f"{layer.name}_weight", code.values)
    scale_node = store(graph, f"{layer.name}_weight_scale", code.scale)
    zero_node = None
    if zeros or bool(code.zero_point.any()):
        zero_node = store(graph, f"{layer.name}_weight_zero_point", code.zero_point.long())
    limits = torch.iinfo(code.values.dtype)
    low = limits.min if bool(code.zero_point.any()) else -limits.max
    return graph.graph.call_function(
        OPERATORS.dequantize_per_channel.default,
        (weight_node, scale_node, zero_node, code.axis, low, limits.max, code.values.dtype),
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
    grids: Mapping[str, Grid],
    scheme: Scheme,
) -> None:
    """Take out activations that the saturation of the quantize operator after them already does.

    ReLU before unsigned integers with zero point 0 is one: the result is the same to the last bit. A runtime that does
    not see through the clip would leave the whole layer in float.
    """
    for name in placement.tensors:
        node = nodes[name]
        bounds = clip_of(node)
        if bounds is None or operator(node) not in scheme.absorbed or not isinstance(node.args[0], fx.Node):
            continue
        scale, zero_point = qparams[name].scale.item(), qparams[name].zero_point.item()
        lowest, highest = ((end - zero_point) * scale for end in (grids[name].low, grids[name].high))
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
