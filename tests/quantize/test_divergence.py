"""Clipping by divergence and by error, against the procedure written out from the raw values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pared.activations import Histogram
from pared.quantize import divergence
from pared.quantize.affine import grid
from pared.quantize.divergence import best_range, bins_of, distributions, quantize_bins
from slow_divergence import DISTRIBUTIONS, search, values_of

AFFINE = grid(bits=8, signed=False, symmetric=False)
SYMMETRIC = grid(bits=8, signed=True, symmetric=True)
SCORES = {
    "kl": divergence.kl,
    "symmetric_kl": divergence.symmetric_kl,
    "js": divergence.js,
    "mse": divergence.squared_error,
}


def seen(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(torch.from_numpy(values))
    return histogram


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_best_range_is_that_of_the_slow_search(name: str, symmetric: bool) -> None:
    values, numbers = values_of(name), SYMMETRIC if symmetric else AFFINE
    bins = bins_of(seen(values), 512)
    for kind, score in SCORES.items():
        first, last, width = search(
            values, kind, lowest=numbers.low, highest=numbers.high, symmetric=symmetric, bins=512
        )
        found = best_range(bins, score, numbers, symmetric=symmetric)
        assert (found[0] - bins.zero, found[1] - bins.zero, bins.width) == (first, last, width), kind


def by_hand() -> tuple[torch.Tensor, divergence.Quantized]:
    """Six bins of 1, [0, 6); four integers over [0, 3], so that two thirds of a bin's width lie beyond the range."""
    histogram = Histogram(bins=16)
    histogram.update(torch.tensor([0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 2.5, 2.5, 3.5, 5.5]))
    bins = bins_of(histogram, 6)
    numbers = grid(bits=2, signed=False, symmetric=False)
    return bins.counts, quantize_bins(bins, torch.tensor([0, 0]), torch.tensor([4, 2]), numbers, symmetric=False)


def test_distributions_are_those_worked_out_by_hand() -> None:
    counts, quantized = by_hand()
    assert counts.tolist() == [2, 4, 2, 1, 0, 1]
    p, q = distributions(counts, quantized)
    # The range [0, 4) has integers 4/3 apart: middles 0.5, 1.5, 2.5, 3.5 become 0, 1, 2, 3..
    # What is at 5.5 counts at 3.5.
    torch.testing.assert_close(p[0], torch.tensor([0.2, 0.4, 0.2, 0.2, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(q[0], torch.tensor([2, 4, 2, 1, 0, 0], dtype=torch.float64) / 9)
    torch.testing.assert_close(p[1], torch.tensor([0.2, 0.8, 0, 0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(q[1], torch.tensor([2, 4, 0, 0, 0, 0], dtype=torch.float64) / 6)


def test_js_is_bounded_and_zero_where_nothing_is_lost() -> None:
    counts, quantized = by_hand()
    values = divergence.js(counts, quantized)
    assert 0 < values.max() < np.log(2)
    whole = quantized._replace(
        last=torch.tensor([6, 6]), kept=torch.ones(2, 6), level=torch.tensor([[0, 1, 2, 3, 3, 3]] * 2)
    )
    even = torch.tensor([2.0, 4.0, 2.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(divergence.js(even, whole), torch.zeros(2, dtype=torch.float64), atol=1e-15, rtol=0)


def test_bins_merge_to_the_limit_and_leave_exact_zeros_out() -> None:
    values = torch.cat([torch.zeros(1000), torch.randn(5000), torch.tensor([-0.01, 0.01])])
    histogram = seen(values.numpy())
    assert histogram.zeros == 1000
    for limit in (512, 1000, 4096, 16384):
        bins = bins_of(histogram, limit)
        assert limit / 4 < len(bins.counts) <= limit
        edges = (np.arange(len(bins.counts) + 1) - bins.zero) * bins.width
        expected = np.histogram(values[values != 0].double().numpy(), edges)[0]
        np.testing.assert_array_equal(bins.counts.numpy(), expected)
