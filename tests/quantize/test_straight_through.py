"""Fake quantization with derivatives, against PyTorch's own learnable one, which is another implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pared.quantize.affine import Grid, QParams, fake_quantize, grid
from pared.quantize.straight_through import closest_scale, fake_quantize_trained

U8, S4 = grid(bits=8, signed=False, symmetric=False), grid(bits=4, signed=True, symmetric=True)


def gradients(result: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a weighted sum of the result, so that every element counts differently."""
    weights = torch.linspace(-1, 2, result.numel()).reshape(result.shape)
    return list(torch.autograd.grad((result * weights).sum(), inputs))


@pytest.mark.parametrize("zero_point", [0, 100])
@pytest.mark.parametrize("shape", [(64,), (4, 3, 5, 5)])
def test_value_and_gradients_are_those_of_pytorch_when_one_scale_serves_all(zero_point: int, shape: tuple[int]) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2).requires_grad_()
    scale = torch.tensor(0.011, requires_grad=True)
    ours = fake_quantize_trained(x, scale, zero_point, U8)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(
        x, scale.reshape(1), torch.tensor([float(zero_point)]), U8.low, U8.high, 1.0
    )
    assert torch.equal(ours, theirs)
    assert bool((ours == ours.amax()).sum() > 1)  # some are clipped
    for one, other in zip(gradients(ours, x, scale), gradients(theirs, x, scale), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_value_and_gradients_are_those_of_pytorch_when_each_channel_has_a_scale(axis: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6, 3).requires_grad_()
    scale = (torch.rand(6) * 0.3 + 0.05).requires_grad_()
    shape = [1, 1, 1]
    shape[axis] = 6
    ours = fake_quantize_trained(x, scale.reshape(shape), 0, S4)
    theirs = torch._fake_quantize_learnable_per_channel_affine(x, scale, torch.zeros(6), axis, S4.low, S4.high, 1.0)
    assert torch.equal(ours, theirs)
    for one, other in zip(gradients(ours, x, scale), gradients(theirs, x, scale), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_value_is_that_of_the_affine_map_when_strides_are_permuted() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale = torch.tensor(0.02, requires_grad=True)
    ours = fake_quantize_trained(x, scale, 7, U8)
    expected = fake_quantize(x.detach(), QParams(scale.detach(), torch.tensor(7, dtype=torch.int32)), U8)
    assert torch.equal(ours.detach(), expected)
    plain = x.detach().contiguous().requires_grad_()
    for one, other in zip(
        gradients(ours, x, scale), gradients(fake_quantize_trained(plain, scale, 7, U8), plain, scale), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_half_precision_is_quantized_in_float32() -> None:
    x = torch.tensor([0.1, 0.2], dtype=torch.bfloat16, requires_grad=True)
    found = fake_quantize_trained(x, torch.tensor(0.001), 0, U8)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_closest_scale_has_less_error_than_the_largest_value_when_bits_are_few(bits: int) -> None:
    torch.manual_seed(0)
    weight, numbers = torch.randn(5, 40), grid(bits=bits, signed=True, symmetric=True)
    found = closest_scale(weight, numbers, axis=0)
    assert found.shape == (5, 1)

    def error(row: Tensor, scale: float) -> float:
        steps = (row / scale).round().clamp(numbers.low, numbers.high)
        return float((steps * scale - row).square().sum())

    for row, scale in zip(weight, found.flatten().tolist(), strict=True):
        whole = float(row.abs().max()) / numbers.high
        tried = [error(row, whole * share / 1000) for share in range(300, 1001)]
        assert error(row, scale) <= error(row, whole)
        # A search 25 times as fine finds little more: the error is flat, with teeth, around its minimum.
        assert error(row, scale) <= 1.1 * min(tried)


def test_closest_scale_clips_nothing_at_8_bits_and_survives_zeros() -> None:
    eight = grid(bits=8, signed=True, symmetric=True)
    assert closest_scale(torch.tensor([[1.0, -2.54]]), eight, axis=0).item() == pytest.approx(0.02)
    assert closest_scale(torch.zeros(2, 3), Grid(-7, 7, torch.int8), axis=0).flatten().tolist() == [1.0, 1.0]
