"""From calibration data to ranges: every calibrator on ragged data, and warnings that hold the evidence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.errors import ParedWarning, QuantizeError
from pared.quantize.doubts import excess
from pared.quantize.ranges import RANGES
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task

ALL = [name for name in RANGES if name != "auto"]


def planned(model: nn.Module, task: Task, **settings: Any) -> Plan:
    ctx = Context(task=task, target=OnnxRuntime(), work=Path(), dense=model)
    return QuantizeStatic(**settings).plan(model, ctx)


def about_ranges(plan: Plan) -> list[str]:
    """What the plan warns of, less what it says of the speed of so small a network."""
    return [text for text in plan.facts["warnings"] if "samples" in text]


def convolutions() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).eval()


def images(*shapes: tuple[int, int, int]) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.rand(n, 3, h, w) for n, h, w in shapes]


@pytest.mark.parametrize("ranges", [*ALL, "auto"])
def test_ranges_take_ragged_batches_of_several_sizes(ranges: str) -> None:
    model = convolutions()
    data = images((5, 12, 12), (3, 20, 16), (1, 12, 12))
    task = Task(example_inputs=data[0], calibration=data, validation=data, dynamic={0: {2: "height", 3: "width"}})
    plan = planned(model, task, ranges=ranges)
    assert plan.facts["samples"] == 9
    with torch.no_grad():
        hidden = torch.cat([model[1](model[0](x)).flatten() for x in data])
    (low, high) = plan.facts["ranges"]["relu"]
    assert 0 <= low < 1e-6  # within a bin of the zeros that a ReLU makes
    assert 0.3 * hidden.max().item() <= high <= hidden.max().item() * (1 + 1e-6)
    if ranges == "minmax":
        assert high == pytest.approx(hidden.max().item(), rel=1e-6)


def test_moving_average_does_not_depend_on_threads() -> None:
    model, data = convolutions(), images((37, 12, 12), (6, 12, 12))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            plan = planned(model, Task(example_inputs=data[0], calibration=data), ranges="moving_average")
            found.append(plan.facts["ranges"])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    per_image = torch.cat(data).amax((1, 2, 3)).double()
    expected = per_image.mean().item()  # fewer than 1 / momentum samples: a plain mean
    name = next(name for name in found[0] if "input" in name)
    assert found[0][name][1] == pytest.approx(expected, rel=1e-9)


def test_no_warning_when_the_data_are_alike() -> None:
    data = images((40, 12, 12), (24, 12, 12), (16, 12, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = planned(convolutions(), Task(example_inputs=data[0], calibration=data[:2], validation=data[2:]))
    assert about_ranges(plan) == []


def test_warning_names_tensors_and_ranges_when_later_batches_leave_them() -> None:
    early, late = images((24, 12, 12), (8, 12, 12))
    task = Task(example_inputs=early, calibration=[early, late * 10])
    with pytest.warns(
        ParedWarning, match="the last 8 of 32 calibration samples leave the range of the first 24"
    ) as seen:
        plan = planned(convolutions(), task)
    assert [str(item.message) for item in seen] == about_ranges(plan)
    (text,) = about_ranges(plan)
    assert f"[{early.min():.4g}, {early.max():.4g}] -> [{early.min():.4g}, {10 * late.max():.4g}]" in text
    assert "in 3 of 3 tensors" in text


def test_warning_is_found_within_one_large_batch() -> None:
    early, late = images((96, 8, 8), (32, 8, 8))
    with pytest.warns(ParedWarning, match="the last 32 of 128 calibration samples"):
        planned(convolutions(), Task(example_inputs=early, calibration=[torch.cat([early, late * 10])]))


def test_warning_says_that_validation_data_are_unlike() -> None:
    calibration, validation = images((24, 12, 12), (20, 12, 12))
    task = Task(example_inputs=calibration, calibration=[calibration], validation=[validation * 255])
    with pytest.warns(ParedWarning, match="16 validation samples leave the range of the 24 calibration samples"):
        plan = planned(convolutions(), task)
    assert "prepared as the validation data are" in about_ranges(plan)[0]


def test_step_names_layer_and_batch_when_an_activation_is_not_finite() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.exp(self.first(x)))

    data = [torch.randn(4, 4), torch.randn(4, 4) * 1e6]
    with pytest.raises(QuantizeError, match=r"\(exp\): values are not finite") as caught:
        planned(Overflow().eval(), Task(example_inputs=data[0], calibration=data), ranges="kl")
    assert caught.value.__notes__ == ["while calibrating on batch 1"]


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        ((0.0, 2.0), (0.0, 2.0), 0.0),
        ((0.0, 2.0), (1.0, 1.5), 0.0),
        ((1.0, 2.0), (0.5, 4.0), 1.0),
        ((-1.0, 1.0), (-2.0, 1.5), 0.5),
        ((-3.0, -1.0), (-1.0, 3.0), 1.0),
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((0.0, 2.0), (float("inf"), float("-inf")), 0.0),
    ],
)
def test_excess_is_in_widths_of_the_range_that_holds_zero(earlier: Any, later: Any, expected: float) -> None:
    assert excess(earlier, later) == expected
