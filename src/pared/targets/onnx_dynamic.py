"""ONNX for activations that are quantized at run time: DynamicQuantizeLinear and MatMulInteger.

Before the export, each linear layer between quantize operators gives way to one operator of ours, and each tensor that
is quantized to another, so that layers share it. `table` translates them into the nodes that ONNX Runtime fuses into
DynamicQuantizeMatMul or MatMulIntegerToFloat.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.graph.capture import operator, quiet

LIBRARY: Any = torch.library.Library("pared", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("dynamic_quantize(Tensor x) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "integer_linear(Tensor x, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor? bias) "
    "-> Tensor"
)


@torch.library.impl(LIBRARY, "dynamic_quantize", "CompositeExplicitAutograd")
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What DynamicQuantizeLinear computes: integers, scale, zero point."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale).clamp(0, 255)
    q = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return q.to(torch.uint8), scale, zero_point.to(torch.uint8)


@torch.library.impl(LIBRARY, "integer_linear", "CompositeExplicitAutograd")
def integer_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """What the nodes that `table` writes compute; `weight` has shape (inputs, outputs)."""
    total = (x.float() - zero_point.float()) @ weight.float()
    real = total * (scale * weight_scale)
    return real if bias is None else real + bias


def with_dynamic_operators(model: nn.Module) -> nn.Module:
    """A copy of a program whose run-time quantized layers are operators that `table` translates; others as they are."""
    if not isinstance(model, fx.GraphModule) or not any(map(is_chosen, model.graph.nodes)):
        return model
    with quiet():
        program = copy.deepcopy(model)
    quantized: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
    weights: dict[fx.Node, fx.Node] = {}
    for node in list(program.graph.nodes):
        if is_chosen(node):
            quantized[node] = quantize(program, node)
    for node in list(program.graph.nodes):
        if operator(node) == "aten.linear" and is_dynamic(node.args[0]):
            rewrite(program, node, quantized, weights)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.recompile()
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name in [name for name in (*program._buffers, *program._parameters) if name not in used]:
        delattr(program, name)
    return program


def is_chosen(node: fx.Node) -> bool:
    return operator(node) == "quantized_decomposed.choose_qparams"


def is_dynamic(value: Any) -> bool:
    """True for the end of a chain choose_qparams, quantize, dequantize."""
    if not isinstance(value, fx.Node) or operator(value) != "quantized_decomposed.dequantize_per_tensor":
        return False
    scale = value.args[1]
    return isinstance(scale, fx.Node) and scale.target is getitem and is_chosen(source(scale))


def source(node: fx.Node) -> fx.Node:
    """The node that a node's first argument is."""
    first: Any = node.args[0]
    return first  # type: ignore[no-any-return]


def quantize(program: fx.GraphModule, chosen: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Integers, scale and zero point of the tensor that `chosen` looks at."""
    with program.graph.inserting_before(chosen):
        made = program.graph.call_function(torch.ops.pared.dynamic_quantize.default, (chosen.args[0],))
        q, scale, zero_point = (program.graph.call_function(getitem, (made, i)) for i in range(3))
    return q, scale, zero_point


def rewrite(
    program: fx.GraphModule,
    node: fx.Node,
    quantized: Mapping[fx.Node, tuple[fx.Node, fx.Node, fx.Node]],
    weights: dict[fx.Node, fx.Node],
) -> None:
    """Let a linear layer work on integers; layers that share a weight go on sharing it."""
    scale: Any = source(node).args[1]
    dequantized: Any = node.args[1]
    values, weight_scale = dequantized.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    with program.graph.inserting_before(node):
        if values not in weights:
            # As MatMulInteger reads it: ONNX Runtime need not transpose it when it loads the file.
            name = f"{values.target}_transposed"
            program.register_buffer(name, getattr(program, str(values.target)).t().contiguous())
            weights[values] = program.graph.get_attr(name)
        new = program.graph.call_function(
            torch.ops.pared.integer_linear.default,
            (*quantized[source(scale)], weights[values], weight_scale, bias),
        )
    node.replace_all_uses_with(new)


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of our operators, for `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset18 as op

    def dynamic_quantize(x: Any) -> Any:
        return op.DynamicQuantizeLinear(x)

    def integer_linear(x: Any, scale: Any, zero_point: Any, weight: Any, weight_scale: Any, bias: Any = None) -> Any:
        total = op.Cast(op.MatMulInteger(x, weight, zero_point), to=1)
        real = op.Mul(total, op.Mul(scale, weight_scale))
        return real if bias is None else op.Add(real, bias)

    ours = torch.ops.pared
    return {ours.dynamic_quantize.default: dynamic_quantize, ours.integer_linear.default: integer_linear}
