"""Which integer attributes the forwards of a model read, found by running it with the reads recorded.

A forward may take a number of channels, heads or features from an attribute of its own. Which ones do cannot be told
from a graph, where they have become constants; so a copy of the model runs once, and notes what it is asked for.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pared.errors import CaptureError, ModelError
from pared.graph.capture import Explained, evaluating, quiet
from pared.step import Edit
from pared.surgery import apply_edits, duplicate
from pared.task import Inputs

Read = int | tuple[int, ...]
# Layers whose numbers follow the shapes of their tensors, which surgery sees to: their own reads say nothing.
LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding, nn.RNNBase, nn.PReLU)
# The rest of PyTorch's own modules read kernel sizes and the like, but for these.
READERS = (nn.MultiheadAttention, nn.Unflatten)


class Rehearsal:
    """Runs of a model, or of an edited one, that check shapes without computing anything, where its code allows.

    Args:
        model: Any module that can be copied. It is not changed.
        inputs: Example inputs.

    Attributes:
        device: "meta", where tensors have no data; that of the inputs where the model's code looks at data.
        ghost: A copy there, which has not been run.
        shapes: Shapes of all tensors that it gives.
        reads: {dotted name of a module: {attribute: value}}, the integers, and tuples or lists of integers, that each
            module's forward reads off itself; modules as `named_modules()` gives them first, lists as tuples. Layers
            whose numbers only repeat the shapes of their tensors are left out.

    Raises:
        CaptureError: The model does not run on these inputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.device = torch.device("meta")
        self.inputs = changed(inputs, lambda value: value.to(self.device))
        self.ghost = without_data(model)
        # One run tells both: shapes without recording would be those with it.
        try:
            self.shapes, self.reads = self.recorded()
        except CaptureError:
            self.inputs, self.ghost = inputs, duplicate(model)
            self.device = next(iter(inputs.tensors.values())).device
            self.shapes, self.reads = self.recorded()

    def recorded(self) -> tuple[list[tuple[int, ...]], dict[str, dict[str, Read]]]:
        """Shapes and reads of the model as it is. Raises: CaptureError."""
        copied = self.edited(())
        reads = recorders_in(copied)
        shapes = self.run(copied)
        return shapes, {name: found for name, found in reads.items() if found}

    def run(self, model: nn.Module) -> list[tuple[int, ...]]:
        """Shapes of all tensors that a model gives. Raises: CaptureError, with the line that failed."""
        # Tensors that the forward makes are to lie where its inputs do.
        with evaluating(model), torch.no_grad(), quiet(), torch.device(self.device), ShapesOfNorms(), Explained("{}"):
            result = model(*self.inputs.args, **self.inputs.kwargs)
        return [tuple(value.shape) for value in tree_flatten(result)[0] if isinstance(value, Tensor)]

    def edited(self, edits: Iterable[Edit]) -> nn.Module:
        """The copy with some edits replayed."""
        return apply_edits(self.ghost, edits, {})


class ShapesOfNorms(TorchFunctionMode):
    """Batch norms in eval mode give, without data, what they are given: PyTorch takes them apart into ten operators,
    which are then most of what a rehearsal takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.batch_norm or args[0].device.type != "meta" or kwargs.get("training", True):
            return func(*args, **kwargs)
        x, *statistics = args
        held = [value for value in (*statistics, kwargs.get("weight"), kwargs.get("bias")) if value is not None]
        fits = x.ndim > 1 and len(args) == 3 and all(tuple(value.shape) == (x.shape[1],) for value in held)
        return torch.empty_like(x) if fits else func(*args, **kwargs)  # which says what is wrong


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers have a shape and no data."""
    memo: dict[int, Any] = {}
    for value in [*model.parameters(), *model.buffers()]:
        empty = value.detach().to("meta")
        held = isinstance(value, nn.Parameter)
        memo[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad) if held else empty
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({error}); give it only leaf tensors") from error


def recorders_in(model: nn.Module) -> dict[str, dict[str, Read]]:
    """Let the modules of a model note what they read. Returns: {module: {attribute: value}}, filled as it runs."""
    reads: dict[str, dict[str, Read]] = {}
    recorders: dict[type, type] = {}
    for name, module in model.named_modules():
        if wanted(module):
            kind = type(module)
            module.__dict__["_pared_reads"] = reads.setdefault(name, {})
            # As an attribute of the object itself; a module's own `__setattr__` may think of something else.
            object.__setattr__(module, "__class__", recorders.setdefault(kind, recording(kind)))
    return reads


def wanted(module: nn.Module) -> bool:
    """True for a module whose reads may be numbers of channels."""
    if isinstance(module, LAYERS):
        return False
    return isinstance(module, READERS) or not type(module).__module__.startswith("torch.nn.")


def recording(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that notes every read of a plain integer, or of a list or tuple of them, in `_pared_reads`."""

    class Recording(kind):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if whole(value):
                own = object.__getattribute__(self, "__dict__")
                if name in own:
                    own["_pared_reads"][name] = value if type(value) is int else tuple(value)
            return value

    Recording.__name__, Recording.__qualname__ = kind.__name__, kind.__qualname__
    return Recording


def whole(value: Any) -> bool:
    """True for an integer, and for a list or tuple of integers that has any."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(type(item) is int for item in value)
    return type(value) is int


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with every tensor changed."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    kwargs: Mapping[str, Any] = inputs.kwargs
    return Inputs(tuple(map(one, inputs.args)), {name: one(value) for name, value in kwargs.items()})


@contextlib.contextmanager
def whose(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forwards are running, outermost first: after a failure, those it went through."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = [
        hook
        for name, module in model.named_modules()
        for hook in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave))
    ]
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()
