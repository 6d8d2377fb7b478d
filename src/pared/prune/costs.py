"""What a choice of channels costs, in parameters and multiply-accumulates, before any model of it is made.

Both are exactly what `graph.counts` will find in the pruned model: every dimension is as long as what is kept of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.graph.capture import operator
from pared.graph.channels import NO_UNIT, Channels
from pared.graph.macs import FORMULAS, Shape, concrete
from pared.graph.macs import macs_of as work_of
from pared.prune.evidence import tensor_names


def kept_along(units: Tensor, keep: Tensor) -> int:
    """How many indices of a dimension stay.

    Args:
        units: The unit of each index, or NO_UNIT.
        keep: bool, for each unit of the model.

    Example:
        >>> kept_along(torch.tensor([0, 0, 1, -1]), torch.tensor([False, True]))
        2
    """
    fixed = units == NO_UNIT
    # Unit -1 reads the last entry of `keep`, whatever it is: it is counted as fixed.
    return int((keep[units] | fixed).sum()) if len(keep) else len(units)


def params_of(channels: Channels, model: nn.Module, keep: Tensor) -> int:
    """How many numbers the parameters of the pruned model hold, each shared one once."""
    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for (tensor, dim), units in channels.tensors.items():
        if tensor in sizes:
            sizes[tensor][dim] = kept_along(units, keep)
    return sum(math.prod(shape) for shape in sizes.values())


@dataclasses.dataclass(frozen=True)
class Work:
    """The multiply-accumulates of a captured model, for one sample, as a function of what is kept.

    Attributes:
        channels: Of the model.
        model: For the names of its tensors.
    """

    channels: Channels
    model: nn.Module

    def __call__(self, keep: Tensor) -> int:
        """Multiply-accumulates of one sample."""
        sizes = [kept_along(units, keep) for units in self.lengths.values()]
        for node, shape, changed in self.values:
            held = list(shape)
            for dim, place in changed:
                held[dim] = sizes[place]
            node.meta["val"] = torch.empty(held, device="meta")
        return sum(work_of(node) for node in self.counted)

    @functools.cached_property
    def copies(self) -> dict[fx.Node, fx.Node]:
        """The nodes of a copy of the graph, whose shapes may be written over, by the nodes that they stand for."""
        copied: dict[fx.Node, fx.Node] = {}
        fx.Graph().graph_copy(self.channels.program.graph, copied)
        return copied

    @functools.cached_property
    def counted(self) -> list[fx.Node]:
        """The operators that count as work."""
        return [node for node in self.copies.values() if operator(node) in FORMULAS]

    @functools.cached_property
    def lengths(self) -> dict[bytes, Tensor]:
        """The units along every dimension, each arrangement of them once."""
        arrangements = [*self.channels.tensors.values()]
        arrangements += [units for dims in self.channels.values.values() for units in dims.values()]
        return {units.numpy().tobytes(): units for units in arrangements}

    @functools.cached_property
    def values(self) -> list[tuple[fx.Node, Shape, list[tuple[int, int]]]]:
        """Every value that work depends on: its node, its shape for one sample, and the dimensions that change with the
        number of their arrangement."""
        place = {key: number for number, key in enumerate(self.lengths)}
        names = tensor_names(self.channels, self.model)
        used = {node for counted in self.counted for node in (counted, *counted.all_input_nodes)}
        symbols = symbols_of(self.channels.program.graph)
        found = []
        for original, node in self.copies.items():
            held = original.meta.get("val")
            if node not in used or not isinstance(held, Tensor):
                continue
            dims: Mapping[int, Tensor] = self.channels.values.get(original.name, {})
            if original.name in names:
                own = names[original.name]
                dims = {dim: units for (tensor, dim), units in self.channels.tensors.items() if tensor == own}
            shape = tuple(one_sample(size, symbols) for size in held.shape)
            found.append((node, shape, [(dim, place[units.numpy().tobytes()]) for dim, units in dims.items()]))
        return found


def macs_of(channels: Channels, model: nn.Module, keep: Tensor) -> int:
    """Multiply-accumulates of the pruned model for one sample; make a `Work` to ask more than once."""
    return Work(channels, model)(keep)


def symbols_of(graph: fx.Graph) -> dict[Any, int]:
    """What the free dimensions of a graph's inputs count as: the batch is 1, all others are as in the example."""
    found: dict[Any, int] = {}
    for node in graph.nodes:
        held = node.meta.get("val")
        if node.op == "placeholder" and isinstance(held, Tensor):
            for dim, size in enumerate(held.shape):
                if not isinstance(size, int):
                    found.setdefault(size.node.expr, 1 if dim == 0 else concrete(size))
    return found


def one_sample(size: int | torch.SymInt, symbols: Mapping[Any, int]) -> int:
    """A size, given what its symbols stand for."""
    return size if isinstance(size, int) else int(size.node.expr.subs(symbols))


def marginal(channels: Channels, cost: Callable[[Tensor], float]) -> dict[str, float]:
    """What the cost falls by when one unit of a group goes and all else stays, by group.

    All units of a group sit in the same tensors, so that any of them stands for the others.
    """
    whole = torch.ones(channels.units, dtype=torch.bool)
    base = cost(whole)
    found = {}
    for group in channels.groups:
        keep = whole.clone()
        keep[group.start] = False
        found[group.name] = base - cost(keep)
    return found
