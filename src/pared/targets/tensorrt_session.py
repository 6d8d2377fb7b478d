"""A TensorRT-RTX engine opened on an NVIDIA GPU, through the CUDA driver's own functions: neither torch nor CUDA's
packages are needed. No machine of this project's has such a GPU: what runs there is written by the documentation."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np

from pared.errors import TargetError
from pared.targets.sessions import InputSpec, not_installed

NO_GPU = "this machine has no NVIDIA GPU that CUDA can use"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def why_not_here() -> str:
    """The reason why engines cannot run on this machine, or ""."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return NO_GPU
    count = ctypes.c_int()
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return "" if found else NO_GPU


class Cuda:
    """The few functions of the CUDA driver that running an engine takes, on the first GPU."""

    def __init__(self) -> None:
        reason = why_not_here()
        if reason:
            raise TargetError(f"tensorrt: {reason}; run the engine where there is one")
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context, major, minor = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDeviceGetAttribute", ctypes.byref(major), CAPABILITY_MAJOR, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), CAPABILITY_MINOR, device)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.capability = 10 * major.value + minor.value

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises: TargetError."""
        status = getattr(self.driver, function)(*arguments)
        if status != 0:
            raise TargetError(f"tensorrt: {function} of the CUDA driver failed with status {status}")

    def allocate(self, size: int) -> int:
        """Address of new memory on the GPU."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def release(self, address: int) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy an array to the GPU."""
        self.call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
        )

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into an array, once all work is done."""
        self.call("cuCtxSynchronize")
        self.call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
        )


class TensorRtSession:
    """An engine of TensorRT-RTX on the first NVIDIA GPU. Engines carry code: open those that you trust alone."""

    def __init__(self, path: Path, threads: int) -> None:
        self.cuda = Cuda()
        try:
            import tensorrt_rtx_bindings as trt
        except ImportError as error:
            raise not_installed("tensorrt", error) from None
        older = path.with_name(f"{path.stem}.sm75{path.suffix}")
        chosen = older if self.cuda.capability < 80 and older.is_file() else path
        self.trt = trt
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(chosen.read_bytes())
        if self.engine is None:
            raise TargetError(f"tensorrt refuses {chosen.name} on a GPU of sm_{self.cuda.capability}")
        self.context = self.engine.create_execution_context()
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf8"))
        self.inputs = tuple(InputSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in notes["inputs"])
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.outputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self.most = min(self.engine.get_tensor_profile_shape(item.name, 0)[2][0] for item in self.inputs)
        self.options = {
            "runtime": f"tensorrt-rtx {trt.__version__}",
            "engine": chosen.name,
            "gpu": f"sm_{self.cuda.capability}",
            "timed": "with the copies to the GPU and back",
        }

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order. Raises: TargetError."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(item.name for item in self.inputs)
            raise TargetError(f"the file takes {len(self.inputs)} inputs ({names}), found {len(inputs)}")
        batch = inputs[0].shape[0]
        if batch <= self.most:
            return self.run_part(inputs)
        parts = [self.run_part([a[at : at + self.most] for a in inputs]) for at in range(0, batch, self.most)]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def run_part(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call of the engine."""
        held: list[int] = []
        try:
            for spec, array in zip(self.inputs, inputs, strict=True):
                given = np.ascontiguousarray(array, dtype=spec.dtype)
                held.append(self.cuda.allocate(given.nbytes))
                self.cuda.upload(held[-1], given)
                if not self.context.set_input_shape(spec.name, given.shape):
                    raise TargetError(f"input {spec.name!r} takes {list(spec.shape)}, found {list(given.shape)}")
                self.context.set_tensor_address(spec.name, held[-1])
            arrays = []
            for name in self.outputs:
                dtype = self.trt.nptype(self.engine.get_tensor_dtype(name))
                arrays.append(np.empty(tuple(self.context.get_tensor_shape(name)), dtype))
                held.append(self.cuda.allocate(arrays[-1].nbytes))
                self.context.set_tensor_address(name, held[-1])
            if not self.context.execute_async_v3(0):
                raise TargetError("tensorrt cannot run the engine on these inputs")
            for array, address in zip(arrays, held[len(inputs) :], strict=True):
                self.cuda.download(array, address)
        finally:
            for address in held:
                self.cuda.release(address)
        return arrays
