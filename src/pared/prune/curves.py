"""What removing more and more of one group costs: the metric on validation data against the ratio, a curve a group.

Each point is measured on the captured graph with the group's worst units zeroed wherever something sums over them, all
else as it is; nothing is retrained. Points are kept in the step's work folder, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pared.errors import UsageError
from pared.graph.capture import operator
from pared.graph.channels import Channels
from pared.prune.exact import SUMS
from pared.prune.timing import digest, write
from pared.sensitivity import Override, costs
from pared.step import Context

# (ratio removed, drop of the first metric in its own unit), ratios rising from 0.
Curve = list[tuple[float, float]]
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def curves(
    channels: Channels, scores: Mapping[str, Tensor], ctx: Context, *, samples: int, key: str = ""
) -> dict[str, Curve]:
    """The curve of every group that has scores.

    Args:
        channels: Of the model.
        scores: By group: the units with the lowest are zeroed first.
        ctx: Gives validation data, the metric and the work folder.
        samples: Look at this many at most.
        key: Names the model and the data, so that a curve of another model is not taken for this one's.

    Raises:
        UsageError: The task has no metric.
    """
    metric = ctx.task.metric
    if metric is None:
        raise UsageError("PruneChannels: ratios='sensitivity' needs a metric; give Task(metrics=...)")
    graph = channels.program.module()
    whole = "as it is"
    found: dict[str, Curve] = {}
    groups = [group for group in channels.groups if group.name in scores]
    for number, group in enumerate(groups):
        ctx.progress("sensitivity", number, len(groups), group.name)
        order = torch.argsort(scores[group.name], stable=True)
        file = ctx.work / f"curve-{digest(key, group.name, order.tolist(), RATIOS, samples)}.json"
        if not file.exists():
            changes: dict[str, Mapping[str, Override]] = {whole: {}}
            for ratio in RATIOS:
                gone = group.start + order[: round(ratio * group.size)]
                changes[str(ratio)] = zeroing(channels, gone)
            measured = costs(
                graph,
                ctx.task.batches("validation", "PruneChannels", limit=None),
                changes,
                ctx.task.pick,
                metrics=[metric],
                samples=samples,
                deadline=ctx.deadline,
            )
            before = measured[whole].metrics[metric.name]
            points = [[r, metric.drop(before, measured[str(r)].metrics[metric.name])] for r in RATIOS]
            write(file, [[0.0, 0.0], *points])
        found[group.name] = [(ratio, drop) for ratio, drop in json.loads(file.read_text(encoding="utf8"))]
    return found


def zeroing(channels: Channels, gone: Tensor) -> dict[str, Override]:
    """Overrides that zero units in every value that something sums over, by node."""
    inside = torch.zeros(channels.units + 1, dtype=torch.bool)  # one more, which NO_UNIT finds
    inside[gone] = True
    found: dict[str, Override] = {}
    for node in channels.program.graph.nodes:
        if operator(node).removeprefix("aten.") not in SUMS:
            continue
        for source in node.all_input_nodes:
            places = {dim: inside[units] for dim, units in channels.values.get(source.name, {}).items()}
            places = {dim: where for dim, where in places.items() if bool(where.any())}
            if places and source.op == "call_function":
                found[source.name] = zeroed(places)
    return found


def zeroed(places: Mapping[int, Tensor]) -> Override:
    """An override that fills some indices with 0."""

    def override(value: Any, _: tuple[Any, ...]) -> Any:
        for dim, where in places.items():
            value = value.index_fill(dim, where.nonzero().flatten(), 0)
        return value

    return override


def path_along(curves: Mapping[str, Curve]) -> Callable[[float], dict[str, float]]:
    """From a number between 0 and 1 to a ratio for each group, all at the same drop.

    At 0 nothing goes, at 1 everything. First goes, of every group alike, what costs nothing; then every group loses as
    much as costs no more than a drop that rises evenly through all that were measured.

    Example:
        >>> path = path_along({"a": [(0.0, 0.0), (0.5, 0.1)], "b": [(0.0, 0.0), (0.5, 0.4)]})
        >>> {name: round(ratio, 2) for name, ratio in path(0.5).items()}
        {'a': 0.5, 'b': 0.12}
    """
    rising = {name: monotone(curve) for name, curve in curves.items()}
    drops = sorted({drop for curve in rising.values() for _, drop in curve})
    top = drops[-1] + (drops[-1] - drops[0] or 1.0)
    drops.append(top)

    def path(part: float) -> dict[str, float]:
        at = part * len(drops)
        if at < 1:
            return {name: at * ratio_at([*curve, (1.0, top)], drops[0]) for name, curve in rising.items()}
        low = min(int(at) - 1, len(drops) - 2)
        drop = drops[low] + (at - 1 - low) * (drops[low + 1] - drops[low])
        return {name: ratio_at([*curve, (1.0, top)], drop) for name, curve in rising.items()}

    return path


def monotone(curve: Sequence[tuple[float, float]]) -> Curve:
    """The curve with every drop at least that of the smaller ratios, and none below 0."""
    found: Curve = []
    for ratio, drop in curve:
        found.append((ratio, max(drop, found[-1][1] if found else 0.0)))
    return found


def ratio_at(curve: Sequence[tuple[float, float]], drop: float) -> float:
    """The largest ratio that costs no more than a drop, between points along the straight line."""
    last = max(i for i, (_, known) in enumerate(curve) if known <= drop)
    if last == len(curve) - 1:
        return curve[last][0]
    (low, a), (high, b) = curve[last], curve[last + 1]
    return low + (high - low) * (drop - a) / (b - a)
