"""The target `torch`: a package that AOTInductor compiles, run by PyTorch without Python code of the model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import TargetError
from pared.targets.onnxruntime import SCHEME as ONNXRUNTIME
from pared.targets.sessions import OpenSession, open_session

if TYPE_CHECKING:
    from torch import fx, nn
    from torch.export import ExportedProgram

    from pared.task import Task

# What Inductor lowers to oneDNN's integer kernels on x86; tests count the calls in the code that it writes.
SCHEME = dataclasses.replace(
    ONNXRUNTIME,
    whole=frozenset(),
    float_activations=True,
    # oneDNN's kernels without VNNI add products in pairs, in an order of their own.
    saturating="any",
    # The forms of ONNX Runtime alone.
    weight_only=frozenset(),
    dynamic=frozenset(),
    # A clip between integers is none of its patterns.
    narrow_activations=False,
    norms_as_convolutions=False,
    # Of the activations that oneDNN appends to an integer layer, those that Inductor's patterns find.
    absorbed=frozenset(
        {"aten.relu", "aten.relu6", "aten.hardtanh", "aten.clamp", "aten.hardswish", "aten.silu", "aten.gelu"}
    ),
    joining=frozenset({"aten.add", "aten.cat"}),
    summed=frozenset({"aten.add"}),
    # Its patterns want every operand written out: zero points of weights, and biases in float.
    bias_dtype="float32",
    weight_zero_points=True,
    # One channel has no memory format of its own: Inductor takes the integer output for laid out as it is not.
    least_inputs=2,
)
# Freezing makes weights constants, which the integer patterns need. Line tables would be most of a small file.
OPTIONS = {"freezing": True, "aot_inductor.enable_line_tables": False}
QUANTIZE, DEQUANTIZE = "quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor"


class TorchPackage:
    """An AOTInductor package on the CPU."""

    name = "torch"
    filename = "model.pt2"
    scheme = SCHEME

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        """Compile `model` into a package. Raises: CaptureError, TargetError."""
        import torch

        from pared.graph.capture import capture, quiet

        check_compiler()
        program = capture(model, task)
        lay_out(program.graph_module)
        options = {**OPTIONS, "aot_inductor.metadata": {"pared_inputs": json.dumps(described(program, task))}}
        with tempfile.TemporaryDirectory(prefix="pared-") as folder, quiet(), torch.no_grad():
            made = Path(folder) / path.name
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=options)
            except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.CppCompileError) as error:
                raise TargetError(f"torch: Inductor cannot compile the model: {first_line(error)}") from error
            rewrite(made, path)

    def open(self, path: Path, *, threads: int) -> OpenSession:
        """The file in a session; whoever calls a target has made it. Raises: TargetError."""
        return open_session(self.name, path, threads=threads, trust=True)


def check_compiler() -> None:
    """Raise `TargetError` where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise TargetError(
            "the target torch compiles the model and finds no C++ compiler; install one (Debian: apt-get install g++), "
            "or name it in the variable CXX. The file that it makes needs none"
        ) from None


def lay_out(graph: fx.GraphModule) -> None:
    """Have the integers that linear layers read written in the order of their dimensions, in place.

    A linear layer over a transposed input, as `nn.MultiheadAttention(batch_first=True)` has one, becomes a product of
    batches of matrices, and Inductor's check of that pattern fails where a size of it is dynamic (its
    `_is_valid_dequant_linear_pattern`, in 2.13). In order it is one product of matrices. Whoever quantizes writes the
    integers anyway, so that the order costs nothing; where they are in order, nothing is compiled for it.
    """
    import torch

    from pared.graph.capture import operator

    for node in list(graph.graph.nodes):
        dequantized: Any = node.args[0] if operator(node) == "aten.linear" else None
        if dequantized is None or operator(dequantized) != DEQUANTIZE:
            continue
        quantized = dequantized.args[0]
        if operator(quantized) != QUANTIZE:
            continue
        source = quantized.args[0]
        with graph.graph.inserting_before(quantized):
            ordered = graph.graph.call_function(torch.ops.aten.contiguous.default, (source,))
        ordered.meta["val"] = source.meta["val"].contiguous()
        quantized.replace_input_with(source, ordered)
    graph.recompile()


def first_line(error: Exception) -> str:
    """What went wrong, without the traceback that Inductor adds."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def described(program: ExportedProgram, task: Task) -> list[dict[str, Any]]:
    """Name, shape and dtype of each input, free dimensions by the task's names: a package itself tells none."""
    keys = list(task.example_inputs.tensors)
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = []
    for index, name in enumerate(program.graph_signature.user_inputs):
        key = name if name in keys else keys[index]
        named = {0: "batch", **task.dynamic_of(key)}
        shape = [size if isinstance(size, int) else named.get(axis, "") for axis, size in enumerate(values[name].shape)]
        inputs.append({"name": name, "shape": shape, "dtype": str(values[name].dtype).removeprefix("torch.")})
    return inputs


def rewrite(made: Path, path: Path) -> None:
    """Copy a package without the C++ code that it was compiled from, and without the names of the build's folders.

    The compiled code holds these in its messages only. They are overwritten in place, so that nothing moves.
    """
    import torch
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    homes = {str(Path(torch.__file__).parents[1]), cache_dir(), tempfile.gettempdir(), str(Path.home())}
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as copy:
        for item in source.infolist():
            if item.filename.endswith(".cpp"):
                continue
            content = source.read(item)
            for home in sorted(homes, key=len, reverse=True):
                content = content.replace(home.encode() + b"/", b"." * len(home.encode()) + b"/")
            # One archive name, whatever the file is called, and no time of day: the same model gives the same file.
            name = "/".join(["model", *Path(item.filename).parts[1:]])
            copy.writestr(zipfile.ZipInfo(name), content)
