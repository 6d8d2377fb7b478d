"""The step `QuantizeStatic`: integer weights and activations, with ranges chosen on calibration data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import fx, nn

from pared.errors import SettingError
from pared.measure.processor import saturates_here
from pared.quantize.choose import Choice, Formats, numbers_of, transform
from pared.quantize.emission import emit
from pared.quantize.formats import Activations, Weights, kept_safe
from pared.quantize.norms import write_norms_as_convolutions
from pared.quantize.placement import REFUSED, Placement, place
from pared.quantize.program import nothing_to_quantize, prepare
from pared.quantize.ranges import RANGES, AnyRanges, Auto, MinMax
from pared.quantize.repair import DEFAULT, FoldBatchNorms, Repair
from pared.quantize.search import Sensitivity, keep_fragile, measure
from pared.quantize.smooth import Migrate, make_room
from pared.quantize.verdict import warnings_of, work_of
from pared.step import Context, Edit, Need, Plan, Skip, settings, settings_of

Name = Literal["minmax", "moving_average", "percentile", "mse", "kl", "symmetric_kl", "js", "auto"]


def named_ranges(value: Any) -> Any:
    """Let a bare name stand for a calibrator with its default settings."""
    return RANGES[value]() if isinstance(value, str) and value in RANGES else value


@settings
class QuantizeStatic:
    """Post-training quantization of weights and activations, with fixed activation ranges.

    Batch norms are folded first. Weights get one scale for each output channel; activations one scale and zero point
    for each tensor, from the range seen on calibration data; biases take back what rounding shifts.

    Example:
        >>> QuantizeStatic(ranges="percentile", exclude=["head"], repairs=["fold_batch_norms"]).ranges.kind
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
    weights: Annotated[
        Weights, pydantic.Field(description="How weights become integers: width, granularity, rounding.")
    ] = Weights()
    activations: Annotated[Activations, pydantic.Field(description="How activations become integers.")] = Activations()
    repairs: Annotated[
        tuple[Repair, ...],
        pydantic.Field(
            description="What to do against the loss, each once: fold_batch_norms, equalize, migrate, correct_bias."
        ),
    ] = DEFAULT
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to quantize.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to keep in float.")
    ] = ()
    samples: Annotated[
        int | None, pydantic.Field(ge=1, description="Use at most this many calibration samples; null uses all.")
    ] = 512
    max_drop: Annotated[
        float | None,
        pydantic.Field(
            ge=0, description="Keep the most fragile layers in float until the first metric drops by no more than this."
        ),
    ] = None
    sensitivity: Annotated[
        Sensitivity | None,
        pydantic.Field(description="Measure what each layer costs alone; with max_drop it is measured anyway."),
    ] = None

    def __post_init__(self) -> None:
        kinds = [repair.kind for repair in self.repairs]
        if len(set(kinds)) < len(kinds):
            raise SettingError(f"QuantizeStatic.repairs: each kind at most once, found {', '.join(kinds)}")

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration data; validation data where they decide."""
        decides = self.max_drop is not None or self.sensitivity is not None or isinstance(self.ranges, Auto)
        return frozenset({"calibration", "validation"}) if decides else frozenset({"calibration"})

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the tensors and their ranges. Raises: PlanError, CaptureError, DataError, QuantizeError."""
        self.activations.grid(ctx.target.scheme)  # refuses what the target cannot run, before the work
        graph, placement, folded, idle = self.prepare(model, ctx)
        facts: dict[str, Any] = {"folded": folded, "ranges": {}, "any_cpu": self.must_suit_any_cpu(ctx), "kept": []}
        facts["refused"] = list(ctx.refused)
        if not ctx.dry:
            Choice(
                graph=graph,
                placement=placement,
                ranges=self.ranges,
                formats=self.formats(ctx, facts),
                repairs=self.repairs,
                samples=self.samples,
                ctx=ctx,
                facts=facts,
            ).all()
            placement = self.guard(graph, placement, ctx, facts)
            ctx.memo["QuantizeStatic"] = (self, model, graph, placement)
        bits = self.weights.bits
        work = work_of(graph, placement, ctx.target.scheme)
        facts["warnings"] = [*warnings_of(work), *facts.get("warnings", ())]
        facts |= {"macs": work.macs, "integer_macs": work.integer_macs, "conversions": work.conversions}
        return Plan(
            step="QuantizeStatic",
            settings=settings_of(self),
            edits=tuple(
                Edit("quantize", anchor.module, {"node": anchor.node, "weight": anchor.weight, "bits": bits})
                for anchor in placement.anchors
            ),
            skips=(*placement.skips, *idle),
            facts=facts | {"tensors": dict(placement.tensors)},
            estimate=ctx.dry,
        )

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The quantized program. Raises: QuantizeError where the plan does not fit the model."""
        owner, planned, *prepared = ctx.memo.pop("QuantizeStatic", (None, None))
        graph: fx.GraphModule
        if owner == self and planned is model:
            graph, placement = prepared
        else:
            ctx = dataclasses.replace(ctx, refused=tuple(plan.facts["refused"]))
            graph, placement, _, _ = self.prepare(model, ctx)
            transform(graph, placement, plan.facts)
            placement = self.without(graph, ctx, plan.facts["kept"])
        numbers = numbers_of(graph, placement, plan.facts, self.formats(ctx, plan.facts))
        grids = dict.fromkeys(numbers.qparams, numbers.grid)
        emit(graph, placement, numbers.qparams, grids, numbers.codes, ctx.target.scheme)
        return graph

    def formats(self, ctx: Context, facts: Mapping[str, Any]) -> Formats:
        """How numbers become integers in a plan with these facts."""
        return Formats(self.weights, self.activations, ctx.target.scheme, facts["any_cpu"])

    def must_suit_any_cpu(self, ctx: Context) -> bool:
        """Whether weights must be kept from saturating: a plan's fact, so that it is replayed the same elsewhere."""
        return kept_safe(self.weights.cpu, ctx.target.scheme, here=saturates_here())

    def prepare(self, model: nn.Module, ctx: Context) -> tuple[fx.GraphModule, Placement, list[str], list[Skip]]:
        """The captured graph, what becomes integers in it, the norms folded, and the layers that do not run."""
        fold = any(isinstance(repair, FoldBatchNorms) for repair in self.repairs)
        graph, folded, idle = prepare(model, ctx.task, "QuantizeStatic", fold=fold)
        if fold:
            write_norms_as_convolutions(graph, ctx.target.scheme, include=self.include, exclude=self.exclude)
        placement = self.without(graph, ctx, [])
        if any(isinstance(repair, Migrate) for repair in self.repairs):
            make_room(graph, placement.anchors)
            placement = self.without(graph, ctx, [])
        if not placement.anchors:
            raise nothing_to_quantize("QuantizeStatic", placement.skips)
        return graph, placement, folded, idle

    def without(self, graph: fx.GraphModule, ctx: Context, kept: Sequence[str]) -> Placement:
        """What becomes integers where some modules, and those that the runtime refused, are kept in float."""
        exclude = (*self.exclude, *ctx.refused, *kept)
        placement = place(graph, ctx.target.scheme, include=self.include, exclude=exclude)
        skips = tuple(explained(skip, kept, ctx.refused) for skip in placement.skips)
        return dataclasses.replace(placement, skips=skips)

    def guard(self, graph: fx.GraphModule, placement: Placement, ctx: Context, facts: dict[str, Any]) -> Placement:
        """Measure what each layer costs alone, and keep the most fragile in float, where the settings ask for it."""
        if self.max_drop is None and self.sensitivity is None:
            return placement
        setting = self.sensitivity or Sensitivity()
        deadline = time.monotonic() + setting.seconds
        numbers = numbers_of(graph, placement, facts, self.formats(ctx, facts))
        fragile, samples = measure(graph, numbers, ctx, setting, deadline)
        facts["sensitivity"] = {"samples": samples, "layers": [dataclasses.asdict(row) for row in fragile]}
        if self.max_drop is not None:
            facts["kept"], facts["search"] = keep_fragile(
                graph,
                ctx,
                fragile,
                lambda kept: numbers_of(graph, self.without(graph, ctx, kept), facts, self.formats(ctx, facts)),
                max_drop=self.max_drop,
                deadline=deadline,
            )
        return self.without(graph, ctx, facts["kept"])


def explained(skip: Skip, kept: Sequence[str], refused: Sequence[str]) -> Skip:
    """A skip with its real reason where a search or the runtime, not a pattern of the user's, left the layer out."""
    if skip.module in refused:
        return Skip(skip.module, REFUSED)
    if skip.module in kept and skip.reason.startswith("excluded by"):
        return Skip(skip.module, "among the most fragile layers: kept in float to hold the metric")
    return skip
