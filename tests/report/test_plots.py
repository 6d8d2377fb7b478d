"""Geometry of the plots."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from pared.report.data import Agreement, Latency, Report
from pared.report.plots import HEIGHT, LEFT, WIDTH, plots, ticks


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_enclose_the_range_evenly_when_it_is_any(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    slack = 1e-6 * max(abs(low), span)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + span - slack
    assert 3 <= len(marks) <= 12
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert max(steps) - min(steps) <= slack


def test_plots_place_every_stage_left_when_faster_and_low_when_less_accurate(sample: Report) -> None:
    latency, size = plots(sample)
    assert (latency.title, size.title) == ("Accuracy against latency p50", "Accuracy against file size")
    baseline, train, pruned, quantized = latency.points
    assert quantized.x < pruned.x < train.x < baseline.x
    assert pruned.y > baseline.y > quantized.y > train.y  # SVG counts y downwards
    assert [point.kind for point in latency.points] == ["baseline", "kept", "refused", "ships"]
    assert quantized.readout == "3 QuantizeStatic: 91.52 %, 2.80 ms"


def test_plot_starts_at_zero_when_it_shows_latency_or_size(sample: Report) -> None:
    assert [(plot.x_ticks[0].label, plot.x_ticks[0].at) for plot in plots(sample)] == [("0", LEFT), ("0", LEFT)]


def test_plot_joins_only_stages_that_were_kept(sample: Report) -> None:
    plot = plots(sample)[0]
    kept = [f"{point.x},{point.y}" for point in plot.points if point.kind != "refused"]
    assert plot.path.split() == kept


def test_plot_draws_the_budget_between_what_passed_and_what_failed_it(sample: Report) -> None:
    plot = plots(sample)[0]
    assert plot.limit is not None
    assert plot.points[3].y < plot.limit < plot.points[2].y
    assert plot.limit_label == "budget 90.35 %"


def test_labels_stay_inside_and_apart_when_points_lie_on_one_another(sample: Report) -> None:
    twins = tuple(
        dataclasses.replace(sample.stages[0], name=f"stage {i}", latency_ms=Latency(p50=8.1, p90=8.2)) for i in range(8)
    )
    points = plots(dataclasses.replace(sample, stages=twins))[0].points
    labels = [point for point in points if point.label]
    assert 1 <= len(labels) < 8
    assert len({(point.label_x, point.label_y) for point in labels}) == len(labels)
    assert all(0 <= point.label_x <= WIDTH and 0 <= point.label_y <= HEIGHT for point in labels)


def test_plots_fall_back_to_fidelity_when_there_is_no_metric(sample: Report) -> None:
    stages = tuple(
        dataclasses.replace(s, metrics={}, fidelity=Agreement(sqnr_db=10.0 + i, max_abs=1.0, agreement=None))
        for i, s in enumerate(sample.stages)
    )
    drawn = plots(dataclasses.replace(sample, stages=stages, final=None))
    assert [plot.y_title for plot in drawn] == ["fidelity to the baseline (dB)"] * 2


def test_plots_are_left_out_when_fewer_than_two_stages_were_measured(sample: Report) -> None:
    assert plots(dataclasses.replace(sample, stages=sample.stages[:1])) == []
    assert plots(dataclasses.replace(sample, stages=())) == []


def test_plot_leaves_a_point_out_when_its_figure_is_not_finite(sample: Report) -> None:
    broken = dataclasses.replace(sample.stages[1], metrics={"accuracy": float("nan")})
    stages = (sample.stages[0], broken, *sample.stages[2:])
    assert len(plots(dataclasses.replace(sample, stages=stages))[0].points) == 3
