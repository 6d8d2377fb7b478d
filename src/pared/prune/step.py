"""The step `PruneChannels`: channels, heads and hidden units leave a network, which becomes smaller everywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, fx, nn

from pared.errors import PlanError, PruneError, SettingError
from pared.graph.capture import capture
from pared.graph.channels import Channels, Group
from pared.graph.labels import find_channels
from pared.graph.units import UNREAD
from pared.prune.budgets import Choice, candidates, shown
from pared.prune.choosing import ROUND_TO, Chooser
from pared.prune.constants import Constants, constants_of, fold
from pared.prune.edits import edits_of, hides
from pared.prune.exact import Difference, difference
from pared.prune.ratios import Equal, Ratios, Sensitivity, Widths, named_ratios
from pared.prune.saliency import criterion_of, needs_of
from pared.step import Context, Edit, Need, Plan, Skip, settings, settings_of
from pared.surgery import apply_edits, duplicate
from pared.task import Task

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
    widths: Annotated[Widths, pydantic.Field(description="Multiples, least and most, heads.")] = Widths()
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the layers to prune.")] = ("*",)
    exclude: Annotated[
        tuple[str, ...], pydantic.Field(description="Glob patterns of the layers that keep their channels.")
    ] = ()

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise SettingError(f"give exactly one budget, {', '.join(BUDGETS[:-1])} or {BUDGETS[-1]}; {found}")
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

    def without_measuring(self) -> tuple[PruneChannels, list[str]]:
        """The step as it can be planned at once, without data or clock, and what it then only estimates."""
        changes: dict[str, Any] = {}
        guesses = []
        if needs_of(self.saliency):
            changes["saliency"] = "l2"
            guesses.append(f"an estimate: channels are ranked by l2, since {self.saliency} reads data")
        if isinstance(self.ratios, Sensitivity):
            changes["ratios"] = Equal()
            guesses.append("an estimate: every group loses the same fraction, since sensitivity is measured on data")
        if self.latency is not None:
            changes |= {"latency": None, "macs": self.latency}
            guesses.append("an estimate: multiply-accumulates stand for the latency, which only a run measures")
        if self.widths.round_to == "measured":
            changes["widths"] = dataclasses.replace(self.widths, round_to=ROUND_TO)
            guesses.append(f"an estimate: widths are multiples of {ROUND_TO}; only a run measures which are fastest")
        return dataclasses.replace(self, **changes), guesses

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Choose the channels, and prove that the model without them is what it was but for them.

        Raises:
            PlanError: Nothing can be removed, the budget cannot be met, or the order of steps cannot work.
            PruneError: What the model computes without the channels is not what the masked one does.
            CaptureError: The model cannot be captured.
            UsageError, DataError: The data that the saliency needs are missing or wrong.
        """
        if isinstance(model, fx.GraphModule) or ctx.floating not in (None, model) or quantized_in(ctx.history):
            raise PlanError(
                "PruneChannels: the model is quantized already, and its integers have no channels to remove; "
                "move PruneChannels, and the training after it, before the quantization"
            )
        step, guesses = self.without_measuring() if ctx.dry else (self, [])
        program = capture(model, ctx.task)
        pins: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            ctx.progress("prune", attempt, attempt + 1, "choose channels")
            channels = find_channels(program, model, attention=self.widths.attention, pinned=pins)
            groups, skips = candidates(channels, self.include, self.exclude)
            if not groups:
                raise nothing_to_prune((*channels.skips, *skips))
            chooser = Chooser(step, model, channels, groups, ctx)
            choice, measured = chooser.choice()
            unmoved = chooser.unmoved(choice)
            if bool(choice.keep.all()) and not removed_in(ctx.history):
                if not any(isinstance(step, PruneChannels) for step in ctx.later):
                    raise nothing_to_prune((*unmoved, *skips, *channels.skips))
                choice = dataclasses.replace(choice, notes=(*choice.notes, left_to_later(unmoved)))
            found = proved(model, channels, choice.keep, ctx.task)
            if isinstance(found, Proved):
                ctx.progress("prune", attempt + 1, attempt + 1, "channels chosen, edits proved")
                facts = {"pins": {name: placeless(why) for name, why in pins.items()}, **measured, "warnings": guesses}
                return self.planned(chooser, choice, found, (*channels.skips, *skips, *unmoved), facts)
            pins |= found
        raise PlanError(
            f"PruneChannels: after {ATTEMPTS} attempts the model still does not run without channels: "
            f"{list(pins.values())[-1]}; exclude the layers that are named"
        )

    def planned(
        self, chooser: Chooser, choice: Choice, found: Proved, skips: tuple[Skip, ...], facts: dict[str, Any]
    ) -> Plan:
        """The plan of a choice whose edits are proved."""
        channels, model, keep, ctx = chooser.channels, chooser.model, choice.keep, chooser.ctx
        constants = found.constants
        dense, params, macs = chooser.dense, chooser.params(keep), chooser.work(keep)
        widths = {g.name: [choice.sizes[g.name] * g.width, g.size * g.width] for g in channels.groups}
        changed = [group for group in channels.groups if choice.sizes[group.name] < group.size]
        unjudged = chooser.scored[1]
        guesses = facts.pop("warnings")
        plan = Plan(
            step="PruneChannels",
            settings=settings_of(self),
            edits=found.edits,
            skips=tuple(Skip(skip.module, placeless(skip.reason)) for skip in (*skips, *unjudged)),
            facts={
                "dense": dataclasses.asdict(dense),
                "keep": {group.name: keep[group.units].nonzero().flatten().tolist() for group in changed},
                "widths": widths,
                "params": params / dense.params,
                "macs": macs / dense.macs,
                "difference": found.difference.relative,
                "taken_in": int(constants.folded.sum()),
                "constants": dict(constants.left),
                "approximate": {
                    g.name: channels.approximate[g.name] for g in changed if g.name in channels.approximate
                },
                "warnings": [*guesses, *choice.notes, *warnings_of(channels, changed, constants.left)],
                "curves": {name: [list(point) for point in curve] for name, curve in chooser.curves.items()},
                **facts,
            },
            estimate=ctx.dry and bool(guesses or ctx.history),
        )
        ctx.memo["PruneChannels"] = (plan, model, found.pruned)
        return plan

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """The model without the channels. Raises: PruneError, ModelError where the plan does not fit the model."""
        planned, of, ready = ctx.memo.pop("PruneChannels", (None, None, None))
        if planned is plan and of is model and ready is not None:
            made: nn.Module = ready
            return made
        program = capture(model, ctx.task)
        channels = find_channels(program, model, attention=self.widths.attention, pinned=plan.facts["pins"])
        keep = torch.ones(channels.units, dtype=torch.bool)
        groups = {group.name: group for group in channels.groups}
        for name, kept in plan.facts["keep"].items():
            if name not in groups:
                raise PruneError(
                    f"PruneChannels: the plan removes channels of {name}, which this model has not: plan again"
                )
            part = torch.zeros(groups[name].size, dtype=torch.bool)
            part[kept] = True
            keep[groups[name].units] = part
        constants = constants_of(model, channels, keep, ctx.task)
        return fold(apply_edits(model, plan.edits, {}), model, channels, keep, constants)


@dataclasses.dataclass(frozen=True)
class Proved:
    """A model without some of its units, and the proof that it is the masked original.

    Attributes:
        edits: What makes it.
        constants: What removed units left behind.
        pruned: The model, constants taken in.
        difference: From the masked original.
    """

    edits: tuple[Edit, ...]
    constants: Constants
    pruned: nn.Module
    difference: Difference


def proved(model: nn.Module, channels: Channels, keep: Tensor, task: Task) -> Proved | Mapping[str, str]:
    """The model without some units, proved; or tensors whose groups are in the way, with the reason.

    One comparison with the masked original does for edits and constants together, but where zeros could hide a wrong
    edit from it. There, and where it fails, edits are proved alone first, on a copy without zeros.

    Raises:
        PruneError: The edits are right, and the constants are not.
    """
    alone = hides(model, channels)
    fitted = edits_of(model, channels, keep, task, prove=alone)
    if fitted.pins:
        return fitted.pins
    if fitted.difference is None:
        with contextlib.suppress(RuntimeError):
            found = proof_of(model, channels, keep, task, fitted.edits)
            if found.difference.exact:
                return found
        # What is wrong, and which groups are in the way, is told by the edits without the constants.
        fitted = edits_of(model, channels, keep, task)
        if fitted.pins:
            return fitted.pins
    found = proof_of(model, channels, keep, task, fitted.edits)
    if not found.difference.exact:
        apart = found.difference
        raise PruneError(
            f"PruneChannels: with the constants of removed channels taken in, the model is {apart.relative:.1e} "
            f"from the masked one, where rounding explains {apart.tolerance:.0e}; please report this model"
        )
    return found


def proof_of(model: nn.Module, channels: Channels, keep: Tensor, task: Task, edits: tuple[Edit, ...]) -> Proved:
    """The edited model with the constants taken in, compared with the masked original."""
    constants = constants_of(model, channels, keep, task)
    bare = apply_edits(model, edits, {})
    # Compared on a copy whose biases are not rounded to the model's own dtype again.
    exact = fold(duplicate(bare).double(), model, channels, keep, constants)
    apart = difference(model, exact, channels, keep, task, folded=constants.folded)
    return Proved(edits, constants, fold(bare, model, channels, keep, constants), apart)


def quantized_in(history: Sequence[Plan]) -> bool:
    """Whether an earlier step has made integers of the model, which a dry run does not do."""
    return any(edit.kind == "quantize" for plan in history for edit in plan.edits)


def removed_in(history: Sequence[Plan]) -> bool:
    """Whether an earlier step has removed channels."""
    return any(plan.step == "PruneChannels" and plan.edits for plan in history)


def left_to_later(unmoved: Sequence[Skip]) -> str:
    """What a first round says that asks for less than one channel of any layer."""
    why = next((f": {skip.module}: {skip.reason}" for skip in unmoved), "")
    return f"no channel is removed yet, a later PruneChannels has to{why}"


def placeless(reason: str) -> str:
    """A reason whose line of code is named without the folders of this machine: plans are shipped.

    Example:
        >>> placeless("it is written there (at /home/me/net.py:3, in forward: x + 8)")
        'it is written there (at net.py:3, in forward: x + 8)'
    """
    return re.sub(r"\(at [^:]*[/\\]([^/\\]+:\d+, in )", r"(at \1", reason)


def warnings_of(channels: Channels, changed: Sequence[Group], left: Mapping[str, str]) -> list[str]:
    """What the caller should know of a prune that went well.

    Args:
        channels: Of the model.
        changed: Groups that lose units.
        left: Layers into which constants of removed channels could not be taken, with the reason.
    """
    found = []
    vague = {group.name: channels.approximate[group.name] for group in changed if group.name in channels.approximate}
    if vague:
        first = next(iter(vague.values()))
        found.append(f"{shown(list(vague))}: removed up to this: {first}")
    lost = {name or "the model itself": why for name, why in left.items() if "up to" in why}  # those of a known size
    if lost:
        found.append(
            "biases and shifts of removed channels count as zero where no bias could take them in, "
            f"before {shown(list(lost))}; the first: {next(iter(lost.values()))}"
        )
    unread = [skip.module for skip in channels.skips if skip.reason == UNREAD]
    if unread and changed:
        found.append(
            f"{shown(unread)}: no forward reads them in eval mode, so that they keep their shapes and may no longer "
            "fit what they read in training; drop auxiliary heads before training on"
        )
    return found


def nothing_to_prune(skips: Sequence[Skip]) -> PlanError:
    """The error where no channel of any layer can leave: never a model that is silently as large as before."""
    few = "; ".join(f"{skip.module or 'the model itself'}: {skip.reason}" for skip in skips[:3])
    more = f"; and {len(skips) - 3} more" if len(skips) > 3 else ""
    return PlanError(f"PruneChannels: no channel can be removed ({few or 'the model has no layers'}{more})")
