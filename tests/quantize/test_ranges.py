"""The calibrators, against numpy on the same data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pared.errors import SettingError
from pared.quantize.ranges import RANGES, MinMax, Percentile

BATCHES = [torch.randn(50, 40), torch.randn(10, 40) * 3, torch.randn(5).abs() * 8]


def found(kind: MinMax | Percentile) -> tuple[float, float]:
    observer = kind.observer()
    for batch in BATCHES:
        observer.update(batch)
    return kind.range(observer)  # type: ignore[arg-type]


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
