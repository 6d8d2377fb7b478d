"""Blocks and budgets: what pays is kept, what does not is rolled back, and the ledger says why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pared
from fake_pipeline import Change, Changing, FastTarget, Net, Tune, level, make_task
from pared.errors import MeasureError, RefusedError, UsageError

Compress = Callable[..., pared.Artifact]


def rows(artifact: pared.Artifact) -> list[tuple[str, int, bool]]:
    return [(row.name, row.block, row.kept) for row in artifact.report.stages]


def test_a_block_is_kept_when_it_is_faster_and_smaller(compress: Compress) -> None:
    artifact = compress(Change(ms=0.5, bulk=500))
    baseline, change = artifact.report.stages
    assert (change.kept, change.why, change.block) == (True, "", 1)
    assert change.speedup is not None and change.speedup.verdict == "faster"
    assert change.speedup.value == pytest.approx(2.0)
    assert (baseline.speedup, baseline.size_bytes, change.size_bytes) == (None, 1000, 500)
    assert artifact.report.final is not None
    assert (artifact.report.final.stage, artifact.report.final.size_bytes) == ("1 Change", 500)
    assert artifact.report.final.baseline_size_bytes == 1000
    assert [plan.step for plan in artifact.plans] == ["Change"]


@pytest.mark.parametrize(
    ("step", "budget", "why"),
    [
        (Change(ms=2.0), {}, r"slower than the last good stage: 0\.50x \(0\.50 to 0\.50\)"),
        (Change(bulk=1002), {}, "the file is larger: 1002 bytes after 1000"),
        (Change(level=-0.5), {"max_drop": 0.25}, r"level dropped by 0\.5000 to -0\.5000, the budget allows 0\.2500"),
        (Tune(level=-0.5), {"max_drop": 0.25}, "level dropped by 0.5000"),
    ],
)
def test_a_block_is_rolled_back_when_it_does_not_pay(
    compress: Compress, step: Any, budget: dict[str, float], why: str
) -> None:
    artifact = compress(step, budget=pared.Budget(**budget))
    row = artifact.report.stages[1]
    assert not row.kept
    assert re.match(why, row.why)
    assert artifact.report.final is not None
    assert artifact.report.final.stage == "baseline"


@pytest.mark.parametrize(
    ("step", "budget"),
    [
        (Change(ms=2.0), {"allow_slower": True}),
        (Change(bulk=1002), {"allow_larger": True}),
        (Change(bulk=1001), {}),  # a thousandth: names differ in length
        (Change(level=-0.5), {"max_drop": 0.5}),
        (Change(level=-0.5), {}),
        (Change(), {"max_drop": 0.0}),
        # A training changes neither time nor size: what is measured of them is noise.
        (Tune(ms=2.0, bulk=2000), {}),
    ],
)
def test_a_block_is_kept_when_the_budget_allows_it(compress: Compress, step: Any, budget: dict[str, Any]) -> None:
    artifact = compress(step, budget=pared.Budget(**budget))
    assert artifact.report.stages[1].kept
    assert artifact.report.final is not None
    assert artifact.report.final.stage == artifact.report.stages[1].name


def test_a_block_is_rolled_back_when_its_metric_is_nan(compress: Compress) -> None:
    task = make_task(metrics=lambda output, _: math.nan if output.mean() < -0.1 else 1.0)
    artifact = compress(Change(level=-0.5), task=task, budget=pared.Budget(max_drop=10.0))
    assert not artifact.report.stages[1].kept
    again = pared.Report.read(artifact.path)
    assert math.isnan(again.stages[1].metrics["<lambda>"])


def test_the_run_goes_on_from_the_last_good_block_when_one_is_rolled_back(compress: Compress) -> None:
    artifact = compress(Change(level=-1.0), Change(level=-8.0), Change(level=-2.0), budget=pared.Budget(max_drop=4.0))
    assert rows(artifact) == [
        ("baseline", 0, True),
        ("1 Change", 1, True),
        ("2 Change", 2, False),
        ("3 Change", 3, True),
    ]
    values = [row.metrics["level"] for row in artifact.report.stages]
    assert values == pytest.approx([0.0, -1.0, -9.0, -3.0], abs=1e-4)
    assert Changing.histories == [(), ("Change",), ("Change",)]
    assert len(artifact.plans) == 2


def test_the_baseline_ships_when_every_block_is_rolled_back(compress: Compress) -> None:
    net = Net()
    artifact = compress(Change(ms=2.0, level=1.0), Change(bulk=2000, level=1.0), model=net)
    assert [kept for _, _, kept in rows(artifact)] == [True, False, False]
    assert artifact.plans == ()
    shipped = load_file(artifact.path / "tensors.safetensors")
    assert shipped.keys() == net.state_dict().keys()
    assert all(torch.equal(shipped[name], tensor) for name, tensor in net.state_dict().items())
    assert artifact.report.final is not None
    assert artifact.report.final.size_bytes == artifact.report.final.baseline_size_bytes == 1000


def test_stages_in_a_block_are_not_judged_when_a_training_follows(compress: Compress) -> None:
    artifact = compress(Change(level=-8.0, ms=0.5), Tune(level=4.0), Tune(level=3.5), budget=pared.Budget(max_drop=1.0))
    assert rows(artifact)[1:] == [("1 Change", 1, True), ("2 Tune", 1, True), ("3 Tune", 1, True)]
    artifact = compress(Change(level=-8.0), Tune(level=4.0), budget=pared.Budget(max_drop=1.0), overwrite=True)
    assert rows(artifact)[1:] == [("1 Change", 1, False), ("2 Tune", 1, False)]
    assert {row.why for row in artifact.report.stages[1:]} == {artifact.report.stages[2].why} != {""}


def test_trainings_are_a_block_of_their_own_when_no_change_is_before_them(compress: Compress) -> None:
    artifact = compress(Tune(level=1.0), Tune(level=1.0), Change(ms=2.0))
    assert rows(artifact)[1:] == [("1 Tune", 1, True), ("2 Tune", 1, True), ("3 Change", 2, False)]


def test_a_block_is_compared_with_the_last_good_one_when_it_is_timed(compress: Compress) -> None:
    artifact = compress(Change(ms=0.25), Change(ms=0.5))
    last = artifact.report.stages[2]
    assert last.speedup is not None and last.speedup.verdict == "faster"  # than the baseline
    assert not last.kept and "0.50x" in last.why


def test_the_drop_counts_the_other_way_when_lower_is_better(compress: Compress) -> None:
    def error(output: torch.Tensor, _: Any) -> torch.Tensor:
        return output.mean()

    error.higher_is_better = False  # type: ignore[attr-defined]
    artifact = compress(
        Change(level=-3.0), Change(level=2.0), task=make_task(metrics=error), budget=pared.Budget(max_drop=0.5)
    )
    assert [row.kept for row in artifact.report.stages] == [True, True, True]  # -3, then -1: better than 0
    artifact = compress(
        Change(level=1.0), task=make_task(metrics=error), budget=pared.Budget(max_drop=0.5), overwrite=True
    )
    assert not artifact.report.stages[1].kept


def test_only_the_first_metric_decides_when_there_are_several(compress: Compress) -> None:
    def other(output: torch.Tensor, _: Any) -> float:
        return -100 * output.mean().item()

    task = make_task(metrics=[level, other])
    artifact = compress(Change(level=1.0), task=task, budget=pared.Budget(max_drop=0.5))
    assert artifact.report.stages[1].kept
    assert artifact.report.stages[1].metrics["other"] == pytest.approx(-100, abs=0.01)


@pytest.mark.parametrize(("lacking", "name"), [({"metrics": ()}, "metrics"), ({"validation": None}, "validation")])
def test_a_budget_is_refused_when_nothing_can_judge_it(compress: Compress, lacking: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=rf"max_drop judges .* give Task\({name}=\.\.\.\)"):
        compress(Change(), task=make_task(**lacking), budget=pared.Budget(max_drop=0.1))
    assert Changing.calls == []


def test_there_is_fidelity_but_no_metric_when_the_task_has_example_inputs_alone(compress: Compress) -> None:
    artifact = compress(Change(level=1.0), task=make_task(validation=None, metrics=()))
    row = artifact.report.stages[1]
    assert row.metrics == {}
    assert row.fidelity is not None and row.fidelity.max_abs == pytest.approx(1.0, abs=1e-4)
    assert row.parity is not None and row.parity.max_abs == 0.0


@pytest.mark.parametrize(("again", "planned"), [((), [(), ("a",)]), (("a", "b"), [(), ("a",), ("a", "b")])])
def test_a_step_plans_anew_when_the_runtime_refuses_layers(
    compress: Compress,
    target: FastTarget,
    monkeypatch: pytest.MonkeyPatch,
    again: tuple[str, ...],
    planned: list[tuple[str, ...]],
) -> None:
    refusals, export = [("a",), again], target.export

    def picky(model: Any, task: Any, path: Path) -> None:
        if Changing.refused and refusals and (layers := refusals.pop(0)):
            raise RefusedError("cannot run them", layers)
        export(model, task, path)

    monkeypatch.setattr(target, "export", picky)
    assert compress(Change(ms=0.5)).report.stages[1].kept
    assert Changing.refused == planned


def test_a_run_stops_when_the_runtime_refuses_layers_that_were_left_alone(
    compress: Compress, target: FastTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = target.export

    def picky(model: Any, task: Any, path: Path) -> None:
        if Changing.refused:
            raise RefusedError("cannot run them", ["a"])
        export(model, task, path)

    monkeypatch.setattr(target, "export", picky)
    with pytest.raises(RefusedError, match="cannot run them"):
        compress(Change(ms=0.5))
    assert Changing.refused == [(), ("a",)]


def test_an_error_carries_the_steps_number_and_name_when_a_step_fails(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError, match="own code") as caught:
        compress(Tune(), Change(error=True))
    assert caught.value.__notes__ == ["in step 2, Change"]
    for step, name in ((pared.QuantizeStatic(), "QuantizeStatic"), (pared.Train(), "Train")):
        with pytest.raises(UsageError, match=f"{name} needs .* data") as refused:
            compress(Change(), step)
        assert refused.value.__notes__ == [f"in step 2, {name}"]

    def die(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MeasureError("a worker died")

    calls: list[int] = []
    monkeypatch.setattr("pared.pipeline.run.peak_memory", die)
    with pytest.raises(MeasureError) as measured:
        compress(Change(level=7.0))
    assert measured.value.__notes__ == ["in step 1, Change"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "give at least one step"),
        (Change(), "no list of steps"),
        ([Change], r"step 1 must be a step such as pared\.QuantizeStatic\(\)"),
        (["QuantizeStatic"], "step 1 must be a step"),
        ([pared.Distill()], r"step 1: Distill runs while training; give pared\.Train\(during=\[Distill\("),
    ],
)
def test_compress_says_what_a_step_is_when_given_something_else(target: Any, steps: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pared.compress(Net(), steps, make_task())
    with pytest.raises(UsageError, match=message):
        pared.dry_run(Net(), steps, make_task())


def test_compress_says_what_model_and_task_are_when_given_something_else(target: Any) -> None:
    with pytest.raises(UsageError, match=r"model must be a torch\.nn\.Module, .* not its class"):
        pared.compress(Net, [Change()], make_task())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"task must be a pared\.Task, found Tensor"):
        pared.compress(Net(), [Change()], torch.ones(1))  # type: ignore[arg-type]


def test_compress_names_the_nearest_target_when_misspelt_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no target 'onxruntime'; did you mean 'onnxruntime'"):
        pared.compress(Net(), [Change()], make_task(), target="onxruntime", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["linear.weight", "ms"])
def test_a_model_is_refused_when_its_tensors_are_not_finite(compress: Compress, name: str, value: float) -> None:
    net = Net()
    with torch.no_grad():
        net.state_dict()[name].fill_(value)
    with pytest.raises(UsageError, match=f"{name} holds NaN or infinity; give a model with finite weights"):
        compress(Change(), model=net)


def test_dry_run_plans_every_step_and_applies_none(target: Any) -> None:
    net = Net()
    plans = pared.dry_run(net, [Change(), Tune(), Change(level=1.0)], make_task())
    assert [plan.step for plan in plans] == ["Change", "Tune", "Change"]
    assert Changing.histories == [(), ("Change",), ("Change", "Tune")]
    assert {what for what, _ in Changing.calls} == {"plan"}
    assert target.exported == []


def test_the_dense_model_is_what_the_trainings_at_the_beginning_made(compress: Compress) -> None:
    compress(Tune(level=0.25), Change(level=1.0), Tune(level=1.0), Tune(level=1.0))
    # As it came in; as the first training left it, which nothing after it changes.
    assert Changing.denses == [0.0, 0.25, 0.25, 0.25]


def test_the_dense_model_is_as_it_came_in_when_the_first_training_is_rolled_back(compress: Compress) -> None:
    compress(Tune(level=-1.0), Change(level=1.0), budget=pared.Budget(max_drop=0.5))
    assert Changing.denses == [0.0, 0.0]
