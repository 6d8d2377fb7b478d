"""The search for fragile layers: the fewest in float that hold the metric, the best found otherwise, never silent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pared.errors import PlanError, UsageError
from pared.quantize import search
from pared.quantize.search import Fragile, keep_fragile
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around four corners of a square, far enough apart that a float network tells them."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 4
    corner = torch.stack([label % 2, label // 2], 1).float() * 2 - 1
    return corner + 0.8 * torch.rand(count, 2, generator=generator) - 0.4, label


class Corners(nn.Module):
    """A first layer whose channels differ by a factor of 500: with one scale for all and few bits it goes blind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 6), nn.Linear(6, 4)
        with torch.no_grad():
            self.first.weight.copy_(
                torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [500, 500], [-500, 500]]),
            )
            self.first.bias.zero_()
            self.first.bias[4:] = -1e4  # the large weights never get through the ReLU
            corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
            self.last.weight.copy_(
                torch.cat([corners[:, :1], -corners[:, :1], corners[:, 1:], -corners[:, 1:], torch.zeros(4, 2)], 1)
            )
            self.last.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y


def context(**changes: Any) -> Context:
    x = blobs(256, 0)[0]
    settings = {"calibration": [x], "validation": [blobs(40, 1)], "metrics": accuracy} | changes
    return Context(task=Task(example_inputs=(x[:2],), **settings), target=OnnxRuntime(), work=Path(), dense=Corners())


BLIND = {"weights": {"granularity": "tensor", "bits": 4}}


def test_the_fragile_layer_stays_in_float_until_the_metric_holds() -> None:
    model, ctx = Corners().eval(), context()
    free = QuantizeStatic(sensitivity={"samples": 40}, **BLIND).plan(model, ctx)
    layers = free.facts["sensitivity"]["layers"]
    assert [row["module"] for row in layers] == ["first", "last"]
    assert layers[0]["drops"]["accuracy"] > 0.3
    assert layers[1]["drops"]["accuracy"] == 0.0
    assert free.facts["sensitivity"]["samples"] == 40
    assert len(free.edits) == 2

    step = QuantizeStatic(max_drop=0.02, **BLIND)
    plan = step.plan(model, ctx)
    assert plan.facts["kept"] == ["first"]
    assert plan.facts["search"]["met"]
    assert [edit.module for edit in plan.edits] == ["last"]
    reasons = {skip.module: skip.reason for skip in plan.skips}
    assert "most fragile" in reasons["first"]
    program = step.apply(model, plan, ctx)
    x, y = blobs(40, 1)
    exact = accuracy(model(x), y).item()
    assert exact > 0.95
    assert accuracy(program(x), y).item() >= exact - 0.02
    # Another machine makes the same program of the plan alone.
    again = step.apply(Corners().eval(), Plan.from_json(plan.to_json()), context())
    assert torch.equal(again(x), program(x))


def test_nothing_stays_in_float_when_the_metric_holds_anyway() -> None:
    plan = QuantizeStatic(max_drop=0.02).plan(Corners().eval(), context())
    assert plan.facts["kept"] == []
    assert [trial["kept"] for trial in plan.facts["search"]["trials"]] == [0]


def searched(
    drops: Sequence[float], max_drop: float, monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0
) -> tuple[list[str], dict[str, Any]]:
    """The search alone, where keeping k layers in float leaves the drop `drops[k]`."""
    found = iter([1.0])
    asked: list[int] = []

    def numbers(kept: Sequence[str]) -> Any:
        asked.append(len(kept))
        return None

    def metric(*_: Any) -> float:
        return next(found, 0.0) if not asked else 1.0 - drops[asked[-1]]

    monkeypatch.setattr(search, "metric_of", metric)
    graph = fx.symbolic_trace(nn.Identity())
    rows = [Fragile(module=f"layer{i}", sqnr_db=float(i), drops={}) for i in range(len(drops))]
    return keep_fragile(graph, context(), rows, numbers, max_drop=max_drop, deadline=time.monotonic() + seconds)


@pytest.mark.parametrize("needed", range(9))
def test_the_fewest_layers_are_kept_whatever_their_number(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = [0.1 if kept < needed else 0.0 for kept in range(10)]
    kept, facts = searched(drops, 0.01, monkeypatch)
    assert kept == [f"layer{i}" for i in range(needed)]
    assert facts["met"]
    assert len(facts["trials"]) <= 8


def test_the_best_found_is_kept_when_nothing_holds_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, facts = searched([0.5, 0.4, 0.3, 0.35, 0.3], 0.01, monkeypatch)
    assert (len(kept), facts["met"]) == (2, False)  # the fewest of those that come nearest
    kept, facts = searched([0.5, 0.4, 0.0], 0.01, monkeypatch, seconds=-1.0)
    assert (len(kept), facts["met"]) == (0, False)


def test_a_search_without_a_metric_or_validation_data_is_refused() -> None:
    with pytest.raises(UsageError, match="validation"):
        QuantizeStatic(max_drop=0.0).plan(Corners().eval(), context(validation=None))
    with pytest.raises(PlanError, match="metrics"):
        QuantizeStatic(max_drop=0.0).plan(Corners().eval(), context(metrics=()))
