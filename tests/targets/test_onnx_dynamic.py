"""ONNX files of run-time quantized programs: the nodes that ONNX Runtime makes of them, and what they compute."""

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

from pared.quantize.dynamic import QuantizeDynamic
from pared.step import Context
from pared.targets.onnx_dynamic import dynamic_quantize, with_dynamic_operators
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task
from zoo_models import FusedAttention, make


class Shared(nn.Module):
    """Two layers that read one tensor, one more, and a length that may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x) * torch.sigmoid(self.b(x))))


def exported(model: nn.Module, task: Task, folder: Path, **settings: Any) -> tuple[nn.Module, Path]:
    target, step = OnnxRuntime(), QuantizeDynamic(**settings)
    ctx = Context(task=task, target=target, work=folder, dense=model)
    program = step.apply(model, step.plan(model, ctx), ctx)
    target.export(program, task, folder / "model.onnx")
    return program, folder / "model.onnx"


def optimized(path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def outputs(path: Path, *inputs: Tensor) -> np.ndarray:
    session = OnnxRuntime().open(path, threads=1)
    found: np.ndarray = session.run([x.numpy() for x in inputs])[0]
    return found


@pytest.mark.parametrize("activations", ["per_row", "per_tensor"])
def test_runtime_makes_an_integer_operator_of_every_layer(activations: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    task = Task(example_inputs=torch.randn(2, 5, 16), dynamic={"0": {1: "length"}})
    program, path = exported(model, task, tmp_path, activations=activations)
    kinds = optimized(path)
    assert kinds["MatMulIntegerToFloat"] == 2  # what `a` and `b` read is quantized once
    assert kinds["DynamicQuantizeMatMul"] == 1
    assert kinds["DynamicQuantizeLinear"] == 1
    assert kinds["MatMul"] + kinds["Gemm"] + kinds["Transpose"] == 0
    stored = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2}
    assert stored == {onnx.TensorProto.INT8}
    for shape in ((1, 1, 16), (3, 9, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = program(x).numpy()
        # Where float32 rounds apart, a value moves by one quantum of the second quantization, half a percent or so.
        assert np.abs(outputs(path, x) - expected).max() <= 0.01 * np.abs(expected).max()


def test_first_layer_is_the_same_as_in_the_program_to_float_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    program, path = exported(model, Task(example_inputs=torch.randn(2, 16)), tmp_path)
    for x in (torch.randn(4, 16), torch.rand(4, 16) + 3, torch.zeros(2, 16)):
        with torch.no_grad():
            expected = program(x).numpy()
        assert np.abs(outputs(path, x) - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_layers_that_share_a_weight_share_it_in_the_file(tmp_path: Path) -> None:
    model, example = make("tied_weights")
    _, path = exported(model, Task(example_inputs=example), tmp_path)
    shapes = [tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    assert sorted(shapes) == [(6, 8), (8, 5), (8, 8)]


def test_attention_runs_in_the_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FusedAttention().eval()
    task = Task(example_inputs=torch.randn(2, 7, 6), dynamic={"0": {1: "length"}})
    program, path = exported(model, task, tmp_path)
    kinds = optimized(path)
    assert kinds["DynamicQuantizeMatMul"] + kinds["MatMulIntegerToFloat"] == 6
    x = torch.randn(3, 11, 6)
    with torch.no_grad():
        expected = program(x).numpy()
    assert np.abs(outputs(path, x) - expected).max() <= 0.02 * np.abs(expected).max()


def test_embeddings_are_gathered_as_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2**11, 32), nn.Linear(32, 4)).eval()
    program, path = exported(model, Task(example_inputs=torch.randint(0, 9, (2, 3))), tmp_path)
    assert path.stat().st_size < 2**16 + 2**15  # a quarter of the float table, and a scale for each row
    ids = torch.randint(0, 2**11, (4, 3))
    with torch.no_grad():
        assert np.abs(outputs(path, ids) - program(ids).numpy()).max() <= 1e-5


def test_operator_equals_dynamic_quantize_linear(tmp_path: Path) -> None:
    """The rule of ONNX, as ONNX Runtime runs it: the program's own arithmetic chooses the same integers."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])
    kinds = (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8)
    results = [onnx.helper.make_tensor_value_info(f"y{i}", kind, None) for i, kind in enumerate(kinds)]
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y0", "y1", "y2"])
    graph = onnx.helper.make_graph([node], "g", [x], results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    for value in (torch.randn(500), torch.rand(500), -torch.rand(500), torch.zeros(5)):
        q, scale, zero_point = session.run(None, {"x": value.numpy()})
        found = dynamic_quantize(value)
        assert scale == pytest.approx(found[1].item(), rel=1e-6) or not value.any()
        assert zero_point == found[2].item()
        assert np.abs(q.astype(int) - found[0].numpy().astype(int)).max() <= 1


def test_other_programs_are_left_as_they_are() -> None:
    model, example = make("mlp")
    assert with_dynamic_operators(model) is model
    task = Task(example_inputs=example)
    ctx = Context(task=task, target=OnnxRuntime(), work=Path(), dense=model)
    step = QuantizeDynamic()
    program = step.apply(model, step.plan(model, ctx), ctx)
    before = dict(program.state_dict())
    assert with_dynamic_operators(program) is not program
    assert program.state_dict().keys() == before.keys()
