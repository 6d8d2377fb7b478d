"""GPTQ against optimal brain quantization written out: one inverse after the other, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pared.errors import QuantizeError
from pared.quantize import gptq as module
from pared.quantize.affine import grid
from pared.quantize.gptq import gptq
from pared.quantize.grouping import nearest, restored

BITS = 3


def correlated(columns: int, rows: int = 400) -> Tensor:
    """Second moments of inputs that have much in common."""
    torch.manual_seed(columns)
    x = torch.randn(rows, columns // 2) @ torch.randn(columns // 2, columns) + 0.3 * torch.randn(rows, columns)
    return x.double().mT @ x.double() / rows


def pair(group: np.ndarray) -> tuple[float, int]:
    """Scale and zero point of a group, worked out by hand."""
    least, most = min(group.min(), 0.0), max(group.max(), 0.0)
    scale = float(np.float32((most - least) / (2**BITS - 1))) or 1.0
    return scale, int(np.clip(-4 - np.rint(least / scale), -4, 3))


def slow(weight: np.ndarray, hessian: np.ndarray, size: int, damping: float, by_activation: bool) -> np.ndarray:
    """Optimal brain quantization in a fixed order: the inverse of what is left is taken anew for each column.

    Source: Frantar et al. 2022, arXiv:2210.17323, eq. 2: the weights to come move by -(w - q) / [F^-1]_00 * [F^-1]_0:,
    F being the Hessian of the columns that are left.
    """
    columns = weight.shape[1]
    h = hessian + damping * np.diag(hessian).mean() * np.eye(columns)
    order = np.argsort(-np.diag(hessian), kind="stable") if by_activation else np.arange(columns)
    real = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        w = weight[row].copy()
        fixed = {start: pair(w[start : start + size]) for start in range(0, columns, size)}
        for position, column in enumerate(order):
            start = column // size * size
            if not by_activation and column == start:
                fixed[start] = pair(w[start : start + size])
            scale, zero = fixed[start]
            q = np.clip(np.rint(w[column] / scale) + zero, -4, 3)
            real[row, column] = (q - zero) * scale
            left = order[position:]
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            w[left] -= (w[column] - real[row, column]) / inverse[0, 0] * inverse[0]
    return real


def loss(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """Mean square of the layer's output error."""
    difference = weight.double() - other.double()
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize(("columns", "size", "block"), [(12, 4, 4), (12, 5, 8), (12, 12, 128), (9, 3, 1)])
def test_gptq_equals_optimal_brain_quantization_written_out(
    columns: int, size: int, block: int, by_activation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    hessian, weight = correlated(columns), torch.randn(5, columns)
    numbers = grid(bits=BITS, signed=True, symmetric=False)
    found = gptq(weight, hessian, numbers, size, symmetric=False, damping=0.05, by_activation=by_activation)
    expected = slow(weight.double().numpy(), hessian.numpy(), size, 0.05, by_activation)
    # The same integers; only the products with float32 scales are rounded otherwise.
    np.testing.assert_allclose(restored(found, columns).numpy(), expected, rtol=2.0**-22, atol=1e-12)


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize(("bits", "size", "symmetric"), [(2, 16, False), (3, 32, True), (4, 32, False), (8, 64, False)])
def test_error_of_gptq_is_below_that_of_nearest_on_correlated_inputs(
    bits: int, size: int, symmetric: bool, by_activation: bool
) -> None:
    hessian = correlated(64)
    numbers = grid(bits=bits, signed=True, symmetric=symmetric)
    for seed in range(3):
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        own = gptq(weight, hessian, numbers, size, symmetric=symmetric, by_activation=by_activation)
        other = nearest(weight, numbers, size, symmetric=symmetric)
        assert loss(weight, restored(own, 64), hessian) < 0.7 * loss(weight, restored(other, 64), hessian)


def test_gptq_is_nearest_when_inputs_have_nothing_in_common() -> None:
    weight = torch.randn(4, 20)
    numbers = grid(bits=4, signed=True, symmetric=False)
    found = gptq(weight, torch.eye(20, dtype=torch.float64) * 3, numbers, 8, symmetric=False)
    expected = nearest(weight, numbers, 8, symmetric=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_zeros_stay_and_columns_without_input_are_rounded_to_nearest() -> None:
    hessian, weight = correlated(16), torch.randn(6, 16)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    weight[torch.rand(6, 16) < 0.4] = 0.0
    numbers = grid(bits=4, signed=True, symmetric=False)
    for by_activation in (False, True):
        real = restored(gptq(weight, hessian, numbers, 16, symmetric=False, by_activation=by_activation), 16)
        assert bool((real[weight == 0] == 0).all())
    found = restored(gptq(weight, hessian, numbers, 16, symmetric=False, by_activation=True), 16)
    assert torch.equal(found[:, 3], restored(nearest(weight, numbers, 16, symmetric=False), 16)[:, 3])


def test_gptq_refuses_a_hessian_that_does_not_fit() -> None:
    numbers = grid(bits=4, signed=True, symmetric=True)
    with pytest.raises(QuantizeError, match="Hessian of that size"):
        gptq(torch.randn(2, 3), torch.eye(4), numbers, 2, symmetric=True)
    with pytest.raises(QuantizeError, match="raise it"):
        gptq(torch.randn(2, 2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]), numbers, 2, symmetric=True)
