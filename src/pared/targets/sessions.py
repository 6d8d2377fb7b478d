"""Exported files opened in their runtimes, without torch: what a worker process, `predict` and `bench` share.

Exporting is each target's own file. A further runtime joins by one session class and one row in `RUNTIMES`. Rows name
their class as text, imported when a file is opened: some runtimes need torch, which nothing here may load.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pared.errors import TargetError, UsageError, nearest

ONNX_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input of a file. A free dimension is given by its name, or "" where it has none."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class OpenSession(Protocol):
    """An exported file, opened in its runtime."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]: ...
    @property
    def options(self) -> Mapping[str, str]:
        """How the runtime was set up, for the report."""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order. Raises: TargetError."""


class OnnxRuntimeSession:
    """An ONNX file in ONNX Runtime on the CPU.

    Spinning is off: a thread pool that spins between calls takes the cores from whoever runs next to it.
    """

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise not_installed("onnxruntime", error) from None
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except self.refusals() as error:
            raise TargetError(f"onnxruntime refuses {path.name}: {error}") from None
        self.inputs = tuple(
            InputSpec(
                item.name, tuple(size if isinstance(size, int) else size or "" for size in item.shape), dtype_of(item)
            )
            for item in self.session.get_inputs()
        )
        self.options = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "provider": "CPUExecutionProvider",
            "intra_op_num_threads": str(threads),
            "inter_op_num_threads": "1",
            "execution_mode": "sequential",
            "graph_optimization_level": "all",
            "allow_spinning": "no",
        }

    @staticmethod
    def refusals() -> tuple[type[Exception], ...]:
        """What ONNX Runtime raises: its own exceptions share no root, and some are plain."""
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
        return (*own, RuntimeError, ValueError, TypeError)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order. Raises: TargetError."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(item.name for item in self.inputs)
            raise TargetError(f"the file takes {len(self.inputs)} inputs ({names}), found {len(inputs)}")
        feed = {item.name: array for item, array in zip(self.inputs, inputs, strict=True)}
        try:
            outputs: list[np.ndarray] = self.session.run(None, feed)
        except self.refusals() as error:
            raise TargetError(f"onnxruntime cannot run the file on these inputs: {error}") from None
        return outputs


def dtype_of(item: Any) -> str:
    """The numpy name of an input's type. Raises: TargetError for one that is no tensor of numbers."""
    if item.type not in ONNX_DTYPES:
        raise TargetError(f"input {item.name} is a {item.type}; files with tensors of numbers can be run")
    return ONNX_DTYPES[item.type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """One row of the table: what a target's exports are, and what opens them.

    Attributes:
        about: One line for `pared list targets`.
        session: The class that opens a file, as "module:Class"; called with the path and the number of threads.
        files: Names of an export's files inside an artifact; the first is the one that is opened.
        optional: Names of further files, which not every export has.
        packages: Distributions that make and run the file: their versions are part of what a cached stage depends on.
        install: What to give to `pip install` where the runtime is missing.
        carries_code: True where opening a file runs code from it, so that it opens only with `trust=True`.
        here: What says why files cannot run on this machine, as "module:function"; it returns "" where they can.
    """

    about: str
    session: str
    files: tuple[str, ...]
    packages: tuple[str, ...]
    install: str
    optional: tuple[str, ...] = ()
    carries_code: bool = False
    here: str = ""

    @property
    def filename(self) -> str:
        """Name of the file that is opened."""
        return self.files[0]

    def open(self, path: Path, threads: int) -> OpenSession:
        """A file in a session. Raises: TargetError."""
        module, _, name = self.session.partition(":")
        opened: OpenSession = getattr(importlib.import_module(module), name)(path, threads)
        return opened


RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime": Runtime(
        about="An ONNX file in ONNX Runtime on the CPU.",
        session="pared.targets.sessions:OnnxRuntimeSession",
        files=("model.onnx",),
        packages=("onnx", "onnxscript", "onnxruntime"),
        install="onnxruntime",
    ),
    "executorch": Runtime(
        about="A program for ExecuTorch with XNNPACK, for phones and small boards.",
        session="pared.targets.executorch_session:ExecuTorchSession",
        files=("model.pte", "model.json"),
        packages=("executorch",),
        install="pared[executorch]",
    ),
    "tensorrt": Runtime(
        about="TensorRT-RTX engines for NVIDIA GPUs from Turing on, built without one.",
        session="pared.targets.tensorrt_session:TensorRtSession",
        files=("model.engine", "model.json"),
        optional=("model.sm75.engine",),
        packages=("onnx", "onnxscript", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
        install="pared[tensorrt]",
        carries_code=True,
        here="pared.targets.tensorrt_session:why_not_here",
    ),
    "openvino": Runtime(
        about="OpenVINO IR in OpenVINO on the CPU.",
        session="pared.targets.openvino_session:OpenVinoSession",
        files=("model.xml", "model.bin"),
        packages=("onnx", "onnxscript", "openvino"),
        install="pared[openvino]",
    ),
    "torch": Runtime(
        about="A package of AOTInductor in PyTorch on the CPU; carries compiled code.",
        session="pared.targets.torch_session:TorchSession",
        files=("model.pt2",),
        packages=("torch",),
        install="torch",
        carries_code=True,
    ),
}


def runtime(target: str) -> Runtime:
    """The row of a target. Raises: UsageError for one that opens no files."""
    if target not in RUNTIMES:
        raise UsageError(f"no runtime opens files of target {target!r}; {nearest(target, RUNTIMES)}")
    return RUNTIMES[target]


def why_not_here(target: str) -> str:
    """Why a target's files cannot run on this machine, or "" where they can."""
    module, _, name = runtime(target).here.partition(":")
    return str(getattr(importlib.import_module(module), name)()) if module else ""


def summary_of(target: str, path: Path) -> dict[str, str]:
    """What an export's notes say of it in short, for runtimes that cannot run here; empty where there are none."""
    notes = [file for file in files_of(target, path) if file.suffix == ".json"]
    found: dict[str, str] = json.loads(notes[0].read_text(encoding="utf8")).get("summary", {}) if notes else {}
    return found


def not_installed(target: str, error: ImportError) -> TargetError:
    """What to raise where a target's runtime is missing."""
    return TargetError(f"the target {target} needs a package that is missing ({error}); {how_to_install(target)}")


def how_to_install(target: str) -> str:
    """The command that installs a target's runtime; quoted, as brackets mean something to a shell."""
    package = RUNTIMES[target].install
    return f"pip install {package}" if package.isidentifier() else f"pip install '{package}'"


def files_of(target: str, path: Path) -> list[Path]:
    """The files of an export that exist: the one that is opened first, then those that belong to it.

    These lie beside it and begin with its stem, as `model.bin` beside `model.xml`. ONNX may keep tensors in a further
    file, NAME.data.
    """
    first, *others = *runtime(target).files, *runtime(target).optional
    names = [path.name, *(path.stem + name.removeprefix(Path(first).stem) for name in others), f"{path.name}.data"]
    return [file for file in map(path.with_name, names) if file.is_file()]


def size_of(target: str, path: Path) -> int:
    """Bytes of an export, all its files together."""
    return sum(file.stat().st_size for file in files_of(target, path))


def open_session(target: str, path: Path, *, threads: int, trust: bool = False) -> OpenSession:
    """An exported file, ready to run.

    Args:
        target: Name of a row of `RUNTIMES`.
        path: The exported file.
        threads: Threads of one call, at least 1.
        trust: Say that the file comes from someone you trust: some runtimes' files carry code.

    Raises:
        UsageError: No such target or file, no thread, or a file that carries code and is not trusted.
        TargetError: The runtime is not installed, or refuses the file.
    """
    row = runtime(target)
    if threads < 1:
        raise UsageError(f"a session needs at least one thread, found {threads}")
    if not path.is_file():
        raise UsageError(f"no file at {path}")
    if row.carries_code and not trust:
        raise UsageError(
            f"{path.name} carries code that runs when it is opened; open it with trust=True (--trust) if you trust "
            "whoever made it"
        )
    return row.open(path, threads)
