"""Callbacks: how techniques join a training, so that several run together in one.

The loop calls every hook of each callback in the order of the list, `on_end` in the opposite order, so that what was
put on last comes off first. `on_start` may replace the model, so what looks for layers does so in `on_ready`.

Where a training has several processes, each has its own copy of every callback, made by pickling, and shows it its part
of each batch. Parameters take the same steps everywhere; of other state, that of process 0 is taken over by all after
each epoch. The caller's process then runs `on_start`, `on_ready`, `load_state_dict` and `on_end` to make the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from pared.step import Context, Need, Plan
from pared.task import Batch


class Callback:
    """One technique in a training. Every hook does nothing unless overridden."""

    def on_start(self, model: nn.Module) -> nn.Module:
        """The model to train: `model`, a copy of the caller's on the device that trains, or a replacement."""
        return model

    def on_ready(self, model: nn.Module) -> None:
        """All replacements are made: this is the model that trains."""

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Epoch `epoch` of `epochs`, counted from 0, begins; also the first one after a resumption."""

    def loss(self, current: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """The loss to go on with, given the one so far and the model's raw outputs: a mean over the samples of `batch`.

        Called for every batch, several times for one step of the optimizer where batches are accumulated.
        """
        return current

    def after_backward(self, model: nn.Module) -> None:
        """Gradients are there as the optimizer will see them: of all batches and processes, unscaled, clipped."""

    def after_step(self, model: nn.Module) -> None:
        """The optimizer has stepped, or has left the step out where a float16 gradient overflowed."""

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """All batches of epoch `epoch`, counted from 0, are done; nothing is validated or saved yet."""

    def on_end(self, model: nn.Module) -> nn.Module:
        """The model to return; the best weights are back in place."""
        return model

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the callback's own that the optimizer trains too; asked for after `on_ready`."""
        return ()

    def state_dict(self) -> Mapping[str, Any]:
        """What a resumed run needs, its own parameters included: tensors, numbers, strings, lists, dictionaries."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; called after `on_ready`."""


class During(Protocol):
    """The settings of a technique that runs while training; stands in `Train(during=[...])`.

    Attributes:
        changes: True where it changes the structure, as a plan with edits says: the training is then judged as a change
            of its own, and may start from a quantized program, that is from the module that it was made of.
    """

    changes: ClassVar[bool]

    @property
    def needs(self) -> frozenset[Need]:
        """The data that the technique reads, beside what `Train` does."""

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """What it will do, found out before training. Reads only. Becomes a part of `Train`'s plan."""

    def callback(self, plan: Plan, ctx: Context) -> Callback:
        """A fresh callback for one training that follows `plan`."""


class KeepZeros(Callback):
    """Weights that are 0 at the start stay 0.

    Args:
        names: Dotted names of parameters whose zeros are kept.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.kept: list[tuple[nn.Parameter, Tensor]] = []

    def on_start(self, model: nn.Module) -> nn.Module:
        # The parameters themselves: a model that is captured may know a shared one by another of its names.
        found = [model.get_parameter(name) for name in self.names]
        self.kept = [(parameter, parameter.detach() == 0) for parameter in found]
        return model

    def after_step(self, model: nn.Module) -> None:
        for parameter, zeros in self.kept:
            # Filled, not multiplied: a product leaves -0.0 here and there, which is another bit pattern.
            parameter.detach().masked_fill_(zeros, 0)
