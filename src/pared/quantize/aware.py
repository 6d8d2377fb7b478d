"""`QuantizeAware`: quantization-aware training, a technique for `Train(during=[...])`.

The four steps of the literature: ranges to start with, from calibration; fake quantization wherever the target's
placement will put integers; training through the straight-through estimator; conversion, by the code that emits
post-training quantization too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import fx, nn

from pared.errors import PlanError, SettingError
from pared.measure.processor import saturates_here
from pared.quantize.affine import Grid, QParams, grid
from pared.quantize.aware_graph import Aware, Form, aware_graph, check_norms, out_of_place
from pared.quantize.aware_layers import Freezable
from pared.quantize.choose import Choice, Formats
from pared.quantize.coding import Code, integers_of, room_for_bias, shared_ranges, sharing_groups, tensors_of
from pared.quantize.emission import emit
from pared.quantize.folding import tensor_of
from pared.quantize.formats import Activations, Cpu, Weights, kept_safe
from pared.quantize.placement import Placement, behind, check_patterns, place
from pared.quantize.program import nothing_to_quantize, prepare
from pared.quantize.ranges import MSE, RANGES, AnyRanges
from pared.quantize.static import Name, explained, named_ranges
from pared.quantize.verdict import warnings_of, work_of
from pared.step import Context, Edit, Need, Plan, Skip, settings, settings_of
from pared.targets import find_target
from pared.task import Task
from pared.train.callbacks import Callback

STEP = "QuantizeAware"
SAMPLES = 512  # that ranges are first chosen on; training goes on from there
SAFE_BITS = 7  # two products of 8-bit activations and 7-bit weights fit 16 bits
Bits = Annotated[int, pydantic.Field(ge=2, le=8)]


@settings
class QuantizeAware:
    """Quantization-aware training: train on what integers will make of the network, then convert it to them.

    Stands in `Train(during=[...])`, which then returns the quantized program. Batch norms train as such until they are
    frozen, their weights quantized as folded. A start from a post-training quantized model is a recipe with
    `QuantizeStatic` before this `Train`: its ranges are taken over.

    Example:
        >>> QuantizeAware(weight_bits=4, layer_bits={"head": 8}).weight_bits
        4
    """

    changes: ClassVar[bool] = True

    weight_bits: Annotated[Bits, pydantic.Field(description="Width of weights; they are stored as int8.")] = 8
    activation_bits: Annotated[Bits, pydantic.Field(description="Width of activations; they are stored in 8.")] = 8
    layer_bits: Annotated[
        dict[str, Bits],
        pydantic.Field(
            description="Width of the weight and the input of the layers that a glob pattern names, in place of the "
            "two above; the first pattern that matches counts. An input of several layers has the largest of theirs."
        ),
    ] = dataclasses.field(default_factory=dict)
    scales: Annotated[
        Literal["learned", "follow"],
        pydantic.Field(
            description="learned: scales are trained with the weights (LSQ); follow: they cover the largest weights "
            "of each channel, and a moving average of the activations' ends."
        ),
    ] = "learned"
    ranges: Annotated[
        AnyRanges,
        pydantic.Field(discriminator="kind", description=f"The activation ranges to start with: {', '.join(RANGES)}."),
        pydantic.BeforeValidator(named_ranges, json_schema_input_type=Name | AnyRanges),
    ] = MSE()
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to quantize.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to keep in float.")
    ] = ()
    freeze_after: Annotated[
        float,
        pydantic.Field(
            ge=0,
            le=1,
            description="Share of the epochs after which batch-norm statistics, and ranges that follow, stay as they "
            "are. Frozen early, the network trains without its norms, and needs a lower learning rate.",
        ),
    ] = 0.75
    cpu: Cpu = "here"

    def __post_init__(self) -> None:
        if self.ranges.kind == "auto":
            raise SettingError("QuantizeAware.ranges: auto measures fixed ranges; use one of its calibrators by name")

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration data."""
        return frozenset({"calibration"})

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose tensors and first ranges. Raises: PlanError, CaptureError, DataError, QuantizeError."""
        for bits in (self.activation_bits, *self.layer_bits.values()):
            Activations(bits=bits).grid(ctx.target.scheme)  # refuses what the target cannot run, before the work
        base = prepared(self, model, ctx)
        facts: dict[str, Any] = {"folded": base.folded, "ranges": {}, "refused": list(ctx.refused)}
        facts["any_cpu"] = kept_safe(self.cpu, ctx.target.scheme, here=saturates_here())
        known = ranges_of_history(ctx)
        roots = set(base.placement.tensors.values())
        facts["start"] = "post-training" if roots <= known.keys() else "calibration"
        if roots <= known.keys():
            facts["ranges"] = {name: known[name] for name in sorted(roots)}
        elif not ctx.dry:
            Choice(
                graph=base.graph,
                placement=base.placement,
                ranges=self.ranges,
                formats=Formats(self.weights(), self.activations(), ctx.target.scheme, facts["any_cpu"]),
                repairs=(),
                samples=SAMPLES,
                ctx=ctx,
                facts=facts,
                step=STEP,
            ).calibrate()
        work = work_of(base.graph, base.placement, ctx.target.scheme)
        facts["warnings"] = [*warnings_of(work), *facts.get("warnings", ())]
        weights = self.weight_grids(base, any_cpu=facts["any_cpu"])
        return Plan(
            step=STEP,
            settings=settings_of(self),
            edits=tuple(
                Edit(
                    "quantize",
                    anchor.module,
                    {"node": anchor.node, "weight": anchor.weight, "bits": bits_of(weights[anchor.node])},
                )
                for anchor in base.placement.anchors
            ),
            skips=(*base.placement.skips, *base.idle),
            facts=facts | {"tensors": dict(base.placement.tensors)},
            estimate=ctx.dry,
        )

    def callback(self, plan: Plan, ctx: Context) -> Callback:
        """What one training runs."""
        return AwareTraining(self, plan, ctx)

    def weights(self) -> Weights:
        """The format of most weights."""
        return Weights(bits=self.weight_bits, cpu=self.cpu)

    def activations(self) -> Activations:
        """The format of most activations."""
        return Activations(bits=self.activation_bits)

    def bits_named(self, module: str) -> int | None:
        """The width that a layer's name asks for."""
        return next((bits for pattern, bits in self.layer_bits.items() if fnmatchcase(module, pattern)), None)

    def weight_grids(self, base: Prepared, *, any_cpu: bool) -> dict[str, Grid]:
        """The integers of every anchor's weight; narrower where products of 8 bits could saturate."""
        grids = {}
        for anchor in base.placement.anchors:
            bits = self.bits_named(anchor.module) or self.weight_bits
            bits = min(bits, SAFE_BITS) if any_cpu else bits
            grids[anchor.node] = grid(bits=bits, signed=True, symmetric=True)
        return grids

    def form(self, base: Prepared, facts: Mapping[str, Any], ctx: Context) -> Form:
        """How the placed graph trains. Raises: QuantizeError where the plan does not fit it."""
        scheme, placement = ctx.target.scheme, base.placement
        nodes = {node.name: node for node in base.graph.graph.nodes}
        groups = {root: group[0] for root, group in sharing_groups(nodes, placement, scheme).items()}
        ranges = {name: (float(low), float(high)) for name, (low, high) in facts["ranges"].items()}
        missing = sorted(groups.keys() - ranges.keys())
        if missing:
            raise PlanError(f"QuantizeAware: the plan has no range for {missing[0]}; plan again")
        widened = shared_ranges(nodes, placement, ranges, scheme)
        wanted: dict[str, int] = {}
        for anchor in placement.anchors:
            root = groups[placement.tensors[behind(nodes[anchor.node].args[0]).name]]
            bits = self.bits_named(anchor.module)
            if bits is not None:
                wanted[root] = max(bits, wanted.get(root, 0))
        form = self.activations()
        return Form(
            placement=placement,
            groups=groups,
            ranges={root: widened[root] for root in groups.values()},
            activations={root: Activations(bits=wanted.get(root, form.bits)).grid(scheme) for root in groups.values()},
            weights=self.weight_grids(base, any_cpu=facts["any_cpu"]),
            folded={anchor.node: tensor_of(base.graph, nodes[anchor.node].args[1]) for anchor in placement.anchors},
            takes_in={
                anchor.node: nodes[anchor.node].meta["takes_in"]
                for anchor in placement.anchors
                if "takes_in" in nodes[anchor.node].meta
            },
            learned=self.scales == "learned",
            symmetric=form.is_symmetric(scheme),
        )


@dataclasses.dataclass
class Prepared:
    """A captured graph with norms folded, what becomes integers in it, and what is to be said about the rest."""

    graph: fx.GraphModule
    placement: Placement
    folded: list[str]
    idle: list[Skip]


def prepared(aware: QuantizeAware, model: nn.Module, ctx: Context) -> Prepared:
    """The graph that is exported in the end, with the weights that a model has now. Raises: PlanError, CaptureError."""
    check_norms(model)
    with out_of_place(model):
        graph, folded, idle = prepare(model, ctx.task, STEP)
    exclude = (*aware.exclude, *ctx.refused)
    placement = place(graph, ctx.target.scheme, include=aware.include, exclude=exclude)
    if not placement.anchors:
        raise nothing_to_quantize(STEP, placement.skips)
    check_patterns([anchor.module for anchor in placement.anchors], layer_bits=aware.layer_bits)
    skips = tuple(explained(skip, (), ctx.refused) for skip in placement.skips)
    return Prepared(graph, dataclasses.replace(placement, skips=skips), folded, idle)


def ranges_of_history(ctx: Context) -> Mapping[str, Any]:
    """Ranges of the post-training quantization that this training starts from; none where it changed the weights."""
    for plan in reversed(ctx.history):
        if plan.step == "QuantizeStatic" and not (plan.facts.get("equalized") or plan.facts.get("migrated")):
            found: Mapping[str, Any] = plan.facts["ranges"]
            return found
    return {}


def bits_of(numbers: Grid) -> int:
    """The width of a signed symmetric grid."""
    return (numbers.high + 1).bit_length()


class AwareTraining(Callback):
    """Trains the fake quantized graph of the model, and returns the program with the integers that came of it."""

    def __init__(self, aware: QuantizeAware, plan: Plan, ctx: Context) -> None:
        self.aware, self.plan = aware, plan
        # Of the task only what capture asks for, so that this callback can be sent to other processes.
        task = Task(example_inputs=ctx.task.example_inputs, dynamic=ctx.task.dynamic, output=ctx.task.output)
        self.ctx = Context(
            task=task, target=ctx.target, work=ctx.work, dense=nn.Identity(), refused=tuple(plan.facts["refused"])
        )
        self.memo = ctx.memo

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memo": {}}

    def on_start(self, model: nn.Module) -> fx.GraphModule:
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.model = model.to("cpu")
        base = prepared(self.aware, model, self.ctx)
        self.parts: Aware = aware_graph(model, self.ctx.task, self.aware.form(base, self.plan.facts, self.ctx))
        graph = self.parts.graph
        # Parameters are moved in place, buffers are not: which of them are one and the same is noted before.
        names = {id(buffer): name for name, buffer in graph.named_buffers()}
        buffers = model.named_buffers(remove_duplicate=False)
        self.shared = {name: names[id(buffer)] for name, buffer in buffers if id(buffer) in names}
        return graph.to(device)

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        freeze(model, frozen=epoch >= self.aware.freeze_after * epochs)

    def on_end(self, model: nn.Module) -> nn.Module:
        graph = self.parts.graph.to("cpu")
        with torch.no_grad():
            for name, held in self.shared.items():
                self.model.get_buffer(name).copy_(graph.get_buffer(held))
        self.model.to("cpu")
        self.memo["floating"] = self.model
        return self.program()

    @torch.no_grad()
    def program(self) -> nn.Module:
        """The trained model as a quantized program."""
        base = prepared(self.aware, self.model, self.ctx)
        scheme = self.ctx.target.scheme
        form = self.aware.form(base, self.plan.facts, self.ctx)
        roots = {root: part.qparams() for root, part in self.parts.activations.items()}
        detached = {root: QParams(found.scale.detach(), found.zero_point) for root, found in roots.items()}
        qparams = {name: detached[root] for name, root in base.placement.tensors.items()}
        grids = {name: form.activations[form.groups[root]] for name, root in base.placement.tensors.items()}
        nodes = {node.name: node for node in base.graph.graph.nodes}
        codes = {}
        for anchor in base.placement.anchors:
            node, layer = nodes[anchor.node], self.parts.layers[anchor.node]
            weight, bias = tensors_of(base.graph, node, anchor)
            input_scale = qparams[behind(node.args[0]).name].scale
            scale = room_for_bias(layer.scale(weight).detach().flatten(), bias, input_scale, scheme)
            zeros = torch.zeros_like(scale, dtype=torch.int32)
            values = integers_of(weight, QParams(scale, zeros), layer.call.axis, layer.numbers)
            key = (str(node.args[1]), scale.numpy().tobytes())
            codes[anchor.node] = Code(values, scale, zeros, layer.call.axis, bias, key)
        emit(base.graph, base.placement, qparams, grids, codes, scheme)
        return base.graph


def begin(
    model: nn.Module,
    task: Task,
    aware: QuantizeAware = QuantizeAware(),  # noqa: B008 - frozen
    target: str = "onnxruntime",
) -> tuple[fx.GraphModule, Callable[[], nn.Module]]:
    """Quantization-aware training in a loop of your own.

    Args:
        model: Trained, or not yet. It is not changed.
        task: Gives the example inputs and `calibration` data.
        aware: The settings; when norms are frozen is up to the loop, by `freeze`.
        target: The runtime that it will ship on.

    Returns:
        The graph to train, called as the model is, with modes and parameters as any module; and what, called at the
        end, gives the quantized program.

    Raises:
        PlanError: Nothing would be quantized.
        CaptureError: The model cannot be captured.
        DataError: Calibration data are missing or unusable.
    """
    ctx = Context(task=task, target=find_target(target), work=Path(), dense=model)
    training = AwareTraining(aware, aware.plan(model, ctx), ctx)
    graph = training.on_start(copy.deepcopy(model))
    return graph, lambda: training.on_end(graph)


def freeze(graph: nn.Module, *, frozen: bool = True) -> None:
    """Keep batch-norm statistics, and ranges that follow the data, of a graph that trains as they are."""
    for module in graph.modules():
        if isinstance(module, Freezable):
            module.frozen = frozen
