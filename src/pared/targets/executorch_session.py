"""A `.pte` program opened in ExecuTorch.

Its Python runtime passes tensors of PyTorch, so this file imports torch, unlike `targets.sessions`: a worker process of
this target weighs what PyTorch weighs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pared.errors import TargetError
from pared.targets.sessions import InputSpec, not_installed


class ExecuTorchSession:
    """A program in ExecuTorch with the XNNPACK delegate on the CPU.

    The thread pool belongs to the process. Making it anew leaves programs that were loaded before with one that is
    gone, so each session loads its program again where another session has changed the number of threads.
    """

    pool: ClassVar[int] = 0  # how often the thread pool was made

    def __init__(self, path: Path, threads: int) -> None:
        try:
            # `executorch.runtime`, which wraps this, loads the whole exporter, and that takes longer than PyTorch.
            library = importlib.import_module("executorch.extension.pybindings._C")
        except ImportError as error:
            raise not_installed("executorch", error) from None
        self.library, self.path, self.threads = library, path, threads
        self.method = self.load()
        metadata = self.method.method_meta()
        planned = [metadata.input_tensor_meta(index) for index in range(metadata.num_inputs())]
        notes = read_notes(path)
        self.inputs = tuple(
            InputSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in notes.get("inputs", ())
        )
        if len(self.inputs) != len(planned):
            raise TargetError(
                f"executorch: {path.name} takes {len(planned)} inputs, and its notes beside it tell of "
                f"{len(self.inputs)}; keep the two files of an export together"
            )
        self.largest = [tuple(item.sizes()) for item in planned]
        self.parts = notes["outputs_have_batch"]
        left = ", ".join(f"{name} x {count}" for name, count in notes["not_delegated"].items())
        self.options = {
            "runtime": f"executorch {importlib.metadata.version('executorch')}",
            "delegate": "XNNPACK",
            "threads": str(threads),
            "not_delegated": left or "nothing",
            "memory": "includes PyTorch, which the Python runtime needs and a C++ program does not",
        }

    def load(self) -> Any:
        """The program's method, ready to run on this session's threads. Raises: TargetError."""
        if self.library._threadpool_get_thread_count() != self.threads:
            self.library._unsafe_reset_threadpool(self.threads)
            ExecuTorchSession.pool += 1
        self.loaded_for = ExecuTorchSession.pool
        try:
            whole = self.library.Verification.InternalConsistency
            # The method needs its program alive.
            self.program = self.library._load_program(str(self.path), program_verification=whole)
            return self.program.load_method("forward")
        except RuntimeError as error:
            raise TargetError(f"executorch refuses {self.path.name}: {error}") from None

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order. Raises: TargetError."""
        self.check(inputs)
        if self.loaded_for != ExecuTorchSession.pool:
            self.method = self.load()
        batch, most = inputs[0].shape[0], min(sizes[0] for sizes in self.largest)
        if batch <= most or not self.parts:
            return self.run_part(inputs)
        parts = [self.run_part([array[at : at + most] for array in inputs]) for at in range(0, batch, most)]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def run_part(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call of the program."""
        tensors = [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in inputs]
        try:
            outputs = self.method(tensors)
        except RuntimeError as error:
            raise TargetError(f"executorch cannot run the file on these inputs: {error}") from None
        arrays = [output.numpy() for output in outputs if isinstance(output, torch.Tensor)]
        # An integer tensor that is an output too comes as long as memory was planned for, its first rows filled.
        return [array[: len(inputs[0])] for array in arrays] if self.parts else arrays

    def check(self, inputs: list[np.ndarray]) -> None:
        """Raise `TargetError` for inputs that the program does not take."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(item.name for item in self.inputs)
            raise TargetError(f"the file takes {len(self.inputs)} inputs ({names}), found {len(inputs)}")
        for spec, most, array in zip(self.inputs, self.largest, inputs, strict=True):
            if str(array.dtype) != spec.dtype:
                raise TargetError(f"input {spec.name!r} takes {spec.dtype}, found {array.dtype}")
            fits = array.ndim == len(spec.shape) and all(
                size == found if isinstance(size, int) else found <= limit or (axis == 0 and self.parts)
                for axis, (size, limit, found) in enumerate(zip(spec.shape, most, array.shape, strict=True))
            )
            if not fits:
                raise TargetError(f"input {spec.name!r} takes {shown(spec.shape, most)}, found {list(array.shape)}")


def shown(shape: tuple[int | str, ...], most: tuple[int, ...]) -> list[str]:
    """A shape for a message: free dimensions with the largest size that memory was planned for."""
    return [str(s) if isinstance(s, int) else f"{s} up to {m}" for s, m in zip(shape, most, strict=True)]


def read_notes(path: Path) -> dict[str, Any]:
    """What the exporter wrote beside the program. Raises: TargetError."""
    file = path.with_suffix(".json")
    try:
        notes: dict[str, Any] = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError):
        raise TargetError(
            f"executorch: {file.name} is missing or damaged; keep the two files of an export together"
        ) from None
    return notes
