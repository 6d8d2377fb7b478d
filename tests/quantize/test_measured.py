"""The choice by measured effect, against models run whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.errors import SettingError, UsageError
from pared.quantize.ranges import Auto
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Inputs, Task
from zoo_models import OUTPUT, make


def planned(model: nn.Module, task: Task, ranges: Any) -> Plan:
    ctx = Context(task=task, target=OnnxRuntime(), work=Path(), dense=model)
    return QuantizeStatic(ranges=ranges).plan(model, ctx)


def outlier_task() -> tuple[nn.Module, Task]:
    """One calibration sample is far out, and nothing like it comes in validation."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).eval()
    calibration = torch.randn(600, 12)
    calibration[7, 3] = 60.0
    return model, Task(example_inputs=(calibration[:2],), calibration=[calibration], validation=[torch.randn(24, 12)])


def test_auto_leaves_out_the_outlier_that_minmax_keeps() -> None:
    model, task = outlier_task()
    plan = planned(model, task, "auto")
    facts = plan.facts["auto"]
    (root,) = [name for name in plan.facts["ranges"] if "input" in name]
    assert plan.facts["ranges"][root][1] < 10
    assert facts["chosen"][root] != "minmax"
    assert facts["sqnr_db"][facts["kept"]] == max(facts["sqnr_db"].values())
    assert facts["sqnr_db"][facts["kept"]] > facts["sqnr_db"]["minmax"] + 10
    assert (facts["samples"], facts["seconds"] >= 0) == (16, True)
    assert facts["measured"] == facts["tensors"] > 0
    assert Plan.from_json(plan.to_json()) == plan


def test_auto_returns_the_best_single_calibrator_when_there_is_no_time() -> None:
    model, task = outlier_task()
    facts = planned(model, task, Auto(seconds=0)).facts["auto"]
    assert facts["measured"] == 0
    single = {kind: value for kind, value in facts["sqnr_db"].items() if kind != "measured"}
    assert facts["kept"] == max(single, key=lambda kind: single[kind])
    assert facts["samples"] == 4, "the samples of the first chunk are always measured on"


def test_auto_stops_at_the_deadline_of_the_run() -> None:
    model, task = outlier_task()
    ctx = Context(task=task, target=OnnxRuntime(), work=Path(), dense=model, deadline=time.monotonic())
    assert QuantizeStatic(ranges="auto").plan(model, ctx).facts["auto"]["measured"] == 0


def like(x: Tensor) -> Tensor:
    return torch.randn(6, *x.shape[1:])


@pytest.mark.parametrize("pattern", ["squeeze_excite", "attention_fused_qkv", "dict_output", "chunk_shuffle_concat"])
def test_auto_works_whatever_the_graph(pattern: str) -> None:
    model, inputs = make(pattern)
    data = [
        Inputs(tuple(map(like, inputs.args)), {name: like(x) for name, x in inputs.kwargs.items()}) for _ in range(2)
    ]
    task = Task(example_inputs=inputs, calibration=data, validation=data[1:], output=OUTPUT.get(pattern))
    facts = planned(model, task, Auto(samples=5)).facts["auto"]
    assert facts["sqnr_db"][facts["kept"]] == max(facts["sqnr_db"].values())


def test_auto_needs_validation_data() -> None:
    model, task = outlier_task()
    assert QuantizeStatic(ranges="auto").needs == {"calibration", "validation"}
    assert QuantizeStatic(ranges="kl").needs == {"calibration"}
    task.validation = None
    with pytest.raises(UsageError, match=r"ranges=\"auto\"\) needs validation data; give it as Task\(validation=...\)"):
        planned(model, task, "auto")


def test_auto_refuses_calibrators_that_it_does_not_know() -> None:
    for tried in (["moving_average"], ["auto"], []):
        with pytest.raises(SettingError, match=r"Auto\.tried"):
            Auto(tried=tried)
