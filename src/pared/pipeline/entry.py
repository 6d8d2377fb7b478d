"""What a caller asks of the pipeline: `compress`, and `dry_run`, which only plans."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pared.artifact import Artifact
from pared.pipeline.arguments import check_arguments, described, told
from pared.pipeline.run import Run
from pared.pipeline.workspace import Workspace
from pared.recipe import Budget, Repeat, TimingSettings, unrolled
from pared.seeding import isolated
from pared.step import Context, Plan, Progress, Step, silent
from pared.surgery import apply_edits
from pared.targets import find_target
from pared.task import Task


def compress(
    model: nn.Module,
    steps: Sequence[Step | Repeat],
    task: Task,
    *,
    target: str = "onnxruntime",
    out: str | Path | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen
    timing: TimingSettings = TimingSettings(),  # noqa: B008 - frozen
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    recipe: Mapping[str, Any] | None = None,
) -> Artifact:
    """Apply steps to a copy of a model, export and measure after each, and keep what pays.

    Args:
        model: A trained model. It is not changed.
        steps: In order. Each opens a block; trainings that follow a change belong to its block. The steps of a
            `Repeat` count as if they were written out.
        task: What the model is for.
        target: The runtime that it ships on: a name that `pared list targets` shows.
        out: Folder of the artifact; a temporary one by default, which `Artifact.save` moves.
        budget: When a block is rolled back.
        timing: How latency is taken.
        seed: Of everything random.
        resume: Go on with a run that was stopped.
        overwrite: Replace the artifact in `out`.
        progress: Told how far the run is.
        recipe: What to print as "how to repeat it"; what can be told from the arguments by default.

    Returns:
        The artifact, with its report.

    Raises:
        UsageError: An argument, the data or the model cannot be used.
        ParityError: An exported file disagrees with its own PyTorch model.
        ParedError: Anything else that went wrong, with the step's number and name as a note.
    """
    check_arguments(model, steps, task, budget)
    runtime, flat = find_target(target), unrolled(steps)
    with folder_for(out) as folder, Workspace(folder, resume=resume, overwrite=overwrite) as space, isolated(task):
        run = Run(task, runtime, space, budget, timing, seed, progress, model)
        if resume and (done := run.finished(flat)) is not None:
            return done
        space.check_replace()
        return run.all(flat, recipe or described(steps, target, budget, timing, seed))


@contextlib.contextmanager
def folder_for(out: str | Path | None) -> Iterator[Path]:
    """The output folder: as given, or a temporary one, which goes again where the run does not reach its end."""
    if out is not None:
        yield Path(out)
        return
    made = Path(tempfile.mkdtemp(prefix="pared-"))
    done = False
    try:
        yield made / "artifact"
        done = True
    finally:
        if not done:
            shutil.rmtree(made, ignore_errors=True)


def dry_run(
    model: nn.Module,
    steps: Sequence[Step | Repeat],
    task: Task,
    *,
    target: str = "onnxruntime",
    budget: Budget = Budget(),  # noqa: B008 - frozen
    seed: int = 0,
    progress: Progress = silent,
) -> list[Plan]:
    """What each step would change and skip, without training or calibrating. Plans that are estimates say so."""
    check_arguments(model, steps, task, budget)
    runtime = find_target(target)
    plans: list[Plan] = []
    current = model
    with tempfile.TemporaryDirectory(prefix="pared-") as folder, isolated(task):
        flat = unrolled(steps)
        for number, step in enumerate(flat, 1):
            ctx = Context(
                task=task,
                target=runtime,
                work=Path(folder),
                dense=model,
                seed=seed,
                history=tuple(plans),
                later=tuple(flat[number:]),
                dry=True,
                progress=progress,
                floating=current,
            )
            with told(number, step):
                plan = step.plan(current, ctx)
            plans.append(plan)
            structural = [edit for edit in plan.edits if edit.kind != "quantize"]
            current = apply_edits(current, structural, {}) if structural else current
    return plans
