"""Files of the target `torch` opened in PyTorch. Never imported by a process that times another runtime."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pared.errors import TargetError
from pared.targets.sessions import InputSpec

if "torch" not in sys.modules:
    # In a worker: threads that wait for the next call give up the cores. OpenMP reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


class TorchSession:
    """A package of AOTInductor on the CPU.

    PyTorch has one number of threads for the whole process: it is set for each call, and set back.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.threads = threads
        try:
            self.model = torch._inductor.aoti_load_package(str(path))
            described = self.model.get_metadata().get("pared_inputs", "")
        except (RuntimeError, ValueError, OSError) as error:
            raise TargetError(f"torch refuses {path.name}: {first_line(error)}") from None
        if not described:
            raise TargetError(f"{path.name} does not say what its inputs are; make it with pared's target torch")
        self.inputs = tuple(
            InputSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in json.loads(described)
        )
        self.options = {
            "runtime": f"torch {torch.__version__}",
            "device": "CPU",
            "intra_op_num_threads": str(threads),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        }

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order. Raises: TargetError."""
        self.check(inputs)
        with limited(self.threads), torch.inference_mode():
            try:
                # The package knows what the model gives; its loader gives the tensors of that, flat.
                found = self.model.loader.boxed_run([torch.from_numpy(np.ascontiguousarray(x)) for x in inputs])
            except RuntimeError as error:
                raise TargetError(f"torch cannot run the file on these inputs: {first_line(error)}") from None
        return [tensor.numpy() for tensor in found]

    def check(self, inputs: list[np.ndarray]) -> None:
        """Raise `TargetError` for inputs that the compiled code, which checks nothing, would misread."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(item.name for item in self.inputs)
            raise TargetError(f"the file takes {len(self.inputs)} inputs ({names}), found {len(inputs)}")
        for item, array in zip(self.inputs, inputs, strict=True):
            fits = len(array.shape) == len(item.shape) and all(
                size == want for size, want in zip(array.shape, item.shape, strict=True) if isinstance(want, int)
            )
            if not fits or array.dtype != item.dtype:
                raise TargetError(
                    f"torch cannot run the file on these inputs: {item.name} takes {item.dtype} of shape "
                    f"{list(item.shape)}, found {array.dtype} of shape {list(array.shape)}"
                )


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """A number of threads for a while."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def first_line(error: Exception) -> str:
    """What went wrong, without the places in PyTorch's own source."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
