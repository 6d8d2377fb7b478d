"""The simulation of integers against the program that is emitted, which PyTorch's own operators run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pared.quantize.choose import numbers_of
from pared.quantize.simulate import Simulation
from pared.quantize.static import QuantizeStatic
from pared.sensitivity import flat
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task, as_inputs
from zoo_models import ZOO


@pytest.mark.parametrize("pattern", ["residual_add", "depthwise", "concat", "attention_fused_qkv", "tied_weights"])
def test_simulation_is_the_emitted_program(pattern: str) -> None:
    torch.manual_seed(0)
    model, example = ZOO[pattern]()
    shape = example.args[0].shape[1:]
    task = Task(example_inputs=example, calibration=[torch.randn(64, *shape)])
    target = OnnxRuntime()
    # Biases in float, for the simulation does not round them, and a value on the border of two quanta shows it.
    target.scheme = dataclasses.replace(target.scheme, bias_dtype="float32")
    ctx = Context(task=task, target=target, work=Path(), dense=model)
    step = QuantizeStatic()
    plan = step.plan(model, ctx)
    graph, placement, _, _ = step.prepare(model, ctx)
    numbers = numbers_of(graph, placement, plan.facts, step.formats(ctx, plan.facts))
    inputs = as_inputs(torch.randn(5, *shape))
    program = step.apply(model, plan, ctx)
    with torch.no_grad():
        simulated = Simulation(graph, numbers).run(*flat(graph, inputs))
        emitted = program(*inputs.args)
    assert torch.equal(simulated, emitted)
