"""Sums that saturate in 16 bits: against loops written out, and against ONNX Runtime's own AVX2 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.measure.saturation import can_saturate, neighbours, reach
from pared.quantize.affine import QParams, grid, quantize
from pared.quantize.saturation import convolution_sums, exact_product, linear_sums, safe_scale
from saturating import on_avx2


def naive(row: np.ndarray, window: np.ndarray) -> int:
    """One sum as `pmaddubsw` makes it: two products, cut to 16 bits, then added in 64."""
    total = 0
    for k in range(0, len(row), 2):
        pair = sum(int(row[i]) * int(window[i]) for i in range(k, min(k + 2, len(row))))
        total += max(-(2**15), min(2**15 - 1, pair))
    return total


def naive_convolution(
    x: np.ndarray, weight: np.ndarray, stride: int, dilation: int, groups: int, *, saturate: bool
) -> np.ndarray:
    outs, inside, kernel = weight.shape[:3]
    size = (x.shape[2] - (kernel - 1) * dilation - 1) // stride + 1
    found = np.zeros((len(x), outs, size, size), np.int64)
    for n, o, i, j in np.ndindex(found.shape):
        first = o // (outs // groups) * inside
        taps = [
            (x[n, first + c, i * stride + u * dilation, j * stride + v * dilation], weight[o, c, u, v])
            for u in range(kernel)
            for v in range(kernel)
            for c in range(inside)
        ]
        window, row = map(np.array, zip(*taps, strict=True))
        exact = int((window.astype(np.int64) * row.astype(np.int64)).sum())
        found[n, o, i, j] = naive(row, window) if saturate else exact
    return found


def extreme(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Activations and weights of which many are at the ends of their range."""
    x = generator.integers(0, 256, shape).astype(np.uint8)
    x[x > 90] = 255
    return x


def weights(generator: np.random.Generator, *shape: int) -> np.ndarray:
    values = generator.integers(-127, 128, shape)
    return np.where(np.abs(values) > 60, np.sign(values) * 127, values).astype(np.int8)


LAYERS = [
    (2, 3, 3, 1, 1, 1),
    (4, 6, 2, 2, 1, 2),
    (3, 4, 3, 1, 2, 1),
    (5, 5, 3, 1, 1, 5),
    (3, 6, 3, 2, 1, 3),
    (5, 2, 1, 2, 1, 1),
]


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize(("inside", "outside", "kernel", "stride", "dilation", "groups"), LAYERS)
def test_convolution_equals_a_loop_over_pairs(
    inside: int, outside: int, kernel: int, stride: int, dilation: int, groups: int, saturate: bool
) -> None:
    generator = np.random.default_rng(0)
    x, w = extreme(generator, 2, inside, 7, 7), weights(generator, outside, inside // groups, kernel, kernel)
    depthwise = groups == inside == outside
    expected = naive_convolution(x, w, stride, dilation, groups, saturate=saturate and not depthwise)
    found = convolution_sums(
        torch.from_numpy(x),
        torch.from_numpy(w),
        stride=(stride, stride),
        dilation=(dilation, dilation),
        groups=groups,
        saturate=saturate,
    )
    assert found.dtype == torch.int32 and np.array_equal(found.numpy(), expected)
    exact = naive_convolution(x, w, stride, dilation, groups, saturate=False)
    assert (saturate and not depthwise) == (not np.array_equal(expected, exact))


@pytest.mark.parametrize("width", [1, 2, 7, 1031])
def test_linear_equals_a_loop_over_pairs(width: int) -> None:
    generator = np.random.default_rng(1)
    x, w = extreme(generator, 3, 2, width), weights(generator, 5, width)
    x.flat[0] = 255
    expected = [[[naive(row, window) for row in w] for window in rows] for rows in x]
    assert linear_sums(torch.from_numpy(x), torch.from_numpy(w), saturate=True).tolist() == expected
    exact = x.astype(np.int64) @ w.astype(np.int64).T
    assert np.array_equal(linear_sums(torch.from_numpy(x), torch.from_numpy(w), saturate=False).numpy(), exact)


def test_exact_product_is_exact_when_the_sum_is_too_large_for_float32() -> None:
    columns, weight = torch.full((5001, 1), 255, dtype=torch.uint8), torch.full((1, 5001), 127, dtype=torch.int8)
    assert exact_product(weight, columns).item() == 5001 * 255 * 127


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 3, 11, 11), (16, 3, 3, 3), {"pads": [1] * 4, "strides": [2, 2]}),
    ((2, 8, 6, 6), (24, 8, 3, 3), {"pads": [1] * 4}),
    ((1, 8, 6, 6), (10, 8, 1, 1), {}),
    ((1, 6, 9, 9), (4, 3, 3, 3), {"group": 2, "dilations": [2, 2]}),
    ((1, 16, 6, 6), (16, 1, 3, 3), {"group": 16, "pads": [1] * 4}),
    ((1, 5, 6, 6), (5, 1, 3, 3), {"group": 5}),
    ((1, 4, 6, 6), (8, 1, 3, 3), {"group": 4}),
    ((1, 5, 20), (17, 5, 4), {}),
    ((1, 300, 3, 3), (32, 300, 3, 3), {"pads": [1] * 4}),
]


@pytest.mark.parametrize("number", range(len(CONVOLUTIONS)))
def test_convolution_equals_onnx_runtime_when_there_is_no_vnni(tmp_path: Path, number: int) -> None:
    """The runtime's own kernels: the order of the pairs, padding, depthwise layers, to the last integer."""
    shape, weight_shape, options = CONVOLUTIONS[number]
    generator = np.random.default_rng(number)
    x, w = extreme(generator, *shape), weights(generator, *weight_shape)
    zero = 37
    rank = len(shape) - 2
    groups = options.get("group", 1)
    ends = options.get("pads", [0] * 2 * rank)[0]
    padded = np.pad(x, ((0, 0), (0, 0), *[(ends, ends)] * rank), constant_values=zero)
    found = {}
    for saturate in (True, False):
        sums = convolution_sums(
            torch.from_numpy(padded),
            torch.from_numpy(w),
            stride=options.get("strides", [1] * rank),
            dilation=options.get("dilations", [1] * rank),
            groups=groups,
            saturate=saturate,
        ).numpy()
        offset = zero * w.reshape(len(w), -1).astype(np.int64).sum(1)
        found[saturate] = sums - offset.reshape(-1, *[1] * rank)
    # A power of two: the sum's steps are exact in float32 up to the rounding itself.
    scale = 2.0 ** np.ceil(np.log2(np.abs(found[True]).max() / 127))
    expected = np.clip(np.rint(found[True] / scale), -128, 127) + 128
    real = on_avx2("convolution", x, w, folder=tmp_path, scale=float(scale), zero_point=zero, **options)
    assert np.array_equal(real, expected)
    depthwise = groups == weight_shape[0] and weight_shape[1] == 1
    assert depthwise == (not (found[True] != found[False]).any())


def test_linear_equals_onnx_runtime_when_there_is_no_vnni(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    x, w = extreme(generator, 3, 531), weights(generator, 20, 531)
    sums = linear_sums(torch.from_numpy(x), torch.from_numpy(w), saturate=True).numpy()
    scale = 2.0 ** np.ceil(np.log2(np.abs(sums).max() / 127))
    assert np.array_equal(
        on_avx2("linear", x, w, folder=tmp_path, scale=float(scale)), np.clip(np.rint(sums / scale), -128, 127) + 128
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=14), st.sampled_from(["neighbours", "any"]))
def test_no_pair_saturates_when_the_scale_is_safe(values: list[float], order: str) -> None:
    weight = torch.tensor([values])
    scale = safe_scale(weight, groups=1, any_pair=order == "any").clamp(min=1e-30)
    # Rounding either way keeps the bound: so do methods that choose the side.
    for rounded in (torch.floor, torch.ceil, torch.round):
        q = rounded(weight.double() / scale.double()).clamp(-127, 127).to(torch.int8).numpy()
        pairs = [(0, 1)] if order == "neighbours" else [(a, b) for a in range(q.size) for b in range(a)]
        assert not can_saturate(q)
        for a, b in pairs:
            left, right = int(q[0, a]), int(q[0, b])
            for worst in ((255, 255), (255, 0), (0, 255)):
                assert -(2**15) <= worst[0] * left + worst[1] * right < 2**15


def test_safe_scale_needs_nothing_when_the_layer_is_depthwise() -> None:
    weight = torch.randn(4, 1, 3, 3)
    assert safe_scale(weight, groups=4, any_pair=False).tolist() == [0.0] * 4
    assert bool((safe_scale(weight, groups=1, any_pair=False) > 0).all())


def test_safe_weights_are_never_coarser_than_seven_bits_would_be() -> None:
    """The scale of 7 bits is max / 63: two weights as large as the largest."""
    weight = torch.randn(64, 288, generator=torch.Generator().manual_seed(0))
    scale = safe_scale(weight, groups=1, any_pair=False)
    seven = weight.abs().amax(1) / 63
    assert bool((scale <= seven * 1.00001).all())
    # Of normal weights the largest pair is far from twice the largest weight.
    assert scale.mean() < 0.75 * seven.mean()


def test_neighbours_follow_the_kernel_when_channels_are_odd() -> None:
    weight = np.arange(18).reshape(1, 3, 2, 3)
    expected = [c * 6 + k for k in range(6) for c in range(3)]
    assert neighbours(weight).reshape(-1).tolist() == expected


def test_reach_counts_both_orders_when_channels_are_odd() -> None:
    """By experiment: OpenVINO's jit_avx2_I8 pairs within a position, its jit_gemm_I8 and ONNX Runtime run on."""
    weight = np.zeros((2, 3, 1, 2), np.int8)
    weight[0, 2, 0, 0] = weight[0, 0, 0, 1] = 100  # neighbours where the order runs on
    weight[1, 0, 0, 1] = weight[1, 1, 0, 1] = 100  # neighbours within the second position
    assert reach(weight).tolist() == [200, 200]
    assert reach(weight[:, :2]).tolist() == [100, 200]


def test_reach_counts_one_sign_at_a_time() -> None:
    assert reach(np.array([[100, -100, 3, 4], [-90, -38, 0, 0]], np.int8)).tolist() == [100, 128]


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_seven_bits_and_fewer_never_saturate(bits: int) -> None:
    numbers = grid(bits=bits, signed=True, symmetric=True)
    weight = quantize(torch.randn(8, 64) * 100, QParams(torch.tensor(1.0), torch.tensor(0)), numbers)
    weight[0] = numbers.high
    assert not can_saturate(weight.numpy())
    eight: Tensor = torch.full((1, 2), 127, dtype=torch.int8)
    assert can_saturate(eight.numpy())
