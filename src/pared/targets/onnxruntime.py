"""The target `onnxruntime`: export to ONNX with quantize/dequantize pairs, as ONNX Runtime fuses them on CPUs."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pared.errors import TargetError
from pared.step import MOVES, Scheme
from pared.targets.sessions import OpenSession, open_session

if TYPE_CHECKING:
    from torch import nn

    from pared.task import Task

SCHEME = Scheme(
    # Signed activations ran three times slower on x86: its int8 dot product takes unsigned times signed.
    activation_dtype="uint8",
    activation_symmetric=False,
    weighted=frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear"}),
    # QLinearConv writes integers only; QGemm and MatMulIntegerToFloat can write float.
    whole=frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d"}),
    joining=frozenset({"aten.add", "aten.mul", "aten.cat", "aten.sigmoid", "aten.avg_pool2d"}),
    following=MOVES | {"aten.max_pool2d"},
    absorbed=frozenset({"aten.relu", "aten.relu6", "aten.hardtanh", "aten.clamp"}),
    saturating="neighbours",
    halves=frozenset({"float16", "bfloat16"}),
    # bfloat16 has no kernels on CPUs, and is not cast to float32 as float16 is.
    computed_halves=frozenset({"float16"}),
    # MatMulNBits, GatherBlockQuantized; weights of convolutions are restored as the file is loaded.
    weight_only=frozenset({"aten.linear", "aten.embedding", "aten.conv1d", "aten.conv2d", "aten.conv3d"}),
    # Its ConvInteger runs slower than a float convolution.
    dynamic=frozenset({"aten.linear", "aten.embedding"}),
    narrow_activations=True,
    norms_as_convolutions=True,
)

# Operators that ONNX Runtime looks through, or moves its conversions over, when it fuses integer layers.
MOVING = frozenset(
    {"Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Pad", "Identity"}
)
LOWEST = "lowest_float32"


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    filename = "model.onnx"
    scheme = SCHEME

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        """Write `model` as ONNX. Raises: CaptureError, TargetError."""
        from pared.targets import onnx_attention, onnx_dynamic, onnx_weights

        rewritten = onnx_dynamic.with_dynamic_operators(onnx_weights.with_weight_operators(model))
        proto = to_onnx(
            rewritten,
            task,
            self.name,
            rewrite=onnx_attention.attend_in_one,
            table={**onnx_weights.table(), **onnx_dynamic.table(), **onnx_attention.table()},
            finish=onnx_weights.unfold,
        )
        protect(proto.graph)
        path.write_bytes(checked(proto, self.name))

    def open(self, path: Path, *, threads: int) -> OpenSession:
        """The file in a session. Raises: TargetError."""
        return open_session(self.name, path, threads=threads)


def to_onnx(
    model: nn.Module,
    task: Task,
    target: str,
    *,
    rewrite: Callable[[Any], Any] | None = None,
    table: Mapping[Any, Any] = MappingProxyType({}),
    finish: Callable[[Any], None] | None = None,
) -> Any:
    """`model` as an ONNX model, anonymous, its free dimensions named.

    Args:
        model: Captured anew.
        task: Gives the example inputs and the names of dimensions.
        target: For messages.
        rewrite: Changes the captured program.
        table: Translations of operators that PyTorch's exporter does not know.
        finish: Changes the model before names and notes are taken out of it.

    Raises:
        CaptureError: The model cannot be captured.
        TargetError: It cannot be written as ONNX.
    """
    import torch

    from pared.graph.capture import capture, quiet
    from pared.targets.decomposition import decompose_sparingly

    program = capture(model, task)
    program = decompose_sparingly(program if rewrite is None else rewrite(program))
    with quiet(), hushed():
        try:
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, custom_translation_table={**clamps(), **table}
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise TargetError(f"{target}: the model cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    if exported is None:
        raise TargetError(f"{target}: the exporter returned nothing")
    proto = exported.model_proto
    if finish is not None:
        finish(proto)
    strip(proto)
    name_dimensions(proto.graph, task)
    return proto


def clamps() -> dict[Any, Any]:
    """A clamp by two scalars that the model holds, as the one operator that it is.

    The exporter writes a maximum and a minimum, and its optimizer joins them; of two clamps of the same tensor it loses
    the bounds of one.
    """
    import torch
    from onnxscript import opset18 as op

    def clamp(x: Any, low: Any = None, high: Any = None) -> Any:
        bounds = [bound for bound in (low, high) if bound is not None]
        if len(bounds) == 2 and not any(bound.shape is None or len(bound.shape) for bound in bounds):
            return op.Clip(x, op.CastLike(low, x), op.CastLike(high, x))
        above = x if low is None else op.Max(x, op.CastLike(low, x))
        return above if high is None else op.Min(above, op.CastLike(high, x))

    return {torch.ops.aten.clamp.Tensor: clamp}


def checked(proto: Any, target: str) -> bytes:
    """The content of an ONNX file, the same for the same model. Raises: TargetError for an invalid one."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise TargetError(f"{target}: onnx.checker refuses the file: {str(error).splitlines()[0]}") from error
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def strip(proto: Any) -> None:
    """Take the exporter's notes, long names and what goes without saying out of a model.

    The notes hold paths and lines of the user's source. Shapes of inner values can be inferred, and names of inner
    values say nothing: together they are a good part of a small file.
    """
    import onnx

    proto.producer_name, proto.producer_version = "pared", ""
    opset = next(item.version for item in proto.opset_import if item.domain == "")
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    tensors = proto.graph.initializer
    kept = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    kept |= {tensor.name for tensor in tensors if tensor.name.endswith("weight")}
    short: dict[str, str] = {}
    fresh = (name for name in map("t{}".format, itertools.count()) if name not in kept)

    def shorten(name: str) -> str:
        return name if name in kept or not name else short.get(name) or short.setdefault(name, next(fresh))

    for tensor in tensors:
        tensor.name = shorten(tensor.name)
    graphs: list[Any] = [proto.graph]
    while graphs:
        graph = graphs.pop()
        compared = residuals(graph)
        for index in reversed(range(len(graph.value_info))):
            if graph.value_info[index].name not in compared:
                del graph.value_info[index]
        for holder in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
            holder.ClearField("doc_string")
            holder.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("name")
            for values in (node.input, node.output):
                values[:] = map(shorten, values)
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
            drop_defaults(node, opset)
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []
        for value in graph.value_info:
            value.name = shorten(value.name)
        if graph is not proto.graph:
            for holder in (*graph.input, *graph.output, *graph.initializer):
                holder.name = shorten(holder.name)


def residuals(graph: Any) -> set[str]:
    """Names of the values that are added right before a layer norm."""
    added = {node.output[0]: node.input for node in graph.node if node.op_type == "Add"}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    return {name for node in norms for name in added.get(node.input[0], ())}


def name_dimensions(graph: Any, task: Task) -> None:
    """Call free dimensions what the task calls them, where PyTorch has symbols such as s38."""
    keys = list(task.example_inputs.tensors)
    names = {}
    for index, value in enumerate(graph.input):
        key = value.name if value.name in keys else keys[index]
        for axis, name in {0: "batch", **task.dynamic_of(key)}.items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.dim_param)


def drop_defaults(node: Any, opset: int) -> None:
    """Take out the attributes of an operator of ONNX itself that have the value they have by default."""
    import onnx

    if node.domain:
        return
    defaults = onnx.defs.get_schema(node.op_type, opset).attributes
    kept = [item for item in node.attribute if item.name not in defaults or item != defaults[item.name].default_value]
    del node.attribute[:]
    node.attribute.extend(kept)


def protect(graph: Any) -> None:
    """Keep ONNX Runtime from rounding the weights of layers that stay in float.

    It takes a float convolution or Gemm between integer tensors for an oversight, and rounds its weight to 8 bits with
    one scale for all channels (`WeightBiasQuantization`). Behind a maximum with the lowest number, which changes no
    value, it leaves the layer alone.
    """
    import numpy as np
    import onnx

    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights = {tensor.name for tensor in graph.initializer}
    guarded = []
    for node in graph.node:
        if node.op_type not in {"Conv", "ConvTranspose", "Gemm"} or node.input[1] not in weights:
            continue
        before, after = makers.get(node.input[0]), users.get(node.output[0], [])
        while before is not None and before.op_type in MOVING:
            before = makers.get(before.input[0])
        while len(after) == 1 and after[0].op_type in MOVING:
            after = users.get(after[0].output[0], [])
        if (
            before is not None
            and before.op_type == "DequantizeLinear"
            and after[:1]
            and after[0].op_type == "QuantizeLinear"
        ):
            guarded.append(node)
    for node in guarded:
        name, node.output[0] = node.output[0], f"{node.output[0]}_float"
        guard = onnx.helper.make_node("Max", [node.output[0], LOWEST], [name])
        graph.node.insert(list(graph.node).index(node) + 1, guard)
    if guarded:
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(np.finfo(np.float32).min), LOWEST))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep the exporter's own messages off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
