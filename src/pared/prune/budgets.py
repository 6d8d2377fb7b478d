"""From scores to the channels that stay: by ratio, or by a budget of parameters or multiply-accumulates.

A choice is `keep`: a bool for each unit of the model, True where it stays. In each group the best-scored units stay;
a budget only settles how many. Which sizes are allowed is `widths`'s work, what a choice costs is `costs`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from pared.errors import PlanError, nearest
from pared.graph.channels import Channels, Group
from pared.prune.widths import Block, Limits, Row, Sizes, blocks_of, bounds, matches, producers, round_rows, rows_of
from pared.prune.widths import settle as nearest_sizes
from pared.step import Skip

Cost = Callable[[Tensor], float]
HALVINGS = 22  # of a ratio: the last are finer than one unit of any model
NEAR, ROUNDS = 0.998, 4  # a budget used up to so much is met; otherwise groups with smaller units fill it, so often
NORMALIZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "max": torch.max,
    "none": lambda _: torch.ones(()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How sizes are settled.

    Attributes:
        scope: "local": every group loses the same fraction. "global": the worst units of all groups go.
        normalize: What a group's scores are divided by before those of different groups are compared.
        round_to: Widths become multiples of it, where a layer is not smaller.
        limits: {pattern of layers: (least, most) fraction of units that stays}.
        dense: Units by group that limits are fractions of; those of the model as it is where not given.
        path: From a number between 0 and 1 to the ratio of each group; takes the place of `scope` where given.
    """

    scope: Literal["local", "global"] = "local"
    normalize: Literal["mean", "max", "none"] = "mean"
    round_to: int = 1
    limits: Limits = dataclasses.field(default_factory=dict)
    dense: Sizes | None = None
    path: Callable[[float], Mapping[str, float]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which units stay.

    Attributes:
        keep: bool, shape (channels.units,).
        sizes: Units that stay, by group.
        notes: What the caller should know of it.
    """

    keep: Tensor
    sizes: Sizes
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What every choice for one model has in common."""

    channels: Channels
    scores: Mapping[str, Tensor]
    rules: Rules
    rows: Sequence[Row]
    blocks: Sequence[Block]

    @functools.cached_property
    def full(self) -> dict[str, int]:
        """Sizes of the model as it is."""
        return {group.name: group.size for group in self.channels.groups}

    @functools.cached_property
    def free(self) -> list[Group]:
        """Groups that lose units."""
        names = {name for block in self.blocks for name in block.names}
        return [group for group in self.channels.groups if group.name in names]

    @functools.cached_property
    def places(self) -> Tensor:
        """The place of each unit in its group, best first: int64, shape (units,); of two as good, the first."""
        found = torch.zeros(self.channels.units, dtype=torch.int64)
        for group in self.free:
            order = torch.argsort(self.scores[group.name], descending=True, stable=True)
            found[group.start + order] = torch.arange(group.size)
        return found

    @functools.cached_property
    def ranking(self) -> tuple[Tensor, Tensor]:
        """All free units from worst to best over the whole model: the number of the group of each (in `free`), and the
        fraction of all channels that is gone with it, its own half counted."""
        parts, owners = [], []
        for i, group in enumerate(self.free):
            scores = self.scores[group.name].double()
            scale = NORMALIZERS[self.rules.normalize](scores)
            parts.append(scores / scale if scale > 0 else scores)
            owners.append(torch.full((group.size,), i))
        order = torch.argsort(torch.cat(parts), stable=True)
        owner = torch.cat(owners)[order]
        taken = torch.tensor([group.width for group in self.free], dtype=torch.float64)[owner]
        return owner, (taken.cumsum(0) - taken / 2) / taken.sum()

    def wishes(self, ratio: float | Mapping[str, float]) -> dict[str, float]:
        """Units that each free group would have without limits."""
        if self.rules.path is not None and not isinstance(ratio, Mapping):
            ratio = self.rules.path(ratio)
        if isinstance(ratio, Mapping):
            return {group.name: group.size * (1 - ratio.get(group.name, 0.0)) for group in self.free}
        if self.rules.scope == "local":
            return {group.name: group.size * (1 - ratio) for group in self.free}
        owner, gone = self.ranking
        lost = torch.bincount(owner[gone < ratio], minlength=len(self.free)).tolist()
        return {group.name: group.size - n for group, n in zip(self.free, lost, strict=True)}

    def sizes(self, ratio: float | Mapping[str, float]) -> Sizes:
        """Units that stay of all groups, limits observed."""
        found = self.full | nearest_sizes(self.blocks, self.wishes(ratio))
        if self.rules.round_to == 1:
            return found
        return round_rows(found, self.blocks, self.rows, self.full, self.rules.round_to)

    def keep(self, sizes: Sizes) -> Tensor:
        """The best units of each group."""
        groups = self.channels.groups
        stay = torch.tensor([sizes[group.name] for group in groups], dtype=torch.int64)
        return self.places < stay.repeat_interleave(torch.tensor([group.size for group in groups], dtype=torch.int64))


def problem(channels: Channels, scores: Mapping[str, Tensor], rules: Rules) -> Problem:
    """What `choose` and `meet` choose from.

    Args:
        channels: Of the model.
        scores: Of the groups that may lose units: float, shape (size,), larger stays longer.
        rules: How.

    Raises:
        PlanError: No group may lose units, or no size fits the limits.
    """
    check_limits(channels, rules.limits)
    rows = rows_of(channels)
    spans = {group.name: bounds(group, rules.limits, rules.dense) for group in channels.groups if group.name in scores}
    blocks = blocks_of(channels, scores, rows, spans, rules.round_to)
    if not blocks:
        raise PlanError(f"no channel can be removed: {held(channels, scores, rules)}")
    return Problem(channels=channels, scores=scores, rules=rules, rows=rows, blocks=blocks)


def choose(
    channels: Channels, scores: Mapping[str, Tensor], ratio: float | Mapping[str, float], rules: Rules = Rules()
) -> Choice:
    """The units that stay when a fraction of the channels goes.

    Args:
        channels: Of the model.
        scores: By group, of those that may lose units.
        ratio: Fraction of channels to remove, 0 to 1, or {group: its own}. Of each group with local scope, of all
            together with global scope: as near to it as sizes allow, and not less.
        rules: Scope, limits, widths.

    Raises:
        PlanError: No group may lose units, no size fits the limits, or these do not let that many go.

    Example:
        >>> from types import SimpleNamespace
        >>> group = Group("conv", 0, 4, (), ())
        >>> channels = Channels(None, (group,), 4, {}, {})
        >>> choose(channels, {"conv": torch.tensor([3.0, 1.0, 4.0, 2.0])}, ratio=0.5).keep.tolist()
        [True, False, True, False]
    """
    made = problem(channels, scores, rules)
    if (rules.scope == "global" or rules.path is not None) and not isinstance(ratio, Mapping):
        most = sum(group.size * group.width for group in made.free) * (1 - ratio) + 1e-6
        sizes, ratio = within(made, lambda keep: channels_of(made, keep), most) or (made.sizes(1.0), 1.0)
    else:
        sizes = made.sizes(ratio)
    return Choice(keep=made.keep(sizes), sizes=sizes, notes=emptied(made, ratio, sizes))


def meet(
    channels: Channels,
    scores: Mapping[str, Tensor],
    cost: Cost,
    share: float,
    rules: Rules = Rules(),
    what: str = "budget",
) -> Choice:
    """The units that stay when the cost may be a fraction of what it is: as near to it as sizes allow, never above.

    Args:
        channels: Of the model.
        scores: By group, of those that may lose units.
        cost: Of a choice, lower with fewer units: parameters, multiply-accumulates.
        share: Fraction of the cost of the model as it is, 0 to 1.
        rules: Scope, limits, widths.
        what: The budget's name in an error.

    Raises:
        PlanError: Not even the smallest allowed sizes meet the budget; says what they reach and what holds them.
    """
    made = problem(channels, scores, rules)
    base = cost(made.keep(made.full))
    fitted = within(made, cost, base * share)
    if fitted is None:
        least = cost(made.keep(made.sizes(1.0)))
        raise PlanError(
            f"{what}={share:g} cannot be met: the least that can be reached is {least / base:.3f} "
            f"({least:,.0f} of {base:,.0f}); {held(channels, scores, rules)}"
        )
    sizes, ratio = fitted
    return Choice(keep=made.keep(sizes), sizes=sizes, notes=emptied(made, ratio, sizes))


def within(made: Problem, cost: Cost, most: float) -> tuple[Sizes, float] | None:
    """Sizes that cost at most so much, and the ratio that led to them; None where the least cost more.

    The ratio just above and the one just below the budget differ in a few groups; as many of these as fit take the
    larger size. Where that leaves some of the budget, as where the few heads of attentions tie a wide layer, the groups
    that did not fit stay as they are and the others share it.
    """
    fixed: Sizes = {}
    found = None
    for _ in range(ROUNDS):
        halved = halve(made, cost, most, fixed)
        if halved is None:
            return found
        over, sizes, ratio = halved
        refused = []
        for names in together(made):
            larger = {**sizes, **{name: over[name] for name in names}}
            if larger != sizes and cost(made.keep(larger)) > most:
                refused += list(names)
            else:
                sizes = larger
        found = sizes, ratio
        if not refused or cost(made.keep(sizes)) >= NEAR * most:
            break
        fixed = {**fixed, **{name: sizes[name] for name in refused}}
    return found


def halve(made: Problem, cost: Cost, most: float, fixed: Sizes) -> tuple[Sizes, Sizes, float] | None:
    """Sizes at two ratios that hardly differ, above a cost and not above it, and the second ratio; the same sizes twice
    where all fits, None where nothing does. Some groups keep a fixed size."""
    low, high = 0.0, 1.0
    over, under = {**made.sizes(low), **fixed}, {**made.sizes(high), **fixed}
    if cost(made.keep(over)) <= most:
        return over, over, low
    if cost(made.keep(under)) > most:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        sizes = {**made.sizes(middle), **fixed}
        if cost(made.keep(sizes)) <= most:
            high, under = middle, sizes
        else:
            low, over = middle, sizes
    return over, under, high


def together(made: Problem) -> list[set[str]]:
    """Groups whose sizes can be taken from another choice alone: those of a block, and where widths are rounded, all
    along a dimension."""
    parts = [set(block.names) for block in made.blocks]
    for row in made.rows if made.rules.round_to > 1 else ():
        touched = [part for part in parts if part & set(row.takes)]
        if len(touched) > 1:
            first = touched[0]
            first.update(*touched[1:])
            parts = [part for part in parts if part is first or part not in touched]
    return parts


def channels_of(made: Problem, keep: Tensor) -> float:
    """How many channels of the free groups stay."""
    return float(sum(int(keep[group.units].sum()) * group.width for group in made.free))


def emptied(made: Problem, ratio: float | Mapping[str, float], sizes: Sizes) -> tuple[str, ...]:
    """A line for each group that only keeps a unit because a layer needs one."""
    wishes = made.wishes(ratio)
    return tuple(
        f"{group.name}: one of its {group.size} units stays, though all were to go: a layer needs one"
        for group in made.free
        if sizes[group.name] == 1 < group.size and wishes[group.name] < 0.5
    )


def held(channels: Channels, scores: Mapping[str, Tensor], rules: Rules) -> str:
    """What keeps channels in the model, in words, and what to do."""
    reasons = []
    floors = [g.name for g in channels.groups if g.name in scores and bounds(g, rules.limits, rules.dense)[0] > 1]
    whole = [group.name for group in channels.groups if group.name not in scores]
    if floors:
        reasons.append(f"limits hold {shown(floors)}")
    if whole:
        reasons.append(f"{shown(whole)} may not be pruned")
    if channels.skips:
        first = channels.skips[0]
        reasons.append(f"{shown([skip.module for skip in channels.skips])} cannot be pruned ({first.reason})")
    if rules.round_to > 1:
        reasons.append(f"widths are multiples of {rules.round_to}")
    return "; ".join(reasons or ["one unit of each group has to stay"]) + "; ask for less, or let more layers be pruned"


def shown(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    few = ", ".join(names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"


def candidates(
    channels: Channels, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[list[Group], list[Skip]]:
    """The groups that the caller's patterns of layers let be pruned, and the others with the reason.

    A pattern stands for a group where it matches the name of a layer that makes its channels. One layer that is
    excluded keeps the whole group: layers tied by a sum lose their channels together.

    Raises:
        PlanError: A pattern matches no layer that could be pruned; says why where it is one that cannot.
    """
    for setting, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(setting, patterns, channels)
    chosen, skips = [], []
    for group in channels.groups:
        out = next((pattern for pattern in exclude if matches(group, pattern)), None)
        if out is not None:
            skips.append(Skip(group.name, f"excluded by {out!r}"))
        elif not any(matches(group, pattern) for pattern in include):
            skips.append(Skip(group.name, "not in include"))
        else:
            chosen.append(group)
    return chosen, skips


def check_patterns(setting: str, patterns: Sequence[str], channels: Channels) -> None:
    """Raise `PlanError` for a pattern that matches nothing: a misspelt name must not be silent."""
    for pattern in patterns:
        if pattern == "*" or any(matches(group, pattern) for group in channels.groups):
            continue
        skip = next((skip for skip in channels.skips if fnmatchcase(skip.module, pattern)), None)
        if skip is not None and setting == "exclude":
            continue  # it stays anyway
        if skip is not None:
            raise PlanError(f"{setting}={pattern!r}: the channels of {skip.module} cannot be removed: {skip.reason}")
        names = [name for group in channels.groups for name in producers(group)]
        raise PlanError(f"{setting}={pattern!r} matches no layer that can be pruned; {nearest(pattern, names)}")


def check_limits(channels: Channels, limits: Limits) -> None:
    """Raise `PlanError` for limits that are no fractions or match nothing."""
    check_patterns("limits", list(limits), channels)
    for pattern, (least, most) in limits.items():
        if not 0 <= least <= most <= 1:
            raise PlanError(f"limits: {pattern!r} needs (least, most) fractions between 0 and 1, found {(least, most)}")
