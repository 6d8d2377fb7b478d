"""Tiny ONNX files, made without torch: a chain of matrix products, which any test can compute by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def weight(width: int) -> np.ndarray:
    """The matrix that every layer multiplies by."""
    return (np.arange(width * width, dtype=np.float32).reshape(width, width) % 7 - 3) / width


def write_chain(path: Path, *, width: int = 4, layers: int = 1, shape: tuple[int | str, ...] = ("batch", 4)) -> Path:
    """Write y = x W W ... (`layers` times). `shape` is the declared shape of x."""
    nodes = [helper.make_node("MatMul", [f"t{i}", "w"], [f"t{i + 1}"]) for i in range(layers)]
    return write(path, nodes, {"t0": ("float32", shape)}, f"t{layers}", {"w": weight(width)})


def write_lookup(path: Path, shape: tuple[int | str, ...]) -> Path:
    """Write a look-up of two rows by the integers in x."""
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    return write(
        path, [node], {"ids": ("int64", shape)}, "y", {"table": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)}
    )


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[str, tuple[int | str, ...]]],
    output: str,
    constants: dict[str, np.ndarray],
) -> Path:
    """Write a graph with one float output."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, DTYPES[dtype], list(shape)) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
