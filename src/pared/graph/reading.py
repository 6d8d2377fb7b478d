"""What is known of a graph's channels while it is walked: labels, and which of them can only leave together.

Every index of every dimension of every parameter is an *atom*, a number of its own. A value of the graph has for each
dimension a label: the atom that each index leaves with. Rules, one an operator, say what label a result has, and which
atoms can only leave together; what follows from all of that is `units`' work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from pared.graph.capture import operator, owner
from pared.graph.channels import Role
from pared.graph.macs import Shape, shape_of

Atoms = NDArray[np.int64]
# {dimension: the atom that each index leaves with}; the indices of other dimensions always stay.
Labels = dict[int, Atoms]
Value = Labels | list[Labels]
Mode = Literal["heads", "head_dim"]
Heads = Mapping[tuple[str, int], tuple[int, int]]
STAYS = 0  # the atom of what always stays


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One dimension of a parameter or buffer, with its atoms."""

    name: str
    dim: int
    atoms: Atoms


@dataclasses.dataclass(frozen=True)
class Split:
    """A reshape that took one labelled dimension apart into several.

    Attributes:
        node: The reshape.
        whole: Label of the dimension before it.
        parts: {dimension after it: its label}.
        sizes: {dimension after it: its size}.
    """

    node: fx.Node
    whole: Atoms
    parts: Labels
    sizes: Mapping[int, int]


@dataclasses.dataclass
class Reading:
    """Everything that the rules have said so far.

    Attributes:
        free: {(name of a reshape, dimension before it): (dimension after it whose indices leave as a whole, the one
            that stays whole)}, for those that take attention heads apart.
        scouting: True while looking for these: each part of a split dimension then has a label of its own.
        node: The operator being read.
        atoms: How many atoms there are, with `STAYS`.
        tensors: In the order that the graph uses them.
        values: Labels of what each node makes.
        weights: Nodes made of nothing but parameters and buffers.
        repeated: Labels of dimensions along which all values are the same.
        edges: Pairs of atoms that leave together.
        pins: Atoms that cannot leave, with the number of the reason.
        reasons: In the order that they were found.
        marks: Labels of a weight's dimension, with what it does with them.
        vague: Labels whose removal changes a statistic, with what to say of it.
        counts: Integer attributes of modules that count the entries of a label: (module, attribute, label).
        splits: By name of the reshape and the dimension before it.
        products: Labels of the batch dimensions, and of the others, of each product of two tensors.
    """

    free: Heads = dataclasses.field(default_factory=dict)
    scouting: bool = False
    node: fx.Node = dataclasses.field(init=False)
    atoms: int = STAYS + 1
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    values: dict[fx.Node, Value] = dataclasses.field(default_factory=dict)
    weights: set[fx.Node] = dataclasses.field(default_factory=set)
    repeated: list[Atoms] = dataclasses.field(default_factory=list)
    edges: list[tuple[Atoms, Atoms]] = dataclasses.field(default_factory=list)
    pins: list[tuple[Atoms, int]] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)
    marks: list[tuple[Role, Atoms]] = dataclasses.field(default_factory=list)
    vague: list[tuple[Atoms, str]] = dataclasses.field(default_factory=list)
    counts: list[tuple[str, str, Atoms]] = dataclasses.field(default_factory=list)
    splits: dict[tuple[str, int], Split] = dataclasses.field(default_factory=dict)
    products: list[tuple[list[Atoms], list[Atoms]]] = dataclasses.field(default_factory=list)

    def fresh(self, size: int) -> Atoms:
        """Atoms that nothing else has."""
        self.atoms += size
        return np.arange(self.atoms - size, self.atoms)

    def loose(self, size: int) -> Atoms:
        """Atoms of a dimension along which all values are the same."""
        label = self.fresh(size)
        self.repeated.append(label)
        return label

    def is_loose(self, label: Atoms) -> bool:
        """True for a label of equal values that has not been tied to any other."""
        if not any(label is one for one in self.repeated):
            return False
        low, high = label[0], label[-1]
        return not any(((side >= low) & (side <= high)).any() for edge in self.edges for side in edge)

    def labels(self, value: Any) -> Labels:
        """Labels of an argument; none for numbers and lists."""
        found = self.values.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, dict) else {}

    def pin(self, label: Atoms | None, why: str, *, exact: bool = False) -> None:
        """The indices of a label never leave; `why` is said of the operator being read, unless it is `exact`."""
        if label is None:
            return
        text = why if exact else f"{why} ({operator(self.node)} in {owner(self.node) or 'the model itself'})"
        if not self.reasons or self.reasons[-1] != text:
            self.reasons.append(text)
        self.pins.append((label, len(self.reasons) - 1))

    def pin_all(self, labels: Labels, why: str) -> None:
        """Pin every dimension of a value."""
        for label in labels.values():
            self.pin(label, why)

    def tie(self, first: Atoms | None, second: Atoms | None, why: str = "tied to channels that always stay") -> None:
        """Index by index, two labels leave together; None for a dimension that always stays."""
        if first is None or second is None:
            self.pin(second if first is None else first, why)
            return
        if first is second:
            return
        if len(first) != len(second):
            self.pin(np.concatenate([first, second]), "it meets channels of another number")
            return
        stays = (first == STAYS) | (second == STAYS)
        if stays.any():
            self.pin(np.concatenate([first[stays], second[stays]]), why)
            first, second = first[~stays], second[~stays]
        self.edges.append((first, second))

    def join(self, labels: Iterable[Atoms | None], why: str = "tied to channels that always stay") -> Atoms | None:
        """One label for indices that all leave together; None where one of them always stays."""
        found = list(labels)
        for label in found[1:]:
            self.tie(found[0], label, why)
        return None if any(label is None for label in found) else found[0]

    def tie_along(self, grid: Atoms, axis: int) -> Atoms:
        """All indices of one axis leave together. Returns: the label of the other axes, one index of `axis` taken."""
        first = grid.take([0], axis)
        if grid.shape[axis] > 1:
            rest = np.delete(grid, 0, axis)
            self.tie(np.broadcast_to(first, rest.shape).ravel(), rest.ravel())
        return first.squeeze(axis)

    def mark(self, weight: Any, label: Atoms | None, role: Role) -> None:
        """Note what a weight does with a label; nothing for values that are computed from inputs."""
        if label is not None and weight in self.weights:
            self.marks.append((role, label))

    def blur(self, label: Atoms | None, what: str) -> None:
        """Note that removing these indices changes a statistic."""
        if label is not None:
            self.vague.append((label, f"{what} of {owner(self.node) or 'the model itself'} runs over fewer channels"))


Rule = Callable[[Reading, fx.Node], Value]


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node that stand for tensors."""
    return [arg for arg in node.all_input_nodes if is_tensor(arg.meta.get("val"))]


def is_tensor(held: Any) -> bool:
    """True for a tensor, or several."""
    if isinstance(held, (list, tuple)):
        return any(isinstance(item, torch.Tensor) for item in held)
    return isinstance(held, torch.Tensor)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def dims_of(value: Any, ndim: int) -> list[int]:
    """Dimensions counted from the front; all of them for None or none."""
    if value is None or value == []:
        return list(range(ndim))
    return [dim % max(ndim, 1) for dim in ([value] if isinstance(value, int) else value)]


def result_shape(node: fx.Node) -> Shape:
    """Shape of the only or first tensor that a node makes."""
    held = node.meta.get("val")
    return shape_of(node) if isinstance(held, torch.Tensor) else ()


def results(node: fx.Node, labels: Labels) -> Value:
    """Labels of what a node makes, where each of several results has the same ones."""
    held = node.meta.get("val")
    return [labels for _ in held] if isinstance(held, (list, tuple)) else labels
