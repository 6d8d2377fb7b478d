"""Which int8 files a processor without VNNI may get wrong, read off the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pared.targets import risk
from pared.targets.bench import bench
from pared.targets.risk import layers_at_risk, warning
from tiny_onnx import write_chain


def write(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def integer_file(path: Path, weight: np.ndarray) -> Path:
    """Quantize, dequantize, MatMul with a dequantized weight of (in, out)."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    return write(path, nodes, {"w": weight.astype(np.int8), "s": np.float32(0.1), "z": np.uint8(0)})


def test_layers_at_risk_are_those_whose_neighbours_are_large(tmp_path: Path) -> None:
    assert layers_at_risk(integer_file(tmp_path / "a.onnx", np.array([[100, 1], [100, 1]]))) == ["w"]
    # 100 and 1 meet in each output channel here: 255 * 101 fits 16 bits.
    assert layers_at_risk(integer_file(tmp_path / "b.onnx", np.array([[100, 1], [1, 100]]))) == []
    assert layers_at_risk(write_chain(tmp_path / "c.onnx")) == []


@pytest.mark.parametrize(("group", "at_risk"), [(2, []), (1, ["w"])])
def test_depthwise_convolutions_are_not_at_risk(tmp_path: Path, group: int, at_risk: list[str]) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["y"], group=group),
    ]
    weight = np.full((2, 2 // group, 1, 2), 127, np.int8)
    path = write(tmp_path / "m.onnx", nodes, {"w": weight, "s": np.float32(1)})
    assert layers_at_risk(path) == at_risk


@pytest.mark.parametrize(
    ("here", "said"), [(True, "this processor has no VNNI"), (None, "this system does not tell"), (False, "")]
)
def test_warning_names_the_layer_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool | None, said: str
) -> None:
    monkeypatch.setattr(risk, "saturates_here", lambda: here)
    path = integer_file(tmp_path / "a.onnx", np.full((2, 2), 127))
    found = warning(path, "onnxruntime")
    assert (said in found and "'any'" in found and " w " in found) if said else found == ""
    assert warning(integer_file(tmp_path / "b.onnx", np.full((2, 2), 64)), "onnxruntime") == ""


def test_bench_warns_when_a_file_is_at_risk_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk, "saturates_here", lambda: True)
    files = [
        integer_file(tmp_path / "a.onnx", np.full((2, 2), 64)),
        integer_file(tmp_path / "b.onnx", np.full((2, 2), 127)),
    ]
    monkeypatch.setattr(
        "pared.targets.bench.time_in_turn", lambda commands, **_: [[[[1.0] * 3] * 2] * 2] * len(commands)
    )
    monkeypatch.setattr("pared.targets.bench.peak_memory", lambda command: 1)
    rows: list[Any] = bench(files)
    assert rows[0].warning == "" and "b.onnx may be wrong here" in rows[1].warning
