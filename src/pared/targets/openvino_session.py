"""Files of the target `openvino` opened in OpenVINO on the CPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pared.errors import TargetError
from pared.targets.sessions import InputSpec, not_installed

# Where a file keeps the names of its inputs' dimensions, which OpenVINO has none for.
NAMES = ["pared", "dimensions"]
# The numpy name of each type of OpenVINO that tensors of numbers have.
DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "f64": "float64",
    "i8": "int8",
    "u8": "uint8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}


@functools.cache
def core() -> Any:
    """OpenVINO's `Core`, the same for all that this process does. Raises: ImportError.

    On processors with AMX a core gives the thread that makes it a stack for signals, and takes that away when it goes.
    Where two have lived at once the thread may be left with one that is gone; then Ctrl-C kills the process wordlessly.
    """
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """OpenVINO IR, or an ONNX file, in OpenVINO on the CPU.

    Set up like the other sessions: one call at a time, `threads` threads, no sleeping threads kept awake. Float32 stays
    float32: on processors with bfloat16 units OpenVINO would round to 8 bits of mantissa by itself.
    """

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise not_installed("openvino", error) from None
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            # Processes are timed in turn on the same cores: each goes where the system puts it.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            read = core().read_model(str(path))
            names = json.loads(read.get_rt_info(NAMES).astype(str)) if read.has_rt_info(NAMES) else {}
            self.model = core().compile_model(read, "CPU", settings)
            self.request = self.model.create_infer_request()
        except RuntimeError as error:
            raise TargetError(f"openvino refuses {path.name}: {last_line(error)}") from None
        self.inputs = tuple(spec_of(port, names) for port in self.model.inputs)
        self.options = {
            "runtime": f"openvino {openvino.__version__}",
            "device": "CPU",
            **{name.lower(): str(value) for name, value in settings.items()},
        }

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order. Raises: TargetError."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(item.name for item in self.inputs)
            raise TargetError(f"the file takes {len(self.inputs)} inputs ({names}), found {len(inputs)}")
        for item, array in zip(self.inputs, inputs, strict=True):
            # OpenVINO converts other types without a word.
            if array.dtype != item.dtype:
                raise TargetError(
                    f"openvino cannot run the file on these inputs: {item.name} takes {item.dtype}, found {array.dtype}"
                )
        try:
            found = self.request.infer(inputs, share_inputs=True)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TargetError(f"openvino cannot run the file on these inputs: {last_line(error)}") from None
        return [np.array(found[index]) for index in range(len(self.model.outputs))]


def last_line(error: Exception) -> str:
    """What OpenVINO says in the end; before it come the places in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def spec_of(port: Any, names: Mapping[str, list[str]]) -> InputSpec:
    """One input of a compiled model, free dimensions named. Raises: TargetError for one that holds no numbers."""
    kind = port.get_element_type().get_type_name()
    name = min(port.get_names(), default="")
    if kind not in DTYPES:
        raise TargetError(f"input {name} is a {kind}; files with tensors of numbers can be run")
    sizes = list(port.partial_shape)
    free = names.get(name, [""] * len(sizes))
    shape = tuple(size.get_length() if size.is_static else free[axis] for axis, size in enumerate(sizes))
    return InputSpec(name, shape, DTYPES[kind])
