"""The program that a quantize step starts from: captured, with tensors of its own and batch norms folded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from pared.errors import ModelError, PlanError
from pared.graph.capture import capture, operator
from pared.quantize.constants import fold_constants
from pared.quantize.folding import fold_batch_norms
from pared.step import Skip
from pared.task import Task


def prepare(
    model: nn.Module, task: Task, step: str, *, fold: bool = True
) -> tuple[fx.GraphModule, list[str], list[Skip]]:
    """What every quantize step starts from.

    Args:
        model: Not changed; the program shares no tensor with it.
        task: Gives the example inputs.
        step: Name of the step, for messages.
        fold: Fold batch norms into the layers before them.

    Returns:
        The captured graph, the names of the norms that were folded, and the layers that it does not run.

    Raises:
        PlanError: The model is quantized already.
        ModelError: A parameter is not finite.
        CaptureError: The model cannot be captured.
    """
    if is_quantized(model):
        raise PlanError(f"{step}: the model is quantized already; keep one quantize step, as the last of the recipe")
    graph = capture(model, task).module(check_guards=False)
    if not isinstance(graph, fx.GraphModule):
        raise PlanError(f"{step}: the captured program is a {type(graph).__name__}, not a graph")
    idle = [Skip(name, "the model does not run it on the example inputs") for name in idle_layers(model, graph)]
    check_finite(graph)
    own_tensors(graph)
    idle += [Skip(name, "its result does not depend on the input, so it is stored") for name in fold_constants(graph)]
    return graph, fold_batch_norms(graph) if fold else [], idle


def nothing_to_quantize(step: str, skips: Sequence[Skip]) -> PlanError:
    """The error for a plan that changes no layer, with the first reasons."""
    reasons = "; ".join(f"{skip.module}: {skip.reason}" for skip in skips[:3])
    return PlanError(
        f"{step} would quantize no layer" + (f" ({reasons})" if reasons else ": the model has none that could")
    )


def idle_layers(model: nn.Module, graph: fx.GraphModule) -> list[str]:
    """Modules with a weight of two dimensions or more that no operator of the captured graph reads."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr" and node.users}
    used = {id(tensor) for name, tensor in graph.named_parameters(remove_duplicate=False) if name in read}
    weights = {
        name: [tensor for tensor in module.parameters(recurse=False) if tensor.ndim > 1]
        for name, module in model.named_modules()
    }
    return [name for name, own in weights.items() if own and not any(id(tensor) in used for tensor in own)]


def is_quantized(model: nn.Module) -> bool:
    """True for a program that holds quantize operators already."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    return any(operator(node).startswith("quantized_decomposed.") for node in nodes)


def check_finite(graph: fx.GraphModule) -> None:
    """Raise `ModelError` for a parameter with NaN or infinity: no range could hold what comes of it."""
    for name, tensor in graph.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the parameter {name} holds NaN or infinity; load or train the weights again")


def own_tensors(graph: fx.GraphModule) -> None:
    """Give a captured graph copies of its tensors, which are the model's own until here; shared ones stay shared."""
    copies: dict[int, Tensor] = {}
    for module in graph.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                copied = copies.setdefault(id(tensor), nn.Parameter(tensor.detach().clone(), requires_grad=False))
                module._parameters[name] = copied  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        for name, constant in vars(module).items():
            if isinstance(constant, Tensor):
                vars(module)[name] = copies.setdefault(id(constant), constant.detach().clone())
