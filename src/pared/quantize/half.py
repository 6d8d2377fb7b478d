"""The step `CastHalf`: 16-bit floats where ranges allow them, float32 elsewhere; inputs and outputs stay float32."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, fx, nn

from pared.errors import DataError, PlanError, QuantizeError
from pared.graph.capture import operator, owner
from pared.quantize.calibrate import calibrate
from pared.quantize.emission import drop_unused_tensors
from pared.quantize.folding import tensor_of
from pared.quantize.placement import check_patterns, label, layer
from pared.quantize.program import nothing_to_quantize, prepare
from pared.step import MOVES, Context, Edit, Need, Plan, Skip, settings, settings_of

DTYPES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
Casts = dict[tuple[fx.Node, torch.dtype], fx.Node]  # (value, type) -> the node that casts it
HEADROOM = 2.0  # between what calibration data reach and the largest number of the type

# Layers with weights: what the step is for.
WEIGHTED = frozenset({"aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.embedding"})
# Computed one element at a time, or as products with few terms: as exact as the type. Sums over many elements,
# exponentials and what divides by them stay in float32.
ELEMENTWISE = frozenset(
    {
        "aten.add",
        "aten.sub",
        "aten.mul",
        "aten.relu",
        "aten.relu6",
        "aten.hardtanh",
        "aten.hardswish",
        "aten.hardsigmoid",
        "aten.gelu",
        "aten.silu",
        "aten.sigmoid",
        "aten.tanh",
        "aten.cat",
        "aten.max_pool2d",
    }
)
# Only moves values: in the type that it is given.
FOLLOWING = MOVES | {"aten.contiguous", "aten.alias", "aten.dropout"}


class Reach:
    """Largest magnitude seen; infinity counts, as masks hold it.

    Example:
        >>> seen = Reach()
        >>> seen.update(torch.tensor([1.0, -3.0]))
        >>> seen.most
        3.0
    """

    def __init__(self) -> None:
        self.most = 0.0

    def update(self, x: Tensor) -> None:
        """Count a tensor in. Raises: DataError for NaN."""
        most = x.detach().abs().max().item() if x.numel() else 0.0
        if most != most:
            raise DataError("values are not numbers (NaN)")
        self.most = max(self.most, most)


@settings
class CastHalf:
    """Weights, and activations if asked for, in 16-bit floating point; inputs and outputs stay float32.

    Batch norms are folded first. By default weights alone are cast; the runtime turns them into float32 as it loads the
    file. Where activations are cast too, normalizations, softmax, attention, means and other reductions stay in
    float32; so do layers with an input, a weight or an output that exceeds half of the type's largest number on
    calibration data.

    Example:
        >>> CastHalf(exclude=["head"]).dtype
        'float16'
    """

    trains: ClassVar[bool] = False

    dtype: Annotated[
        Literal["float16", "bfloat16"], pydantic.Field(description="float16 is finer, bfloat16 has float32's range.")
    ] = "float16"
    activations: Annotated[
        bool, pydantic.Field(description="Compute in the type too, not only store weights in it.")
    ] = False
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to cast.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to keep in float32.")
    ] = ()

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration data where activations are cast."""
        return frozenset({"calibration"}) if self.activations else frozenset()

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the layers. Raises: PlanError, CaptureError, DataError, QuantizeError, UsageError."""
        self.check(ctx)
        graph, folded, idle = prepare(model, ctx.task, "CastHalf")
        layers = [node for node in graph.graph.nodes if operator(node) in WEIGHTED]
        check_patterns([name_of(node) for node in layers], include=self.include, exclude=self.exclude)
        reach = self.reach(graph, ctx) if self.activations and not ctx.dry else {}
        chosen, edits, skips = [], [], []
        for node in layers:
            reason = self.why_not(graph, node, reach)
            if reason is not None:
                skips.append(Skip(name_of(node), reason))
                continue
            chosen.append(node)
            detail = {"node": node.name, "weight": weight_name(node), "bits": 16, "dtype": self.dtype}
            edits.append(Edit("quantize", name_of(node), detail))
        if not chosen:
            raise nothing_to_quantize("CastHalf", skips)
        kept = [node for node in graph.graph.nodes if operator(node) not in WEIGHTED and has_weight(node)]
        skips += [Skip(label(node), "stays in float32: its sums over many elements would lose digits") for node in kept]
        facts: dict[str, Any] = {
            "folded": folded,
            "wide": [name for name, most in reach.items() if most > self.limit],
            "underflow": self.underflow(graph, chosen),
            "warnings": [f"{ctx.target.name} is no faster in {self.dtype}: the file becomes smaller, that is all"],
        }
        return Plan(
            step="CastHalf",
            settings=settings_of(self),
            edits=tuple(edits),
            skips=(*skips, *idle),
            facts=facts,
            estimate=ctx.dry,
        )

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The program with casts. Raises: QuantizeError where the plan does not fit the model."""
        graph = prepare(model, ctx.task, "CastHalf")[0]
        names = {edit.detail["node"] for edit in plan.edits}
        missing = names - {node.name for node in graph.graph.nodes}
        if missing:
            raise QuantizeError(f"the plan casts {min(missing)}, which this model has not: plan again")
        if self.activations:
            cast(graph, names, frozenset(plan.facts["wide"]), DTYPES[self.dtype])
        else:
            cast_weights(graph, names, DTYPES[self.dtype])
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        graph.delete_all_unused_submodules()
        drop_unused_tensors(graph)
        return graph

    @property
    def limit(self) -> float:
        """Largest magnitude that is put into the type."""
        return torch.finfo(DTYPES[self.dtype]).max / HEADROOM

    def check(self, ctx: Context) -> None:
        """Raise `PlanError` where the target cannot do what the settings ask for."""
        scheme, target = ctx.target.scheme, ctx.target.name
        if self.dtype not in scheme.halves:
            others = f"use dtype={min(scheme.halves)!r}" if scheme.halves else "use the target onnxruntime"
            raise PlanError(f"CastHalf: files of the target {target} become no smaller with {self.dtype}; {others}")
        if self.activations and self.dtype not in scheme.computed_halves:
            raise PlanError(
                f"CastHalf: the target {target} has no operators in {self.dtype}; "
                "leave activations out, and the weights alone are stored in it"
            )

    def reach(self, graph: fx.GraphModule, ctx: Context) -> dict[str, float]:
        """Largest magnitude of every float32 value of the graph, by node."""
        watched = {node.name: Reach() for node in graph.graph.nodes if is_float(node) and node.op != "output"}
        calibrate(graph, watched, ctx.task.batches("calibration", "CastHalf"), ctx.progress)
        return {name: seen.most for name, seen in watched.items()}

    def why_not(self, graph: fx.GraphModule, node: fx.Node, reach: Mapping[str, float]) -> str | None:
        """The reason for keeping a layer in float32, or None."""
        name = name_of(node)
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "not in include"
        excluded = next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)
        if excluded is not None:
            return f"excluded by {excluded!r}"
        weight = weight_of(node)
        if weight is None or weight.op != "get_attr":
            return "its weight is computed, not stored"
        if not is_float(weight):
            return "its weight is not float32"
        for what, value in (("output", node), *(("input", arg) for arg in node.all_input_nodes)):
            most = tensor_of(graph, value).abs().max().item() if value.op == "get_attr" else reach.get(value.name, 0.0)
            if most > self.limit:
                what = "weight" if value.op == "get_attr" else what
                return f"its {what} reaches {most:.3g}; {self.dtype} is used up to {self.limit:.3g}"
        return None

    def underflow(self, graph: fx.GraphModule, chosen: list[fx.Node]) -> dict[str, int]:
        """How many weights become 0, for each weight of which some do."""
        lost = {}
        for node in chosen:
            weight = tensor_of(graph, weight_of(node))
            count = int(((weight != 0) & (weight.to(DTYPES[self.dtype]) == 0)).sum())
            if count:
                lost[weight_name(node)] = count
        return lost


def cast(graph: fx.GraphModule, layers: set[str], wide: frozenset[str], dtype: torch.dtype) -> None:
    """Compute the chosen layers, and what lies between them, in half precision, in place.

    Args:
        graph: A captured program in float32.
        layers: Names of the nodes of the layers to cast.
        wide: Names of nodes with values that the type does not hold.
        dtype: The type.
    """
    types: dict[fx.Node, torch.dtype] = {}
    casts: Casts = {}
    nodes = list(graph.graph.nodes)
    for node in nodes:
        if node.op in {"placeholder", "get_attr"} or operator(node) == "getitem":
            source = node.args[0] if node.op == "call_function" else None
            types[node] = types[source] if isinstance(source, fx.Node) else torch.float32
            continue
        types[node] = dtype if runs_in_half(node, types, layers, wide) else torch.float32
        for arg in node.all_input_nodes:
            if is_float(arg) and types[arg] != types[node]:
                node.replace_input_with(arg, converted(graph, arg, types[node], casts))
    shrink(graph, casts, dtype)


def cast_weights(graph: fx.GraphModule, layers: set[str], dtype: torch.dtype) -> None:
    """Store the weights of the chosen layers in half precision, and compute in float32, in place."""
    casts: Casts = {}
    for node in list(graph.graph.nodes):
        weight = weight_of(node) if node.name in layers else None
        if weight is not None:
            half = converted(graph, weight, dtype, casts)
            node.replace_input_with(weight, converted(graph, half, torch.float32, casts))
    shrink(graph, casts, dtype)


def runs_in_half(node: fx.Node, types: Mapping[fx.Node, torch.dtype], layers: set[str], wide: frozenset[str]) -> bool:
    """True where a node's result is computed in half precision."""
    if node.op != "call_function":
        return False
    floats = [arg for arg in node.all_input_nodes if is_float(arg)]
    if operator(node) in FOLLOWING:
        return bool(floats) and types[floats[0]] != torch.float32
    if operator(node) in WEIGHTED:
        return node.name in layers
    # Between layers: where nothing comes from half precision, a cast would only cost.
    fits = node.name not in wide and not any(arg.name in wide for arg in floats)
    from_half = any(types[arg] != torch.float32 for arg in floats)
    return operator(node) in ELEMENTWISE and is_float(node) and fits and from_half


def converted(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype, casts: Casts) -> fx.Node:
    """A value in another type: one cast for all who want it."""
    if (node, dtype) not in casts:
        with graph.graph.inserting_after(node):
            new = graph.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        new.meta = {"val": node.meta["val"].to(dtype)}
        casts[node, dtype] = new
    return casts[node, dtype]


def shrink(graph: fx.GraphModule, casts: Casts, dtype: torch.dtype) -> None:
    """Store in half precision the tensors that nobody reads otherwise, and drop their casts."""
    stored: dict[int, nn.Parameter] = {}
    read: dict[int, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and is_float(node):
            read.setdefault(id(raw(graph, node)), []).append(node)
    wanted = {node: new for (node, to), new in casts.items() if node.op == "get_attr" and to == dtype}
    for key, nodes in read.items():
        if not all(set(node.users) <= {wanted.get(node)} for node in nodes if node.users):
            continue
        for node in nodes:
            if node in wanted:
                tensor = tensor_of(graph, node).to(dtype)
                half = stored.setdefault(key, nn.Parameter(tensor, requires_grad=False))
                place(graph, str(node.target), half)
                wanted[node].replace_all_uses_with(node)
                node.meta["val"] = wanted[node].meta["val"]


def raw(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The very object that a node reads: the same for all names of a shared tensor."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def place(graph: fx.GraphModule, name: str, value: nn.Parameter) -> None:
    """Put a tensor where another was, parameter or buffer."""
    holder_name, _, key = name.rpartition(".")
    holder = graph.get_submodule(holder_name)
    if key in holder._parameters:
        holder._parameters[key] = value
    else:
        holder._buffers[key] = value.data


def is_float(node: fx.Node) -> bool:
    """True for a value that is one float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def weight_of(node: fx.Node) -> fx.Node | None:
    """The node that a layer's weight comes from."""
    weight = node.args[0 if operator(node) == "aten.embedding" else 1]
    return weight if isinstance(weight, fx.Node) else None


def weight_name(node: fx.Node) -> str:
    """Name of a layer's weight in the model."""
    weight = weight_of(node)
    return "" if weight is None else str(weight.meta.get("stands_for") or weight.target)


def name_of(node: fx.Node) -> str:
    """Dotted name of the module that a layer stands for."""
    return owner(node) if operator(node) == "aten.embedding" else layer(node)


def has_weight(node: fx.Node) -> bool:
    """True for an operator that reads a stored float tensor and that is no layer of ours: a normalization, say."""
    named = operator(node).endswith("norm") or operator(node) in {"aten.lstm", "aten.gru", "aten.conv_transpose2d"}
    return named and any(arg.op == "get_attr" for arg in node.all_input_nodes)
