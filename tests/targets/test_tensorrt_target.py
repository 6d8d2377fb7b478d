"""The target `tensorrt`: engines are built without a GPU, for the architectures they name, with integers where planned;
what running them would tell is not told."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import pared
from contract_cases import batch_of, model_and_task
from pared.artifact import open_artifact
from pared.errors import TargetError, UsageError
from pared.quantize.static import QuantizeStatic
from pared.recipe import Budget
from pared.step import Context
from pared.targets import sessions
from pared.targets.onnxruntime import to_onnx
from pared.targets.tensorrt import TensorRt, build, largest_sizes, linear_as_convolution, name_nodes
from pared.targets.tensorrt_session import why_not_here
from pared.task import Task
from user_traces import traces_in

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed: pip install 'pared[tensorrt]'",
)
needs_no_gpu = pytest.mark.skipif(not why_not_here(), reason="this machine has an NVIDIA GPU")
PATTERNS = ["residual_add", pytest.param("depthwise", marks=pytest.mark.contract)]


def quantized(pattern: str, folder: Path) -> tuple[nn.Module, Task]:
    model, task = model_and_task(pattern)
    ctx = Context(task=task, target=TensorRt(), work=folder, dense=model)
    step = QuantizeStatic()
    return step.apply(model, step.plan(model, ctx), ctx), task


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], dict[str, Any]]:
    """The notes of a pattern's export, with its folder under "folder"; each exported once."""
    made: dict[tuple[str, bool], dict[str, Any]] = {}

    def export(pattern: str, integers: bool) -> dict[str, Any]:
        if (pattern, integers) not in made:
            folder = tmp_path_factory.mktemp(pattern)
            model, task = quantized(pattern, folder) if integers else model_and_task(pattern)
            TensorRt().export(model, task, folder / "model.engine")
            written = json.loads((folder / "model.json").read_text(encoding="utf8"))
            made[pattern, integers] = written | {"folder": folder}
        return made[pattern, integers]

    return export


@needs_tensorrt
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("integers", [False, True])
def test_engines_are_built_for_every_architecture_when_there_is_no_gpu(
    notes: Callable[[str, bool], dict[str, Any]], pattern: str, integers: bool
) -> None:
    written = notes(pattern, integers)
    engines = written["engines"]
    assert engines["model.engine"]["architectures"] == [80, 86, 89, 120]
    assert engines["model.sm75.engine"]["architectures"] == [75]
    for name in engines:
        # An engine of TensorRT-RTX begins with four letters that a runtime looks for.
        assert (written["folder"] / name).stat().st_size > 10_000
    assert written["inputs"] == [
        {"name": written["inputs"][0]["name"], "shape": ["batch", 3, 8, 8], "dtype": "float32"}
    ]


@needs_tensorrt
@pytest.mark.parametrize("integers", [False, True])
def test_engines_carry_no_path_and_no_source(notes: Callable[[str, bool], dict[str, Any]], integers: bool) -> None:
    assert traces_in(notes("residual_add", integers)["folder"].iterdir()) == []


@needs_tensorrt
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layer_takes_int8_when_the_model_is_quantized(
    notes: Callable[[str, bool], dict[str, Any]], pattern: str
) -> None:
    later = notes(pattern, True)["engines"]["model.engine"]
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model_and_task(pattern)[0].modules())
    assert later["int8_layers"] == later["multiplying_layers"] == layers
    assert notes(pattern, False)["engines"]["model.engine"]["int8_layers"] == 0
    # Turing stores integers and multiplies in float: it must not be said to do more.
    assert notes(pattern, True)["engines"]["model.sm75.engine"]["int8_layers"] == 0


@pytest.mark.parametrize("integers", [False, True])
def test_linear_as_convolution_computes_the_same_when_run_in_onnx_runtime(integers: bool, tmp_path: Path) -> None:
    model, task = quantized("mlp", tmp_path) if integers else model_and_task("mlp")
    proto = to_onnx(model, task, "tensorrt")
    name_nodes(proto.graph)
    x = batch_of(task.example_inputs, 5, 1).args[0].numpy()
    before = run(proto, x)
    linear_as_convolution(proto)
    assert not any(node.op_type == "Gemm" for node in proto.graph.node)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(run(proto, x), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(before, model(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-5)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The oracle: ONNX Runtime, without any rewriting of its own."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@needs_tensorrt
def test_parser_names_the_operator_when_it_refuses_one() -> None:
    task = model_and_task("mlp")[1]
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], "NoSuchOperator:y", domain="elsewhere")
    spec = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 12]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", spec[:1], spec[1:])
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("elsewhere", 1)]
    with pytest.raises(TargetError, match="refuses the operator NoSuchOperator"):
        build(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), (80,), task)


def test_largest_sizes_grow_when_a_dimension_is_dynamic() -> None:
    task = Task(example_inputs=(torch.zeros(1, 7, 16),), dynamic={"0": {1: "length"}})
    assert largest_sizes(task) == {"batch": 64, "length": 28}


def test_export_says_what_to_install_when_tensorrt_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    model, task = model_and_task("mlp")
    with pytest.raises(TargetError, match=r"pip install 'pared\[tensorrt\]'"):
        TensorRt().export(model, task, tmp_path / "model.engine")


@needs_tensorrt
@needs_no_gpu
def test_compress_writes_the_engine_and_guesses_nothing_when_there_is_no_gpu(tmp_path: Path) -> None:
    model, task = model_and_task("conv_bn_relu")
    settings: dict[str, Any] = {
        "target": "tensorrt",
        "out": tmp_path / "a",
        "budget": Budget(allow_larger=True, max_drop=0.0),
    }
    artifact = pared.compress(model, [QuantizeStatic()], task, **settings)
    for stage in artifact.report.stages:
        assert not stage.measured and "no NVIDIA GPU" in stage.why
        figures = (stage.latency_ms, stage.speedup, stage.peak_memory_bytes, stage.parity, stage.fidelity)
        assert figures == (None,) * 5 and stage.metrics == {}
        assert stage.size_bytes and stage.macs
    last, final = artifact.report.stages[-1], artifact.report.final
    assert last.kept and "accuracy and speed could not be judged" in last.why
    assert final is not None and (final.metrics, final.baseline_metrics, final.parity) == ({}, {}, None)
    assert "take int8" in artifact.report.environment["session"]["model.engine"]
    assert "not measured: this machine has no NVIDIA GPU" in " ".join(str(artifact.report).split())
    assert "the task gives no metric" not in str(artifact.report)
    with pytest.raises(TargetError, match="this machine has no NVIDIA GPU"):
        artifact.predict(*task.example_inputs.args)
    with pytest.raises(UsageError, match=r"carries code .* trust=True"):
        open_artifact(tmp_path / "a").predict(*task.example_inputs.args)
    again = pared.compress(model, [QuantizeStatic()], task, resume=True, **settings)
    assert again.report.to_json() == artifact.report.to_json()


def test_summary_of_is_empty_when_an_export_has_no_notes(tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"x")
    assert sessions.summary_of("tensorrt", tmp_path / "model.engine") == {}
