"""Figures in words."""

import dataclasses
import math
from typing import Any

import pytest

from pared.report import words
from pared.report.data import Agreement, Report, Speedup, WithoutVnni
from pared.report.html import page


def final_of(report: Report, **changes: Any) -> Report:
    assert report.final is not None
    return dataclasses.replace(report, final=dataclasses.replace(report.final, **changes))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (17_800_000, "17.8 MB"),
        (None, "not measured"),
    ],
)
def test_size_keeps_three_digits_when_it_changes_unit(value: int | None, said: str) -> None:
    assert words.size(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.1234, "0.123 ms"), (2.804, "2.80 ms"), (9.996, "10.0 ms"), (142.4, "142 ms"), (None, "not measured")],
)
def test_milliseconds_keep_three_digits_when_they_grow(value: float | None, said: str) -> None:
    assert words.milliseconds(value) == said


def test_decibels_tell_equal_outputs_from_outputs_that_are_not_finite_when_the_ratio_is_missing() -> None:
    assert words.decibels(Agreement(sqnr_db=None, max_abs=0.0, agreement=1.0)) == "exact"
    assert words.decibels(Agreement(sqnr_db=None, max_abs=math.nan, agreement=None)) == "not finite"
    assert words.decibels(None) == "not measured"


@pytest.mark.parametrize(
    ("higher", "before", "after", "said"),
    [
        (True, 0.90, 0.88, (-1, "2.00 points worse")),
        (True, 0.90, 0.91, (1, "1.00 points better")),
        (True, 0.90, 0.90, (0, "unchanged")),
        (None, 0.90, 0.88, (0, "down 2.00 points")),
        (True, 0.90, math.nan, (0, "not finite")),
    ],
)
def test_drop_gives_direction_and_points_when_a_ratio_moves(
    sample: Report, higher: bool | None, before: float, after: float, said: tuple[int, str]
) -> None:
    report = dataclasses.replace(sample, task={} if higher is None else {"higher_is_better": {"accuracy": higher}})
    assert words.drop(report, "accuracy", before, after) == said


def test_drop_counts_a_rise_as_worse_when_lower_is_better(sample: Report) -> None:
    report = dataclasses.replace(sample, task={"higher_is_better": {"mse": False}})
    assert words.drop(report, "mse", 0.5, 0.75) == (-1, "0.25 worse")
    assert words.drop(report, "mse", 0.5, 0.25) == (1, "0.25 better")


def test_headline_claims_nothing_when_the_interval_holds_one(sample: Report) -> None:
    same = Speedup(value=1.03, low=0.97, high=1.08, verdict="no measurable change")
    report = final_of(sample, speedup=same, size_bytes=17_800_000, metrics={"accuracy": 0.9142})
    assert words.headline(report) == "No measurable change in speed, the same size and accuracy unchanged."


def test_headline_names_the_losses_when_nothing_was_gained(sample: Report) -> None:
    slower = Speedup(value=0.5, low=0.49, high=0.51, verdict="slower")
    report = final_of(sample, speedup=slower, size_bytes=35_600_000, metrics={"accuracy": 0.9142})
    assert words.headline(report) == "Nothing gained: 2.00x slower, 2.00x larger and accuracy unchanged."


def test_headline_says_so_when_the_baseline_ships(sample: Report) -> None:
    assert (
        words.headline(final_of(sample, stage="baseline")) == "Nothing paid for itself: the baseline ships as it was."
    )


def test_headline_says_what_is_missing_when_there_was_no_test_data(sample: Report) -> None:
    report = final_of(sample, metrics={}, baseline_metrics={})
    assert words.headline(report) == "2.90x faster and 3.91x smaller, with quality on test data not measured."


@pytest.mark.parametrize(
    ("after", "agreement", "warned"),
    [(0.60, 0.65, True), (0.895, 0.98, False), (0.92, 0.98, False), (0.60, None, True)],
)
def test_without_vnni_warns_when_the_drop_is_more_than_chance(
    sample: Report, after: float, agreement: float | None, warned: bool
) -> None:
    found = WithoutVnni(
        metrics={"accuracy": after},
        metrics_with={"accuracy": 0.90},
        sqnr_db=12.3,
        agreement=agreement,
        samples=200,
        seconds=2.5,
    )
    stages = (*sample.stages[:-1], dataclasses.replace(sample.stages[-1], without_vnni=found))
    report = dataclasses.replace(sample, stages=stages)
    said = words.without_vnni(report)
    assert "outputs at 12.3 dB" in said[0] and "200 samples in 2.5 s" in said[0] and "90.00 %" in said[0]
    assert (len(said) == 2 and said[1].startswith("Warning") and "'cpu': 'any'" in said[1]) is warned
    assert "8-bit products saturate" in page(report)
    assert Report.from_json(report.to_json()) == report
