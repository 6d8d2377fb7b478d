"""Channel groups: which indices of which tensors can only leave a model together, as plain data read off a graph.

A *unit* is the smallest part that can be removed exactly: the same channel in every layer that a residual sum ties, a
whole attention head, one hidden unit of an LSTM in all four gates. Units are numbered through the whole model; a
*group* is a run of units that sit side by side in the same tensors, and so compete with one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.export import ExportedProgram

from pared.step import Skip

NO_UNIT = -1  # of an index that always stays
# out: the tensor makes the channel (a filter, a row of a linear layer); in: it reads it; along: it scales or shifts it,
# or keeps its statistics.
Role = Literal["out", "in", "along"]


@dataclasses.dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that a group runs along.

    Attributes:
        tensor: Dotted name in the model, as `named_parameters()` and `named_buffers()` give it first.
        dim: The dimension.
        role: What the tensor does with the channel.
    """

    tensor: str
    dim: int
    role: Role


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that sit side by side in the same tensors.

    Attributes:
        name: Dotted name of the first module that makes its channels; with ":2" and so on behind it where that module
            also makes channels of an earlier group.
        start: Number of its first unit.
        size: How many units it has.
        members: Every dimension that it runs along, in graph order.
        modules: Every module that holds one of them, in graph order.
        width: Indices that one unit takes along the first dimension that makes it: 64 for a head of 64.
    """

    name: str
    start: int
    size: int
    members: tuple[Member, ...]
    modules: tuple[str, ...]
    width: int = 1

    @property
    def units(self) -> slice:
        """Where its units stand among all units."""
        return slice(self.start, self.start + self.size)


@dataclasses.dataclass(frozen=True)
class Count:
    """An integer attribute of a module that counts groups of channels, and so must follow what is kept.

    Attributes:
        module: Dotted name.
        attribute: `groups` of a convolution whose groups leave as a whole, `num_groups` of a group norm.
        units: int64, the unit of each group, or NO_UNIT: the attribute becomes the number of those that are kept.
    """

    module: str
    attribute: str
    units: Tensor


@dataclasses.dataclass(frozen=True)
class Channels:
    """Everything that a graph says about a model's channels.

    Attributes:
        program: The captured model that it was read off.
        groups: In graph order.
        units: How many units there are in all groups.
        tensors: {(tensor, dimension): int64, the unit of each index, or NO_UNIT}.
        values: {name of a graph node: {dimension of its value: the unit of each index, or NO_UNIT}}.
        equal: Names of groups of which the same fraction must stay, as where a forward takes the inner width of an
            attention from the width of its input.
        skips: Every layer whose channels cannot be removed, with the reason and the operator that is in the way.
        counts: Integer attributes that follow the number of kept units.
        approximate: {group: why its removal is not exact}, as where a layer norm's mean runs over fewer channels.
    """

    program: ExportedProgram
    groups: tuple[Group, ...]
    units: int
    tensors: Mapping[tuple[str, int], Tensor]
    values: Mapping[str, Mapping[int, Tensor]]
    equal: tuple[tuple[str, ...], ...] = ()
    skips: tuple[Skip, ...] = ()
    counts: tuple[Count, ...] = ()
    approximate: Mapping[str, str] = dataclasses.field(default_factory=dict)
