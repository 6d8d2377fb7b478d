"""Activations of fewer bits than they are stored in: the file clips where the program does, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

import pared
from pared.errors import SettingError
from pared.graph.capture import operator
from pared.step import Context
from pared.targets import find_target
from pared.task import Task


def clipping(target: str, tmp_path: Path) -> tuple[nn.Module, Context, pared.QuantizeStatic]:
    """A network, and a quantization whose ranges leave out the largest tenth of every activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    x = torch.randn(64, 3, 8, 8)
    task = Task(example_inputs=(x[:1],), calibration=[x])
    step = pared.QuantizeStatic(ranges={"kind": "percentile", "percentile": 90.0}, activations={"bits": 4})
    return model.eval(), Context(task=task, target=find_target(target), work=tmp_path, dense=model), step


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_file_clips_at_the_ends_of_four_bits(target: str, tmp_path: Path) -> None:
    model, ctx, step = clipping(target, tmp_path)
    program = step.apply(model, step.plan(model, ctx), ctx)
    file = tmp_path / ctx.target.filename
    ctx.target.export(program, ctx.task, file)
    x = torch.randn(32, 3, 8, 8) * 2  # more beyond the ranges than in calibration
    with torch.no_grad():
        expected = program(x).numpy()
    (found,) = ctx.target.open(file, threads=1).run([x.numpy()])
    # Without a clip of its own the file came to 5 dB and less here.
    noise = np.square(found - expected).sum()
    assert 10 * np.log10(np.square(expected).sum() / max(noise, 1e-30)) > 25


def test_eight_bits_need_no_clip(tmp_path: Path) -> None:
    model, ctx, _ = clipping("onnxruntime", tmp_path)
    step = pared.QuantizeStatic()
    program = step.apply(model, step.plan(model, ctx), ctx)
    assert isinstance(program, fx.GraphModule)
    assert not [node for node in program.graph.nodes if operator(node) == "aten.clamp"]


@pytest.mark.parametrize("target", ["executorch", "tensorrt", "torch"])
def test_a_target_that_clips_at_eight_bits_alone_refuses_fewer(target: str, tmp_path: Path) -> None:
    model, ctx, step = clipping(target, tmp_path)
    for dry in (False, True):
        with pytest.raises(SettingError, match="activations of 4 bits: this target clips at the ends of 8 bits alone"):
            step.plan(model, Context(**(vars(ctx) | {"dry": dry})))
    for aware in (pared.QuantizeAware(activation_bits=3), pared.QuantizeAware(layer_bits={"*": 3})):
        with pytest.raises(SettingError, match="activations of 3 bits"):
            aware.plan(model, ctx)
