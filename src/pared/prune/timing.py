"""How long a pruned network takes in the runtime that it ships on, beside the dense one: measured on exported files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pared.errors import PlanError
from pared.step import Context
from pared.targets.bench import bench
from pared.targets.sessions import why_not_here
from pared.task import Task


class Clock:
    """Times networks in turn with the dense one, each as a file in a process of its own.

    Args:
        ctx: Its target runs the files, its dense model is what they are held against, its work folder takes them.

    Raises:
        PlanError: The target's files do not run on this machine.
    """

    def __init__(self, ctx: Context) -> None:
        reason = why_not_here(ctx.target.name)
        if reason:
            raise PlanError(
                f"PruneChannels: {reason}, so latency cannot be measured; give ratio, params or macs instead"
            )
        self.ctx = ctx
        self.count = 0
        self.dense = self.export(ctx.dense)

    def export(self, model: nn.Module) -> Path:
        """Write a network as the target's file, in a folder of its own."""
        folder = self.ctx.work / f"timed-{self.count}"
        folder.mkdir(parents=True, exist_ok=True)
        self.count += 1
        path = folder / self.ctx.target.filename
        self.ctx.target.export(model, self.ctx.task, path)
        return path

    def shares(self, models: Sequence[nn.Module]) -> list[float]:
        """Latency of each network as a fraction of the dense one's, all timed in one turn."""
        files = [self.export(model) for model in models]
        rows = bench(
            [self.dense, *files],
            target=self.ctx.target.name,
            batch_size=self.ctx.batch_size,
            threads=self.ctx.threads,
            dimensions=sizes_of(self.ctx.task),
            seed=self.ctx.seed,
            trust=True,  # this very step has written them
        )
        return [1 / row.speedup.value for row in rows[1:] if row.speedup is not None]


def sizes_of(task: Task) -> dict[str, int]:
    """Sizes of free dimensions other than the batch, as in the example inputs."""
    inputs = task.example_inputs
    named = [*((str(i), value) for i, value in enumerate(inputs.args)), *inputs.kwargs.items()]
    return {
        label: value.shape[dim]
        for name, value in named
        if isinstance(value, Tensor)
        for dim, label in task.dynamic_of(name).items()
    }


class Journal:
    """Measurements by what was measured, in a file: a run that was stopped goes by the same ones when it goes on.

    Args:
        path: Of the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}

    def recall(self, keys: Sequence[str], measure: Callable[[], Sequence[float]]) -> list[float]:
        """The measurements of these keys, made and written down at once where one of them is not known."""
        if not set(keys) <= self.known.keys():
            self.known |= dict(zip(keys, measure(), strict=True))
            write(self.path, self.known)
        return [self.known[key] for key in keys]


def digest(*parts: Any) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write(path: Path, data: Any) -> None:
    """Write a file at once, so that none is ever read half."""
    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(data), encoding="utf8")
    part.replace(path)
