"""Pruning in the caller's own loop, without a recipe: one call, a smaller model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from pared.errors import UsageError
from pared.prune.step import PruneChannels
from pared.seeding import isolated
from pared.step import Context
from pared.targets import find_target
from pared.task import Task


def channels(model: nn.Module, task: Task, *, target: str = "onnxruntime", seed: int = 0, **settings: Any) -> nn.Module:
    """A copy of a model without the channels that matter least, to train on.

    Args:
        model: A trained model. It is not changed.
        task: Its example inputs are all that is needed, unless the saliency reads data.
        target: Where latency is measured, if that is the budget.
        seed: Of everything random.
        settings: Those of `PruneChannels`: one of `ratio`, `params`, `macs` and `latency`, and whatever else it takes.

    Raises:
        SettingError: A setting is unknown or wrong.
        PlanError: Nothing can be removed, or the budget cannot be met.
        PruneError: What the model computes without the channels is not what the masked one does.
        CaptureError: The model cannot be captured.
        UsageError, DataError: The data that the saliency needs are missing or wrong.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> task = Task(example_inputs=torch.ones(1, 4))
        >>> channels(model, task, ratio=0.5, widths={"round_to": 1})[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    step = PruneChannels(**settings)
    if not isinstance(task, Task):
        raise UsageError(f"task must be a pared.Task, found {type(task).__name__}; say pared.Task(example_inputs=(x,))")
    for need in sorted(step.needs):
        task.require(need, "PruneChannels")
    with tempfile.TemporaryDirectory(prefix="pared-") as folder, isolated(task):
        runtime = find_target(target)
        ctx = Context(task=task, target=runtime, work=Path(folder), dense=model, seed=seed)
        return step.apply(model, step.plan(model, ctx), ctx)
