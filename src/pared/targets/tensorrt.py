"""The target `tensorrt`: TensorRT-RTX engines with explicit quantization, built ahead of time and without a GPU.

Two engines make an export: one for Turing (sm_75), one for all later architectures. One engine for both would hold, for
every architecture, what Turing can do: it multiplies in float what it stores in int8.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import TargetError
from pared.step import RESHAPES, Scheme
from pared.targets.sessions import OpenSession, not_installed, open_session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from pared.task import Task

SCHEME = Scheme(
    # The parser takes zero points of 0 alone.
    activation_dtype="int8",
    activation_symmetric=True,
    weighted=frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear"}),
    # A layer whose inputs are quantized runs in integers, and adds a residual in the same kernel: integers between the
    # two would part them. The other side of a residual add is quantized, where it feeds a layer.
    whole=frozenset(),
    joining=frozenset(),
    following=RESHAPES | {"aten.max_pool2d"},
    # It takes clips into the layer before them as they are; saturation could not do their work, for it is symmetric.
    absorbed=frozenset(),
    bias_dtype="float32",
)
TURING = (75,)
LATER = (80, 86, 89, 120)
BATCH = 64
GROWTH = 4
LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[")
OUTPUTS = re.compile(r"Outputs: \[(.*?)\], TacticName")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# What TensorRT-RTX calls the layers that multiply: convolutions and matrix products.
MULTIPLIES = frozenset({"correlation", "gemm", "conv", "convolution", "matmul", "fc"})


class TensorRt:
    """TensorRT-RTX engines for NVIDIA GPUs, built without one."""

    name = "tensorrt"
    filename = "model.engine"
    scheme = SCHEME

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        """Write an engine, the one for Turing beside it, and what their layers became.

        Turing may refuse what later architectures run; then its engine is left out, and the notes say why.

        Raises:
            CaptureError: The model cannot be exported.
            TargetError: It cannot be written as ONNX, or the parser or builder refuses it; names the operator.
        """
        from pared.targets.onnxruntime import checked, to_onnx

        proto = to_onnx(model, task, self.name)
        name_nodes(proto.graph)
        engine = build(proto, LATER, task)
        path.write_bytes(engine.plan)
        engines = {path.name: engine.described()}
        turing = path.with_name(f"{path.stem}.sm75{path.suffix}")
        turing.unlink(missing_ok=True)
        linear_as_convolution(proto)
        checked(proto, self.name)
        try:
            older = build(proto, TURING, task)
        except TargetError as error:
            engines[turing.name] = {"architectures": list(TURING), "refused": str(error)}
        else:
            turing.write_bytes(older.plan)
            engines[turing.name] = older.described()
        notes = {"inputs": inputs_of(proto), "engines": engines, "summary": summary(engines)}
        path.with_suffix(".json").write_text(json.dumps(notes, indent=1), encoding="utf8")

    def open(self, path: Path, *, threads: int) -> OpenSession:
        """The file in a session. Raises: TargetError, also where there is no NVIDIA GPU."""
        return open_session(self.name, path, threads=threads, trust=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine: its bytes, the architectures it is for, and its layers as the builder lists them."""

    plan: bytes
    architectures: tuple[int, ...]
    layers: tuple[dict[str, Any], ...]

    def described(self) -> dict[str, Any]:
        """Plain data for the notes."""
        multiply = [layer for layer in self.layers if layer["type"] in MULTIPLIES]
        return {
            "architectures": list(self.architectures),
            "int8_layers": sum("Int8" in layer["inputs"] for layer in multiply),
            "multiplying_layers": len(multiply),
            "layers": list(self.layers),
        }


def summary(engines: dict[str, dict[str, Any]]) -> dict[str, str]:
    """One line an engine: for which architectures, and how many of its multiplying layers take int8."""
    lines = {}
    for name, engine in engines.items():
        archs = ", ".join(f"sm_{number}" for number in engine["architectures"])
        count = f"{engine.get('int8_layers')} of {engine.get('multiplying_layers')} multiplying layers take int8"
        lines[name] = f"{archs}: not built: {engine['refused']}" if "refused" in engine else f"{archs}: {count}"
    return lines


def build(proto: Any, architectures: Sequence[int], task: Task) -> Engine:
    """One engine for some architectures. Raises: TargetError with the operator that is refused."""
    try:
        import tensorrt_rtx_bindings as trt
    except ImportError as error:
        raise not_installed("tensorrt", error) from None

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        """Keeps what is said, for the list of layers and for errors."""

        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            self.said.append(msg)
            if severity <= trt.ILogger.ERROR:
                self.errors.append(msg)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString()):
        found = parser.get_error(0)
        raise TargetError(
            f"tensorrt: the parser refuses the operator {found.node_operator() or '?'} ({found.node_name()}): "
            f"{found.desc().strip().splitlines()[-1]}"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    largest = largest_sizes(task)
    for index, given in enumerate(proto.graph.input):
        sizes = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
        least, typical = (
            [usual.get(size, size) for size in sizes] for usual in (dict.fromkeys(largest, 1), examples(task))
        )
        profile.set_shape(network.get_input(index).name, least, typical, [largest.get(size, size) for size in sizes])
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(architectures)
    for index, number in enumerate(architectures):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)
    plan = builder.build_serialized_network(network, config)
    names = ", ".join(f"sm_{number}" for number in architectures)
    if plan is None:
        raise TargetError(
            f"tensorrt: no engine for {names}: {log.errors[-1].strip() if log.errors else 'no reason given'}"
        )
    return Engine(plan=bytes(plan), architectures=tuple(architectures), layers=tuple(layers_in(log.said)))


def layers_in(said: Sequence[str]) -> list[dict[str, Any]]:
    """The layers of an engine, from what its builder said: the list that an inspector of the engine gives.

    An inspector needs an engine that was loaded, and loading one needs a GPU.

    Example:
        >>> line = ("Name: c, LayerType: gemm, Inputs: [ { Name: x, Datatype: Int8, Format: y }], Constants: [], "
        ...         "Outputs: [ { Name: z, Datatype: Float, Format: y }], TacticName: t, Metadata: [ONNX Layer: fc]")
        >>> layers_in(["Layers:\\n" + line])
        [{'name': 'c', 'type': 'gemm', 'inputs': ['Int8'], 'outputs': ['Float'], 'onnx': ['fc']}]
    """
    found = []
    for line in "\n".join(said).splitlines():
        match, outputs = LAYER.match(line), OUTPUTS.search(line)
        if match is not None and outputs is not None:
            found.append(
                {
                    "name": match["name"],
                    "type": match["type"],
                    "inputs": re.findall(r"Datatype: (\w+)", match["inputs"]),
                    "outputs": re.findall(r"Datatype: (\w+)", outputs[1]),
                    "onnx": ONNX_LAYER.findall(line),
                }
            )
    return found


def largest_sizes(task: Task) -> dict[str, int]:
    """The largest size of each dynamic dimension, by name."""
    found = {"batch": max(BATCH, task.example_inputs.size)}
    for name, size in examples(task).items():
        if name != "batch":
            found[name] = GROWTH * size
    return found


def examples(task: Task) -> dict[str, int]:
    """The size of each dynamic dimension that engines are tuned for: one sample, and otherwise the example's."""
    sizes = {"batch": 1}
    for key, tensor in task.example_inputs.tensors.items():
        sizes |= {name: tensor.shape[axis] for axis, name in task.dynamic_of(key).items()}
    return sizes


def inputs_of(proto: Any) -> list[dict[str, Any]]:
    """Name, shape and dtype of each input, free dimensions by name."""
    import onnx

    found = []
    for given in proto.graph.input:
        kind = given.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        found.append({"name": given.name, "shape": shape, "dtype": str(dtype)})
    return found


def name_nodes(graph: Any) -> None:
    """Name each node after its result, so that refusals and layer lists can say which one they mean."""
    for node in graph.node:
        node.name = f"{node.op_type}:{node.output[0]}"


def linear_as_convolution(proto: Any) -> None:
    """Write each `Gemm` with a stored weight as the convolution with a window of 1 that it is, in place.

    Turing has no float matrix product in TensorRT-RTX, but has the convolution.
    """
    import numpy as np
    import onnx

    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    axes = "one_by_one"
    written: list[Any] = []
    reshaped: set[str] = set()
    for node in graph.node:
        weight = node.input[1] if node.op_type == "Gemm" else ""
        maker = makers.get(weight)
        stored = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else weight
        settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if stored not in tensors or settings.pop("transB", 0) != 1 or any(value != 1.0 for value in settings.values()):
            written.append(node)
            continue
        if stored not in reshaped:
            array = onnx.numpy_helper.to_array(tensors[stored])
            tensors[stored].CopyFrom(onnx.numpy_helper.from_array(array.reshape(*array.shape, 1, 1), stored))
            reshaped.add(stored)
        name = node.output[0]
        wide, result = f"{name}_wide", f"{name}_conv"
        written += [
            onnx.helper.make_node("Unsqueeze", [node.input[0], axes], [wide], f"{node.name}:unsqueeze"),
            onnx.helper.make_node("Conv", [wide, weight, *node.input[2:]], [result], node.name),
            onnx.helper.make_node("Squeeze", [result, axes], [name], f"{node.name}:squeeze"),
        ]
    if reshaped:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3], np.int64), axes))
        del graph.node[:]
        graph.node.extend(written)
