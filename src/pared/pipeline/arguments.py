"""What can be told about a run before any work: whether its arguments can be used, and how to write it down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pared.errors import ModelError, UsageError
from pared.recipe import Budget, Repeat, TimingSettings, unrolled
from pared.step import Step, settings_of
from pared.task import Task


def check_arguments(model: nn.Module, steps: Sequence[Step | Repeat], task: Task, budget: Budget) -> None:
    """Raise `UsageError` for no model, no steps, missing data, a budget that nothing judges, weights not finite."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model must be a torch.nn.Module, found {model!r}; give a trained model, not its class or file"
        )
    if not isinstance(task, Task):
        raise UsageError(
            f"task must be a pared.Task, found {type(task).__name__}; say pared.Task(example_inputs=(x,), ...)"
        )
    if not isinstance(steps, (list, tuple)) or not steps:
        raise UsageError("no list of steps; give at least one step, e.g. [pared.QuantizeStatic()]")
    for number, step in enumerate(unrolled(steps), 1):
        if hasattr(step, "callback") and not isinstance(step, type):
            kind = type(step).__name__
            raise UsageError(f"step {number}: {kind} runs while training; give pared.Train(during=[{kind}(...)])")
        if isinstance(step, type) or not (hasattr(step, "plan") and hasattr(step, "apply")):
            raise UsageError(f"step {number} must be a step such as pared.QuantizeStatic(), found {step!r}")
        with told(number, step):
            for need in sorted(step.needs):
                task.require(need, type(step).__name__)
    if budget.max_drop is not None and (task.metric is None or task.validation is None):
        lacking = "validation=..." if task.metric is not None else "metrics=..."
        raise UsageError(f"budget max_drop judges the first metric on validation data; give Task({lacking})")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} holds NaN or infinity; give a model with finite weights")


def described(
    steps: Sequence[Step | Repeat], target: str, budget: Budget, timing: TimingSettings, seed: int
) -> dict[str, Any]:
    """The part of a recipe that can be told from live objects."""
    return {
        "target": target,
        "seed": seed,
        "budget": settings_of(budget),
        "timing": settings_of(timing),
        "steps": [{type(step).__name__: settings_of(step)} for step in steps],
    }


@contextlib.contextmanager
def told(number: int, step: Step) -> Iterator[None]:
    """Add the step's number and name to an error that comes out of it, whoever raised it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in step {number}, {type(step).__name__}")
        raise
