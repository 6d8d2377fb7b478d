"""The exponential moving average of a model's weights and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pared.train.checkpoint import restore, tensors_of


def update(average: Tensor, value: Tensor, decay: float) -> None:
    """Move `average` towards `value` in place: average = decay * average + (1 - decay) * value.

    Args:
        average: Any shape.
        value: Same shape and dtype. Integers and truth values are not averaged: the newest count.
        decay: 0 to 1.

    Source: Polyak and Juditsky 1992; the exponential form as in Tarvainen and Valpola 2017, arXiv:1703.01780, sec. 2.

    Example:
        >>> average = torch.tensor([1.0, 0.0])
        >>> update(average, torch.tensor([2.0, 0.0]), decay=0.75)
        >>> average
        tensor([1.2500, 0.0000])
    """
    if torch.is_floating_point(average) or torch.is_complex(average):
        average.lerp_(value, 1 - decay)
    else:
        average.copy_(value)


class Average:
    """A moving average of every tensor of a model, starting with the tensors that it has now."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}

    def update(self) -> None:
        """Count the model's tensors in."""
        for name, tensor in tensors_of(self.model).items():
            update(self.tensors[name], tensor, self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for its tensors."""
        raw: Mapping[str, Tensor] = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}
        restore(self.model, self.tensors)
        try:
            yield
        finally:
            restore(self.model, raw)
