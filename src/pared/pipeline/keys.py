"""Names of stages and runs, made of all that goes into them: what has the same key need not be done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from pared.identity import identity, values_of
from pared.measure.environment import version_of
from pared.step import Step, settings_of
from pared.targets.sessions import runtime, why_not_here
from pared.task import Task
from pared.train.checkpoint import fingerprint

PACKAGES = ("pared", "torch")


def start_key(model: nn.Module, task: Task, target: str, seed: int) -> str:
    """What every stage depends on: the model with its code and attributes, the task, the target, seed and versions."""
    parts = {
        "modules": [(name, identity(own_parts(module))) for name, module in model.named_modules()],
        "teachers": {name: identity(teacher) for name, teacher in sorted(task.teachers.items())},
        "versions": {name: version_of(name) for name in (*PACKAGES, *runtime(target).packages)},
        "target": target,
        "runs_here": not why_not_here(target),
    }
    return fingerprint(model, task, parts, seed)


def own_parts(module: nn.Module) -> list[Any]:
    """A module's class, and its attributes without the submodules and tensors, which have entries of their own."""
    values = values_of(module)
    return [type(module), {name: value for name, value in values.items() if not isinstance(value, nn.Module)}]


def next_key(key: str, step: Step) -> str:
    """A stage: the one before it, and the step with its code."""
    return digest([key, type(step).__name__, identity(type(step)), settings_of(step)])


def run_key(key: str, steps: Sequence[Step], *settings: Any) -> str:
    """A whole run, or a decision in it: where it starts, the steps from there, and the settings that judge them."""
    for step in steps:
        key = next_key(key, step)
    return digest([key, *map(settings_of, settings)])


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
