"""The calibrators, against numpy on the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.errors import SettingError
from pared.quantize import static
from pared.quantize.affine import Grid, QParams, fake_quantize, grid, qparams_of_range
from pared.quantize.ranges import MSE, RANGES, MinMax, MovingAverage, Percentile
from slow_divergence import values_of

BATCHES = [torch.randn(50, 40), torch.randn(10, 40) * 3, torch.randn(5).abs() * 8]


AFFINE = grid(bits=8, signed=False, symmetric=False)
SYMMETRIC = grid(bits=8, signed=True, symmetric=True)
CALIBRATORS = [kind() for name, kind in RANGES.items() if name != "auto"]
ORDERLESS = [calibrator for calibrator in CALIBRATORS if not isinstance(calibrator, MovingAverage)]


def found(kind: Any, batches: Sequence[Tensor] = BATCHES, numbers: Grid = AFFINE) -> tuple[float, float]:
    observer = kind.observer()
    for batch in batches:
        observer.update(batch)
    low, high = kind.range(observer, numbers, symmetric=numbers.low < 0)
    return low, high


def test_minmax_gives_the_extremes() -> None:
    values = torch.cat([batch.flatten() for batch in BATCHES])
    assert found(MinMax()) == (values.min().item(), values.max().item())


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
def test_percentile_gives_the_quantiles_within_a_bin(percentile: float) -> None:
    values = torch.cat([batch.flatten() for batch in BATCHES]).double().numpy()
    low, high = found(Percentile(percentile=percentile))
    # A window of 16384 bins over at most four times the largest value.
    width = 4 * np.abs(values).max() / 16384
    assert low == pytest.approx(np.quantile(values, 1 - percentile / 100, method="inverted_cdf"), abs=2 * width)
    assert high == pytest.approx(np.quantile(values, percentile / 100, method="inverted_cdf"), abs=2 * width)


def test_percentile_is_wider_the_higher_it_is_and_minmax_at_100() -> None:
    spans = [found(Percentile(percentile=p)) for p in (60, 90, 99, 99.9, 100)]
    assert [low for low, _ in spans] == sorted((low for low, _ in spans), reverse=True)
    assert [high for _, high in spans] == sorted(high for _, high in spans)
    assert len(set(spans)) == len(spans)
    assert spans[-1] == found(MinMax())


@pytest.mark.parametrize("value", [50, 0, 100.1, -3, float("nan"), "many"])
def test_percentile_refuses_when_out_of_range(value: object) -> None:
    with pytest.raises(SettingError, match=r"Percentile\.percentile"):
        Percentile(percentile=value)


def test_ranges_names_every_calibrator_by_its_kind() -> None:
    assert {name: kind().kind for name, kind in RANGES.items()} == {name: name for name in RANGES}


VALUES = st.lists(st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 2.5, 1000.0])), min_size=1, max_size=40)


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=lambda calibrator: calibrator.kind)
@settings(max_examples=15, deadline=None)
@given(values=VALUES, numbers=st.sampled_from([AFFINE, SYMMETRIC]))
def test_range_lies_within_the_extremes_and_can_be_quantized(
    calibrator: Any, values: list[float], numbers: Grid
) -> None:
    low, high = found(calibrator, [torch.tensor(values)], numbers)
    slack = 1e-6 * max(map(abs, values))  # an average of equal numbers may be off by a rounding
    assert min(values) - slack <= low <= high <= max(values) + slack
    qparams = qparams_of_range(torch.tensor(low), torch.tensor(high), numbers, symmetric=numbers.low < 0)
    assert fake_quantize(torch.zeros(()), qparams, numbers).item() == 0


@pytest.mark.parametrize("calibrator", ORDERLESS, ids=lambda calibrator: calibrator.kind)
def test_range_is_the_same_for_any_order_and_any_cut(calibrator: Any) -> None:
    reference = found(calibrator)
    assert found(calibrator, BATCHES[::-1]) == reference
    flat = torch.cat([batch.flatten() for batch in BATCHES])
    assert found(calibrator, flat.flip(0).split(97)) == reference


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=lambda calibrator: calibrator.kind)
@pytest.mark.parametrize("value", [5.0, -4.0, 0.0, 1e-30])
def test_range_of_constant_data_is_the_constant(calibrator: Any, value: float) -> None:
    assert found(calibrator, [torch.full((3, 4), value)] * 2) == pytest.approx((value, value), rel=1e-6, abs=0)


def test_moving_average_is_the_mean_at_first_and_then_moves_by_momentum() -> None:
    rows = torch.randn(30, 8).double()
    low = high = 0.0
    for k, row in enumerate(rows.tolist(), 1):
        weight = max(1 / k, 0.1)
        low, high = (1 - weight) * low + weight * min(row), (1 - weight) * high + weight * max(row)
    for batches in (rows.split(1), rows.split(7), [rows]):
        assert found(MovingAverage(momentum=0.1), batches) == pytest.approx((low, high), rel=1e-12)
    first = rows[:10]
    expected = first.amin(1).mean().item(), first.amax(1).mean().item()
    assert found(MovingAverage(momentum=0.1), [first]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("numbers", [AFFINE, SYMMETRIC, grid(bits=4, signed=False, symmetric=False)], ids=str)
@pytest.mark.parametrize("name", ["relu", "laplace", "student t, 4, one-sided", "uniform"])
def test_mse_is_as_good_as_the_best_of_many_ranges_tried_on_the_values(name: str, numbers: Grid) -> None:
    values = torch.from_numpy(values_of(name))[:5000]

    def error(ends: tuple[float, float]) -> float:
        low, high = (torch.tensor(end) for end in ends)
        qparams: QParams = qparams_of_range(low, high, numbers, symmetric=numbers.low < 0)
        return (fake_quantize(values, qparams, numbers) - values).double().square().mean().item()

    lowest, highest = values.min().item(), values.max().item()
    fractions = np.linspace(0.15, 1, 14)
    both = [(b * lowest, a * highest) for a in fractions for b in (fractions if lowest < 0 else [1.0])]
    # Two in a hundred: the search knows the values to within a bin, and clips one end after the other.
    assert error(found(MSE(), [values], numbers)) <= 1.02 * min(map(error, both))


def test_calibrators_clip_an_outlier_where_minmax_does_not() -> None:
    values = torch.cat([torch.randn(100_000), torch.tensor([30.0])])
    for calibrator in ORDERLESS:
        high = found(calibrator, [values])[1]
        assert (high == 30) == (calibrator.kind == "minmax"), calibrator.kind


def test_ranges_can_all_be_asked_for_by_name() -> None:
    assert get_args(static.Name) == tuple(RANGES)
    for name, kind in RANGES.items():
        assert static.QuantizeStatic(ranges=name).ranges == kind()
        assert static.QuantizeStatic(ranges={"kind": name}).ranges == kind()
