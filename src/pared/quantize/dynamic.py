"""The step `QuantizeDynamic`: int8 weights, and activations whose scale is computed at every call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from operator import getitem as operator_getitem
from typing import Annotated, ClassVar, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, fx, nn

from pared.errors import PlanError, QuantizeError
from pared.graph.capture import operator
from pared.measure.processor import saturates_here
from pared.quantize.affine import QParams, choose_qparams, grid, quantize
from pared.quantize.emission import OPERATORS, drop_unused_tensors
from pared.quantize.folding import CONVOLUTIONS, LINEAR, store, tensor_of
from pared.quantize.formats import Cpu, kept_safe
from pared.quantize.placement import CANDIDATES, REFUSED, Anchor, behind, check_patterns, label, layer, why_not
from pared.quantize.program import nothing_to_quantize, prepare
from pared.quantize.saturation import safe_scale
from pared.quantize.smooth import migrate_without_data
from pared.step import Context, Edit, Need, Plan, Scheme, Skip, settings, settings_of

EMBEDDING = "aten.embedding"
TINY = float(torch.finfo(torch.float32).tiny)
WEIGHTS = grid(bits=8, signed=True, symmetric=True)
ACTIVATIONS = grid(bits=8, signed=False, symmetric=False)
SMALLEST_TABLE = 2**16  # weights of an embedding
ROWS = grid(bits=8, signed=True, symmetric=False)
Granularity = Literal["per_tensor", "per_channel"]
Quantized = tuple[fx.Node, fx.Node | None]


class Stored(NamedTuple):
    """Nodes that read a quantized weight, its rows' scales, and their zero points where the runtime wants them."""

    values: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None


@settings
class QuantizeDynamic:
    """Post-training quantization that needs no data: int8 weights, and activations quantized at run time.

    Batch norms are folded first. The input of each linear layer gets a scale and a zero point at every call, from its
    own smallest and largest value; layers that read one tensor share them. Embeddings are stored in int8, one scale a
    row, and stay float arithmetic.

    Example:
        >>> QuantizeDynamic(activations="per_tensor", exclude=["head"]).weights
        'per_channel'
    """

    trains: ClassVar[bool] = False

    weights: Annotated[
        Granularity, pydantic.Field(description="One weight scale for each output channel, or one for the tensor.")
    ] = "per_channel"
    bits: Annotated[
        int,
        pydantic.Field(
            ge=2,
            le=8,
            description="Width of the weights, which are stored in 8.",
        ),
    ] = 8
    cpu: Cpu = "here"
    activations: Annotated[
        Literal["per_row", "per_tensor"],
        pydantic.Field(
            description="per_row makes large rows (tokens) cost small ones nothing: each gets a scale of its own "
            "where the runtime can do that, else is divided by its largest absolute value before the tensor is "
            "quantized, and the layer's output multiplied by it; behind layer norms, whose rows are of one size, the "
            "spread of channels goes over to the weights instead. per_tensor does neither."
        ),
    ] = "per_row"
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to quantize.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to keep in float.")
    ] = ()

    @property
    def needs(self) -> frozenset[Need]:
        """No data."""
        return frozenset()

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the layers. Raises: PlanError, CaptureError, ModelError."""
        if ctx.target.scheme.dynamic_rows and self.activations == "per_tensor":
            raise PlanError(
                f"QuantizeDynamic(activations='per_tensor'): {ctx.target.name} gives each row a scale of its own; "
                "leave activations at 'per_row'"
            )
        graph, folded, idle = prepared(model, ctx)
        layers, skips = choose(graph, ctx, self.include, (*self.exclude, *ctx.refused))
        if not layers:
            raise nothing_to_quantize("QuantizeDynamic", skips)
        return Plan(
            step="QuantizeDynamic",
            settings=settings_of(self),
            edits=tuple(
                Edit("quantize", layer(node), {"node": node.name, "weight": weight_name(node), "bits": self.bits})
                for node in layers
            ),
            skips=(*skips, *idle),
            facts={"folded": folded, "any_cpu": kept_safe(self.cpu, ctx.target.scheme, here=saturates_here())},
            estimate=ctx.dry,
        )

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The quantized program. Raises: QuantizeError where the plan does not fit the model."""
        graph, _, _ = prepared(model, ctx)
        names = [edit.detail["node"] for edit in plan.edits]
        emit_dynamic(graph, names, self, ctx.target.scheme, any_cpu=plan.facts["any_cpu"])
        return graph


def prepared(model: nn.Module, ctx: Context) -> tuple[fx.GraphModule, list[str], list[Skip]]:
    """The captured program, where the target can run what becomes of it. Raises: PlanError."""
    if not ctx.target.scheme.dynamic:
        raise PlanError(
            f"QuantizeDynamic: the target {ctx.target.name} has no operators that quantize at run time; use "
            "QuantizeStatic, or the target onnxruntime or executorch"
        )
    return prepare(model, ctx.task, "QuantizeDynamic")


def anchor_of(node: fx.Node) -> Anchor:
    """A linear layer as placement speaks of it."""
    return Anchor(node.name, layer(node), weight_name(node), operator(node))


def weight_name(node: fx.Node) -> str:
    """Name of the parameter that a layer reads."""
    weight = weight_of(node)
    return str(weight.meta.get("stands_for") or weight.target)


def weight_of(node: fx.Node) -> fx.Node:
    """The node of a layer's weight: an embedding has it first."""
    weight = node.args[0] if operator(node) == EMBEDDING else node.args[1]
    if not isinstance(weight, fx.Node):
        raise QuantizeError(f"{node.name}: its weight is not a tensor of the graph; plan again")
    return weight


def choose(
    graph: fx.GraphModule, ctx: Context, include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[list[fx.Node], list[Skip]]:
    """The layers to quantize, in graph order, and the candidates that stay as they are, with the reason."""
    scheme = dataclasses.replace(ctx.target.scheme, weighted=ctx.target.scheme.dynamic)
    kinds = scheme.dynamic | ctx.target.scheme.weighted | CANDIDATES
    candidates = [node for node in graph.graph.nodes if operator(node) in kinds]
    check_patterns([layer(node) for node in candidates], include=include, exclude=exclude)
    reasons = [reason_of(graph, node, scheme, ctx.target.name, include, exclude) for node in candidates]
    pairs = list(zip(candidates, reasons, strict=True))
    return (
        [node for node, reason in pairs if reason is None],
        [
            Skip(label(node), REFUSED if layer(node) in ctx.refused else reason)
            for node, reason in pairs
            if reason is not None
        ],
    )


def reason_of(
    graph: fx.GraphModule,
    node: fx.Node,
    scheme: Scheme,
    target: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> str | None:
    """Why a candidate stays as it is, or None."""
    kind = operator(node)
    if kind == EMBEDDING and EMBEDDING in scheme.dynamic:
        # An embedding has its weight first, where other layers have their input.
        reason = unnamed(layer(node), include, exclude)
        table = node.args[0]
        if reason is None and (not isinstance(table, fx.Node) or table.op != "get_attr"):
            reason = "its weight is computed, not stored"
        elif reason is None and tensor_of(graph, table).numel() < SMALLEST_TABLE:
            reason = f"it has fewer than {SMALLEST_TABLE} weights: not worth the operators"
        return reason
    reason = why_not(node, scheme, include, exclude)
    if reason is None or kind in scheme.dynamic or not reason.endswith("does not run in integers here"):
        return reason
    if kind in CONVOLUTIONS:
        return f"{target} has no dynamic integer convolution that is faster than float"
    return f"{kind} is not written in dynamic integers on {target}"


def unnamed(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """Why the patterns leave a layer out, or None."""
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not in include"
    excluded = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
    return None if excluded is None else f"excluded by {excluded!r}"


def emit_dynamic(
    graph: fx.GraphModule, names: list[str], step: QuantizeDynamic, scheme: Scheme, *, any_cpu: bool
) -> None:
    """Write the quantization into the graph, in place.

    Args:
        graph: The prepared graph.
        names: Nodes of the layers.
        step: The settings.
        scheme: The runtime's rules.
        any_cpu: Keep the weights of linear layers so small that their products saturate on no processor.

    Raises:
        QuantizeError: A node is missing: the plan belongs to another model or version.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    missing = next((name for name in names if name not in nodes), None)
    if missing is not None:
        raise QuantizeError(
            f"the model has no node {missing}; the plan belongs to another model or version: plan again"
        )
    stored: dict[str, Stored] = {}
    inputs: dict[fx.Node, Quantized] = {}
    rows, even = step.activations == "per_row" and not scheme.dynamic_rows, set[str]()
    if rows:
        even = migrate_without_data(
            graph, [anchor_of(nodes[name]) for name in names if operator(nodes[name]) == LINEAR]
        )
    emit = emit_rows if scheme.dynamic_rows else functools.partial(emit_tensor, rows=rows, even=even)
    multiplied = {str(weight_of(nodes[name]).target) for name in names if operator(nodes[name]) == LINEAR}
    for name in names:
        node, weight = nodes[name], weight_of(nodes[name])
        if str(weight.target) not in stored:
            # A table that embeddings alone read is multiplied with nothing; one tied to a layer is, and goes first.
            safe = any_cpu and str(weight.target) in multiplied
            with graph.graph.inserting_before(node):
                values = tensor_of(graph, weight)
                zeros = scheme.weight_zero_points
                stored[str(weight.target)] = emit_weight(graph, node, values, step, safe=safe, zeros=zeros)
        if operator(node) == EMBEDDING:
            emit_embedding(graph, node, stored[str(weight.target)])
        else:
            emit_linear(graph, node, stored[str(weight.target)], inputs, emit)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    graph.delete_all_unused_submodules()
    drop_unused_tensors(graph)


def emit_weight(
    graph: fx.GraphModule, node: fx.Node, weight: Tensor, step: QuantizeDynamic, *, safe: bool, zeros: bool
) -> Stored:
    """Integers and scales of a weight: one scale for each row, all equal where one serves the tensor."""
    numbers = grid(bits=step.bits, signed=True, symmetric=True)
    qparams = choose_qparams(weight, numbers, symmetric=True, axis=0 if step.weights == "per_channel" else None)
    scale = qparams.scale.reshape(-1).expand(weight.shape[0]).contiguous()
    if safe:
        scale = torch.maximum(scale, safe_scale(weight, groups=1, any_pair=False))
        scale = scale if step.weights == "per_channel" else scale.max().expand(weight.shape[0]).contiguous()
    column = QParams(scale.double().reshape(-1, 1), qparams.zero_point.new_zeros(()))
    values = store(graph, f"{node.name}_weight", quantize(weight.double(), column, numbers))
    zero_point = torch.zeros(len(scale), dtype=torch.int64)
    return Stored(
        values,
        store(graph, f"{node.name}_weight_scale", scale),
        store(graph, f"{node.name}_weight_zero_point", zero_point) if zeros else None,
    )


def emit_embedding(graph: fx.GraphModule, node: fx.Node, weight: Stored) -> None:
    """Gather the integers of the rows, and their scales."""
    aten = torch.ops.aten
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function
        rows = call(aten.embedding.default, (weight.values, node.args[1]))
        scale = call(aten.embedding.default, (call(aten.unsqueeze.default, (weight.scale, -1)), node.args[1]))
        real = call(aten.mul.Tensor, (call(aten.to.dtype, (rows, torch.float32)), scale))
    node.replace_all_uses_with(real)


def emit_linear(
    graph: fx.GraphModule,
    node: fx.Node,
    weight: Stored,
    inputs: dict[fx.Node, Quantized],
    emit: Callable[[fx.GraphModule, fx.Node], Quantized],
) -> None:
    """Quantize the input at run time, once for all layers that read it, and give the layer its integer weight."""
    if not isinstance(node.args[0], fx.Node):
        raise QuantizeError(f"{node.name}: its input is not a tensor of the graph; plan again")
    x = behind(node.args[0])
    if x not in inputs:
        inputs[x] = emit(graph, x)
    quantized, largest = inputs[x]
    bias = node.args[2] if len(node.args) > 2 else None
    aten, low, high, dtype = torch.ops.aten, *WEIGHTS
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function
        read = (weight.values, weight.scale, weight.zero_point)
        real = call(OPERATORS.dequantize_per_channel.default, (*read, 0, low, high, dtype))
        if largest is None:
            node.args = (quantized, real, bias)
            return
        out = call(aten.mul.Tensor, (call(aten.linear.default, (quantized, real)), largest))
        out = out if bias is None else call(aten.add.Tensor, (out, bias))
    node.replace_all_uses_with(out)


def emit_rows(graph: fx.GraphModule, x: fx.Node) -> Quantized:
    """What stands for `x` in integers with a scale and a zero point for each row."""
    low, high, dtype = ROWS
    with graph.graph.inserting_before(x.next):
        call = graph.graph.call_function
        chosen = call(OPERATORS.choose_qparams_per_token_asymmetric.default, (x, dtype))
        scale, zero = (call(operator_getitem, (chosen, i)) for i in (0, 1))
        q = call(OPERATORS.quantize_per_token.default, (x, scale, zero, low, high, dtype))
        real = call(OPERATORS.dequantize_per_token.default, (q, scale, zero, low, high, dtype, torch.float32))
    return real, None


def emit_tensor(graph: fx.GraphModule, x: fx.Node, *, rows: bool, even: Collection[str]) -> Quantized:
    """The same with one for the tensor, and the factor of each row that it was divided by before.

    Args:
        graph: Changed in place.
        x: What to quantize.
        rows: Divide each row.
        even: Nodes whose rows are of one size as they are.
    """
    aten, low, high, dtype = torch.ops.aten, *ACTIVATIONS
    largest = None
    with graph.graph.inserting_before(x.next):
        call = graph.graph.call_function
        source = x
        if rows and x.name not in even:
            # Not the maximum of abs(x): a whole tensor more to write, which costs twice what another reduction does.
            ends = [call(end.default, (x, [-1], True)) for end in (aten.amax, aten.amin)]
            largest = call(aten.maximum.default, (ends[0], call(aten.neg.default, (ends[1],))))
            largest = call(aten.clamp.default, (largest, TINY))
            source = call(aten.div.Tensor, (x, largest))
        chosen = call(OPERATORS.choose_qparams.tensor, (source, low, high, TINY, dtype))
        scale, zero = (call(operator_getitem, (chosen, i)) for i in (0, 1))
        q = call(OPERATORS.quantize_per_tensor.tensor, (source, scale, zero, low, high, dtype))
        real = call(OPERATORS.dequantize_per_tensor.tensor, (q, scale, zero, low, high, dtype))
    return real, largest
