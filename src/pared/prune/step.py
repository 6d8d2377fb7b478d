"""The step `PruneChannels`: channels, heads and hidden units leave a network, which becomes smaller everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import fx, nn

from pared.errors import PlanError, SettingError
from pared.graph.capture import capture
from pared.graph.labels import find_channels
from pared.prune.budgets import Choice, candidates
from pared.prune.choosing import Chooser
from pared.prune.edits import Fitted, edits_of
from pared.prune.ratios import Equal, Ratios, Sensitivity, Widths, named_ratios
from pared.prune.saliency import criterion_of, needs_of
from pared.step import Context, Need, Plan, Skip, settings, settings_of
from pared.surgery import apply_edits

# How often groups are given up, since a forward does not run without their channels, before the model is.
ATTEMPTS = 12
BUDGETS = ("ratio", "params", "macs", "latency")


@settings
class PruneChannels:
    """Channels, attention heads and hidden units leave the model, and with them what only they needed.

    Exactly one budget is given; `ratio`, `params`, `macs` and `latency` are all of the dense model.

    Example:
        >>> PruneChannels(macs=0.5, saliency="l1").at(0.5).macs
        0.75
    """

    trains: ClassVar[bool] = False

    ratio: Annotated[float | None, pydantic.Field(gt=0, lt=1, description="Fraction of the channels to remove.")] = None
    params: Annotated[
        float | None, pydantic.Field(gt=0, lt=1, description="Fraction of the parameters that may stay.")
    ] = None
    macs: Annotated[
        float | None, pydantic.Field(gt=0, lt=1, description="Fraction of the multiply-accumulates that may stay.")
    ] = None
    latency: Annotated[
        float | None, pydantic.Field(gt=0, lt=1, description="Fraction of the latency, measured, that may stay.")
    ] = None
    saliency: Annotated[str, pydantic.Field(description="What ranks channels, by name or `module:function`.")] = "l2"
    ratios: Annotated[
        Ratios,
        pydantic.Field(discriminator="kind", description="equal everywhere, by one global ranking, or by sensitivity."),
        pydantic.BeforeValidator(
            named_ratios, json_schema_input_type=Literal["equal", "global", "sensitivity"] | Ratios
        ),
    ] = Equal()
    widths: Annotated[Widths, pydantic.Field(description="Which numbers of channels are allowed.")] = Widths()
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to prune.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers that keep their channels.")
    ] = ()

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise SettingError(f"PruneChannels: give exactly one of {', '.join(BUDGETS)}; {found}")
        criterion_of(self.saliency)

    @property
    def needs(self) -> frozenset[Need]:
        """What the saliency reads; validation data where sensitivity sets the ratios."""
        return needs_of(self.saliency) | (frozenset({"validation"} if isinstance(self.ratios, Sensitivity) else ()))

    def at(self, fraction: float) -> PruneChannels:
        """The step that goes a part of the way: its budget is so much nearer to the dense model's."""
        name = next(name for name in BUDGETS if getattr(self, name) is not None)
        whole = getattr(self, name)
        part = whole * fraction if name == "ratio" else 1 - (1 - whole) * fraction
        return dataclasses.replace(self, **{name: part})

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the channels, and prove that the model without them is what it was but for them.

        Raises:
            PlanError: Nothing can be removed, the budget cannot be met, or the order of steps cannot work.
            PruneError: What the model computes without the channels is not what the masked one does.
            CaptureError: The model cannot be captured.
            UsageError, DataError: The data that the saliency needs are missing or wrong.
        """
        if isinstance(model, fx.GraphModule) or ctx.floating not in (None, model):
            raise PlanError(
                "PruneChannels: the model is quantized already, and its integers have no channels to remove; "
                "move PruneChannels, and the training after it, before the quantization"
            )
        program = capture(model, ctx.task)
        pins: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            ctx.progress("prune", attempt, attempt + 1, "choose channels")
            channels = find_channels(program, model, attention=self.widths.attention, pinned=pins)
            groups, skips = candidates(channels, self.include, self.exclude)
            if not groups:
                raise nothing_to_prune((*channels.skips, *skips))
            chooser = Chooser(self, model, channels, groups, ctx)
            choice, measured = chooser.choice()
            fitted = edits_of(model, channels, choice.keep, ctx.task)
            if not fitted.pins:
                return self.planned(chooser, choice, measured, fitted, (*channels.skips, *skips))
            pins |= fitted.pins
        raise PlanError(
            f"PruneChannels: after {ATTEMPTS} attempts the model still does not run without channels: "
            f"{list(pins.values())[-1]}; exclude the layers that are named"
        )

    def planned(
        self, chooser: Chooser, choice: Choice, measured: dict[str, Any], fitted: Fitted, skips: tuple[Skip, ...]
    ) -> Plan:
        """The plan of a choice that is proved."""
        channels, ctx, keep = chooser.channels, chooser.ctx, choice.keep
        dense = chooser.dense
        params, macs = chooser.params(keep), chooser.work(keep)
        widths = {
            group.name: [choice.sizes[group.name] * group.width, group.size * group.width] for group in channels.groups
        }
        facts: dict[str, Any] = {
            "dense": dataclasses.asdict(dense),
            "widths": widths,
            "params": params / dense.params,
            "macs": macs / dense.macs,
            "difference": fitted.difference.relative if fitted.difference else None,
            "approximate": {name: text for name, text in channels.approximate.items() if lost(widths[name])},
            "warnings": [*choice.notes],
            **measured,
        }
        return Plan(
            step="PruneChannels",
            settings=settings_of(self),
            edits=fitted.edits,
            skips=(*skips, *chooser.scored[1]),
            facts=facts,
            estimate=ctx.dry,
        )

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The model without the channels. Raises: PruneError, ModelError where the plan does not fit the model."""
        return apply_edits(model, plan.edits, {})


def lost(width: Sequence[int]) -> bool:
    """True where fewer channels stay than there were."""
    return width[0] < width[1]


def nothing_to_prune(skips: Sequence[Skip]) -> PlanError:
    """The error where no channel of any layer can leave: never a model that is silently as large as before."""
    few = "; ".join(f"{skip.module}: {skip.reason}" for skip in skips[:3])
    more = f"; and {len(skips) - 3} more" if len(skips) > 3 else ""
    return PlanError(f"PruneChannels: no channel can be removed ({few or 'the model has no layers'}{more})")
