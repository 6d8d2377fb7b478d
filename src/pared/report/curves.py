"""Geometry of the page's sensitivity curves: what removing more and more of each group costs, a curve a group.

As in `plots`, positions are in the units of the SVG's view box. Curves are coloured from early to late in the network;
those of fully connected layers are dashed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from pared.report import words
from pared.report.data import PrunedGroup, Report, Stage
from pared.report.plots import LETTER, LINE, Tick, short, ticks

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 196, 34, 48  # names stand at the right
AGES = 8  # colours in page.css, from early to late
HEATS = 6  # backgrounds in page.css, from what costs nothing to what costs most
NAMED = 14  # with more curves only the extremes are named; all are in the table
EXTREMES = 3  # of either kind


@dataclasses.dataclass(frozen=True)
class Name:
    """A curve's name, and where it stands."""

    text: str
    y: float
    lead: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. `mark` is where the stage's own choice lies on it, or None where nothing was removed."""

    readout: str
    age: int
    dashed: bool
    points: str
    mark: tuple[float, float] | None
    name: Name | None


@dataclasses.dataclass(frozen=True)
class CurvePlot:
    """The curves of one stage."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    zero: float
    some_dashed: bool
    crowded: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cell of the table of curves: the drop in words, what it is sorted by, and the background that shows it."""

    text: str
    value: float
    heat: int


def curve_plot(report: Report, stage: Stage) -> CurvePlot | None:
    """The plot of a stage's curves, or None where it measured none."""
    groups = measured(stage)
    if not groups:
        return None
    metric = next(iter(words.metric_names(report)), "the metric")
    scale = 100 if words.is_ratio(metric) else 1
    drops = [drop for group in groups for _, drop in group.curve if math.isfinite(drop)]
    x_ticks = [tick / 4 for tick in range(5)]
    y_ticks = ticks(*span(drops, least=0.02 if scale == 100 else 0.0))
    low, high = y_ticks[0], y_ticks[-1]

    def place(ratio: float, drop: float) -> tuple[float, float]:
        x = LEFT + ratio * (WIDTH - RIGHT - LEFT)
        return round(x, 1), round(HEIGHT - BOTTOM - (drop - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    lines = []
    for number, group in enumerate(groups):
        points = [place(ratio, drop) for ratio, drop in group.curve if math.isfinite(drop)]
        removed = 1 - group.kept / group.before
        chosen = at(group.curve, removed)
        lines.append(
            Line(
                readout=f"{group.name}: {group.kept} of {group.before} channels stay",
                age=round(number * (AGES - 1) / max(1, len(groups) - 1)),
                dashed=group.kind == "fully connected",
                points=" ".join(f"{x},{y}" for x, y in points),
                mark=place(removed, chosen) if removed and math.isfinite(chosen) else None,
                name=None,
            )
        )
    lines = named(groups, lines)
    return CurvePlot(
        title=f"Drop of {metric} against the fraction of channels removed",
        x_title="channels removed (%)",
        y_title=f"drop of {metric}{' (points)' if scale == 100 else ''}",
        x_ticks=tuple(Tick(place(value, low)[0], short(100 * value)) for value in x_ticks),
        y_ticks=tuple(Tick(place(0, value)[1], short(scale * value)) for value in y_ticks),
        lines=tuple(lines),
        zero=place(0, 0)[1],
        some_dashed=any(line.dashed for line in lines),
        crowded=len(lines) > NAMED,
    )


def span(drops: Sequence[float], *, least: float) -> tuple[float, float]:
    """What the upright axis covers. Noise below 0 that is small beside what is above it gets no room of its own."""
    worst, best = max(drops, default=0.0), min(drops, default=0.0)
    high = max(worst, least, 0.0) or 1.0
    return (best if best < -high / 8 else 0.0), high


def measured(stage: Stage) -> list[PrunedGroup]:
    """The groups of a stage that have a curve, early to late."""
    groups = stage.pruned.groups if stage.pruned else ()
    return [group for group in groups if len(group.curve) > 1 and group.before]


def at(curve: Sequence[tuple[float, float]], ratio: float) -> float:
    """The drop at a ratio, along straight lines between points; the last point's beyond it.

    Example:
        >>> round(at([(0.0, 0.0), (0.5, 0.2)], 0.25), 3), at([(0.0, 0.0), (0.5, 0.2)], 0.9)
        (0.1, 0.2)
    """
    for (low, a), (high, b) in itertools.pairwise(curve):
        if ratio <= high:
            return a + (b - a) * (ratio - low) / (high - low)
    return curve[-1][1]


def named(groups: Sequence[PrunedGroup], lines: Sequence[Line]) -> list[Line]:
    """The lines with names at the right, pushed apart where their ends meet; with many, of the extremes alone."""
    chosen = list(range(len(lines)))
    if len(lines) > NAMED:
        chosen.sort(key=lambda i: average(groups[i].curve))
        chosen = [*chosen[:EXTREMES], *chosen[-EXTREMES:]]
    ends = {i: tuple(map(float, lines[i].points.split()[-1].split(","))) for i in chosen if lines[i].points}
    order = sorted(ends, key=lambda i: ends[i][1])
    heights = apart([ends[i][1] for i in order], TOP + LINE / 2, HEIGHT - BOTTOM)
    found = list(lines)
    right = WIDTH - RIGHT
    room = int((RIGHT - 20) / LETTER)
    for i, y in zip(order, heights, strict=True):
        x, end = ends[i]
        text = groups[i].name if len(groups[i].name) <= room else f"…{groups[i].name[1 - room :]}"
        name = Name(text, round(y + 4, 1), f"{x},{end} {right},{round(y, 1)} {right + 10},{round(y, 1)}")
        found[i] = dataclasses.replace(lines[i], name=name)
    return found


def average(curve: Sequence[tuple[float, float]]) -> float:
    """Mean drop of a curve, what is not finite left out."""
    drops = [drop for _, drop in curve if math.isfinite(drop)]
    return sum(drops) / len(drops) if drops else 0.0


def apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Rising heights near the wanted ones, a line apart where there is room for it.

    Example:
        >>> apart([50.0, 51.0, 200.0], 0, 300)
        [50.0, 66.0, 200.0]
    """
    step = min(LINE - 1, (bottom - top) / max(1, len(wanted) - 1))
    found: list[float] = []
    for y in wanted:
        found.append(max(y, top, found[-1] + step if found else top))
    limit = bottom
    for i in reversed(range(len(found))):
        found[i] = min(found[i], limit)
        limit = found[i] - step
    return found


def ratios(stage: Stage) -> list[float]:
    """The ratios that were measured, 0 left out."""
    return sorted({ratio for group in measured(stage) for ratio, _ in group.curve if ratio})


def cost_cells(report: Report, stage: Stage, group: PrunedGroup) -> list[Cost]:
    """A group's drop at each of the measured ratios."""
    metric = next(iter(words.metric_names(report)), "")
    scale = 100 if words.is_ratio(metric) else 1
    worst = max((d for g in measured(stage) for _, d in g.curve if math.isfinite(d)), default=0.0)
    known = dict(group.curve)
    cells = []
    for ratio in ratios(stage):
        drop = known.get(ratio, math.nan)
        finite = math.isfinite(drop)
        heat = math.ceil(max(0.0, drop) / worst * (HEATS - 1) - 1e-9) if finite and worst > 0 else 0
        text = words.number(scale * drop) if scale == 1 or not finite else f"{scale * drop:.1f}"
        cells.append(Cost("" if ratio not in known else text, drop if finite else 1e9, heat))
    return cells
