"""Measured choices: a latency, widths, sensitivity; and what a run that was stopped need not measure again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from contract_cases import WIDTHS, model_and_task
from pared.errors import PlanError, UsageError
from pared.prune import PruneChannels, Sensitivity, Widths
from pared.prune.choosing import MULTIPLES
from pared.prune.curves import path_along
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task


def params(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


class Clock:
    """In the place of the real one: a network takes as long as it has parameters, and time stops after some calls."""

    timed: ClassVar[list[int]] = []
    stop_after: ClassVar[int] = 100

    def __init__(self, ctx: Context) -> None:
        self.dense = ctx.dense

    def shares(self, models: Sequence[nn.Module]) -> list[float]:
        if len(Clock.timed) >= Clock.stop_after:
            raise KeyboardInterrupt
        Clock.timed += map(params, models)
        return [params(model) / params(self.dense) for model in models]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr("pared.prune.choosing.Clock", Clock)
    Clock.timed, Clock.stop_after = [], 100
    return Clock


def network() -> tuple[nn.Sequential, Task]:
    """Wide enough for multiples of 32."""
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 5))
    return model, Task(example_inputs=torch.zeros(1, 6))


def context(model: nn.Module, task: Task, work: Path, **changes: Any) -> Context:
    return Context(task=task, target=OnnxRuntime(), work=work, dense=model, **changes)


def test_a_latency_is_met_by_what_was_measured(tmp_path: Path) -> None:
    model, task = network()
    step = PruneChannels(latency=0.5, widths=WIDTHS)
    ctx = context(model, task, tmp_path)
    plan = step.plan(model, ctx)
    share = params(step.apply(model, plan, ctx)) / params(model)
    assert share == pytest.approx(0.5, rel=0.05)
    assert share in [entry["latency"] for entry in plan.facts["measured"]]
    assert len(plan.facts["measured"]) == len(Clock.timed) <= 10


def test_a_latency_that_cannot_be_met_says_what_the_fastest_takes(tmp_path: Path) -> None:
    model, task = network()
    step = PruneChannels(latency=0.3, widths=Widths(round_to=1, limits={"*": (0.9, 1.0)}))
    with pytest.raises(PlanError, match=r"latency=0\.3 cannot be met: the fastest that was measured takes 0\.8\d\d"):
        step.plan(model, context(model, task, tmp_path))


def test_a_stopped_search_goes_on_with_what_it_has_measured(tmp_path: Path) -> None:
    model, task = network()
    step = PruneChannels(latency=0.513, widths=WIDTHS)
    whole = step.plan(model, context(model, task, tmp_path / "whole"))
    calls = list(Clock.timed)
    assert len(calls) > 1
    Clock.timed, Clock.stop_after = [], 1
    with pytest.raises(KeyboardInterrupt):
        step.plan(model, context(model, task, tmp_path / "stopped"))
    Clock.stop_after = 100
    assert step.plan(model, context(model, task, tmp_path / "stopped")) == whole
    assert Clock.timed == calls
    # What was measured is of this model, this batch size and this data alone.
    Clock.timed = []
    step.plan(model, context(model, task, tmp_path / "stopped", batch_size=2))
    assert Clock.timed == calls
    Clock.timed = []
    with torch.no_grad():
        model[0].weight.mul_(1.0001)
    step.plan(model, context(model, task, tmp_path / "stopped"))
    assert Clock.timed == calls


def test_measured_widths_are_the_fastest_of_the_multiples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def liking_16(clock: Clock, models: Sequence[nn.Module]) -> list[float]:
        Clock.timed += map(params, models)
        return [0.5 if all(layer.out_features % 16 == 0 for layer in (m[0], m[2])) else 0.9 for m in models]

    monkeypatch.setattr(Clock, "shares", liking_16)
    model, task = network()
    step = PruneChannels(ratio=0.4, widths=Widths(round_to="measured"))
    ctx = context(model, task, tmp_path)
    plan = step.plan(model, ctx)
    assert plan.facts["widths"] == {"0": [32, 64], "2": [48, 80]}
    assert 2 <= len(plan.facts["measured"]) == len(Clock.timed) <= len(MULTIPLES)
    assert step.plan(model, dataclasses.replace(ctx, memo={})) == plan
    assert len(Clock.timed) == len(plan.facts["measured"])  # none was timed twice


def judged() -> tuple[nn.Sequential, Task]:
    """Two hidden layers: of the first, half of the channels hardly matter."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
        model[0].weight[2:4] = -model[0].weight[:2]  # so that for no input all that matters is below zero
        model[0].weight[4:] *= 1e-3
    x = torch.randn(64, 4, generator=generator)
    with torch.no_grad():
        labels = model(x).argmax(1)
    return model, Task(example_inputs=x[:1], validation=[(x, labels)], metrics="accuracy")


def test_sensitivity_takes_most_where_it_costs_least_and_its_curves_are_those_of_masked_models(tmp_path: Path) -> None:
    model, task = judged()
    step = PruneChannels(params=0.6, ratios=Sensitivity(samples=64), widths=WIDTHS)
    ctx = context(model, task, tmp_path)
    plan = step.plan(model, ctx)
    left = {name: now for name, (now, _) in plan.facts["widths"].items()}
    assert 4 <= left["0"] < left["2"]
    assert 0.5 < plan.facts["params"] <= 0.6  # no more goes than the budget asks for, though more would cost nothing
    # The oracle: the model itself with the weakest filters of one layer silenced in the layer that reads them.
    ((x, labels),) = task.validation
    for name, reader in (("0", 2), ("2", 4)):
        order = model.get_submodule(name).weight.norm(dim=1).argsort()
        for ratio, drop in plan.facts["curves"][name]:
            masked, _ = judged()
            with torch.no_grad():
                masked[reader].weight[:, order[: round(8 * ratio)]] = 0
                found = (masked(x).argmax(1) == labels).float().mean().item()
            assert drop == pytest.approx(1.0 - found, abs=1e-6)


def test_a_path_begins_with_nothing_and_first_takes_what_costs_nothing() -> None:
    path = path_along({"a": [(0.0, 0.0), (0.5, 0.0), (0.75, 0.2)], "b": [(0.0, 0.0), (0.5, 0.1), (0.75, 0.05)]})
    assert path(0.0) == {"a": 0.0, "b": 0.0}
    assert path(1.0) == {"a": 1.0, "b": 1.0}
    # Drops 0, 0.1, 0.2, and 0.4 at which everything goes: five points evenly from 0 to 1.
    assert path(0.25) == pytest.approx({"a": 0.5, "b": 0.0})
    assert path(0.125) == pytest.approx({"a": 0.25, "b": 0.0})
    assert path(0.5) == pytest.approx({"a": 0.625, "b": 0.75})  # less of b would not cost less
    assert path(0.75) == pytest.approx({"a": 0.75, "b": 0.75 + 0.25 / 3})
    parts = [path(i / 20) for i in range(21)]
    assert all(now[name] >= before[name] for before, now in itertools.pairwise(parts) for name in now)


def test_curves_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = judged()
    step = PruneChannels(ratio=0.5, ratios=Sensitivity(samples=64), widths=WIDTHS)
    first = step.plan(model, context(model, task, tmp_path))
    monkeypatch.setattr("pared.prune.curves.costs", None)
    assert step.plan(model, context(model, task, tmp_path)) == first
    with torch.no_grad():
        model[4].bias += 1e-3  # another model has other curves, though its filters rank alike
    with pytest.raises(TypeError):
        step.plan(model, context(model, task, tmp_path))


def test_sensitivity_without_a_metric_says_what_to_give(tmp_path: Path) -> None:
    model, task = judged()
    bare = Task(example_inputs=task.example_inputs, validation=task.validation)
    with pytest.raises(UsageError, match=r"ratios='sensitivity' needs a metric; give Task\(metrics"):
        PruneChannels(ratio=0.5, ratios="sensitivity").plan(model, context(model, bare, tmp_path))


def test_without_a_step_before_the_model_itself_is_dense(tmp_path: Path) -> None:
    model, task = model_and_task("conv_bn_relu")
    plan = PruneChannels(ratio=0.5, widths=WIDTHS).plan(model, context(model, task, tmp_path))
    assert plan.facts["dense"]["params"] == params(model)
    assert plan.facts["dense"]["sizes"] == {"0.0": 8, "1.0": 8}
