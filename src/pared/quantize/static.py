"""The step `QuantizeStatic`: int8 weights and activations, with ranges chosen on calibration data."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import fx, nn

from pared.quantize.calibrate import calibrate, first_samples
from pared.quantize.emission import emit
from pared.quantize.placement import Placement, place
from pared.quantize.program import nothing_to_quantize, prepare
from pared.quantize.ranges import RANGES, MinMax, Percentile
from pared.step import Context, Edit, Need, Plan, settings, settings_of


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
        facts: dict[str, Any] = {"folded": folded, "tensors": dict(placement.tensors), "ranges": {}}
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
        graph, folded, idle = prepare(model, ctx.task, "QuantizeStatic")
        placement = place(graph, ctx.target.scheme, include=self.include, exclude=self.exclude)
        if not placement.anchors:
            raise nothing_to_quantize("QuantizeStatic", placement.skips)
        return graph, dataclasses.replace(placement, skips=(*placement.skips, *idle)), folded
