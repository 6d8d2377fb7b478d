"""The sensitivity curves' geometry: where they stand, how they differ, and their names."""

import dataclasses
import itertools
import math

import pytest

from pared.report.curves import (
    AGES,
    BOTTOM,
    EXTREMES,
    HEATS,
    HEIGHT,
    LEFT,
    NAMED,
    RIGHT,
    TOP,
    WIDTH,
    CurvePlot,
    apart,
    cost_cells,
    curve_plot,
    ratios,
)
from pared.report.data import PrunedGroup, Report, Stage


def stage_of(sample: Report, *groups: PrunedGroup) -> Stage:
    found = sample.stages[2].pruned
    assert found is not None
    return dataclasses.replace(sample.stages[2], pruned=dataclasses.replace(found, groups=groups or found.groups))


def drawn(sample: Report, *groups: PrunedGroup) -> CurvePlot:
    plot = curve_plot(sample, stage_of(sample, *groups))
    assert plot is not None
    return plot


def group(name: str, *drops: float, kept: int = 4, kind="convolution") -> PrunedGroup:
    curve = tuple((number / 8, drop) for number, drop in enumerate((0.0, *drops)))
    return PrunedGroup(name=name, kind=kind, kept=kept, before=8, curve=curve)


def points(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_curve_stands_higher_when_it_costs_more(sample: Report) -> None:
    plot = drawn(sample, group("a", 0.1, 0.4), group("b", 0.0, 0.2))
    a, b = (points(line.points) for line in plot.lines)
    assert a[0] == b[0] == (LEFT, plot.zero)
    assert a[-1][1] < b[-1][1] < plot.zero  # SVG counts y downwards
    assert a[-1][0] == pytest.approx(LEFT + (WIDTH - RIGHT - LEFT) / 4)
    assert plot.y_title == "drop of accuracy (points)"
    assert [tick.label for tick in plot.x_ticks] == ["0", "25", "50", "75", "100"]
    assert [tick.label for tick in plot.y_ticks][:2] == ["0", "10"]


def test_curves_go_from_early_to_late_and_are_dashed_when_fully_connected(sample: Report) -> None:
    plot = drawn(sample)
    assert [line.age for line in plot.lines] == [0, 2, 4, 5, AGES - 1]
    assert [line.dashed for line in plot.lines] == [False, False, False, True, True]
    assert plot.some_dashed
    assert not plot.crowded


def test_mark_lies_on_its_curve_when_channels_were_removed(sample: Report) -> None:
    plot = drawn(sample, group("a", 0.1, 0.2, 0.4, 0.8), group("whole", 0.1, 0.2, kept=8))
    halfway, end = points(plot.lines[0].points)[3:5]
    assert plot.lines[0].mark == end
    assert halfway[1] > end[1]
    assert plot.lines[1].mark is None


def test_only_the_extremes_are_named_when_there_are_many(sample: Report) -> None:
    groups = [group(f"layer{number}", 0.01 * number, 0.02 * number) for number in range(50)]
    plot = drawn(sample, *groups)
    names = [line.name.text for line in plot.lines if line.name]
    assert names == [f"layer{number}" for number in (*range(EXTREMES), *range(50 - EXTREMES, 50))]
    assert plot.crowded
    assert {line.age for line in plot.lines} == set(range(AGES))


def test_names_stay_apart_and_inside_when_curves_end_together(sample: Report) -> None:
    groups = [group(f"backbone.stages.{number}.blocks.{number}.conv", 0.3, 0.75) for number in range(NAMED)]
    plot = drawn(sample, *groups)
    heights = sorted(line.name.y for line in plot.lines if line.name)
    assert len(heights) == NAMED
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 15
    assert heights[0] >= TOP
    assert heights[-1] <= HEIGHT - BOTTOM + 5
    assert all(line.name.text.endswith(f"blocks.{i}.conv") for i, line in enumerate(plot.lines) if line.name)
    assert all(len(line.name.text) <= 22 for line in plot.lines if line.name)


def test_heights_share_the_room_when_there_is_too_little() -> None:
    found = apart([5.0] * 11, 0.0, 50.0)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[-1] == pytest.approx(50.0)


def test_noise_below_zero_gets_no_room_when_it_is_small(sample: Report) -> None:
    assert drawn(sample, group("a", -0.01, 0.5)).y_ticks[0].label == "0"
    assert drawn(sample, group("a", -0.2, 0.5)).y_ticks[0].label == "-20"


def test_plot_stands_when_nothing_costs_anything_or_a_drop_is_not_finite(sample: Report) -> None:
    flat = drawn(sample, group("a", 0.0, 0.0))
    assert {y for _, y in points(flat.lines[0].points)} == {flat.zero}
    broken = drawn(sample, group("a", 0.1, math.nan))
    assert len(points(broken.lines[0].points)) == 2
    assert broken.lines[0].mark is None


def test_plot_is_left_out_when_no_curve_was_measured(sample: Report) -> None:
    assert curve_plot(sample, sample.stages[0]) is None
    assert curve_plot(sample, stage_of(sample, PrunedGroup(name="a", kept=1, before=2))) is None


def test_cells_are_darker_when_they_cost_more_and_plain_when_nothing(sample: Report) -> None:
    stage = stage_of(sample, group("a", -0.1, 0.0, 0.2, 0.5), group("short", 0.1), group("b", math.nan))
    assert stage.pruned is not None
    assert ratios(stage) == [0.125, 0.25, 0.375, 0.5]
    a, short, b = (cost_cells(sample, stage, found) for found in stage.pruned.groups)
    assert [cell.text for cell in a] == ["-10.0", "0.0", "20.0", "50.0"]
    assert [cell.heat for cell in a] == [0, 0, 2, HEATS - 1]
    assert [cell.text for cell in short] == ["10.0", "", "", ""]
    assert (b[0].text, b[0].heat) == ("not finite", 0)
