"""ONNX for attention: one MultiHeadAttention where ONNX would have a dozen transposes, products and masks.

Before the exporter sees a program, attention between heads that are split and joined as every transformer does it gives
way to one operator of ours; `table` translates it. Attention that is written otherwise stays as it is, in the four
dimensions that the exporter knows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from pared.graph.capture import operator

LIBRARY: Any = torch.library.Library("pared", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int heads, float scale) -> Tensor")
RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view"})
NO_OPERATION = frozenset({"aten.contiguous", "aten.clone"})
ROUNDINGS = frozenset({"quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor"})
# Scores vanish beside it, and it does not overflow.
MASKED = float(torch.finfo(torch.float32).min) / 2


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """What the nodes that `table` writes compute, on tensors of shape (batch, length, heads * width)."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


def attend_in_one(program: ExportedProgram) -> ExportedProgram:
    """The same program, changed in place so that attention is one operator where it can be."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if operator(node) == "aten.scaled_dot_product_attention":
            rewrite(graph, node)
            if node.users:
                in_four_dimensions(graph, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def rewrite(graph: fx.Graph, node: fx.Node) -> None:
    """Put our operator in the place of attention and of what splits and joins its heads; or change nothing."""
    inputs = [split(arg) for arg in node.args[:3]]
    last = joined(node)
    mask, plain = settings(node)
    if any(x is None for x in inputs) or last is None or not plain or not suits(node, mask):
        return
    heads, width = (int(size) for size in (node.meta["val"].shape[1], node.args[0].meta["val"].shape[3]))  # type: ignore[union-attr]
    scale: Any = node.kwargs.get("scale")
    with graph.inserting_before(last):
        arguments = (*inputs, mask, heads, 1 / math.sqrt(width) if scale is None else float(scale))
        new = graph.call_function(torch.ops.pared.attention.default, arguments)
    new.meta = {**last.meta}
    last.replace_all_uses_with(new)


def in_four_dimensions(graph: fx.Graph, node: fx.Node) -> None:
    """Let attention have one dimension of batches and one of heads, where it has more, as for windows, or fewer.

    A mask of more than three dimensions would have to be repeated: such attention stays as it is.
    """
    ndim, mask, operands = node.meta["val"].ndim, settings(node)[0], [*node.args[:3]]
    masked = mask.meta["val"].ndim if isinstance(mask, fx.Node) else 0
    if ndim == 4 or masked > 3 or any(arg.meta["val"].ndim != ndim for arg in operands):  # type: ignore[union-attr]
        return

    def size(value: Any, dim: int) -> Any:
        known = value.meta["val"].shape[dim]
        if isinstance(known, int):
            return known
        found = graph.call_function(torch.ops.aten.sym_size.int, (value, dim))
        found.meta["val"] = known
        return found

    def reshaped(value: Any, sizes: list[Any]) -> fx.Node:
        numbers = [item.meta["val"] if isinstance(item, fx.Node) else item for item in sizes]
        new = graph.call_function(torch.ops.aten.reshape.default, (value, sizes))
        new.meta = {**value.meta, "val": value.meta["val"].reshape(numbers)}
        return new

    with graph.inserting_before(node):
        heads = [[1] if ndim < 4 else [size(arg, ndim - 3)] for arg in operands]
        flat = [
            reshaped(arg, [-1, *number, size(arg, ndim - 2), size(arg, ndim - 1)])
            for arg, number in zip(operands, heads, strict=True)
        ]
        middle = [size(operands[0], dim) for dim in range(1, ndim - 1)]
        last = size(operands[2], ndim - 1)
        rest, kwargs = list(node.args[3:]), dict(node.kwargs)
        if ndim == 3 == masked:  # a mask for each batch, or one for all: heads have no dimension
            own = reshaped(mask, [-1, 1, size(mask, 1), size(mask, 2)])
            rest = [own if value is mask else value for value in rest]
            kwargs = {name: own if value is mask else value for name, value in kwargs.items()}
        new = graph.call_function(node.target, (*flat, *rest), kwargs)  # type: ignore[arg-type]
        new.meta = {
            **node.meta,
            "val": node.meta["val"].reshape(-1, *flat[0].meta["val"].shape[1:3], flat[2].meta["val"].shape[3]),
        }
        node.replace_all_uses_with(reshaped(new, [-1, *middle, last]))


def split(value: Any) -> fx.Node | None:
    """The tensor (batch, length, heads * width) whose heads `value` is, of shape (batch, heads, length, width)."""
    moved = value.args[0] if isinstance(value, fx.Node) and is_swap(value) else None
    if not isinstance(moved, fx.Node) or operator(moved) not in RESHAPES or not isinstance(moved.args[0], fx.Node):
        return None
    whole, parts = moved.args[0].meta["val"], moved.meta["val"].shape
    alike = whole.ndim == 3 and len(parts) == 4 and whole.dtype == torch.float32
    if not alike or whole.shape[2] != parts[2] * parts[3] or whole.shape[1] != parts[1]:
        return None
    return moved.args[0]


def joined(node: fx.Node) -> fx.Node | None:
    """The tensor (batch, length, heads * width) that is made of the heads in `node` and of nothing else."""
    swap = next_change(node)
    if swap is None or not is_swap(swap):
        return None
    last = next_change(swap)
    if last is None or operator(last) not in RESHAPES or not rounded_alike(node, last):
        return None
    whole, parts = last.meta["val"].shape, swap.meta["val"].shape
    fits = len(whole) == 3 and whole[2] == parts[2] * parts[3] and whole[1] == parts[1]
    return last if fits else None


def next_change(node: fx.Node) -> fx.Node | None:
    """The only user of a tensor, after copies, roundings and reshapes that keep the shape; None if there are more."""
    shape = node.meta["val"].shape
    while len(node.users) == 1:
        node = next(iter(node.users))
        same = operator(node) in RESHAPES and node.meta["val"].shape == shape
        if not same and operator(node) not in NO_OPERATION | ROUNDINGS:
            return node
    return None


def rounded_alike(node: fx.Node, last: fx.Node) -> bool:
    """True where all roundings from `node` to `last` are made once more behind `last`, so that they can be left out.

    What only moves values hands their integers on: each such operator has the same rounding before and behind it.
    """
    found = set()
    while node is not last:
        node = next(iter(node.users))
        if operator(node) in ROUNDINGS:
            found.add(node.args[1:])
    return not found or found == {user.args[1:] if operator(user) in ROUNDINGS else () for user in last.users}


def is_swap(node: fx.Node) -> bool:
    """True for a transpose of the second and the third of four dimensions."""
    return operator(node) == "aten.transpose" and {int(str(d)) % 4 for d in node.args[1:3]} == {1, 2}


def settings(node: fx.Node) -> tuple[Any, bool]:
    """The mask of an attention, and False where it is causal, drops, or shares heads."""
    given = [*node.args[3:], *[None] * 3][:3]
    mask, drop, causal = (
        node.kwargs.get(name, value) for name, value in zip(("attn_mask", "dropout_p", "is_causal"), given, strict=True)
    )
    return mask, not drop and not causal and not node.kwargs.get("enable_gqa")


def suits(node: fx.Node, mask: Any) -> bool:
    """True where all heads are alike, and the mask is none or one of truth values for each pair of positions."""
    q, k, v = (arg.meta["val"].shape for arg in node.args[:3])  # type: ignore[union-attr]
    if not (q[1] == k[1] == v[1] and q[3] == k[3] == v[3]):
        return False
    if mask is None:
        return True
    value = mask.meta["val"]
    return bool(
        value.dtype == torch.bool
        and value.ndim == 4
        and value.shape[1] == 1
        and value.shape[2] == q[2]
        and value.shape[3] == k[2]
    )


def table() -> dict[Any, Any]:
    """Translations of our operator, for `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset18 as op

    attend = multi_head_attention()

    def attention(query: Any, key: Any, value: Any, mask: Any, heads: int, scale: float) -> Any:
        if mask is None:
            return attend(query, key, value, num_heads=heads, scale=scale)
        bias = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
        mixed = attend(query, key, value, None, None, bias, num_heads=heads, scale=scale)
        # PyTorch gives a position that sees none 0; the softmax of equal scores would be their mean.
        seen = op.ReduceMax(op.Cast(mask, to=1), op.Constant(value_ints=[-1]), keepdims=1)
        return op.Mul(mixed, op.Squeeze(seen, op.Constant(value_ints=[1])))

    return {torch.ops.pared.attention.default: attention}


def multi_head_attention() -> Any:
    """ONNX Runtime's operator, with as much of its schema as `table` uses: the exporter knows ONNX's own alone."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    domain, name, real = "com.microsoft", "MultiHeadAttention", "tensor(float)"
    may_miss = OpSchema.FormalParameterOption.Optional
    given = [OpSchema.FormalParameter(key, real) for key in ("query", "key", "value")]
    others = ("bias", "key_padding_mask", "attention_bias")
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[*given, *(OpSchema.FormalParameter(key, real, param_option=may_miss) for key in others)],
        outputs=[OpSchema.FormalParameter("output", real)],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT),
        ],
    )
    return Op(Opset(domain, 1), name, schema)
