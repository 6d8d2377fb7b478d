"""ONNX Runtime as an oracle of saturation: one integer layer in a file, on kernels with or without VNNI."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pared.measure.processor import saturates_here

QEMU = shutil.which("qemu-x86_64")


def on_avx2(function: str, *arrays: np.ndarray, folder: Path, **numbers: Any) -> np.ndarray:
    """Run a function of this file where no VNNI is, here or on an emulated Haswell; skips where there is neither."""
    if saturates_here():
        found: np.ndarray = globals()[function](*arrays, **numbers)
        return found
    if QEMU is None:
        pytest.skip("this processor has VNNI, and qemu-x86_64 (Debian: qemu-user) is not installed")
    return on_haswell(function, *arrays, folder=folder, **numbers)


def on_haswell(function: str, *arrays: np.ndarray, folder: Path, **numbers: Any) -> np.ndarray:
    """Run a function of this file in a process on an emulated processor with AVX2 and without VNNI."""
    np.savez(folder / "in.npz", *arrays)
    code = (
        "import sys, numpy as np; sys.path[:0] = sys.argv[1:3]; import saturating; "
        "given = np.load(sys.argv[3] + '/in.npz'); arrays = [given[name] for name in given.files]; "
        f"np.save(sys.argv[3] + '/out.npy', saturating.{function}(*arrays, **{numbers!r}))"
    )
    source = str(Path(sys.modules["pared"].__file__ or "").parents[1])
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", code, str(Path(__file__).parent), source, str(folder)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: np.ndarray = np.load(folder / "out.npy")
    return found


def session(model: bytes | str, *, exact: bool = False) -> onnxruntime.InferenceSession:
    """A session on one thread; with `exact` ONNX Runtime avoids the instruction that saturates."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_file(x: np.ndarray, *, path: str, exact: bool = False) -> np.ndarray:
    """The first output of a file, one sample at a time."""
    opened = session(path, exact=exact)
    name = opened.get_inputs()[0].name
    return np.concatenate([opened.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))])


def convolution(
    x: np.ndarray, weight: np.ndarray, *, scale: float, exact: bool = False, **attributes: Any
) -> np.ndarray:
    """QLinearConv of bytes: round(sum / scale) + 128, as bytes, in ONNX Runtime."""
    zero = attributes.pop("zero_point", 0)
    constants = {
        "xs": np.float32(1),
        "xz": np.uint8(zero),
        "w": weight,
        "ws": np.float32(1),
        "wz": np.int8(0),
        "ys": np.float32(scale),
        "yz": np.uint8(128),
    }
    node = helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], **attributes)
    return run_node(node, x, constants, exact)


def linear(x: np.ndarray, weight: np.ndarray, *, scale: float, exact: bool = False) -> np.ndarray:
    """QGemm of bytes: round(sum / scale) + 128, as bytes, in ONNX Runtime."""
    constants = {
        "xs": np.float32(1),
        "xz": np.uint8(0),
        "w": weight,
        "ws": np.float32(1),
        "wz": np.int8(0),
        "b": np.zeros(len(weight), np.int32),
        "ys": np.float32(scale),
        "yz": np.uint8(128),
    }
    names = ["x", "xs", "xz", "w", "ws", "wz", "b", "ys", "yz"]
    node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=1)
    return run_node(node, x, constants, exact)


def run_node(node: onnx.NodeProto, x: np.ndarray, constants: dict[str, np.ndarray], exact: bool) -> np.ndarray:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    found: np.ndarray = session(model.SerializeToString(), exact=exact).run(None, {"x": x})[0]
    return found
