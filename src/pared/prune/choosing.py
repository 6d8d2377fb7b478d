"""Which channels `PruneChannels` removes: scores and the budget brought together, earlier rounds counted in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pared.errors import PlanError
from pared.graph.channels import Channels, Group
from pared.prune.budgets import Choice, Rules, choose, meet
from pared.prune.costs import Work, params_of
from pared.prune.curves import curves, path_along
from pared.prune.edits import edits_of
from pared.prune.evidence import Evidence
from pared.prune.latency import fit_latency
from pared.prune.ratios import Equal, Global, Sensitivity
from pared.prune.saliency import score
from pared.prune.timing import Clock, Journal, digest
from pared.prune.widths import bounds, equal_to
from pared.step import Context, Plan, Skip
from pared.surgery import apply_edits
from pared.train.checkpoint import fingerprint

if TYPE_CHECKING:
    from pared.prune.step import PruneChannels

ROUND_TO = 8  # where multiples are to be measured and cannot be
MULTIPLES = (1, 8, 16, 32)  # among which the fastest is looked for
TRIES, TOLERANCE = 10, 0.05  # measurements of a latency, and how near to the wanted one it has to be


@dataclasses.dataclass(frozen=True)
class Dense:
    """The network before any of its channels was removed: what budgets are fractions of.

    Attributes:
        sizes: Units of each group.
        params: Parameters.
        macs: Multiply-accumulates of one sample.
    """

    sizes: Mapping[str, int]
    params: int
    macs: int

    @classmethod
    def of(cls, history: Sequence[Plan]) -> Dense | None:
        """As the first plan that removed channels found it; None where there is none."""
        return next((cls(**plan.facts["dense"]) for plan in history if plan.step == "PruneChannels"), None)


@dataclasses.dataclass(frozen=True)
class Chooser:
    """What a choice is made from.

    Attributes:
        step: The settings.
        model: Never changed.
        channels: Of the model.
        groups: That may lose units.
        ctx: Of the run.
    """

    step: PruneChannels
    model: nn.Module
    channels: Channels
    groups: Sequence[Group]
    ctx: Context

    @functools.cached_property
    def scored(self) -> tuple[dict[str, Tensor], list[Skip]]:
        """Scores by group, and the groups that the saliency cannot judge."""
        evidence = Evidence(channels=self.channels, model=self.model, task=self.ctx.task, seed=self.ctx.seed)
        return score(evidence, self.step.saliency, self.groups)

    @property
    def everything(self) -> Tensor:
        """The choice that removes nothing."""
        return torch.ones(self.channels.units, dtype=torch.bool)

    @functools.cached_property
    def work(self) -> Work:
        """Multiply-accumulates of a choice."""
        return Work(self.channels, self.model)

    def params(self, keep: Tensor) -> int:
        """Parameters of a choice."""
        return params_of(self.channels, self.model, keep)

    @functools.cached_property
    def dense(self) -> Dense:
        """What the budget is a fraction of."""
        found = Dense.of(self.ctx.history)
        if found is not None:
            return found
        whole = self.everything
        sizes = {group.name: group.size for group in self.channels.groups}
        return Dense(sizes, self.params(whole), self.work(whole))

    @functools.cached_property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """What each group's loss costs, where that decides."""
        ratios = self.step.ratios
        if not isinstance(ratios, Sensitivity):
            return {}
        return curves(self.channels, self.scored[0], self.ctx, samples=ratios.samples, key=self.key)

    @functools.cached_property
    def key(self) -> str:
        """Fingerprint of what is measured on: the model, the data, what is fixed of the channels, the runtime."""
        ctx = self.ctx
        groups = [(group.name, group.size) for group in self.channels.groups]
        parts = {"groups": groups, "dense": dataclasses.asdict(self.dense), "target": ctx.target.name}
        return fingerprint(self.model, ctx.task, parts, ctx.seed)

    def name_of(self, keep: Tensor) -> str:
        """What a measurement of a choice is written down under."""
        return digest(keep.nonzero().flatten().tolist(), self.ctx.batch_size, self.ctx.threads)

    @property
    def journal(self) -> Journal:
        """Latencies that this step has measured on this model."""
        return Journal(self.ctx.work / f"latency-{digest(self.key)}.json")

    def rules(self, round_to: int) -> Rules:
        """How sizes are settled."""
        return Rules(
            scope="global" if isinstance(self.step.ratios, Global) else "local",
            normalize=self.step.ratios.normalize if isinstance(self.step.ratios, Global) else "none",
            round_to=round_to,
            limits=self.step.widths.limits,
            dense=self.dense.sizes,
            path=path_along(self.curves) if self.curves else None,
        )

    def choice(self) -> tuple[Choice, dict[str, Any]]:
        """The units that stay, and what was measured for it.

        Raises:
            PlanError: The budget cannot be met.
        """
        if self.step.latency is not None:
            return self.by_latency()
        if self.step.widths.round_to != "measured":
            return self.by_count(self.step.widths.round_to), {}
        choices = [self.by_count(multiple) for multiple in MULTIPLES]
        distinct = list({tuple(choice.sizes.items()): choice for choice in choices}.values())
        shares = self.journal.recall(
            [self.name_of(choice.keep) for choice in distinct],
            lambda: Clock(self.ctx).shares([self.pruned(choice.keep) for choice in distinct]),
        )
        fastest = min(range(len(distinct)), key=shares.__getitem__)
        measured = [{"widths": dict(choice.sizes), "latency": s} for choice, s in zip(distinct, shares, strict=True)]
        return distinct[fastest], {"measured": measured}

    def unmoved(self, choice: Choice) -> list[Skip]:
        """The groups that could lose units and lose none, each with the reason."""
        whole = [g for g in self.groups if choice.sizes[g.name] == g.size and g.name in self.scored[0]]
        return [Skip(group.name, self.why_whole(group)) for group in whole]

    def why_whole(self, group: Group) -> str:
        """Why all units of a group stay."""
        step, dense = self.step, self.dense.sizes.get(group.name, group.size)
        allowed = {other.name for other in self.groups}
        tied = [name for name in equal_to(group.name, self.channels) if name not in allowed]
        if group.size == 1:
            return "it has one channel"
        if bounds(group, step.widths.limits, self.dense.sizes)[0] == group.size:
            return "limits keep all its channels"
        if tied:
            return f"as much of it must stay as of {tied[0]}, which may not be pruned"
        if step.ratio is not None and isinstance(step.ratios, Equal) and group.size <= dense * (1 - step.ratio):
            return "as few of its channels as are asked for are left already"
        width, multiple = group.size * group.width, step.widths.round_to
        if isinstance(step.ratios, Equal):
            rounded = "" if multiple == 1 else f", as multiples of {multiple} (widths.round_to)"
            return f"the budget rounds to all its {width} channels{rounded}"
        return f"all its {width} channels rank above what goes"

    def by_count(self, round_to: int) -> Choice:
        """By the budget of channels, parameters or multiply-accumulates."""
        step, rules, scores = self.step, self.rules(round_to), self.scored[0]
        if step.ratio is not None:
            return choose(self.channels, scores, self.left(step.ratio), rules)
        name, share = ("params", step.params) if step.params is not None else ("macs", step.macs)
        cost = self.params if name == "params" else self.work
        base = cost(self.everything)
        allowed = (share or 0.0) * getattr(self.dense, name) / base
        if allowed >= 1:
            # Rounding took more than an earlier round asked for, so that this one has nothing left to do.
            whole = {group.name: group.size for group in self.channels.groups}
            return Choice(
                keep=self.everything, sizes=whole, notes=(f"{name}={share:g} of the dense model is met already",)
            )
        return meet(self.channels, scores, cost, allowed, rules, name)

    def left(self, ratio: float) -> float | dict[str, float]:
        """The ratio of the dense model as one of the model as it is: by group, where each has its own."""
        dense = self.dense.sizes
        if not isinstance(self.step.ratios, Equal):
            before = sum(dense.get(group.name, group.size) * group.width for group in self.groups)
            now = sum(group.size * group.width for group in self.groups)
            return max(0.0, 1 - before * (1 - ratio) / now)
        return {g.name: max(0.0, 1 - dense.get(g.name, g.size) * (1 - ratio) / g.size) for g in self.groups}

    def by_latency(self) -> tuple[Choice, dict[str, Any]]:
        """By measured latency: the ratio at which it fits is searched for."""
        wanted, journal = self.step.latency or 0.0, self.journal
        clock = functools.cache(lambda: Clock(self.ctx))  # its files are written only where something is measured
        round_to = self.step.widths.round_to
        rules = self.rules(ROUND_TO if round_to == "measured" else round_to)

        # Along work, not along a ratio: there one group after another gives way, and latency falls in small steps.
        least = self.work(choose(self.channels, self.scored[0], 1.0, rules).keep) / self.work(self.everything)

        def at(part: float) -> Choice:
            share = least + (1 - least) * (1 - part) + 1e-9  # the least itself is met, rounded or not
            return meet(self.channels, self.scored[0], self.work, share, rules, "macs")

        def path(part: float) -> Tensor:
            return at(part).keep

        def measure(keep: Tensor) -> float:
            self.ctx.progress("prune", len(journal.known), TRIES, "time a candidate")
            return journal.recall([self.name_of(keep)], lambda: clock().shares([self.pruned(keep)]))[0]

        start = 1.0 if Dense.of(self.ctx.history) is None else measure(self.everything)
        fit = fit_latency(measure, wanted, path, start=start, tries=TRIES)
        if fit.latency > wanted * (1 + TOLERANCE):
            fastest = min(latency for _, latency in fit.journal)
            raise PlanError(
                f"PruneChannels: latency={wanted:g} cannot be met: the fastest that was measured takes {fastest:.3f} "
                "of the dense model's time; ask for less, or let more layers be pruned"
            )
        measured = [{"ratio": ratio, "latency": latency} for ratio, latency in fit.journal]
        choice = at(fit.ratio)
        if not fit.met:
            text = f"latency={wanted:g} was not met within {TOLERANCE:.0%}: the nearest below takes {fit.latency:.3f}"
            choice = dataclasses.replace(choice, notes=(*choice.notes, f"{text} of the dense model's time"))
        return choice, {"measured": measured}

    def pruned(self, keep: Tensor) -> nn.Module:
        """The model without the other units, for timing."""
        fitted = edits_of(self.model, self.channels, keep, self.ctx.task, prove=False)
        return apply_edits(self.model, fitted.edits, {})
