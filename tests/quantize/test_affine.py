"""The affine arithmetic against PyTorch's own operators, ONNX Runtime, and the bounds that it promises."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from torch import Tensor

from pared.errors import QuantizeError
from pared.quantize.affine import (
    INT32_MAX,
    Grid,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    fit_bias,
    grid,
    qparams_of_range,
    quantize,
    quantize_bias,
)

UINT8 = grid(bits=8, signed=False, symmetric=False)
INT8 = grid(bits=8, signed=True, symmetric=True)
# Near 2^128 a scale that is rounded up makes the outermost integer overflow float32 itself.
FINITE = st.floats(-(2.0**127), 2.0**127, width=32)
MODEST = st.floats(-1e4, 1e4, width=32)
GROUPS = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 20), elements=FINITE),
    hnp.arrays(np.float32, st.integers(1, 20), elements=MODEST),
    hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(0, 1, width=32)),
    hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-6, 0, width=32)),
    hnp.arrays(np.float32, 5, elements=MODEST, fill=st.nothing()).map(lambda x: np.full_like(x, x[0])),
    st.sampled_from([0.0, 1e-45, -1e-38, 1e-38, 3e-36, 1e30, -1e30]).map(lambda v: np.full(3, v, np.float32)),
)
NUMBERS = st.tuples(st.integers(2, 8), st.booleans(), st.booleans())


def bound(x: Tensor, qparams: QParams) -> Tensor:
    """scale / 2, and what float32 adds to it.

    x / scale, the sum and the product with scale round by 2^-24 of their size each, a scale by as much; sizes are at
    most the larger of |x| and 255 scales.
    """
    scale = qparams.scale.double()
    return scale / 2 + 8 * 2.0**-24 * torch.maximum(x.double().abs(), 255 * scale)


@settings(max_examples=300, deadline=None)
@given(GROUPS, NUMBERS)
def test_fake_quantize_stays_within_half_a_scale_for_any_finite_group(values: np.ndarray, width: tuple) -> None:
    bits, signed, symmetric = width
    numbers = grid(bits=bits, signed=signed, symmetric=symmetric)
    x = torch.from_numpy(values)
    qparams = choose_qparams(x, numbers, symmetric=symmetric)
    found = dequantize(quantize(x, qparams, numbers), qparams)
    assert qparams.scale > 0
    assert bool(((x.double() - found.double()).abs() <= bound(x, qparams)).all())
    assert fake_quantize(torch.zeros(1), qparams, numbers).item() == 0.0
    assert numbers.low <= qparams.zero_point.item() <= numbers.high


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (3, 4), elements=MODEST), st.sampled_from([0, 1]))
def test_choose_qparams_treats_each_index_of_an_axis_alone_when_given_an_axis(values: np.ndarray, axis: int) -> None:
    x = torch.from_numpy(values)
    together = choose_qparams(x, UINT8, symmetric=False, axis=axis)
    for index in range(x.shape[axis]):
        alone = choose_qparams(x.select(axis, index), UINT8, symmetric=False)
        assert together.scale.select(axis, index).item() == alone.scale.item()
        assert together.zero_point.select(axis, index).item() == alone.zero_point.item()
    assert together.scale.shape == tuple(n if d == axis else 1 for d, n in enumerate(x.shape))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=MODEST))
def test_quantize_is_odd_when_symmetric(values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    qparams = choose_qparams(x, INT8, symmetric=True)
    assert qparams.zero_point.item() == 0
    assert torch.equal(quantize(-x, qparams, INT8), -quantize(x, qparams, INT8))


def test_symmetric_zero_point_is_the_middle_of_an_unsigned_grid() -> None:
    assert qparams_of_range(torch.tensor(-1.0), torch.tensor(2.0), UINT8, symmetric=True).zero_point.item() == 128


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 30), elements=MODEST), st.floats(1e-3, 1e3), st.integers(0, 255))
def test_fake_quantize_equals_torch_per_tensor(values: np.ndarray, scale: float, zero_point: int) -> None:
    x = torch.from_numpy(values)
    single = torch.tensor(scale)
    # torch multiplies by 1 / scale where ONNX and we divide: at the border of two integers they may part.
    clear = ((x.double() / single.double()) % 1 - 0.5).abs() > 1e-3
    expected = torch.fake_quantize_per_tensor_affine(x, single.item(), zero_point, 0, 255)
    found = fake_quantize(x, QParams(single, torch.tensor(zero_point)), UINT8)
    assert torch.equal(found[clear], expected[clear])


def test_fake_quantize_equals_torch_per_channel() -> None:
    x = torch.randn(6, 5, 3)
    qparams = choose_qparams(x, INT8, symmetric=True, axis=1)
    expected = torch.fake_quantize_per_channel_affine(
        x, qparams.scale.flatten(), qparams.zero_point.flatten(), 1, -127, 127
    )
    clear = ((x.double() / qparams.scale) % 1 - 0.5).abs() > 1e-3
    assert torch.equal(fake_quantize(x, qparams, INT8)[clear], expected[clear])


def onnx_quantizer(dtype: int) -> onnxruntime.InferenceSession:
    """QuantizeLinear, then DequantizeLinear, as ONNX Runtime runs them."""
    scalar = [helper.make_tensor_value_info("scale", TensorProto.FLOAT, [])]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            *scalar,
            helper.make_tensor_value_info("zero", dtype, []),
        ],
        [
            helper.make_tensor_value_info("q", dtype, ["n"]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [(UINT8, TensorProto.UINT8), (grid(bits=8, signed=True, symmetric=False), TensorProto.INT8)],
)
def test_quantize_equals_onnx_runtime_bit_for_bit(numbers: Grid, dtype: int) -> None:
    session = onnx_quantizer(dtype)
    halves = torch.arange(-600, 600) / 2  # every tie between two integers, and beyond both ends
    random = torch.randn(2000) * 30
    for scale, zero_point in [(1.0, 0), (0.1, 7), (0.037, 100), (2.0**-20, 3)]:
        x = torch.cat([halves * scale, random, torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40])])
        qparams = QParams(torch.tensor(scale), torch.tensor(zero_point))
        kind = numbers.dtype
        feed = {
            "x": x.numpy(),
            "scale": np.array(scale, np.float32),
            "zero": np.array(zero_point, dtype=str(kind).removeprefix("torch.")),
        }
        q, y = session.run(None, feed)
        found = quantize(x, qparams, numbers)
        assert torch.equal(found, torch.from_numpy(q))
        assert torch.equal(dequantize(found, qparams), torch.from_numpy(y))


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    qparams = QParams(torch.tensor(1.0), torch.tensor(0))
    x = torch.tensor([0.5, 1.5, 2.5, 254.5, 255.5, 300.0, -0.5, -3.0])
    assert quantize(x, qparams, UINT8).tolist() == [0, 2, 2, 254, 255, 255, 0, 0]


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_grid_refuses_when_bits_are_out_of_range(bits: int) -> None:
    with pytest.raises(QuantizeError, match=f"2 to 8, found {bits}"):
        grid(bits=bits, signed=True, symmetric=True)


def test_choose_qparams_refuses_when_empty_or_not_finite() -> None:
    with pytest.raises(QuantizeError, match="empty"):
        choose_qparams(torch.empty(0, 3), UINT8, symmetric=False)
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(QuantizeError, match="not finite"):
            choose_qparams(torch.tensor([[0.0, 1.0], [bad, 2.0]]), UINT8, symmetric=False, axis=0)


def test_qparams_of_range_refuses_when_upside_down() -> None:
    with pytest.raises(QuantizeError, match="upside down"):
        qparams_of_range(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), UINT8, symmetric=False)


def test_quantize_bias_refuses_and_fit_bias_widens_when_it_overflows() -> None:
    bias, x_scale = torch.tensor([1.0, -5.0, 0.25, 0.0]), torch.tensor(0.02)
    weight_scale = torch.tensor([1e-12, 1e-20, 0.01, 1e-38])
    with pytest.raises(QuantizeError, match="int32"):
        quantize_bias(bias, x_scale, weight_scale)
    wide = fit_bias(weight_scale, bias, x_scale)
    assert bool((wide >= weight_scale).all())
    assert wide[2] == weight_scale[2], "a bias that fits leaves its scale alone"
    values, scale = quantize_bias(bias, x_scale, wide)
    assert values.dtype == torch.int32
    # Half of int32 stays free for the sum of products, but for the rounding of the scale.
    assert values.abs().max().item() <= INT32_MAX // 2 + 2**8
    assert bool(((values.double() * scale.double() - bias.double()).abs() <= scale.double() / 2 * (1 + 1e-6)).all())


def test_quantize_bias_gives_zero_when_the_scale_underflows() -> None:
    bias, x_scale, weight_scale = torch.zeros(1), torch.tensor(1e-12), torch.tensor([2e-38])
    values, scale = quantize_bias(bias, x_scale, fit_bias(weight_scale, bias, x_scale))
    assert values.tolist() == [0]
    assert scale.item() > 0
