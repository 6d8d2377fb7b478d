"""Rounding in groups against a loop over single weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

from pared.errors import QuantizeError
from pared.quantize.affine import grid
from pared.quantize.grouping import in_groups, nearest, restored


def looped(weight: np.ndarray, bits: int, size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Integers and real numbers of every weight, one group after the other."""
    low, high = (-(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1)
    integers, real = np.zeros(weight.shape, np.int64), np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size].astype(np.float64)
            least, most = min(group.min(), 0.0), max(group.max(), 0.0)
            reach = 2 * max(-least, most) if symmetric else most - least
            scale = float(np.float32(reach / (high - low))) or 1.0
            zero = 0 if symmetric else int(np.clip(low - np.rint(least / scale), low, high))
            found = np.clip(np.rint(group / scale) + zero, low, high).astype(np.int64)
            integers[row, start : start + size] = found
            real[row, start : start + size] = (found - zero) * scale
    return integers, real


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (3, 7), (4, 5), (4, 16), (8, 11)])
def test_nearest_equals_a_loop_over_single_weights(bits: int, size: int, symmetric: bool) -> None:
    weight = torch.randn(6, 11) * torch.logspace(-3, 3, 6).unsqueeze(1)
    weight[2] = weight[2].abs()
    weight[3, :5] = 0.0
    numbers = grid(bits=bits, signed=True, symmetric=symmetric)
    found = nearest(weight, numbers, size, symmetric=symmetric)
    integers, real = looped(weight.numpy(), bits, size, symmetric)
    np.testing.assert_array_equal(found.values[:, :11].numpy(), integers)
    # Real numbers are products of an integer and a float32 scale, in float32.
    np.testing.assert_allclose(restored(found, 11).numpy(), real, rtol=2.0**-23)


def test_restored_equals_pytorchs_operator() -> None:
    weight = torch.randn(5, 24)
    found = nearest(weight, grid(bits=4, signed=True, symmetric=False), 8, symmetric=False)
    operator = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
    expected = operator(*found, -8, 7, torch.int8, 8, torch.float32)
    assert torch.equal(restored(found, 24), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=12),
    st.integers(2, 8),
    st.integers(1, 13),
    st.booleans(),
)
def test_error_is_half_a_quantum_at_most_and_zero_is_exact(
    values: list[float], bits: int, size: int, symmetric: bool
) -> None:
    weight = torch.tensor([values])
    found = nearest(weight, grid(bits=bits, signed=True, symmetric=symmetric), size, symmetric=symmetric)
    real = restored(found, len(values)).double()
    quantum = found.scale.repeat_interleave(size, 1)[:, : len(values)].double()
    # A rounded zero point moves an end of the grid by half a quantum more; scales are float32.
    assert bool(((weight.double() - real).abs() <= quantum * (0.5 if symmetric else 1.0) * 1.0001).all())
    assert bool((real[weight == 0] == 0).all())


def test_groups_are_refused_when_there_is_no_matrix() -> None:
    with pytest.raises(QuantizeError, match="matrix"):
        in_groups(torch.randn(3), 2)
    with pytest.raises(QuantizeError, match="not finite"):
        nearest(torch.tensor([[float("nan")]]), grid(bits=4, signed=True, symmetric=True), 1, symmetric=True)
