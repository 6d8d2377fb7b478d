"""A pipeline that runs in milliseconds: a network whose time and size are numbers in it, and a target that heeds them.

The real target and clock are the subject of `tests/test_promises.py`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from pared.step import Context, Edit, Plan, settings, settings_of
from pared.targets.onnxruntime import SCHEME
from pared.task import Task

Number = Annotated[float | None, pydantic.Field(description="Set to this.")]


class Net(nn.Module):
    """Its output is its level for every input of ones; its file takes `ms` to run and `bulk` bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("ms", torch.tensor(1.0))
        self.register_buffer("bulk", torch.tensor(1000.0))
        self.register_buffer("hidden", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.hidden


class Changing:
    """What `Change` and `Tune` do: set numbers of the network, and remember that they were asked to."""

    calls: ClassVar[list[tuple[str, str]]] = []
    histories: ClassVar[list[tuple[str, ...]]] = []
    laters: ClassVar[list[tuple[str, ...]]] = []
    refused: ClassVar[list[tuple[str, ...]]] = []
    denses: ClassVar[list[float]] = []

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        Changing.calls.append(("plan", str(self)))
        Changing.histories.append(tuple(plan.step for plan in ctx.history))
        Changing.laters.append(tuple(type(step).__name__ for step in ctx.later))
        Changing.refused.append(ctx.refused)
        Changing.denses.append(ctx.dense.get_parameter("linear.bias").item())
        edits = () if self.trains else (Edit("mask", "linear", {"tensor": "weight"}),)
        return Plan(type(self).__name__, settings=settings_of(self), edits=edits)

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        Changing.calls.append(("apply", str(self)))
        if self.error:
            raise ZeroDivisionError("in the step's own code")
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.linear.bias += self.level
            # Random numbers that a resumed run must draw again as they were.
            changed.hidden += torch.rand(()) / 1e6
            for name in ("ms", "bulk"):
                if getattr(self, name) is not None:
                    getattr(changed, name).fill_(getattr(self, name))
        return changed

    needs = frozenset()


@settings
class Change(Changing):
    """A change of structure, as the pipeline sees it."""

    trains: ClassVar[bool] = False
    level: Annotated[float, pydantic.Field(description="Add to the level.")] = 0.0
    ms: Number = None
    bulk: Number = None
    error: Annotated[bool, pydantic.Field(description="Fail.")] = False


@settings
class Tune(Changing):
    """A training, as the pipeline sees it."""

    trains: ClassVar[bool] = True
    level: Annotated[float, pydantic.Field(description="Add to the level.")] = 0.0
    ms: Number = None
    bulk: Number = None
    error: Annotated[bool, pydantic.Field(description="Fail.")] = False


class Session:
    """Runs the module that a file stands for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs = (type("Spec", (), {"name": "x"}),)
        self.options = {"runtime": "fake"}

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [self.model(torch.from_numpy(inputs[0])).numpy()]


class FastTarget:
    """Files of `bulk` bytes that begin with a digest of the module's tensors; the modules are kept beside."""

    name, filename, scheme = "onnxruntime", "model.onnx", SCHEME

    def __init__(self) -> None:
        self.models: dict[bytes, nn.Module] = {}
        self.exported: list[bytes] = []

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        content = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).digest()
        self.models[content] = copy.deepcopy(model)
        self.exported.append(content)
        path.write_bytes(content.ljust(int(model.bulk), b"."))

    def model(self, path: Path) -> nn.Module:
        return self.models[path.read_bytes()[:32]]

    def open(self, path: Path, *, threads: int) -> Session:
        return Session(self.model(path))

    def time_in_turn(self, commands: Sequence[Sequence[str]], **_: Any) -> list[list[list[list[float]]]]:
        """The clock: a file takes as long as its module says."""
        files = [Path(command[command.index("pared.targets.worker") + 2]) for command in commands]
        return [[[[self.model(file).ms.item()] * 3] * 2] * 2 for file in files]


def level(output: Tensor, _: Tensor) -> Tensor:
    """The metric: how high the output is."""
    return output.mean()


def make_task(**changes: Any) -> Task:
    ones = torch.ones(4, 2)
    given = {"example_inputs": ones, "validation": [(ones, torch.zeros(4))], "metrics": level}
    return Task(**(given | changes))
