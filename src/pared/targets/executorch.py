"""The target `executorch`: export to a `.pte` program for XNNPACK, as phones and small boards ship it."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import RefusedError, TargetError
from pared.step import MOVES, Scheme
from pared.targets.sessions import OpenSession, not_installed, open_session

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from pared.task import Task

LAYERS = frozenset({"aten.conv1d", "aten.conv2d", "aten.linear"})
SCHEME = Scheme(
    activation_dtype="int8",
    activation_symmetric=False,
    weighted=LAYERS,
    halves=frozenset({"float16"}),
    # XNNPACK's quantized convolutions and fully connected layers write integers only.
    whole=LAYERS,
    joining=frozenset({"aten.add", "aten.mul", "aten.cat", "aten.clamp", "aten.mean", "aten.adaptive_avg_pool2d"}),
    following=MOVES | {"aten.max_pool2d"},
    # A clamp by other bounds than ReLU's or ReLU6's is an operator of its own.
    absorbed=frozenset({"aten.relu", "aten.relu6", "aten.hardtanh"}),
    # Its concatenation copies bytes, so all sides must mean the same by them.
    sharing=frozenset({"aten.cat"}),
    # It derives the scale of a bias itself, from a bias in float.
    bias_dtype="float32",
    weight_zero_points=True,
    dynamic=frozenset({"aten.linear"}),
    dynamic_rows=True,
)
# Memory is planned for the largest input. Larger batches are run in parts of this size.
BATCH = 16
# Other dynamic dimensions may grow to so many times the example's.
GROWTH = 4
RESHAPES = frozenset({"aten.view", "aten.flatten", "aten._unsafe_view"})


class ExecuTorch:
    """ExecuTorch with the XNNPACK delegate on the CPU."""

    name = "executorch"
    filename = "model.pte"
    scheme = SCHEME

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        """Write `model` as a program, and beside it what its inputs are called.

        Raises:
            CaptureError: It cannot be captured.
            TargetError: It cannot be lowered.
            RefusedError: Of it, XNNPACK does not take certain integer layers.
        """
        from pared.graph.capture import capture

        program = capture(model, task, limits=limits(task))
        notes = {"inputs": described(task), "outputs_have_batch": outputs_have_batch(program)}
        edge = lower(program)
        if notes["outputs_have_batch"] and batch_is_fixed(edge):
            # It could not keep the batch free (a shuffle of channels does that), so samples are run one by one.
            edge = lower(capture(model, task, limits=limits(task) | {"batch": 1}))
        lowered = edge.exported_program()
        check_integers_delegated(lowered, model)
        path.write_bytes(written(edge))
        notes["not_delegated"] = dict(Counter(not_delegated(lowered)))
        path.with_suffix(".json").write_text(json.dumps(notes, indent=1), encoding="utf8")

    def open(self, path: Path, *, threads: int) -> OpenSession:
        """The file in a session. Raises: TargetError."""
        return open_session(self.name, path, threads=threads)


def lower(program: ExportedProgram) -> Any:
    """The program with all that XNNPACK takes handed to it. Raises: TargetError."""
    infer_batch(program)
    part_readers(program)
    with hushed():
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
        except ImportError as error:
            raise not_installed("executorch", error) from None
        # Its passes signal what they cannot do by whatever they happen to raise.
        try:
            return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        except Exception as error:
            raise TargetError(f"executorch: the model cannot be lowered: {first_line(error)}") from error


def written(edge: Any) -> bytes:
    """The file of a lowered program. Raises: TargetError."""
    with hushed():
        try:
            content: bytes = edge.to_executorch().buffer
        except Exception as error:
            raise TargetError(f"executorch: the program cannot be written: {first_line(error)}") from error
    return content


def batch_is_fixed(edge: Any) -> bool:
    """True where lowering has fixed the size of the batch."""
    program = edge.exported_program()
    given = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    # A symbol that was fixed later is still one, and shows its only value.
    return any(str(node.meta["val"].shape[0]).isdecimal() for node in given)


def limits(task: Task) -> dict[str, int]:
    """Largest size of each dynamic dimension, by name."""
    # ExecuTorch plans for one less than the bound, whatever the bound.
    found = {"batch": max(BATCH, task.example_inputs.size) + 1}
    for key, tensor in task.example_inputs.tensors.items():
        for axis, name in task.dynamic_of(key).items():
            found[name] = max(found.get(name, 0), GROWTH * tensor.shape[axis] + 1)
    return found


def described(task: Task) -> list[dict[str, Any]]:
    """Name, shape and dtype of each input, free dimensions by name."""
    found = []
    for key, tensor in task.example_inputs.tensors.items():
        named = {0: "batch", **task.dynamic_of(key)}
        shape = [named.get(axis, size) for axis, size in enumerate(tensor.shape)]
        found.append({"name": key, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")})
    return found


def outputs_have_batch(program: ExportedProgram) -> bool:
    """True where the first dimension of every output is the batch, so that parts of one can be put together."""
    batch = next(
        node.meta["val"].shape[0] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    )
    values = [arg.meta["val"] for arg in program.graph.output_node().args[0]]
    return all(value.ndim > 0 and str(value.shape[0]) == str(batch) for value in values)


def infer_batch(program: ExportedProgram) -> None:
    """Write the one symbolic size of a reshape as -1, in place: XNNPACK takes no symbols, but infers one dimension.

    Otherwise each flatten would cut the network into two delegates, with conversions in between.
    """
    import torch
    from torch._prims_common import is_contiguous_or_false

    from pared.graph.capture import operator

    graph = program.graph
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if operator(node) not in RESHAPES or not isinstance(value, torch.Tensor):
            continue
        # Of values that lie otherwise in memory it would be a copy, for which the batch would be fixed.
        if not is_contiguous_or_false(node.args[0].meta["val"]):
            continue
        sizes = [-1 if isinstance(size, torch.SymInt) else size for size in value.shape]
        if sizes.count(-1) == 1:
            node.target, node.args, node.kwargs = torch.ops.aten.view.default, (node.args[0], sizes), {}
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def part_readers(program: ExportedProgram) -> None:
    """Give each reader of integers a dequantize operator of its own, in place.

    Its operators are taken together with the conversions around them. One conversion that two operators share would
    draw both into one delegate, also where the second needs the result of something in between: a cycle.
    """
    from pared.graph.capture import operator

    graph = program.graph
    for node in list(graph.nodes):
        if not operator(node).startswith("quantized_decomposed.dequantize"):
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_after(node):
                copied = graph.node_copy(node)
            user.replace_input_with(node, copied)
    program.graph_module.recompile()


def not_delegated(program: ExportedProgram) -> list[str]:
    """Operators that stay with ExecuTorch's portable kernels, each by its name in PyTorch."""
    found = []
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else ""
        plumbing = name in {"getitem", "executorch_call_delegate", "alloc"} or "sym_" in name or not name
        if not plumbing:
            found.append(name.removeprefix("aten.").partition(".")[0])
    return found


def check_integers_delegated(program: ExportedProgram, model: nn.Module) -> None:
    """Raise `RefusedError` for layers with integer weights that XNNPACK does not take: they would run in float."""
    named = {**program.graph_signature.inputs_to_buffers, **program.graph_signature.inputs_to_parameters}
    refused = []
    for node in program.graph.nodes:
        if "dequantize" in getattr(node.target, "__name__", ""):
            stored = {named[arg.name] for arg in node.all_input_nodes if arg.name in named}
            refused += [module_of(stored, model) or node.name] if stored else []
    if refused:
        raise RefusedError(
            f"executorch: XNNPACK does not take the integer layers {', '.join(refused)}, which would run in float; "
            f"keep them in float with exclude={refused}",
            refused,
        )


def module_of(tensors: set[str], model: nn.Module) -> str:
    """Name of the module whose layer reads one of a quantized program's stored integers; "" where none does.

    Programs that are captured anew, as for lowering, no longer know which module a node comes from.
    """
    from torch import fx

    from pared.graph.capture import owner

    for stored in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        if stored.op == "get_attr" and stored.target in tensors:
            return next((owner(layer) for reader in stored.users for layer in reader.users), "")
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep ExecuTorch's warnings and notes about its own internals off the user's terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
