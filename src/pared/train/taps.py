"""Taps: the outputs of named layers, recorded while a model runs, whether it is made of modules or of operators."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from pared.errors import PlanError, nearest
from pared.train.step import is_exported


class Taps:
    """Records the output of each named layer whenever the model runs and `recording` is true.

    Modules get forward hooks. In a graph of operators, where no hook of the original modules fires, the last operator
    that `nn_module_stack` counts to a layer gets a recording module behind it. Of several calls in one run the last one
    stays; of an output in parts, the first tensor.

    Args:
        model: Changed by hooks or recording modules until `remove`.
        names: Dotted names of layers, as in the `named_modules()` of the model that was captured.

    Raises:
        PlanError: A layer that the model does not have.

    Example:
        >>> import torch
        >>> taps = Taps(net := nn.Sequential(nn.Flatten(), nn.ReLU()), ["0"])
        >>> _ = net(torch.tensor([[-1.0, 2.0]]))
        >>> taps.take()
        {'0': tensor([[-1.,  2.]])}
        >>> taps.remove()
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.recording = True
        self.found: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []
        self.graph = model if is_exported(model) else None
        if isinstance(self.graph, fx.GraphModule):
            self.insert(self.graph)
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.names:
            if name not in modules:
                raise PlanError(f"no layer {name!r} in {type(model).__name__}; {nearest(name, modules)}")
            self.handles.append(modules[name].register_forward_hook(partial(self.on_forward, name)))

    def insert(self, graph: fx.GraphModule) -> None:
        """Put a recording module behind the last operator of each layer."""
        for i, name in enumerate(self.names):
            last = last_node(graph, name)
            graph.add_submodule(f"tap_{i}", Recorder(partial(self.keep, name)))
            with graph.graph.inserting_after(last):
                graph.graph.call_module(f"tap_{i}", (last,))
        graph.recompile()

    def on_forward(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        value = first_tensor(output)
        if self.recording and value is not None:
            # A copy: what comes next may write over it, as `ReLU(inplace=True)` does. Captured graphs never do.
            self.found[name] = value.clone()

    def keep(self, name: str, output: Any) -> None:
        """Remember an output of a layer."""
        value = first_tensor(output)
        if self.recording and value is not None:
            self.found[name] = value

    def take(self) -> dict[str, Tensor]:
        """What was recorded, by name; forgotten here, so that nothing outlives its step. Raises: PlanError."""
        found, self.found = self.found, {}
        for name in self.names:
            if name not in found:
                raise PlanError(f"layer {name!r} gave no tensor when the model ran; name another layer")
        return found

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        if isinstance(self.graph, fx.GraphModule):
            for i in range(len(self.names)):
                for node in [node for node in self.graph.graph.nodes if node.target == f"tap_{i}"]:
                    self.graph.graph.erase_node(node)
                self.graph.delete_submodule(f"tap_{i}")
            self.graph.recompile()
        self.handles, self.graph, self.found = [], None, {}


class Recorder(nn.Module):
    """Hands what it is given to a function; stands in a graph, where it has neither parameters nor users."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Any) -> Any:
        self.keep(x)
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """A copy of the model records nothing."""
        return Recorder(forget)


def forget(x: Any) -> None:
    """Record nothing."""


def last_node(graph: fx.GraphModule, name: str) -> fx.Node:
    """The last operator that a layer's forward made and that gives a tensor. Raises: PlanError."""
    found: fx.Node | None = None
    known: set[str] = set()
    for node in graph.graph.nodes:
        owners = {re.sub(r"@\d+$", "", str(path)) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
        known |= owners
        if name in owners and isinstance(node.meta.get("val"), Tensor):
            found = node
    if found is None:
        raise PlanError(
            f"no layer {name!r} in the graph that trains; {nearest(name, known - {''})} "
            "(a layer that a batch norm is folded into goes by the norm's name)"
        )
    return found


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a layer's output."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)
