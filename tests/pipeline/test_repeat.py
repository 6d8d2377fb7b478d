"""Rounds of steps: the pipeline sees them as if they were written out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import pytest

import pared
from fake_pipeline import Change, Changing, FastTarget, Net, Number, Tune, make_task
from pared.errors import UsageError
from pared.pipeline.stage import finish_stage
from pared.step import settings

Compress = Callable[..., pared.Artifact]


@settings
class Shrink(Changing):
    """A change that can be done in part."""

    trains: ClassVar[bool] = False
    level: Annotated[float, pydantic.Field(description="Add to the level.")] = 0.0
    ms: Number = None
    bulk: Number = None
    error: Annotated[bool, pydantic.Field(description="Fail.")] = False

    def at(self, fraction: float) -> Shrink:
        return dataclasses.replace(self, level=self.level * fraction)


def test_a_repeat_runs_as_its_steps_written_out(compress: Compress, tmp_path: Path) -> None:
    rounds = pared.Repeat(2, [Shrink(level=-1.0), Tune(level=0.25)])
    repeated = compress(rounds, Change(ms=0.5))
    applied = [step for what, step in Changing.calls if what == "apply"]
    flat = [Shrink(level=-0.5), Tune(level=0.25), Shrink(level=-1.0), Tune(level=0.25), Change(ms=0.5)]
    assert applied == list(map(str, flat))
    assert [(row.name, row.block) for row in repeated.report.stages] == [
        ("baseline", 0),
        ("1 Shrink", 1),
        ("2 Tune", 1),
        ("3 Shrink", 2),
        ("4 Tune", 2),
        ("5 Change", 3),
    ]
    # Every round plans with those before it in the history.
    assert Changing.histories[2] == ("Shrink", "Tune")
    assert Changing.laters == [("Shrink", "Tune", "Shrink", "Tune", "Change")[n:] for n in range(1, 6)]
    written = compress(*flat, out=tmp_path / "flat")
    run = [json.loads((made.path / "artifact.json").read_text())["run"] for made in (repeated, written)]
    assert run[0] == run[1]
    recipe = json.loads((repeated.path / "recipe.json").read_text())
    assert recipe["steps"][0]["Repeat"]["times"] == 2
    assert recipe["steps"][0]["Repeat"]["steps"][0]["Shrink"]["level"] == -1.0


def test_a_finished_repeat_is_not_run_again_when_resumed(compress: Compress) -> None:
    rounds = pared.Repeat(2, [Shrink(level=-1.0), Tune(level=0.25)])
    first = compress(rounds)
    Changing.calls.clear()
    again = compress(rounds, resume=True)
    assert Changing.calls == []
    assert again.report == first.report


def test_a_repeat_goes_on_with_the_round_that_was_stopped(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    # Equal steps, so that only what is before them tells the stages apart.
    rounds = pared.Repeat(3, [Change(level=-0.5)])
    calls = []

    def stopping(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:  # the baseline's, two rounds', and the last round's
            raise KeyboardInterrupt
        finish_stage(*args)

    monkeypatch.setattr("pared.pipeline.run.finish_stage", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(rounds)
    Changing.calls.clear()
    artifact = compress(rounds, resume=True)
    assert [what for what, _ in Changing.calls] == ["plan", "apply"]
    assert [row.metrics["level"] for row in artifact.report.stages] == pytest.approx([0, -0.5, -1.0, -1.5], abs=1e-5)


def test_the_next_round_starts_from_the_last_good_one_when_a_round_is_rolled_back(compress: Compress) -> None:
    artifact = compress(pared.Repeat(4, [Shrink(level=-1.0), Tune(level=0.25)]), budget=pared.Budget(max_drop=0.4))
    # 0 - 0.25 + 0.25, then - 0.5 + 0.25; then - 0.75 + 0.25 is too far, and so is - 1 + 0.25.
    kept = [row.kept for row in artifact.report.stages]
    assert kept == [True, True, True, True, True, False, False, False, False]
    assert artifact.report.final is not None
    assert artifact.report.final.stage == "4 Tune"
    assert Changing.histories[-2] == ("Shrink", "Tune") * 2


def test_equal_rounds_that_do_not_pay_are_all_refused_and_done_once(compress: Compress) -> None:
    artifact = compress(pared.Repeat(3, [Change(ms=4.0)]))
    assert [row.kept for row in artifact.report.stages] == [True, False, False, False]
    assert [what for what, _ in Changing.calls] == ["plan", "apply"]


@pytest.mark.usefixtures("target")
def test_a_dry_run_plans_every_round() -> None:
    plans = pared.dry_run(Net(), [pared.Repeat(3, [Shrink(level=-1.5), Tune()])], make_task())
    assert [plan.step for plan in plans] == ["Shrink", "Tune"] * 3
    assert [plan.settings["level"] for plan in plans[::2]] == [-0.5, -1.0, -1.5]
    assert Changing.laters == [("Shrink", "Tune", "Shrink", "Tune", "Shrink", "Tune")[n:] for n in range(1, 7)]


def test_a_step_in_a_repeat_is_named_by_its_place_when_it_fails_or_is_none(
    compress: Compress, target: FastTarget
) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        compress(pared.Repeat(2, [Tune(), Change(error=True)]))
    assert caught.value.__notes__ == ["in step 2, Change"]
    with pytest.raises(UsageError, match="step 1: Distill runs while training"):
        compress(pared.Repeat(2, [pared.Distill()]), overwrite=True)
    with pytest.raises(UsageError, match="step 2 must be a step"):
        compress(pared.Repeat(2, [Tune(), "Train"]), overwrite=True)
