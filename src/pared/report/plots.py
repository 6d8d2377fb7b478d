"""Geometry of the page's scatter plots: where ticks, points and labels stand, in the units of the SVG's view box.

`page.html` draws them as inline SVG, so that a page needs no plotting library, follows light and dark, and can be read
with the keyboard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from pared.report import words
from pared.report.data import Report, Stage

WIDTH, HEIGHT = 440, 310
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 48
LETTER, LINE = 7.9, 17  # rough width of a letter and height of a line at the largest font size that page.css sets
GAP = 10  # from a point to its label
CROWD = 10  # with more points only the baseline and what ships are labelled; the rest show on hover and focus
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Point:
    """One stage in a plot. `label` is "" where no room was left; `readout` shows while it is focused."""

    x: float
    y: float
    kind: str
    label: str
    label_x: float
    label_y: float
    anchor: str
    readout: str


@dataclasses.dataclass(frozen=True)
class Plot:
    """A scatter plot of the stages. `path` joins those that were kept; `limit` is the height of the budget's line."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    path: str
    limit: float | None
    limit_label: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclasses.dataclass(frozen=True)
class Axis:
    """What one axis shows, and how its figures read."""

    title: str
    value: Callable[[Stage], float | None]
    say: Callable[[float], str]
    tick: Callable[[float], str]


def plots(report: Report) -> list[Plot]:
    """The decisive metric (without one, fidelity) against latency and size; only those with two points or more."""
    names = words.metric_names(report)
    y = metric_axis(names[0]) if names else fidelity_axis()
    across = (
        Axis("latency p50 (ms)", lambda s: s.latency_ms.p50 if s.latency_ms else None, words.milliseconds, short),
        Axis("file size (MB)", lambda s: s.size_bytes / 1e6 if s.size_bytes else None, megabytes, short),
    )
    limit = budget(report, names[0]) if names else None
    drawn = (scatter(report, x, y, limit) for x in across)
    return [plot for plot in drawn if len(plot.points) > 1]


def better_where(report: Report) -> str:
    """Which way is better in the plots, in words."""
    names = words.metric_names(report)
    higher = words.better_when(report, names[0]) if names else True
    vertical = {True: "Up and to the left", False: "Down and to the left", None: "Further left"}[higher]
    return f"{vertical} is better."


def short(value: float) -> str:
    """A tick's number."""
    return f"{value:.6g}"


def clipped(name: str) -> str:
    """A name that fits beside a point or an axis."""
    return name if len(name) <= 22 else f"{name[:21]}…"


def megabytes(value: float) -> str:
    """A size given in MB."""
    return words.size(round(value * 1e6))


def metric_axis(name: str) -> Axis:
    """The axis of a metric."""
    title = f"{clipped(name)} on validation"
    tick: Callable[[float], str] = short
    if words.is_ratio(name):
        title, tick = f"{title} (%)", lambda value: short(100 * value)
    return Axis(title, lambda stage: stage.metrics.get(name), lambda value: words.metric_value(name, value), tick)


def fidelity_axis() -> Axis:
    """The axis that stands in where nothing labels the data."""

    def value(stage: Stage) -> float | None:
        return stage.fidelity.sqnr_db if stage.fidelity else None

    return Axis("fidelity to the baseline (dB)", value, lambda db: f"{db:.1f} dB", short)


def budget(report: Report, metric: str) -> float | None:
    """The worst value of the metric that the recipe's budget allows."""
    given = report.recipe.get("budget")
    allowed = given.get("max_drop") if isinstance(given, dict) else None
    first = words.baseline(report)
    higher = words.better_when(report, metric)
    if not isinstance(allowed, (int, float)) or higher is None or first is None or metric not in first.metrics:
        return None
    return first.metrics[metric] - allowed if higher else first.metrics[metric] + allowed


def scatter(report: Report, x: Axis, y: Axis, limit: float | None) -> Plot:
    """One plot."""
    rows = [(i, stage, x.value(stage), y.value(stage)) for i, stage in enumerate(report.stages)]
    found = [(i, s, a, b) for i, s, a, b in rows if a is not None and b is not None and math.isfinite(a + b)]
    xs, ys = [a for *_, a, _ in found], [b for *_, b in found]
    x_ticks = ticks(0, 1.12 * max(xs, default=1))
    y_ticks = ticks(*padded([*ys, *([] if limit is None else [limit])], ratio=y.title.endswith("(%)")))

    def place_x(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - RIGHT - LEFT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - BOTTOM - TOP)

    ships = report.final.stage if report.final else None
    marks = [
        (place_x(a), place_y(b), kind(i, s, ships), s.name, f"{s.name}: {y.say(b)}, {x.say(a)}") for i, s, a, b in found
    ]
    kept = [mark for mark in marks if mark[2] != "refused"]
    limit_label = "" if limit is None else f"budget {y.say(limit)}"
    reserved = (
        [] if limit is None else [(LEFT, place_y(limit) - LINE, LEFT + LETTER * len(limit_label), place_y(limit))]
    )
    noun = y.title.split(" on ")[0].split(" to ")[0]
    return Plot(
        title=f"{noun[0].upper()}{noun[1:]} against {x.title.split(' (')[0]}",
        x_title=x.title,
        y_title=y.title,
        x_ticks=tuple(Tick(round(place_x(value), 1), x.tick(value)) for value in x_ticks),
        y_ticks=tuple(Tick(round(place_y(value), 1), y.tick(value)) for value in y_ticks),
        points=labelled(marks, reserved),
        path=" ".join(f"{a:.1f},{b:.1f}" for a, b, *_ in kept),
        limit=None if limit is None else round(place_y(limit), 1),
        limit_label=limit_label,
    )


def kind(index: int, stage: Stage, ships: str | None) -> str:
    """How a point is drawn."""
    if not stage.kept:
        return "refused"
    if stage.name == ships:
        return "ships"
    return "baseline" if index == 0 else "kept"


def padded(values: Sequence[float], *, ratio: bool) -> tuple[float, float]:
    """A range with air around the values; two points wide at least for ratios: noise must not look like a cliff."""
    if not values:
        return 0, 1
    low, high = min(values), max(values)
    least = 0.02 if ratio else 0.1 * max(abs(low), abs(high)) or 1
    air = max(0.15 * (high - low), (least - (high - low)) / 2)
    return (low - air, min(high + air, 1.0) if ratio and high <= 1 else high + air)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose a range, evenly spaced.

    Example:
        >>> ticks(0, 9.2)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def labelled(marks: Sequence[tuple[float, float, str, str, str]], reserved: Iterable[Box]) -> tuple[Point, ...]:
    """Points with labels that neither overlap nor leave the plot; what ships and the baseline choose first."""
    taken = [*reserved, *((x - 7, y - 7, x + 7, y + 7) for x, y, *_ in marks)]
    order = sorted(range(len(marks)), key=lambda i: ("ships", "baseline", "kept", "refused").index(marks[i][2]))
    points: dict[int, Point] = {}
    for i in order:
        x, y, what, name, readout = marks[i]
        name = clipped(name)
        spot = next((s for s in spots(x, y, LETTER * len(name)) if free(s[3], taken)), None)
        if len(marks) > CROWD and what not in ("ships", "baseline"):
            spot = None
        if spot is None:
            points[i] = Point(round(x, 1), round(y, 1), what, "", 0, 0, "start", readout)
            continue
        label_x, label_y, anchor, box = spot
        taken.append(box)
        points[i] = Point(round(x, 1), round(y, 1), what, name, round(label_x, 1), round(label_y, 1), anchor, readout)
    return tuple(points[i] for i in range(len(marks)))


def spots(x: float, y: float, wide: float) -> Iterable[tuple[float, float, str, Box]]:
    """Where a label may stand, best first: above, below, right, left."""
    for dy in (-GAP, GAP + LINE - 4):
        yield x, y + dy, "middle", (x - wide / 2, y + dy - LINE + 3, x + wide / 2, y + dy + 3)
    yield x + GAP, y + 4, "start", (x + GAP, y + 4 - LINE, x + GAP + wide, y + 6)
    yield x - GAP, y + 4, "end", (x - GAP - wide, y + 4 - LINE, x - GAP, y + 6)


def free(box: Box, taken: Iterable[Box]) -> bool:
    """True where a label lies inside the plot and on nothing else."""
    inside = box[0] >= LEFT + 2 and box[2] <= WIDTH and box[1] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM
    return inside and all(
        box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1] for other in taken
    )
