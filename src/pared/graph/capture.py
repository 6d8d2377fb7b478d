"""Capture of a model by `torch.export`: the one place that exports, so that its failures are explained in one way."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from pared import errors
from pared.errors import CaptureError
from pared.task import Inputs, Task

# Folders whose source is not the caller's.
OURS = tuple(Path(file).parent for file in (torch.__file__, errors.__file__) if file)
STANDARD_LIBRARY = Path(contextlib.__file__).parent
# Operators that always make new tensors, beside those that work on every element alone.
NEW_TENSORS = (
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear addmm mm bmm matmul batch_norm "
    "layer_norm group_norm instance_norm cat stack hardswish relu6 mish max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d mean sum softmax"
)
FRESH = frozenset(NEW_TENSORS.split())
DROPOUTS = ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout")


def capture(model: nn.Module, task: Task, *, limits: Mapping[str, int] | None = None) -> ExportedProgram:
    """Export a model in eval mode, with a dynamic batch and the task's further dynamic dimensions.

    Args:
        model: Any module that `torch.export` takes. It is not changed; its train/eval flags come back as they were.
        task: Gives the example inputs. They are doubled along the batch, since export specializes a batch of 1.
        limits: Largest size of a dynamic dimension, by name, for runtimes that plan their memory ahead. A batch of at
            most 1 is fixed.

    Raises:
        CaptureError: The model cannot be exported, or does not run on the example inputs; names the line of its code.
    """
    limits = limits or {}
    inputs = task.example_inputs.part(0, 1) if limits.get("batch") == 1 else doubled(task.example_inputs)
    own, model = model, shadow(model)
    with evaluating(model), torch.no_grad(), quiet():
        with Explained("the model does not run on the example inputs: {}; fix the inputs or the model"):
            model(*inputs.args, **inputs.kwargs)
            shapes = dynamic_shapes(model, inputs, task, limits)
        if model is not own:  # the caller's own modules keep what they have noted
            forgetful(model)
        with Explained(
            "the model cannot be exported: {}; rewrite that line so that it does not depend on tensors' values"
        ):
            program = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
            # In-place operators would make a rewritten graph read values that have changed since.
            write_anew(program)
            if not has_mutation(program):
                return program
            # What writes into views, or into inputs; this takes several times as long as the export.
            mark_dropouts(program)
            functional: ExportedProgram = program.run_decompositions({})
            return functional


class Explained:
    """Turns whatever the caller's own code raises while it is run or traced into a `CaptureError` that says where.

    That code may raise anything, and `torch.export` documents no closed set either; so every `Exception` is explained
    here, at the boundary, and none is swallowed.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CaptureError):
            raise CaptureError(self.message.format(where(error))) from error


def shadow(model: nn.Module) -> nn.Module:
    """A copy that holds the very same tensors, so that what a forward notes on its modules stays there with them.

    The model itself where it cannot be copied, or copies itself in a way of its own, as Keras' models do.
    """
    memo: dict[int, Any] = {id(value): value for value in [*model.parameters(), *model.buffers()]}
    try:
        copied = model if isinstance(model, fx.GraphModule) else copy.deepcopy(model, memo)
    except (RuntimeError, TypeError):
        return model
    return copied if held_by(copied) == held_by(model) else model


def held_by(model: nn.Module) -> dict[str, int]:
    """Which tensor each name of a model stands for."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: id(value) for name, value in named}


def forgetful(model: nn.Module) -> nn.Module:
    """The same model without what its modules computed ahead for eval mode, as LeViT's attention keeps its biases.

    Modules that do so compute it anew after they were in training mode; each one's own flag comes back.
    """
    flags = [(module, module.training) for module in model.modules()]
    if not isinstance(model, fx.GraphModule):
        model.train()
        model.eval()
    for module, training in flags:
        module.training = training
    return model


def has_mutation(program: ExportedProgram) -> bool:
    """True where some operator of the graph writes into its argument."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets)


def write_anew(program: ExportedProgram) -> None:
    """Let in-place operators write into new tensors, where no other name leads to the memory that they wrote into."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        new = written_anew(node)
        if new is None:
            continue
        old = node.args[0]
        later = [user for user in old.users if order[user] > order[node]]
        earlier = [user for user in old.users if order[user] < order[node]]
        if is_fresh(old) and all(map(is_fresh, earlier)) and all(user.op != "output" for user in later):
            node.target = new
            for user in later:
                user.replace_input_with(old, node)
    program.graph_module.recompile()


def written_anew(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that gives what an in-place one leaves in its first argument; None for any other node."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name, tensors = target._schema.name.split("::")[1], [arg.meta["val"] for arg in node.all_input_nodes]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    new = getattr(packet, target._overloadname, None) if name.endswith("_") else None
    if target.namespace != "aten" or new is None or torch.Tag.nondeterministic_seeded in new.tags:
        return None
    if [argument.name for argument in new._schema.arguments] != [
        argument.name for argument in target._schema.arguments
    ]:
        return None
    # A new tensor might get another dtype than the one that was written into.
    kept = all(value.dtype == tensors[0].dtype or not value.is_floating_point() for value in tensors)
    alone = len(new._schema.returns) == 1 and new._schema.returns[0].alias_info is None
    return new if alone and kept and tensors[0].is_floating_point() else None


def is_fresh(node: fx.Node) -> bool:
    """True for an operator whose result is known to lie in memory of its own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if any(result.alias_info is not None for result in target._schema.returns) or len(target._schema.returns) != 1:
        return False
    return torch.Tag.pointwise in target.tags or operator(node).removeprefix("aten.") in FRESH


def mark_dropouts(program: ExportedProgram) -> None:
    """Note what each dropout was on the copy that decomposition makes of it, at `meta["custom"]["dropout"]`, so that a
    training can put it back.

    In eval mode a dropout gives its very input, not a copy. Where something is written into either and the other is
    read later, both stay one tensor: what the model computes comes first, and that dropout is not put back.
    """
    memory = memory_of(program.graph)
    for node in program.graph.nodes:
        if operator(node) not in DROPOUTS:
            continue
        if is_idle(node) and is_told_apart(node, memory):
            for user in [user for user in node.users if user.op != "output"]:
                user.replace_input_with(node, node.args[0])
            node.target, node.args = torch.ops.aten.alias.default, node.args[:1]  # an output keeps its name
            continue
        node.meta["custom"] = {**node.meta.get("custom", {}), "dropout": [operator(node), node.args[1]]}
        node.target = torch.ops.aten.dropout.default  # in eval mode all are the same, but this one leaves a copy


def memory_of(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """The nodes whose results each one's result may lie in, itself among them; in eval mode, dropouts too."""
    memory: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes if node.op == "call_function" else []
        if operator(node) in DROPOUTS:
            sources = sources if is_idle(node) else []
        elif isinstance(node.target, torch._ops.OpOverload):
            # Results that share memory name the argument that they share it with.
            shared = any(result.alias_info is not None for result in node.target._schema.returns)
            sources = [source for source, _ in aliased(node)] if shared else []
        memory[node] = {node}.union(*(memory[source] for source in sources))
    return memory


def aliased(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The inputs of an operator that its schema says are shared with a result or written into, and whether written."""
    names = node.target._schema.arguments  # type: ignore[union-attr]
    for place, argument in enumerate(names):
        held = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None:
            for source in held if isinstance(held, (list, tuple)) else [held]:
                if isinstance(source, fx.Node):
                    yield source, argument.alias_info.is_write


def is_idle(dropout: fx.Node) -> bool:
    """True for a dropout that gives its very input: not in training, or nothing is dropped."""
    share, training = dropout.args[1:3]
    return bool(share == 0 or not training)


def is_told_apart(dropout: fx.Node, memory: Mapping[fx.Node, set[fx.Node]]) -> bool:
    """True where a copy in place of a dropout's input would be seen: one is written into, the other read later."""
    order = {node: place for place, node in enumerate(memory)}
    family = [node for node in memory if memory[node] & memory[dropout]]
    behind = {node for node in family if dropout in memory[node]}
    read: dict[bool, int] = {}  # when either side is read for the last time
    for node in family:
        read[node in behind] = max([read.get(node in behind, 0), *(order[user] for user in node.users)])
    return any(
        order[writer] > order[dropout] and read.get(source not in behind, 0) > order[writer]
        for writer in memory
        if isinstance(writer.target, torch._ops.OpOverload)
        for source, written in aliased(writer)
        if written and source in family
    )


def doubled(inputs: Inputs) -> Inputs:
    """The same inputs with the batch repeated to at least 2."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1 else value

    return Inputs(tuple(twice(v) for v in inputs.args), {k: twice(v) for k, v in inputs.kwargs.items()})


def dynamic_shapes(model: nn.Module, inputs: Inputs, task: Task, limits: Mapping[str, int]) -> dict[str, Any]:
    """The `dynamic_shapes` of `torch.export`: the batch, and what `Task.dynamic` names.

    They have the structure of the forward's own parameters: those of `*args` come in a tuple.
    """
    batch = Dim.STATIC if limits.get("batch") == 1 else Dim("batch", max=limits.get("batch"))
    dims: dict[str, Any] = {"batch": batch}

    def spec(name: str, value: Any) -> Mapping[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        named = {0: "batch", **task.dynamic_of(name)}
        for label in named.values():
            if label in limits:
                dims.setdefault(label, Dim(label, max=limits[label]))
        # Without a limit of the runtime's, a further dimension has the range that the model itself allows.
        return {d: dims.get(label, Dim.DYNAMIC) for d, label in named.items()}

    args = [spec(str(i), value) for i, value in enumerate(inputs.args)]
    kwargs = {name: spec(name, value) for name, value in inputs.kwargs.items()}
    return inspect.signature(model.forward).bind(*args, **kwargs).arguments


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    if not isinstance(model, fx.GraphModule):
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings that torch raises about its own internals while exporting."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
        yield


def where(error: BaseException) -> str:
    """First line of an error, with the last line of the caller's own code that it went through."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_callers(frame.filename)]
    if frames:
        last = frames[-1]
        return f"{first} (at {last.filename}:{last.lineno}, in {last.name}: {last.line})"
    # Some errors of torch.export carry the caller's stack in their text alone.
    found = [item for item in re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text) if is_callers(item[0])]
    return f"{first} (at {found[-1][0]}:{found[-1][1]}, in {found[-1][2]})" if found else first


def is_callers(filename: str) -> bool:
    """True for a source file that is neither PyTorch's, nor Python's, nor ours."""
    path = Path(filename)
    standard = path.is_relative_to(STANDARD_LIBRARY) and "site-packages" not in path.parts
    return path.suffix == ".py" and not standard and not any(path.is_relative_to(folder) for folder in OURS)


def operator(node: fx.Node) -> str:
    """Name of a node's operator without overload, e.g. "aten.conv2d"; "" for nodes that call none."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", "") if node.op == "call_function" else ""


def owner(node: fx.Node) -> str:
    """Dotted name of the innermost module whose forward made a node; "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return re.sub(r"@\d+$", "", path)
