"""Where a file and its model part: the layer that a target writes wrongly is the one that is named."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from contract_cases import model_and_task
from pared.errors import ParityError, TargetError
from pared.graph.capture import quiet
from pared.measure.parity import FLOAT_FLOOR_DB
from pared.pipeline.parting import first_true, where_they_part
from pared.pipeline.stage import Stage, finish_stage
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task


def wrongly(model: nn.Module, tensor: str) -> nn.Module:
    """A copy of a model with one tensor halved, by its name; a part of the model that has no such tensor as it is."""
    with quiet():
        model = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name == tensor:
                value.mul_(0.5)
    return model


class Wrong:
    """A target whose files are modules kept in memory: one tensor of each is written wrongly, or none."""

    name, filename, scheme = "wrong", "model.file", OnnxRuntime.scheme

    def __init__(self, tensor: str, *, fails: int = 0) -> None:
        self.tensor, self.fails = tensor, fails
        self.files: dict[Path, tuple[nn.Module, Task]] = {}

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        self.fails -= 1
        if self.fails >= 0:
            raise TargetError("not this time")
        self.files[path] = (wrongly(model, self.tensor), task)

    def open(self, path: Path, *, threads: int) -> Any:
        model, task = self.files[path]
        names = list(task.example_inputs.tensors)

        def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
            given = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
            keywords = {name: x for name, x in given.items() if name in task.example_inputs.kwargs}
            with torch.no_grad():
                return [model(*(x for name, x in given.items() if name not in keywords), **keywords).numpy()]

        return SimpleNamespace(inputs=[SimpleNamespace(name=name) for name in names], run=run)


class WrongOnnx(OnnxRuntime):
    """ONNX Runtime, with one tensor written wrongly."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        super().export(wrongly(model, self.tensor), task, path)


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [("conv_bn_relu", "0.0"), ("conv_bn_relu", "1.0"), ("conv_bn_relu", "2.2"), ("dict_output", "body.0")],
)
def test_the_layer_that_is_written_wrongly_is_named(pattern: str, layer: str) -> None:
    model, task = model_and_task(pattern)
    wrong = Wrong(f"{layer}.weight")
    found = where_they_part(model, task, wrong, task.example_inputs, FLOAT_FLOOR_DB)
    # The batch norm right behind it is part of what an exporter folds away: either may be the first to differ.
    assert found.startswith(f"they part at layer {layer} (aten."), found
    decibels = [float(part.split()[0]) for part in found.split(": ")[1].split(", ")]
    assert decibels[0] < FLOAT_FLOOR_DB
    assert all(before > FLOAT_FLOOR_DB for before in decibels[1:])


def test_a_quantized_layer_is_named_too(tmp_path: Path) -> None:
    model, task = model_and_task("conv_bn_relu")
    ctx = Context(task=task, target=OnnxRuntime(), work=tmp_path, dense=model)
    step = QuantizeStatic()
    program = step.apply(model, step.plan(model, ctx), ctx)
    scale = next(name for name, _ in program.named_parameters() if name.startswith("conv2d_1") and "scale" in name)
    found = where_they_part(program, task, Wrong(scale), task.example_inputs, 30.0)
    assert found.startswith("they part at layer 1."), found


def test_nothing_is_named_when_all_is_well_or_nothing_can_be_exported() -> None:
    model, task = model_and_task("conv_bn_relu")
    assert where_they_part(model, task, Wrong("none"), task.example_inputs, FLOAT_FLOOR_DB) == ""
    hopeless = Wrong("1.0.weight", fails=10**6)
    assert where_they_part(model, task, hopeless, task.example_inputs, FLOAT_FLOOR_DB) == ""


def test_a_layer_is_named_when_some_cuts_cannot_be_exported() -> None:
    model, task = model_and_task("conv_bn_relu")
    found = where_they_part(model, task, Wrong("0.0.weight", fails=2), task.example_inputs, FLOAT_FLOOR_DB)
    assert found.startswith("they part at layer 0."), found


@pytest.mark.parametrize("border", range(6))
@pytest.mark.parametrize("unknown", ["", "a", "c", "abc", "abcde"])
def test_first_true_finds_the_border(border: int, unknown: str) -> None:
    names = list("abcde")
    asked: list[str] = []

    def test(name: str) -> bool | None:
        asked.append(name)
        return None if name in unknown else names.index(name) >= border

    known = [name for name in names[border:] if name not in unknown]
    assert first_true(names, test) == (known[0] if known else None)
    assert len(asked) <= 3 + len(unknown)


def test_a_run_stops_and_names_the_layer(tmp_path: Path) -> None:
    model, task = model_and_task("conv_bn_relu")
    wrong = WrongOnnx("1.0.weight")
    file = tmp_path / "stage" / wrong.filename
    file.parent.mkdir()
    stage = Stage(key="", model=model, floating=model, plan=None, file=file, output=0, facts={})
    with pytest.raises(ParityError, match=r"baseline: .* disagree: .*; they part at layer 1\.0 \(aten\.conv2d\): "):
        finish_stage(stage, None, file, task, wrong, 1)
