"""The step `QuantizeWeights`: weights in 2 to 8 bits, activations in float."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, fx, nn

from pared.activations import SecondMoments, input_rows
from pared.errors import PlanError, QuantizeError
from pared.graph.capture import operator, owner
from pared.quantize.affine import Grid, grid
from pared.quantize.calibrate import calibrate, first_samples
from pared.quantize.emission import OPERATORS, drop_unused_tensors
from pared.quantize.folding import store, tensor_of
from pared.quantize.gptq import gptq
from pared.quantize.grouping import Grouped, nearest
from pared.quantize.placement import CANDIDATES, check_patterns, label, layer
from pared.quantize.program import nothing_to_quantize, prepare
from pared.step import Context, Edit, Need, Plan, Skip, settings, settings_of

EMBEDDING = "aten.embedding"
POSITIONS = 256  # of each sample, that a convolution's second moments are taken at


@settings
class Nearest:
    """Each weight to the nearest integer; needs no data."""

    kind: Literal["nearest"] = "nearest"


@settings
class Gptq:
    """Each column's error made up for by the columns after it, as the layer's inputs on calibration data ask for.

    Source: Frantar et al. 2022, arXiv:2210.17323.
    """

    kind: Literal["gptq"] = "gptq"
    damping: Annotated[
        float,
        pydantic.Field(gt=0, le=1, description="Added to the inputs' second moments, as a fraction of their mean."),
    ] = 0.01
    order: Annotated[
        Literal["activation", "columns"],
        pydantic.Field(description="Round the columns with the largest inputs first, or as they stand."),
    ] = "activation"
    samples: Annotated[
        int | None, pydantic.Field(ge=1, description="Use at most this many calibration samples; null uses all.")
    ] = 128


METHODS = {"nearest": Nearest, "gptq": Gptq}


def named_method(value: Any) -> Any:
    """Let a bare name stand for a method with its default settings."""
    return METHODS[value]() if isinstance(value, str) and value in METHODS else value


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight that becomes integers, once for all layers that share it.

    Attributes:
        name: Of the parameter in the model.
        node: Name of the graph's node that reads it.
        layers: Names of the nodes of the layers that use it, in graph order.
        modules: The modules of those layers.
    """

    name: str
    node: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]


@settings
class QuantizeWeights:
    """Weights in 2 to 8 bits, with a scale for each group of them or each output channel; activations stay in float.

    Batch norms are folded first. Linear layers, convolutions and embeddings become smaller in the file; whether they
    become faster is the runtime's matter.

    Example:
        >>> QuantizeWeights(bits=8, group_size=None, method="nearest").method.kind
        'nearest'
    """

    trains: ClassVar[bool] = False

    bits: Annotated[int, pydantic.Field(ge=2, le=8, description="Width of a weight.")] = 4
    group_size: Annotated[
        int | None, pydantic.Field(ge=2, description="Inputs that share a scale; null: one for each output channel.")
    ] = 32
    symmetric: Annotated[
        bool, pydantic.Field(description="Put every zero point at 0: a little smaller, less accurate.")
    ] = False
    method: Annotated[
        Nearest | Gptq,
        pydantic.Field(discriminator="kind", description="How to round: gptq (on calibration data) or nearest."),
        pydantic.BeforeValidator(named_method, json_schema_input_type=Literal["nearest", "gptq"] | Nearest | Gptq),
    ] = Gptq()
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to quantize.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to keep in float.")
    ] = ()

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration data for GPTQ, none for rounding to nearest."""
        return frozenset({"calibration"}) if isinstance(self.method, Gptq) else frozenset()

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the layers. Raises: PlanError, CaptureError, ModelError."""
        allowed = ctx.target.scheme.weight_only
        if not allowed:
            raise PlanError(
                f"QuantizeWeights: the target {ctx.target.name} has no operators for integer weights beside float "
                "activations; use the target onnxruntime or openvino, or QuantizeStatic"
            )
        graph, folded, idle = prepare(model, ctx.task, "QuantizeWeights")
        chosen, skips = choose(graph, allowed, self.include, self.exclude)
        if not chosen:
            raise nothing_to_quantize("QuantizeWeights", skips)
        ctx.memo["QuantizeWeights"] = (self, model, graph)
        nodes = {node.name: node for node in graph.graph.nodes}
        edits = [
            Edit("quantize", module, {"node": name, "weight": stored.name, "bits": self.bits})
            for stored in chosen
            for name, module in zip(stored.layers, stored.modules, strict=True)
        ]
        facts: dict[str, Any] = {"folded": folded, "warnings": []}
        if any(operator(nodes[name]).startswith("aten.conv") for stored in chosen for name in stored.layers):
            facts["warnings"].append(
                "weights of convolutions become float again when the file is loaded: it is smaller, not faster"
            )
        return Plan(
            step="QuantizeWeights",
            settings=settings_of(self),
            edits=tuple(edits),
            skips=(*skips, *idle),
            facts=facts,
            estimate=ctx.dry,
        )

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The quantized program. Raises: DataError, QuantizeError, UsageError."""
        step, planned, *prepared = ctx.memo.pop("QuantizeWeights", (None, None))
        graph = prepared[0] if step == self and planned is model else prepare(model, ctx.task, "QuantizeWeights")[0]
        chosen = planned_weights(graph, plan)
        moments = self.moments(graph, chosen, ctx) if isinstance(self.method, Gptq) else {}
        numbers = grid(bits=self.bits, signed=True, symmetric=self.symmetric)
        for index, stored in enumerate(chosen):
            ctx.progress("quantize", index, len(chosen), stored.modules[0])
            weight = tensor_of(graph, node_of(graph, stored.node))
            emit_weight(graph, stored, weight, self.rounded(weight, moments.get(stored.name), numbers, stored), numbers)
        ctx.progress("quantize", len(chosen), len(chosen), f"{len(chosen)} weights")
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        graph.delete_all_unused_submodules()
        drop_unused_tensors(graph)
        return graph

    def moments(self, graph: fx.GraphModule, chosen: Sequence[Stored], ctx: Context) -> dict[str, Tensor]:
        """Second moments of what each weight is multiplied by: (columns, columns), or one such for each group.

        All are of the float model's own activations. Those of a model quantized as far as the layer, as in the paper,
        take a pass over the data for each layer, and gained nothing on MiniLM-L6.
        """
        batches = ctx.task.batches("calibration", "QuantizeWeights")
        taps: dict[str, Tap] = {}
        sources: dict[str, list[SecondMoments]] = {}
        for stored in chosen:
            for name in stored.layers:
                node = node_of(graph, name)
                if operator(node) != EMBEDDING:
                    tap = taps.setdefault(str(node.args[0]), Tap())
                    sources.setdefault(stored.name, []).append(tap.of(node))
        samples = self.method.samples if isinstance(self.method, Gptq) else None
        calibrate(graph, taps, first_samples(batches, samples), ctx.progress, ordered=True)
        return {name: sum(seen.products for seen in found) for name, found in sources.items()}  # type: ignore[misc]

    def rounded(self, weight: Tensor, moments: Tensor | None, numbers: Grid, stored: Stored) -> Grouped:
        """A weight, as a matrix with a row for each output channel, in integers."""
        matrix = weight.flatten(1)
        size = min(self.group_size or matrix.shape[1], matrix.shape[1])
        if not isinstance(self.method, Gptq) or moments is None:
            return nearest(matrix, numbers, size, symmetric=self.symmetric)
        hessians = moments if moments.ndim == 3 else moments.unsqueeze(0)
        try:
            parts = [
                gptq(
                    rows,
                    hessian,
                    numbers,
                    size,
                    symmetric=self.symmetric,
                    damping=self.method.damping,
                    by_activation=self.method.order == "activation",
                )
                for rows, hessian in zip(matrix.chunk(len(hessians)), hessians, strict=True)
            ]
        except QuantizeError as error:
            raise QuantizeError(f"{stored.modules[0]}: {error}") from None
        return Grouped(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Tap:
    """Second moments of one activation, in the form that each of its users multiplies it in."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[fx.Node, SecondMoments]] = {}

    def of(self, node: fx.Node) -> SecondMoments:
        """What a layer's input is counted in: the same for layers that read it alike."""
        form = "linear"
        if operator(node) != "aten.linear":
            weight: Any = node.args[1]
            form = repr((operator(node), tuple(weight.meta["val"].shape[2:]), node.args[3:]))
        return self.seen.setdefault(form, (node, SecondMoments()))[1]

    def update(self, x: Tensor) -> None:
        """Count an activation in. Raises: DataError for NaN or infinity."""
        for node, moments in self.seen.values():
            moments.update(input_rows(node, x, POSITIONS))


def choose(
    graph: fx.GraphModule, allowed: frozenset[str], include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[list[Stored], list[Skip]]:
    """The weights to quantize, and every other candidate with the reason. Raises: PlanError for an idle pattern."""
    candidates = [node for node in graph.graph.nodes if operator(node) in allowed | CANDIDATES | WEIGHTED]
    check_patterns([name_of(node) for node in candidates], include=include, exclude=exclude)
    skips, wanted = [], {}
    for node in candidates:
        reason = why_not(node, allowed, include, exclude)
        if reason is None:
            wanted[node] = weight_of(node)
        else:
            skips.append(Skip(name_of(node) if operator(node) == EMBEDDING else label(node), reason))
    chosen: dict[str, list[fx.Node]] = {}
    for node, weight in wanted.items():
        if weight is None:
            continue
        users = {user for reader in readers(graph, weight) for user in reader.users}
        kept = [user for user in users if user not in wanted]
        if kept:
            reason = f"its weight is shared with {', '.join(sorted(user.name for user in kept))}, which stays in float"
            skips.append(Skip(name_of(node), reason))
        else:
            chosen.setdefault(str(weight.target), []).append(node)
    return [stored_of(nodes) for nodes in chosen.values()], skips


WEIGHTED = frozenset({"aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d", EMBEDDING})


def stored_of(nodes: list[fx.Node]) -> Stored:
    weight: Any = weight_of(nodes[0])
    name = str(weight.meta.get("stands_for") or weight.target)
    return Stored(name, weight.name, tuple(node.name for node in nodes), tuple(map(name_of, nodes)))


def readers(graph: fx.GraphModule, weight: fx.Node) -> list[fx.Node]:
    """Every node that reads the tensor of one, under whatever name."""
    tensor = tensor_of(graph, weight)
    return [
        node
        for node in graph.graph.nodes
        if node.op == "get_attr" and node.users and tensor_of(graph, node).data_ptr() == tensor.data_ptr()
    ]


def weight_of(node: fx.Node) -> fx.Node | None:
    """The node that a layer's weight comes from."""
    index = 0 if operator(node) == EMBEDDING else 1
    weight = node.args[index] if len(node.args) > index else None
    return weight if isinstance(weight, fx.Node) else None


def name_of(node: fx.Node) -> str:
    """Dotted name of the module that a layer stands for: the holder of its weight, or the one that ran it."""
    if operator(node) != EMBEDDING:
        return layer(node)
    ran, weight = owner(node), weight_of(node)
    holder = str(weight.target).rpartition(".")[0] if weight is not None and weight.op == "get_attr" else ""
    return holder if holder.startswith(f"{ran}." if ran else "") and holder else ran


def why_not(node: fx.Node, allowed: frozenset[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """The reason for leaving a candidate in float, or None."""
    name = name_of(node)
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not in include"
    excluded = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if operator(node) not in allowed:
        return f"{operator(node)} keeps its weights in float here"
    weight = weight_of(node)
    if weight is None or weight.op != "get_attr":
        return "its weight is computed, not stored"
    dtype = weight.meta["val"].dtype
    return None if dtype == torch.float32 else f"its weight is {dtype}; only float32 is quantized"


def planned_weights(graph: fx.GraphModule, plan: Plan) -> list[Stored]:
    """What a plan chose. Raises: QuantizeError where it does not fit the model."""
    nodes = {node.name: node for node in graph.graph.nodes}
    layers: dict[str, list[fx.Node]] = {}
    for edit in plan.edits:
        node = nodes.get(edit.detail["node"])
        weight = weight_of(node) if node is not None else None
        if node is None or weight is None or weight.op != "get_attr":
            raise QuantizeError(f"the plan quantizes {edit.module}, which this model has not: plan again")
        layers.setdefault(str(weight.target), []).append(node)
    return [stored_of(found) for found in layers.values()]


def node_of(graph: fx.GraphModule, name: str) -> fx.Node:
    """The node of a name."""
    found: fx.Node = next(node for node in graph.graph.nodes if node.name == name)
    return found


def emit_weight(graph: fx.GraphModule, stored: Stored, weight: Tensor, grouped: Grouped, numbers: Grid) -> None:
    """Store a weight's integers, and give its layers what they dequantize to."""
    first = node_of(graph, stored.layers[0])
    size = grouped.values.shape[1] // grouped.scale.shape[1]
    columns = weight.flatten(1).shape[1]
    zeros = None
    with graph.graph.inserting_before(first):
        values = store(graph, f"{first.name}_weight", grouped.values)
        scale = store(graph, f"{first.name}_weight_scale", grouped.scale)
        if bool(grouped.zero_point.any()):
            zeros = store(graph, f"{first.name}_weight_zero_point", grouped.zero_point)
        settings = (numbers.low, numbers.high, numbers.dtype, size, torch.float32)
        real = graph.graph.call_function(
            OPERATORS.dequantize_per_channel_group.default, (values, scale, zeros, *settings)
        )
        if grouped.values.shape[1] != columns:
            real = graph.graph.call_function(torch.ops.aten.slice.Tensor, (real, 1, 0, columns))
        if weight.ndim != 2:
            real = graph.graph.call_function(torch.ops.aten.view.default, (real, list(weight.shape)))
    for name in stored.layers:
        node = node_of(graph, name)
        old: Any = weight_of(node)
        node.replace_input_with(old, real)
