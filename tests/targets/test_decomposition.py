"""Sparing the exporter a tracing: taken where nothing would change, left where something must be decomposed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pared.graph.capture import capture, quiet
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.decomposition import decompose_sparingly
from pared.targets.onnxruntime import OnnxRuntime, hushed
from pared.task import Task


class Net(nn.Module):
    """Padding, a convolution with a batch norm, and a pool to `size`."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.head = nn.Linear(8 * size * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


def quantized(model: nn.Module, task: Task) -> nn.Module:
    ctx = Context(task=task, target=OnnxRuntime(), work=Path(), dense=model)
    return QuantizeStatic().apply(model, QuantizeStatic().plan(model, ctx), ctx)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for each program that is traced anew."""
    seen: list[Any] = []
    original = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, table: Any = None) -> ExportedProgram:
        seen.append(self)
        return original(self, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return seen


def exported(program: ExportedProgram) -> Any:
    with quiet(), hushed():
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    return made.model_proto


def run(proto: Any, x: Tensor) -> Any:
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x.numpy()})[0]


def test_decompose_sparingly_gives_the_exporters_own_file_when_nothing_needs_decomposing(traced: list[Any]) -> None:
    x = torch.randn(8, 3, 11, 11)
    task = Task(example_inputs=(x[:1],), calibration=[x])
    model = quantized(Net().eval(), task)
    own = exported(capture(model, task))
    assert len(traced) == 1
    spared = exported(decompose_sparingly(capture(model, task)))
    assert len(traced) == 1
    assert Counter(node.op_type for node in spared.graph.node) == Counter(node.op_type for node in own.graph.node)
    outputs = [run(proto, x) for proto in (own, spared)]
    np.testing.assert_array_equal(*outputs)
    onnx.checker.check_model(spared, full_check=True)


@pytest.mark.parametrize(
    ("size", "quantize"), [(2, True), (1, False)], ids=["pool with four outputs", "float, with a batch norm"]
)
def test_decompose_sparingly_leaves_to_the_exporter_what_it_has_to_decompose(
    traced: list[Any], size: int, quantize: bool
) -> None:
    x = torch.randn(8, 3, 11, 11)
    task = Task(example_inputs=(x[:1],), calibration=[x])
    model = Net(size).eval()
    program = capture(quantized(model, task) if quantize else model, task)
    proto = exported(decompose_sparingly(program))
    assert len(traced) == 1
    with torch.no_grad():
        expected = program.module()(x).numpy()
    found = run(proto, x)
    # A quantized value may round the other way: up to a few quanta of the output, against values of about 1.
    np.testing.assert_allclose(found, expected, atol=0.05 if quantize else 1e-5)


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_average_pool_with_one_output_is_exact_as_a_mean(size: Any) -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(x, size)

    x = torch.randn(2, 3, 5, 7)
    task = Task(example_inputs=(x,))
    expected = capture(Pool(), task).module()(x)
    program = decompose_sparingly(capture(Pool(), task))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.mean.dim"]
    torch.testing.assert_close(program.module()(x), expected)
