"""Bias correction against means of what the layers really compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pared.activations import input_mean, input_rows
from pared.quantize.correction import shift_of
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (6,)),
    "linear on tokens": (nn.Linear(6, 5), (4, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 7)),
    "dilated": (nn.Conv2d(4, 6, (3, 1), dilation=(2, 1), padding=(2, 0)), (4, 9, 5)),
    "depthwise": (nn.Conv2d(4, 8, 5, padding=2, groups=4), (4, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 1, groups=2), (4, 3, 3)),
    "same": (nn.Conv1d(4, 6, 5, padding="same"), (4, 9)),
    "3-D": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 4, 5, 4)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), (4, 7, 7)),
}


def plan_of(model: nn.Module, data: list[Any], **settings: Any) -> tuple[dict[str, Any], fx.GraphModule]:
    task = Task(example_inputs=data[0], calibration=data)
    ctx = Context(task=task, target=OnnxRuntime(), work=Path(), dense=model)
    step = QuantizeStatic(**settings)
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    assert isinstance(program, fx.GraphModule)
    return dict(plan.facts), program


def means(y: Tensor, channels: int) -> Tensor:
    """Mean of each output channel, whatever the axis."""
    axis = 1 if y.ndim > 2 and y.shape[1] == channels and y.ndim != 3 else -1
    axis = 1 if y.ndim == 3 and y.shape[1] == channels else axis
    return y.double().movedim(axis, 0).flatten(1).mean(1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_corrected_layer_has_the_mean_output_of_the_float_one(name: str) -> None:
    torch.manual_seed(3)
    layer, shape = LAYERS[name]
    data = [torch.rand(6, *shape), torch.rand(3, *shape)]  # one-sided, so that errors do not cancel
    channels = layer.weight.shape[0]
    both = torch.cat(data)
    form = {"weights": {"bits": 4, "cpu": "vnni"}}
    with torch.no_grad():
        exact = means(layer(both), channels)
        plain = means(plan_of(layer, data, repairs=(), **form)[1](both), channels)
        fast = means(plan_of(layer, data, repairs=["correct_bias"], **form)[1](both), channels)
        full = {"kind": "correct_bias", "method": "full", "samples": 9}
        best = means(plan_of(layer, data, repairs=[full], **form)[1](both), channels)
    before = (plain - exact).abs().max()
    # The fast way leaves what rounding the input and the output shifts: a part of a quantum of 8 bits, of which the
    # mean over positions averages most away. Four bits of weight shift the mean by far more.
    assert (fast - exact).abs().max() < 0.25 * before
    assert (best - exact).abs().max() < 0.25 * before


@pytest.mark.parametrize("name", LAYERS)
def test_input_mean_is_the_mean_of_the_rows(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(5, *shape)
    task = Task(example_inputs=x)
    graph = torch.export.export(layer, task.example_inputs.args).graph
    node = next(node for node in graph.nodes if node.op == "call_function")
    expected = input_rows(node, x).double().mean(-2)
    assert torch.allclose(input_mean(node, x), expected, atol=1e-6)
    assert input_mean(node, x).shape == expected.shape


def test_shift_is_that_of_a_convolution_worked_out_by_running_it() -> None:
    torch.manual_seed(0)
    x, error = torch.randn(4, 4, 6, 6).double(), torch.randn(6, 2, 3, 3).double()
    rows = (
        torch.nn.functional.unfold(x, 3, padding=1, stride=2)
        .reshape(4, 2, 18, 9)
        .permute(1, 0, 3, 2)
        .reshape(2, -1, 18)
    )
    ran = torch.nn.functional.conv2d(x, error, padding=1, stride=2, groups=2)
    assert torch.allclose(shift_of(error, rows.mean(1)), ran.mean((0, 2, 3)))


def test_full_correction_repairs_what_earlier_layers_shifted() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(*layers).eval()
    data = [torch.rand(16, 3, 12, 12)]
    form = {"weights": {"bits": 3, "cpu": "vnni"}}
    full = {"kind": "correct_bias", "method": "full", "samples": 16}
    with torch.no_grad():
        exact = means(model(data[0]), 4)
        fast = means(plan_of(model, data, repairs=["correct_bias"], **form)[1](data[0]), 4)
        best = means(plan_of(model, data, repairs=[full], **form)[1](data[0]), 4)
    assert (best - exact).abs().max() < 0.5 * (fast - exact).abs().max()


def test_a_linear_layer_without_a_bias_is_given_none() -> None:
    facts, program = plan_of(nn.Sequential(nn.Linear(6, 5, bias=False)), [torch.rand(4, 6)])
    assert facts["corrections"] == {}
    assert not any("bias" in name for name in program.state_dict())


def test_order_and_size_of_batches_make_no_difference_to_corrections() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    data = torch.rand(24, 4, 7, 7)
    one = plan_of(layer, [data])[0]
    other = plan_of(layer, list(data.flip(0).split(4)))[0]
    again = plan_of(layer, [data])[0]
    assert one["corrections"] == again["corrections"]
    assert one["ranges"] == other["ranges"]
