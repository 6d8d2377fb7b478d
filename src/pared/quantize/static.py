"""The step `QuantizeStatic`: int8 weights and activations, with ranges chosen on calibration data."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, fx, nn

from pared.errors import ModelError, PlanError
from pared.graph.capture import capture, operator
from pared.quantize.calibrate import calibrate, first_samples
from pared.quantize.constants import fold_constants
from pared.quantize.emission import emit
from pared.quantize.folding import fold_batch_norms
from pared.quantize.norms import write_norms_as_convolutions
from pared.quantize.placement import Placement, layer, place
from pared.quantize.ranges import RANGES, MinMax, Percentile
from pared.quantize.verdict import warnings_of, work_of
from pared.step import Context, Edit, Need, Plan, Skip, settings, settings_of


def named_ranges(value: Any) -> Any:
    """Let a bare name stand for a calibrator with its default settings."""
    return RANGES[value]() if isinstance(value, str) and value in RANGES else value


@settings
class QuantizeStatic:
    """Post-training quantization of weights and activations to 8 bits, with fixed activation ranges.

    Batch norms are folded first. Weights get one scale for each output channel; activations one scale and zero point
    for each tensor, from the range seen on calibration data.

    Example:
        >>> QuantizeStatic(ranges="percentile", exclude=["head"]).ranges.kind
        'percentile'
    """

    trains: ClassVar[bool] = False

    ranges: Annotated[
        MinMax | Percentile,
        pydantic.Field(discriminator="kind", description="How to choose activation ranges: minmax or percentile."),
        pydantic.BeforeValidator(
            named_ranges, json_schema_input_type=Literal["minmax", "percentile"] | MinMax | Percentile
        ),
    ] = MinMax()
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to quantize.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to keep in float.")
    ] = ()
    samples: Annotated[
        int | None, pydantic.Field(ge=1, description="Use at most this many calibration samples; null uses all.")
    ] = 512

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration data."""
        return frozenset({"calibration"})

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the tensors and their ranges. Raises: PlanError, CaptureError, DataError, QuantizeError."""
        graph, placement, folded = self.prepare(model, ctx)
        work = work_of(graph, placement, ctx.target.scheme)
        facts: dict[str, Any] = {"folded": folded, "tensors": dict(placement.tensors), "ranges": {}}
        facts |= {"macs": work.macs, "integer_macs": work.integer_macs, "warnings": warnings_of(work)}
        if not ctx.dry:
            roots = dict.fromkeys(placement.tensors.values())
            observers: dict[str, Any] = {name: self.ranges.observer() for name in roots}
            facts["samples"] = calibrate(
                graph,
                observers,
                first_samples(ctx.task.batches("calibration", "QuantizeStatic"), self.samples),
                ctx.progress,
            )
            facts["ranges"] = {name: list(self.ranges.range(seen)) for name, seen in observers.items()}
            ctx.memo["QuantizeStatic"] = (self, model, graph, placement)
        return Plan(
            step="QuantizeStatic",
            settings=settings_of(self),
            edits=tuple(
                Edit("quantize", anchor.module, {"node": anchor.node, "weight": anchor.weight, "bits": 8})
                for anchor in placement.anchors
            ),
            skips=placement.skips,
            facts=facts,
            estimate=ctx.dry,
        )

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The quantized program. Raises: QuantizeError where the plan does not fit the model."""
        owner, planned, *prepared = ctx.memo.pop("QuantizeStatic", (None, None))
        graph, placement = prepared if owner == self and planned is model else self.prepare(model, ctx)[:2]
        ranges = {name: (float(low), float(high)) for name, (low, high) in plan.facts["ranges"].items()}
        emit(graph, placement, ranges, ctx.target.scheme)
        return graph

    def prepare(self, model: nn.Module, ctx: Context) -> tuple[fx.GraphModule, Placement, list[str]]:
        """The captured graph with batch norms folded, what becomes integers in it, and the names of those norms."""
        if is_quantized(model):
            raise PlanError(
                "QuantizeStatic: the model is quantized already; keep one quantize step, as the last of the recipe"
            )
        graph = capture(model, ctx.task).module(check_guards=False)
        if not isinstance(graph, fx.GraphModule):
            raise PlanError(f"QuantizeStatic: the captured program is a {type(graph).__name__}, not a graph")
        idle = [Skip(name, "the model does not run it on the example inputs") for name in idle_layers(model, graph)]
        check_finite(graph)
        own_tensors(graph)
        fixed = fold_constants(graph, ctx.target.scheme.weighted)
        idle += [Skip(layer(node), "its result does not depend on the input, so it is stored") for node in fixed]
        folded = fold_batch_norms(graph)
        write_norms_as_convolutions(graph, ctx.target.scheme, include=self.include, exclude=self.exclude)
        placement = place(graph, ctx.target.scheme, include=self.include, exclude=self.exclude)
        if not placement.anchors:
            reasons = "; ".join(f"{skip.module}: {skip.reason}" for skip in placement.skips[:3])
            raise PlanError(
                "QuantizeStatic would quantize no layer"
                + (f" ({reasons})" if reasons else ": the model has none that could")
            )
        return graph, dataclasses.replace(placement, skips=(*placement.skips, *idle)), folded


def idle_layers(model: nn.Module, graph: fx.GraphModule) -> list[str]:
    """Modules with a weight of two dimensions or more that no operator of the captured graph reads."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr" and node.users}
    used = {id(tensor) for name, tensor in graph.named_parameters(remove_duplicate=False) if name in read}
    weights = {
        name: [tensor for tensor in module.parameters(recurse=False) if tensor.ndim > 1]
        for name, module in model.named_modules()
    }
    return [name for name, own in weights.items() if own and not any(id(tensor) in used for tensor in own)]


def is_quantized(model: nn.Module) -> bool:
    """True for a program that holds quantize operators already."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    return any(operator(node).startswith("quantized_decomposed.") for node in nodes)


def check_finite(graph: fx.GraphModule) -> None:
    """Raise `ModelError` for a parameter with NaN or infinity: no range could hold what comes of it."""
    for name, tensor in graph.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the parameter {name} holds NaN or infinity; load or train the weights again")


def own_tensors(graph: fx.GraphModule) -> None:
    """Give a captured graph copies of its tensors, which are the model's own until here; shared ones stay shared."""
    copies: dict[int, Tensor] = {}
    for module in graph.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                copied = copies.setdefault(id(tensor), nn.Parameter(tensor.detach().clone(), requires_grad=False))
                module._parameters[name] = copied  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        for name, constant in vars(module).items():
            if isinstance(constant, Tensor):
                vars(module)[name] = copies.setdefault(id(constant), constant.detach().clone())
