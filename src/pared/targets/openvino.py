"""The target `openvino`: OpenVINO IR with quantize/dequantize pairs, as OpenVINO fuses them on CPUs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import TargetError
from pared.targets.onnxruntime import SCHEME as ONNXRUNTIME
from pared.targets.onnxruntime import checked, to_onnx
from pared.targets.openvino_session import NAMES, core, last_line
from pared.targets.sessions import OpenSession, not_installed, open_session

if TYPE_CHECKING:
    from torch import nn

    from pared.task import Task

# As for ONNX Runtime, but for what OpenVINO does otherwise; tests compare with the graph that it runs.
SCHEME = dataclasses.replace(
    ONNXRUNTIME,
    # Its integer layers can all write float, also with an activation fused in.
    whole=frozenset(),
    float_activations=True,
    # oneDNN's kernels without VNNI add products in pairs, in an order of their own.
    saturating="any",
    # Others' weights are turned back into float as the file is loaded: they would be small on the disk alone.
    weight_only=frozenset({"aten.linear"}),
    # A form of ONNX Runtime alone.
    dynamic=frozenset(),
    norms_as_convolutions=False,
    # It runs these inside the layer before them, on the accumulator: an integer tensor between would only cost.
    absorbed=ONNXRUNTIME.absorbed
    | {
        "aten.elu",
        "aten.gelu",
        "aten.hardsigmoid",
        "aten.hardswish",
        "aten.leaky_relu",
        "aten.sigmoid",
        "aten.silu",
        "aten.tanh",
    },
    # Alone, a sigmoid runs in float.
    joining=frozenset({"aten.add", "aten.mul", "aten.cat", "aten.avg_pool2d", "aten.adaptive_avg_pool2d"}),
    # A residual add becomes the accumulator's start.
    summed=frozenset({"aten.add"}),
    bias_dtype="float32",
)


class OpenVino:
    """OpenVINO on the CPU."""

    name = "openvino"
    filename = "model.xml"
    scheme = SCHEME

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        """Write `model` as OpenVINO IR: the graph to `path`, the tensors beside it. Raises: CaptureError, TargetError.

        OpenVINO's own reader of ONNX makes the graph. Its tool `convert_model`, which reports its use to its makers,
        has no part in it.
        """
        from pared.targets import onnx_weights

        try:
            import openvino
            from openvino._offline_transformations import apply_moc_transformations
        except ImportError as error:
            raise not_installed(self.name, error) from None
        proto = to_onnx(
            onnx_weights.with_weight_operators(model),
            task,
            self.name,
            table=onnx_weights.table(),
            finish=onnx_weights.unfold,
        )
        try:
            made = core().read_model(checked(proto, self.name))
            # What OpenVINO does first with any file: it halves the graph, and takes nothing out of integers.
            apply_moc_transformations(made, cf=False, smart_reshape=False)
            names = {
                value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in proto.graph.input
            }
            made.set_rt_info(json.dumps(names), NAMES)
            for index, node in enumerate(made.get_ordered_ops()):
                if node.get_type_name() not in {"Parameter", "Result"}:
                    # OpenVINO counts all nodes that a process ever made: the same model gives the same file.
                    node.set_friendly_name(f"n{index}")
            openvino.save_model(made, str(path), compress_to_fp16=False)
        except RuntimeError as error:
            raise TargetError(f"openvino cannot take the model: {last_line(error)}") from None

    def open(self, path: Path, *, threads: int) -> OpenSession:
        """The file in a session. Raises: TargetError."""
        return open_session(self.name, path, threads=threads)
