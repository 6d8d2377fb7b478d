"""How many units each group may keep: floors and caps, widths that a runtime likes, layers tied in size.

Arithmetic on sizes alone: what is kept is `budgets`'s work. Groups whose sizes depend on one another form a *block*:
one number decides for all of them.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

from pared.errors import PlanError
from pared.graph.channels import NO_UNIT, Channels, Group

Limits = Mapping[str, tuple[float, float]]  # {pattern of layers: (least, most) fraction of units that stays}
Sizes = Mapping[str, int]  # units that stay, by group
Spans = Mapping[str, tuple[int, int]]  # least and most units that may stay, by group


@dataclasses.dataclass(frozen=True)
class Block:
    """Groups that one choice settles.

    Attributes:
        names: Of the groups.
        options: Each way to settle them: units that stay, in the order of `names`. Rising; the last is the largest.
    """

    names: tuple[str, ...]
    options: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def totals(self) -> list[int]:
        """Units of each option, rising."""
        return [sum(option) for option in self.options]

    def nearest(self, wish: float) -> int:
        """Which option has the number of units nearest to a wish; of two as near, the larger."""
        after = bisect.bisect_left(self.totals, wish)
        if after in {0, len(self.totals)}:
            return min(after, len(self.totals) - 1)
        return after if self.totals[after] - wish <= wish - self.totals[after - 1] else after - 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One dimension of a tensor that several groups run along, whose width is to be a multiple.

    Attributes:
        tensor: Its dotted name.
        fixed: Indices that always stay.
        takes: Indices along it of one unit, by group.
    """

    tensor: str
    fixed: int
    takes: Mapping[str, int]

    def width(self, sizes: Sizes) -> int:
        """Its width for a choice of sizes."""
        return self.fixed + sum(take * sizes[name] for name, take in self.takes.items())


def producers(group: Group) -> tuple[str, ...]:
    """Names of the modules that make a group's channels, and of the group: what patterns of layers are matched with."""
    made = [member.tensor.rpartition(".")[0] for member in group.members if member.role == "out"]
    return tuple(dict.fromkeys([group.name, *made]))


def matches(group: Group, pattern: str) -> bool:
    """Whether a pattern names one of the layers that make a group's channels."""
    return any(fnmatchcase(name, pattern) for name in producers(group))


def bounds(group: Group, limits: Limits, dense: Sizes | None = None) -> tuple[int, int]:
    """Least and most units of a group that stay; at least 1. Where several patterns match, all hold.

    Args:
        group: As it is.
        limits: Fractions of its units in the dense model.
        dense: These, by group; a group that is not among them counts as it is.

    Raises:
        PlanError: They contradict one another.

    Example:
        >>> bounds(Group("conv", 0, 16, (), ()), {"conv": (0.25, 0.75), "*": (0.0, 0.7)})
        (4, 11)
        >>> bounds(Group("conv", 0, 10, (), ()), {"conv": (0.25, 0.75)}, {"conv": 16})
        (4, 10)
    """
    own = {pattern: pair for pattern, pair in limits.items() if matches(group, pattern)}
    low = max((pair[0] for pair in own.values()), default=0.0)
    high = min((pair[1] for pair in own.values()), default=1.0)
    if low > high:
        raise PlanError(f"limits: {' and '.join(map(repr, own))} leave {group.name} no size; give it one of them")
    size = (dense or {}).get(group.name, group.size)
    least = min(max(1, math.ceil(low * size - 1e-9)), group.size)
    return least, min(max(least, math.floor(high * size + 1e-9)), group.size)


def rows_of(channels: Channels) -> list[Row]:
    """Every dimension that makes channels of groups, each combination of groups once."""
    owner = [group.name for group in channels.groups for _ in range(group.size)]
    sizes = {group.name: group.size for group in channels.groups}
    made = {(m.tensor, m.dim): None for group in channels.groups for m in group.members if m.role == "out"}
    found: dict[tuple[object, ...], Row] = {}
    for tensor, dim in made:
        counts: dict[str, int] = {}
        fixed = 0
        for unit in channels.tensors[tensor, dim].tolist():
            if unit == NO_UNIT:
                fixed += 1
            else:
                counts[owner[unit]] = counts.get(owner[unit], 0) + 1
        takes = {name: count // sizes[name] for name, count in counts.items()}
        found.setdefault((fixed, *takes.items()), Row(tensor, fixed, takes))
    return list(found.values())


def blocks_of(
    channels: Channels, names: Iterable[str], rows: Sequence[Row], spans: Spans, round_to: int
) -> list[Block]:
    """The blocks of the groups that may be pruned, in graph order.

    Args:
        channels: Of the model.
        names: Groups that may be pruned. One of which as much must stay as of another that may not is left out.
        rows: As `rows_of` gives them.
        spans: Floors and caps of these groups.
        round_to: Widths become multiples of it.

    Raises:
        PlanError: Groups that depend on one another have no size in common.
    """
    groups = {group.name: group for group in channels.groups}
    allowed = set(names)
    done: set[str] = set()
    blocks = []
    for name in groups:
        together = equal_to(name, channels)
        if name in done or not set(together) <= allowed:
            continue
        done |= set(together)
        members = [groups[other] for other in together]
        blocks.append(Block(tuple(together), options_of(members, rows, spans, round_to)))
    return blocks


def options_of(
    members: Sequence[Group], rows: Sequence[Row], spans: Spans, round_to: int
) -> tuple[tuple[int, ...], ...]:
    """The sizes that groups may have together: the same fraction of each. Raises: PlanError where there are none."""
    sizes = [fitting(group, rows, spans[group.name], round_to) for group in members]
    if len(members) == 1:
        return tuple((size,) for size in sorted(sizes[0]))
    parts = [{Fraction(size, group.size) for size in own} for group, own in zip(members, sizes, strict=True)]
    shared = sorted(set.intersection(*parts))
    if not shared:
        raise PlanError(
            f"no fraction of channels fits {', '.join(group.name for group in members)} at once, of which the same "
            "must stay; widen their limits or lower round_to"
        )
    return tuple(tuple(int(part * group.size) for group in members) for part in shared)


def equal_to(name: str, channels: Channels) -> list[str]:
    """The groups of which as much must stay as of one, with that one, in graph order."""
    found = {name}
    grown = True
    while grown:
        wider = found.union(*(same for same in map(set, channels.equal) if same & found))
        grown, found = wider != found, wider
    return [group.name for group in channels.groups if group.name in found]


def fitting(group: Group, rows: Sequence[Row], span: tuple[int, int], round_to: int) -> set[int]:
    """Units of a group that may stay: within its limits, and at widths of the layers that only it runs along that
    are multiples of `round_to`; or all of it.

    Where several layers leave no size but all of it, the first of them alone counts. Where no multiple is within the
    limits, as in a layer that is smaller, the limits alone do.
    """
    least, most = span
    own = [row for row in rows if set(row.takes) == {group.name}]

    def rounded(counted: Sequence[Row]) -> set[int]:
        sizes = range(least, most + 1)
        return {size for size in sizes if all(row.width({group.name: size}) % round_to == 0 for row in counted)}

    chosen = rounded(own)
    if chosen <= {group.size}:
        chosen = rounded(own[:1]) or set(range(least, most + 1))
    return chosen | ({most} & {group.size})


def settle(blocks: Iterable[Block], wishes: Mapping[str, float]) -> dict[str, int]:
    """The option of each block whose number of units is nearest to what is wished for; of two as near, the larger.

    Example:
        >>> settle([Block(("a",), ((1,), (8,), (16,)))], {"a": 12.0})
        {'a': 16}
    """
    sizes: dict[str, int] = {}
    for block in blocks:
        option = block.options[block.nearest(sum(wishes[name] for name in block.names))]
        sizes |= zip(block.names, option, strict=True)
    return sizes


def round_rows(sizes: Sizes, blocks: Sequence[Block], rows: Iterable[Row], full: Sizes, round_to: int) -> Sizes:
    """Sizes at which dimensions that several groups run along are multiples too, or whole.

    One dimension after another, blocks grow or shrink by an option at a time towards the nearest multiple. A block that
    an earlier dimension settled is not touched again; where no multiple can be reached, a dimension stays as it is.

    Args:
        sizes: Of all groups.
        blocks: Those that may change.
        rows: Dimensions, in graph order.
        full: Sizes of all groups in the model as it is.
        round_to: The number.
    """
    settled: set[str] = set()
    for row in rows:
        if len(row.takes) < 2:
            continue
        width, whole = row.width(sizes), row.width(full)
        if width % round_to and width != whole:
            free = [block for block in blocks if not settled & set(block.names) and set(block.names) & set(row.takes)]
            wanted = sorted({*range(round_to, whole + 1, round_to), whole}, key=lambda w: (abs(w - width), -w))
            trials = (towards(sizes, free, row, target) for target in wanted[:4])
            sizes = next((trial for trial in trials if trial is not None), sizes)
        settled |= set(row.takes)
    return sizes


def towards(sizes: Sizes, blocks: Iterable[Block], row: Row, target: int) -> Sizes | None:
    """Sizes at which a dimension has a width, reached by small moves spread over its blocks; None where none is."""
    moving = list(blocks)
    at = [block.options.index(tuple(sizes[name] for name in block.names)) for block in moving]
    start = list(at)
    found: Sizes = sizes
    step = 1 if target > row.width(sizes) else -1
    while (width := row.width(found)) != target:
        moves: list[tuple[float, int, Sizes]] = []
        for number, block in enumerate(moving):
            index = at[number] + step
            if 0 <= index < len(block.options):
                moved = {**found, **dict(zip(block.names, block.options[index], strict=True))}
                if width != row.width(moved) and (row.width(moved) - target) * step <= 0:
                    moves.append((abs(index - start[number]) / len(block.options), number, moved))
        if not moves:
            return None
        _, number, found = min(moves, key=lambda move: move[:2])
        at[number] += step
    return found
