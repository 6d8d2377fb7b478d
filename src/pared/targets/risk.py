"""Which layers of an exported file can saturate on a processor without VNNI. Reads the file itself; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pared.measure.processor import saturates_here
from pared.measure.saturation import can_saturate

# Where an operator's weight stands among its inputs.
WEIGHT = {
    "Conv": 1,
    "Gemm": 1,
    "MatMul": 1,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
}


def layers_at_risk(path: Path) -> list[str]:
    """Names of the int8 weights of an ONNX file whose products can saturate; empty for a file of another kind."""
    if path.suffix != ".onnx":
        return []
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    # A weight stands behind the operator that dequantizes it, or, in files of other tools, at the layer itself.
    behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found = []
    for node in graph.node:
        place = WEIGHT.get(node.op_type)
        name = node.input[place] if place is not None and place < len(node.input) else ""
        name = behind.get(name, name)
        if name in tensors and can_saturate(*weight_of(node, onnx.numpy_helper.to_array(tensors[name]))):
            found.append(name)
    return list(dict.fromkeys(found))


def weight_of(node: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """A layer's weight with its output channels first, and its groups."""
    numbers = {item.name: item.i for item in node.attribute}
    if "Conv" in node.op_type:
        return values, numbers.get("group", 1)
    if values.ndim > 1 and not numbers.get("transB", 0):
        values = values.swapaxes(-1, -2)
    return values.reshape(-1, values.shape[-1]), 1


def warning(path: Path, target: str) -> str:
    """What to tell whoever runs a file on this processor, or ""."""
    if target != "onnxruntime" or saturates_here() is False or not (names := layers_at_risk(path)):
        return ""
    here = "this processor has no VNNI" if saturates_here() else "this system does not tell whether there is VNNI"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{path.name} may be wrong here: {here}, without which products of the 8-bit weights of {names[0]}{more} "
        "saturate; quantize again with QuantizeStatic(weights={'cpu': 'any'}) or QuantizeDynamic(cpu='any'), or open "
        "the file with ONNX Runtime's session option session.x64quantprecision=1, which is exact and slower"
    )
