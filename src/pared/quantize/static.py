"""The step `QuantizeStatic`: int8 weights and activations, with ranges chosen on calibration data."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, fx, nn

from pared.errors import ModelError, PlanError
from pared.graph.capture import capture, operator
from pared.quantize.affine import grid
from pared.quantize.calibrate import first_samples
from pared.quantize.choice import choose_ranges
from pared.quantize.emission import emit
from pared.quantize.folding import fold_batch_norms
from pared.quantize.placement import Placement, place
from pared.quantize.ranges import RANGES, AnyRanges, Auto, MinMax
from pared.step import Context, Edit, Need, Plan, Skip, settings, settings_of

Name = Literal["minmax", "moving_average", "percentile", "mse", "kl", "symmetric_kl", "js", "auto"]


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
        AnyRanges,
        pydantic.Field(
            discriminator="kind",
            description=f"How to choose activation ranges: {', '.join(RANGES)}.",
        ),
        pydantic.BeforeValidator(named_ranges, json_schema_input_type=Name | AnyRanges),
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
        """Calibration data; `auto` chooses on validation data."""
        return frozenset({"calibration", "validation"} if isinstance(self.ranges, Auto) else {"calibration"})

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the tensors and their ranges. Raises: PlanError, CaptureError, DataError, QuantizeError."""
        graph, placement, folded = self.prepare(model, ctx)
        facts: dict[str, Any] = {"folded": folded, "tensors": dict(placement.tensors), "ranges": {}}
        if not ctx.dry:
            scheme = ctx.target.scheme
            symmetric = scheme.activation_symmetric
            numbers = grid(bits=8, signed=scheme.activation_dtype == "int8", symmetric=symmetric)
            batches = first_samples(ctx.task.batches("calibration", "QuantizeStatic"), self.samples)
            facts |= choose_ranges(self.ranges, graph, placement, batches, numbers, ctx, symmetric=symmetric)
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
        folded = fold_batch_norms(graph)
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
