"""Runtimes that ship models. Light on import: a worker process opens files without loading torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pared.errors import UsageError, nearest

if TYPE_CHECKING:
    from pared.step import Target

TARGETS: Mapping[str, str] = {
    "onnxruntime": "pared.targets.onnxruntime:OnnxRuntime",
    "openvino": "pared.targets.openvino:OpenVino",
    "executorch": "pared.targets.executorch:ExecuTorch",
    "tensorrt": "pared.targets.tensorrt:TensorRt",
    "torch": "pared.targets.torch:TorchPackage",
}


def find_target(name: str) -> Target:
    """The target of a name. Raises: UsageError for an unknown one."""
    if name not in TARGETS:
        raise UsageError(f"no target {name!r}; {nearest(name, TARGETS)}")
    module, _, attribute = TARGETS[name].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target
