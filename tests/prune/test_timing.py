"""What is handed to the bench, and the journal of measurements."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pared.errors import PlanError
from pared.prune import PruneChannels, Widths
from pared.prune.timing import Clock, Journal, sizes_of
from pared.step import Context
from pared.targets.bench import bench
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task


def test_files_are_timed_in_turn_with_the_dense_one_as_the_run_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def bench(files: list[Path], **settings: Any) -> list[SimpleNamespace]:
        asked.update(settings, files=[file.stat().st_size for file in files])
        return [SimpleNamespace(speedup=None if i == 0 else SimpleNamespace(value=2.0 * i)) for i in range(len(files))]

    monkeypatch.setattr("pared.prune.timing.bench", bench)
    task = Task(example_inputs=torch.zeros(1, 4))

    def export(model: nn.Module, task: Task, path: Path) -> None:
        path.write_bytes(b"." * sum(tensor.numel() for tensor in model.parameters()))

    target: Any = SimpleNamespace(name="onnxruntime", filename="model.onnx", export=export)
    ctx = Context(task=task, target=target, work=tmp_path, dense=nn.Linear(4, 64), batch_size=3, threads=2, seed=7)
    clock = Clock(ctx)
    assert clock.shares([nn.Linear(4, 8), nn.Linear(4, 2)]) == [0.5, 0.25]
    assert asked["files"] == [320, 40, 10]
    wanted = {"target": "onnxruntime", "batch_size": 3, "threads": 2, "seed": 7}
    assert {name: asked[name] for name in wanted} == wanted
    clock.shares([nn.Linear(4, 8)])
    assert asked["files"] == [320, 40]


def test_a_target_that_does_not_run_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.prune.timing.why_not_here", lambda name: "this machine has no such device")
    task = Task(example_inputs=torch.zeros(1, 4))
    with pytest.raises(PlanError, match="no such device, so latency cannot be measured; give ratio, params or macs"):
        Clock(Context(task=task, target=OnnxRuntime(), work=tmp_path, dense=nn.Linear(4, 4)))


def test_free_dimensions_have_the_sizes_of_the_example() -> None:
    task = Task(example_inputs={"tokens": torch.zeros(1, 7, 3)}, dynamic={"tokens": {1: "length"}})
    assert sizes_of(task) == {"length": 7}


def test_a_journal_outlives_its_process_and_measures_only_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.json"
    journal = Journal(path)
    assert journal.recall(["a", "b"], lambda: [1.0, 2.0]) == [1.0, 2.0]
    assert json.loads(path.read_text()) == {"a": 1.0, "b": 2.0}
    again = Journal(path)
    assert again.recall(["b"], lambda: pytest.fail("it is known")) == [2.0]
    # Files timed in one turn are timed again together.
    assert again.recall(["b", "c"], lambda: [2.5, 3.0]) == [2.5, 3.0]
    assert list(path.parent.iterdir()) == [path]


def test_a_latency_is_searched_for_in_the_runtime_itself_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real clock on real files: what is measured differs from run to run, how often and of what does not."""
    monkeypatch.setattr("pared.prune.timing.bench", functools.partial(bench, rounds=4))
    monkeypatch.setattr("pared.measure.latency.SITTINGS", 2)  # the fewest that an interval takes
    monkeypatch.setattr("pared.targets.bench.peak_memory", lambda command: 1)  # one more process for each file
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))  # half of it or all, as multiples of 256
    task = Task(example_inputs=torch.zeros(1, 512))
    ctx = Context(task=task, target=OnnxRuntime(), work=tmp_path, dense=model, batch_size=32, threads=1)
    step = PruneChannels(latency=0.8, widths=Widths(round_to=256))
    plan = step.plan(model, ctx)
    (journal,) = tmp_path.glob("latency-*.json")
    measured, known = plan.facts["measured"], json.loads(journal.read_text())
    assert 1 <= len(measured) == len(known) <= 10
    assert sorted(row["latency"] for row in measured) == sorted(known.values())
    assert all(latency > 0 for latency in known.values())
    files = len(list(tmp_path.glob("timed-*/*.onnx")))
    assert files == 1 + len(known)
    again = step.plan(model, dataclasses.replace(ctx, memo={}))
    assert again == plan
    assert len(list(tmp_path.glob("timed-*/*.onnx"))) == files  # nothing was exported, so nothing was timed
