"""Streaming statistics against numpy on all the data at once."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.activations import (
    Extremes,
    Histogram,
    RunningExtremes,
    SecondMoments,
    convolution_rows,
    input_rows,
    linear_rows,
    spread,
)
from pared.errors import DataError

VALUES = st.floats(-(2.0**127), 2.0**127, width=32)
SMALL = st.floats(-10, 10, width=32)
BATCH = st.one_of(
    st.lists(VALUES, max_size=8),
    st.lists(SMALL, max_size=8),
    st.lists(st.just(0.0), max_size=4),
    st.lists(st.sampled_from([-4.0, -1.0, 1.0, 4.0, 2.0**-149, -(2.0**-149), 2.0**127, -(2.0**127)]), max_size=4),
)
BATCHES = st.lists(BATCH.map(lambda v: torch.tensor(v, dtype=torch.float32)), min_size=1, max_size=6)


def counted(batches: list[Tensor], bins: int = 16) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.update(batch)
    return histogram


def edges(histogram: Histogram) -> np.ndarray:
    return (np.arange(histogram.bins + 1) - histogram.bins // 2) * histogram.width


@settings(max_examples=300, deadline=None)
@given(BATCHES)
def test_histogram_counts_as_numpy_does_whatever_the_batches(batches: list[Tensor]) -> None:
    histogram = counted(batches)
    values = torch.cat(batches).double().numpy()
    assert histogram.counts.sum().item() == values.size
    if histogram.width == 0.0:
        assert not values.any()
        return
    # numpy closes its last bin at both ends, and no value lies on that edge.
    expected, _ = np.histogram(values, edges(histogram))
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    assert edges(histogram)[0] <= values.min() <= values.max() < edges(histogram)[-1]
    # The window is no wider than it must be.
    assert np.abs(values).max() >= edges(histogram)[-1] / 2


@settings(max_examples=60, deadline=None)
@given(st.lists(BATCH.map(torch.tensor), min_size=2, max_size=4))
def test_histogram_is_the_same_for_any_order_and_any_cut(batches: list[Tensor]) -> None:
    reference = counted(batches)
    others = [list(order) for order in itertools.permutations(batches)]
    others += [[torch.cat(batches)], list(torch.cat(batches).split(1))]
    for other in map(counted, others):
        assert other.width == reference.width
        assert torch.equal(other.counts, reference.counts)
        assert (other.extremes.low, other.extremes.high) == (reference.extremes.low, reference.extremes.high)


def test_histogram_equals_torch_histc_on_its_own_edges() -> None:
    batches = [torch.randn(7, 5) * scale for scale in (0.1, 3.0, 40.0, 0.5)]
    histogram = counted(batches, bins=64)
    reach = edges(histogram)[-1]
    expected = torch.histc(torch.cat(batches).double(), bins=64, min=-reach, max=reach)
    assert torch.equal(histogram.counts, expected)


@settings(max_examples=200, deadline=None)
@given(BATCHES, st.floats(0, 1))
def test_quantile_is_within_a_bin_of_numpy_and_inside_the_extremes(batches: list[Tensor], q: float) -> None:
    values = torch.cat(batches).double().numpy()
    if values.size == 0:
        return
    histogram = counted(batches, bins=64)
    found = histogram.quantile(q)
    assert values.min() <= found <= values.max()
    # The order statistics on both sides of q, since rounding of q * n may fall to either.
    n = values.size
    low = np.quantile(values, max(q - 1e-9, 0), method="inverted_cdf")
    high = np.quantile(values, min(q + 1e-9, 1), method="inverted_cdf")
    assert low - histogram.width <= found <= high + histogram.width, n


def test_quantile_grows_with_the_fraction() -> None:
    histogram = counted([torch.randn(1000), torch.zeros(500), torch.rand(100) * 30], bins=256)
    found = [histogram.quantile(q) for q in np.linspace(0, 1, 101)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (histogram.extremes.low, histogram.extremes.high)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.0, 0.0], 0.0, 0.0),
        ([5.0, 5.0], 5.0, 5.0),
        ([-4.0], -4.0, -4.0),
        ([-1.0, -1.0, -1.0], -1.0, -1.0),
        ([1e-38, 1e-38], 1e-38, 1e-38),
    ],
)
def test_quantile_is_exact_when_all_values_are_the_same(values: list[float], low: float, high: float) -> None:
    histogram = counted([torch.tensor(values)])
    assert histogram.quantile(0.0) == pytest.approx(low, rel=1e-6)
    assert histogram.quantile(1.0) == pytest.approx(high, rel=1e-6)


def test_histogram_keeps_its_size_over_many_orders_of_magnitude() -> None:
    histogram = counted([torch.tensor([10.0**power]) for power in range(-38, 39)], bins=32)
    assert histogram.counts.shape == (32,)
    assert histogram.counts.sum().item() == 77
    assert histogram.counts[16:].sum().item() == 77


@pytest.mark.parametrize("statistic", [Extremes, Histogram])
def test_update_refuses_and_keeps_what_it_has_when_a_value_is_not_finite(statistic: type) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        seen = statistic()
        seen.update(torch.tensor([1.0, 2.0]))
        with pytest.raises(DataError, match="not finite"):
            seen.update(torch.tensor([0.0, bad, 9.0]))
        extremes = seen if isinstance(seen, Extremes) else seen.extremes
        assert (extremes.low, extremes.high) == (1.0, 2.0)
        if isinstance(seen, Histogram):
            assert seen.counts.sum().item() == 2


@given(BATCHES)
def test_extremes_equal_numpy_whatever_the_batches(batches: list[Tensor]) -> None:
    seen = Extremes()
    for batch in batches:
        seen.update(batch)
    values = torch.cat(batches).numpy()
    if values.size:
        assert (seen.low, seen.high) == (values.min(), values.max())
    else:
        assert seen.low > seen.high


def test_update_takes_any_shape_and_narrow_types() -> None:
    histogram = Histogram()
    histogram.update(torch.ones(2, 0, 3))
    histogram.update(torch.tensor(0.5))
    histogram.update(torch.full((2, 3, 4), 0.25, dtype=torch.bfloat16).transpose(0, 2))
    assert histogram.counts.sum().item() == 25
    assert (histogram.extremes.low, histogram.extremes.high) == (0.25, 0.5)


def test_histogram_counts_exact_zeros_whatever_the_width() -> None:
    histogram = counted([torch.zeros(3), torch.tensor([0.0, -0.0, 1e-40, 5.0]), torch.tensor([1e30, 0.0])])
    assert histogram.zeros == 6


@pytest.mark.parametrize("scale", [2.0**-120, 1e-3, 1.0, 3e4, 2.0**100])
def test_histogram_is_exact_on_both_ways_of_dividing(scale: float) -> None:
    values = torch.cat([torch.randn(2000), torch.tensor([-(2.0**-149), 2.0**-149, 0.0])]) * torch.tensor(scale)
    values[-3:] = torch.tensor([-(2.0**-149), 2.0**-149, 0.0])
    histogram = counted([values], bins=256)
    np.testing.assert_array_equal(histogram.counts.numpy(), np.histogram(values.double().numpy(), edges(histogram))[0])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_running_extremes_do_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    data = torch.randn(4, 2, 5)
    seen = RunningExtremes(momentum=0.3)
    for index in order:
        seen.update_at(data[index], 2 * index, 2)
    low = high = 0.0
    for k, row in enumerate(data.reshape(8, 5).double().tolist(), 1):
        step = max(1 / k, 0.3)
        low, high = low + step * (min(row) - low), high + step * (max(row) - high)
    assert (seen.low, seen.high) == pytest.approx((low, high), rel=1e-12)
    assert not seen.waiting


def test_running_extremes_count_samples_together_when_the_first_dimension_is_another() -> None:
    seen = RunningExtremes(momentum=0.1)
    seen.update_at(torch.tensor([[-1.0, 2.0], [0.0, 4.0], [1.0, 1.0]]), 0, 2)
    seen.update_at(torch.empty(0, 3), 2, 2)
    seen.update(torch.tensor(9.0))
    assert (seen.samples, seen.counted) == (5, 3)
    assert seen.high == pytest.approx((4 + 4 + 9) / 3)


def test_second_moments_equal_a_loop_over_observations_whatever_the_batches() -> None:
    x = torch.randn(2500, 3) * torch.tensor([1.0, 100.0, 1e-3]) + torch.tensor([0.0, 1e4, 5.0])
    seen = SecondMoments()
    for part in x.split([1, 1999, 0, 500]):
        seen.update(part)
    products, total = np.zeros((3, 3)), np.zeros(3)
    for row in x.double().numpy():
        products += np.outer(row, row)
        total += row
    assert seen.count == len(x)
    # float64 sums of 2500 terms in another order.
    np.testing.assert_allclose(seen.second.numpy(), products / len(x), rtol=2500 * 2.0**-52)
    np.testing.assert_allclose(seen.mean.numpy(), total / len(x), rtol=2500 * 2.0**-52, atol=1e-12)
    # A mean of 1e4 is 100 standard deviations: subtracting its square costs 4 of float64's 15 digits.
    np.testing.assert_allclose(seen.covariance.numpy(), np.cov(x.double().numpy().T, bias=True), rtol=1e-8, atol=1e-8)


def test_second_moments_of_groups_are_those_of_each_group() -> None:
    x = torch.randn(4, 7, 3)
    seen = SecondMoments()
    seen.update(x)
    for group, rows in enumerate(x):
        alone = SecondMoments()
        alone.update(rows)
        assert torch.allclose(seen.products[group], alone.products, rtol=1e-14)


def test_second_moments_refuse_what_is_not_finite_or_of_another_width() -> None:
    seen = SecondMoments()
    with pytest.raises(DataError, match="no observations"):
        _ = seen.second
    with pytest.raises(DataError, match="not finite"):
        seen.update(torch.tensor([[1.0, float("nan")]]))
    seen = SecondMoments()
    seen.update(torch.ones(2, 3))
    with pytest.raises(DataError, match="before"):
        seen.update(torch.ones(2, 4))


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, bias=False),
    nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4, bias=False),
    nn.Conv2d(4, 8, 1, bias=False),
    nn.Conv2d(4, 3, (2, 4), padding="same", bias=False),
    nn.Conv3d(4, 2, (1, 2, 3), padding=(0, 1, 1), stride=2, bias=False),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_rows_times_the_weight_are_the_layers_output(layer: nn.Conv2d) -> None:
    x = torch.randn(3, 4, *[9, 8, 7][: layer.weight.ndim - 2])
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
    program = torch.export.export(layer, (x,))
    node = next(node for node in program.graph.nodes if "conv" in str(node.target))
    rows = input_rows(node, x)
    direct = convolution_rows(
        x,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    assert torch.equal(rows, direct)
    weight = layer.weight.reshape(layer.groups, -1, rows.shape[-1])
    expected = layer(x)
    batches = (rows @ weight.mT).reshape(layer.groups, len(x), -1, weight.shape[1])
    found = batches.permute(1, 0, 3, 2).reshape(expected.shape)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums of at most 24 products


def test_rows_of_a_linear_layer_are_its_inputs() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 4, 5)
    program = torch.export.export(layer, (x,))
    node = next(node for node in program.graph.nodes if "linear" in str(node.target))
    assert torch.equal(input_rows(node, x), x.reshape(8, 5))
    assert torch.allclose(F.linear(linear_rows(x), layer.weight, layer.bias), layer(x).reshape(8, 3), atol=1e-6)


def test_rows_of_some_positions_are_spread_over_the_image_and_the_same_again() -> None:
    x = torch.arange(2 * 64.0).reshape(2, 1, 8, 8)
    all_rows = convolution_rows(x, [1, 1], stride=[1, 1], dilation=[1, 1])
    some = convolution_rows(x, [1, 1], stride=[1, 1], dilation=[1, 1], positions=8)
    assert some.shape == (1, 16, 1)
    assert torch.equal(some, convolution_rows(x, [1, 1], stride=[1, 1], dilation=[1, 1], positions=8))
    assert set(some.flatten().tolist()) <= set(all_rows.flatten().tolist())
    first = some[0, :8, 0].long()
    assert len(set(first.tolist())) == 8
    assert len(set((first % 8).tolist())) >= 4, "a column of the image, not the image"
    assert len(set((first // 8).tolist())) >= 4


@pytest.mark.parametrize("total", [2, 7, 12, 49, 112 * 112])
def test_spread_visits_no_index_twice(total: int) -> None:
    found = spread(total, total - 1).tolist()
    assert len(set(found)) == total - 1
    assert 0 <= min(found) <= max(found) < total
    assert torch.equal(spread(total, None), torch.arange(total))
    assert torch.equal(spread(total, total + 5), torch.arange(total))
