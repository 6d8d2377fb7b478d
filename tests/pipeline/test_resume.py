"""A run that is stopped, at any boundary, goes on to the same end, and does nothing twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import pared
from fake_pipeline import Change, Changing, FastTarget, Net, Tune, make_task
from pared.errors import ArtifactError, PlanError
from pared.step import Context, Plan, settings

Compress = Callable[..., pared.Artifact]
# A block that is kept, one that is rolled back, one with a training, and a change after it.
STEPS = (Change(level=-1.0, ms=0.5), Change(ms=4.0), Change(level=-2.0, bulk=900), Tune(level=1.0), Change(ms=0.25))
BUDGET = pared.Budget(max_drop=3.0)
# Where a run can be stopped: before each of these does its work, whenever it is called.
BOUNDARIES = {
    "pared.pipeline.run": ("finish_stage", "write_file", "peak_memory", "test_metrics", "write_artifact"),
    "pared.pipeline.stage": ("write_json",),
    "pared.pipeline.workspace:Workspace": ("decide", "finish", "clear"),
    "pared.artifact": ("write_html", "digest"),
    "pathlib:Path": ("rename",),
}


class StopError(Exception):
    """What stops a run here."""


@contextlib.contextmanager
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop the run within when all its steps are done, before its artifact is written."""

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("pared.pipeline.run.write_artifact", stop)
        with pytest.raises(StopError):
            yield


class Stopper:
    """Counts the boundaries that a run passes, and stops it before the one told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed, self.stop_at = 0, math.inf
        for owner, names in BOUNDARIES.items():
            for name in names:
                target = pkgutil.resolve_name(owner)
                monkeypatch.setattr(target, name, self.watched(getattr(target, name)))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            self.passed += 1
            if self.passed == self.stop_at:
                raise StopError
            return function(*args, **kwargs)

        return watching


def content(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common: everything but how long they took."""
    found: dict[str, Any] = {
        name: (folder / name).read_bytes()
        for name in ("model.onnx", "tensors.safetensors", "plans.json", "recipe.json")
    }
    ledger = json.loads((folder / "report.json").read_text())
    for row in ledger["stages"]:
        row.pop("seconds")
    return found | {"report": ledger, "run": json.loads((folder / "artifact.json").read_text())["run"]}


def applied() -> list[str]:
    return [step for what, step in Changing.calls if what == "apply"]


def test_a_resumed_run_ends_alike_and_repeats_no_stage_when_stopped_at_any_boundary(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopper = Stopper(monkeypatch)
    whole = content(compress(*STEPS, budget=BUDGET).path)
    boundaries = stopper.passed
    assert [row["kept"] for row in whole["report"]["stages"]] == [True, True, False, True, True, True]
    assert boundaries > 40
    for stop_at in range(1, boundaries + 1):
        out = tmp_path / f"stopped-{stop_at}"
        Changing.calls.clear()
        stopper.passed, stopper.stop_at = 0, stop_at
        with pytest.raises(StopError):
            compress(*STEPS, budget=BUDGET, out=out)
        done = [file.parent.name for file in out.with_name(f".{out.name}.work").glob("stages/*/stage.json")]
        stopper.stop_at = math.inf
        torch.manual_seed(stop_at)  # the caller's random state must not matter
        artifact = compress(*STEPS, budget=BUDGET, out=out, resume=True)
        assert content(artifact.path) == whole, stop_at
        # The stage that was at work may be done again, the finished ones (beside the baseline) not.
        assert len(applied()) <= len(STEPS) + 1, stop_at
        assert len(applied()) - len(set(applied())) <= 1, stop_at
        if len(done) == len(STEPS) + 1:
            assert applied() == list(map(str, STEPS)), stop_at
        assert not out.with_name(f".{out.name}.work").exists(), stop_at


def test_a_decision_stands_when_time_says_otherwise_on_resume(
    compress: Compress, target: FastTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (Change(ms=2.0, level=1.0), Change(level=2.0))
    with cut_off(monkeypatch):
        compress(*steps)
    monkeypatch.setattr(
        "pared.pipeline.run.time_in_turn",
        lambda commands, **_: [[[[1.0 + i]] * 2] * 2 for i in range(len(commands))][::-1],
    )
    artifact = compress(*steps, resume=True)
    first, second = artifact.report.stages[1:]
    assert first.speedup is not None and first.speedup.verdict == "faster"  # what was measured now is what is shown
    assert (first.kept, second.kept) == (False, True)
    assert "slower than the last good stage: 0.50x" in first.why


@pytest.mark.parametrize("budget", [pared.Budget(allow_slower=True), pared.Budget(max_drop=0.5, allow_slower=True)])
def test_a_decision_is_taken_anew_when_the_budget_changes(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, budget: pared.Budget
) -> None:
    with cut_off(monkeypatch):
        compress(Change(ms=2.0))
    artifact = compress(Change(ms=2.0), budget=budget, resume=True)
    assert artifact.report.stages[1].kept
    assert len(applied()) == 1  # the stage itself did not change


def test_a_finished_run_is_returned_at_once_when_resumed(compress: Compress, target: FastTarget) -> None:
    first = compress(*STEPS, budget=BUDGET)
    written = (first.path / "report.json").stat().st_mtime_ns
    Changing.calls.clear()
    target.exported.clear()
    again = compress(*STEPS, budget=BUDGET, resume=True)
    assert (Changing.calls, target.exported) == ([], [])
    assert (again.path, again.report) == (first.path, first.report)
    assert (again.path / "report.json").stat().st_mtime_ns == written
    assert [item.name for item in first.path.parent.iterdir()] == ["out"]


class Wider(Net):
    """Another class with the same tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * 1.0)


def louder() -> nn.Module:
    net = Net()
    nn.init.ones_(net.linear.bias)
    return net


def marked() -> nn.Module:
    net = Net()
    net.factor = 3  # type: ignore[assignment]
    return net


def other_level(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output.mean() / 2


other_level.__name__ = "level"
ONES = torch.ones(4, 2)
CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"model": louder},
    "the code of the model": {"model": Wider},
    "an attribute of the model": {"model": marked},
    "the data": {"task": lambda: make_task(validation=[(ONES * 2, torch.zeros(4))])},
    "the seed": {"seed": 1},
    "the code of a metric": {"task": lambda: make_task(metrics=other_level)},
    "a weight in the loss": {"task": lambda: make_task(loss=nn.CrossEntropyLoss(weight=torch.ones(2)))},
}


@pytest.mark.parametrize("what", CHANGES)
def test_stages_are_done_again_when_something_changed(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with cut_off(monkeypatch):
        compress(Change(level=1.0), Change(level=2.0))
    Changing.calls.clear()
    changes = {name: value() if callable(value) else value for name, value in CHANGES[what].items()}
    compress(Change(level=1.0), Change(level=2.0), resume=True, **changes)
    assert len(applied()) == 2


def test_stages_before_a_changed_step_are_kept_when_resumed(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cut_off(monkeypatch):
        compress(Change(level=1.0), Change(level=2.0), Change(level=3.0))
    Changing.calls.clear()
    artifact = compress(Change(level=1.0), Change(level=2.5), Change(level=3.0), resume=True)
    assert applied() == [str(Change(level=2.5)), str(Change(level=3.0))]
    assert artifact.report.stages[-1].metrics["level"] == pytest.approx(6.5, abs=1e-4)


def test_the_call_is_timed_at_the_batch_size_asked_for_when_resumed_with_another(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("pared.pipeline.run.write_inputs", lambda path, arrays: sizes.append(len(arrays[0])))

    with cut_off(monkeypatch):
        compress(Change())
    artifact = compress(Change(), timing=pared.TimingSettings(batch_size=7), resume=True)
    assert (sizes, artifact.report.timing.batch_size) == ([1, 7], 7)


def test_two_runs_are_equal_when_the_seed_is(compress: Compress, tmp_path: Path) -> None:
    first = compress(*STEPS, budget=BUDGET)
    torch.rand(5)
    second = compress(*STEPS, budget=BUDGET, out=tmp_path / "second")
    other = compress(*STEPS, budget=BUDGET, out=tmp_path / "other", seed=1)
    assert content(first.path) == content(second.path)
    assert content(other.path)["model.onnx"] != content(first.path)["model.onnx"]


def test_a_resumed_run_replaces_no_other_artifact_when_not_told_to(compress: Compress) -> None:
    first = content(compress(Change()).path)
    with pytest.raises(ArtifactError, match="artifact of another run; give another folder, or overwrite it"):
        compress(Change(level=1.0), resume=True)
    with pytest.raises(ArtifactError, match=r"holds an artifact; give another folder, or overwrite it \(--overwrite\)"):
        compress(Change())
    assert content(compress(Change(), resume=True).path) == first


def test_a_resumed_run_may_replace_an_artifact_when_it_was_told_so_before(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compress(Change())
    before = content(first.path)
    with cut_off(monkeypatch):
        compress(Change(level=1.0), overwrite=True)
    assert content(first.path) == before
    again = compress(Change(level=1.0), resume=True)
    assert content(again.path)["model.onnx"] != before["model.onnx"]


def test_the_finished_run_is_done_again_when_the_test_data_changed(compress: Compress) -> None:
    labels = torch.zeros(4)
    compress(Change(level=1.0), task=make_task(test=[(ONES, labels)]))
    with pytest.raises(ArtifactError, match="another run"):
        compress(Change(level=1.0), task=make_task(test=[(ONES * 2, labels)]), resume=True)
    artifact = compress(Change(level=1.0), task=make_task(test=[(ONES * 2, labels)]), resume=True, overwrite=True)
    assert artifact.report.final is not None


@settings
class Postponing(Changing):
    """A change that leaves all to later steps, and must not be the last."""

    trains: ClassVar[bool] = False
    level: float = 0.0
    ms: float | None = None
    bulk: float | None = None
    error: bool = False

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        if not ctx.later:
            raise PlanError("nothing is left to do it")
        return dataclasses.replace(super().plan(model, ctx), edits=())


def test_what_was_left_to_a_later_step_is_not_taken_as_done_without_it(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cut_off(monkeypatch):
        compress(Postponing(), Change(level=1.0))
    with pytest.raises(PlanError, match="nothing is left"):
        compress(Postponing(), resume=True)
