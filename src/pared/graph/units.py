"""From what rules said of atoms to units, groups and skips: arithmetic on integers, nothing of any operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd

from pared.graph.channels import NO_UNIT, Channels, Count, Group, Member, Role
from pared.graph.reading import STAYS, Atoms, Reading
from pared.step import Skip

LAYERS = (_ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)
UNREAD = "no forward reads it"  # as of auxiliary heads, which run in training alone
NONE = np.iinfo(np.int64).max


def components(size: int, edges: Iterable[tuple[Atoms, Atoms]]) -> Atoms:
    """Connected components of a graph of `size` nodes. Returns: the smallest node of each node's component.

    Roots are hooked to smaller roots, then all paths are halved until they are flat; both are done for all edges at a
    time (as in Shiloach and Vishkin 1982).

    Example:
        >>> components(5, [(np.array([1, 3]), np.array([2, 1]))])
        array([0, 1, 1, 1, 4])
    """
    root = np.arange(size)
    pairs = list(edges)
    if not pairs:
        return root
    first, second = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    while True:
        left, right = root[first], root[second]
        apart = left != right
        if not apart.any():
            return root
        first, second, left, right = first[apart], second[apart], left[apart], right[apart]
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
        while True:
            up = root[root]
            if (up == root).all():
                break
            root = up


@dataclasses.dataclass
class Found:
    """Components of the atoms, and what is known of each of them, at the number of its smallest atom.

    Attributes:
        root: Component of each atom.
        reason: Number of the first reason why it stays, or `NONE`.
        unit: Its unit, or `NO_UNIT`.
        first: First component of each group.
        starts: Number of the first unit of each group, then how many units there are.
    """

    root: Atoms
    reason: NDArray[np.int64]
    unit: NDArray[np.int64]
    first: NDArray[np.int64]
    starts: NDArray[np.int64]

    def units_of(self, label: Atoms) -> NDArray[np.int64]:
        """Unit of each index of a label."""
        units: NDArray[np.int64] = self.unit[self.root[label]]
        return units


def find(reading: Reading, roles: Sequence[Role]) -> Found:
    """Units, numbered so that those which sit in the same tensors stand side by side."""
    root = components(reading.atoms, reading.edges)
    reason = np.full(reading.atoms, NONE)
    for label, number in reading.pins:
        np.minimum.at(reason, root[label], number)
    reason[root[STAYS]] = 0
    # A random number for each dimension of a tensor: components with equal sums sit in the same ones, as often.
    numbers = np.random.default_rng(0).integers(0, np.iinfo(np.uint64).max, len(roles) + 1, dtype=np.uint64)
    signature = np.zeros(reading.atoms, dtype=np.uint64)
    made = []
    for number, (tensor, role) in enumerate(zip(reading.tensors, roles, strict=True)):
        np.add.at(signature, root[tensor.atoms], numbers[number])
        made += [root[tensor.atoms]] if role == "out" else []
    unit = np.full(reading.atoms, NO_UNIT)
    every = np.concatenate(made) if made else np.zeros(0, dtype=np.int64)
    every = every[reason[every] == NONE]
    found, place = np.unique(every, return_index=True)
    found = found[np.argsort(place)]  # by first occurrence
    _, begin, kind = np.unique(signature[found], return_index=True, return_inverse=True)
    # Groups by the first occurrence of one of their units, then units by their own.
    order = np.lexsort((np.arange(len(found)), begin[kind]))
    found, kind = found[order], kind[order]
    unit[found] = np.arange(len(found))
    starts = np.flatnonzero(np.diff(kind, prepend=-1))
    return Found(root, reason, unit, found[starts], np.append(starts, len(found)))


def roles_of(reading: Reading) -> list[Role]:
    """What each dimension of each tensor does: it makes channels, or else reads them, or else goes along."""
    sizes = [len(tensor.atoms) for tensor in reading.tensors]
    holder = np.concatenate([np.zeros(1, dtype=np.int64), np.repeat(np.arange(len(sizes)), sizes) + 1])
    # Tensors have their atoms before anything else has; in the order of `tensors`, but for their start.
    starts = np.array([tensor.atoms[0] for tensor in reading.tensors], dtype=np.int64)
    by_start = np.argsort(starts, kind="stable")
    roles: list[Role] = ["along"] * len(sizes)
    rank: Mapping[Role, int] = {"along": 0, "in": 1, "out": 2}
    for role, label in reading.marks:
        for number in set(holder[label[label < len(holder)]].tolist()) - {0}:
            place = int(by_start[number - 1])
            roles[place] = max(roles[place], role, key=rank.__getitem__)
    return roles


def collect(
    reading: Reading, program: ExportedProgram, model: nn.Module, widths: Iterable[tuple[Atoms, Atoms]] = ()
) -> Channels:
    """Everything about a model's channels, from a complete reading."""
    roles = roles_of(reading)
    found = find(reading, roles)
    modules = Modules(model)
    groups = groups_of(reading, found, roles, modules)
    cache: dict[int, Tensor | None] = {}

    def units(label: Atoms) -> Tensor | None:
        if id(label) not in cache:
            known = found.units_of(label)
            cache[id(label)] = torch.from_numpy(known) if (known != NO_UNIT).any() else None
        return cache[id(label)]

    tensors = {(tensor.name, tensor.dim): units(tensor.atoms) for tensor in reading.tensors}
    values = {
        node.name: {dim: held for dim, label in value.items() if (held := units(label)) is not None}
        for node, value in reading.values.items()
        if isinstance(value, dict)
    }
    approximate: dict[str, str] = {}
    for label, text in reading.vague:
        for group in groups_in(found, groups, label):
            approximate.setdefault(group, text)
    counts = {
        (modules.first(module), attribute): held
        for module, attribute, label in reading.counts
        if (held := units(label)) is not None
    }
    return Channels(
        program=program,
        groups=groups,
        units=int(found.starts[-1]),
        tensors={key: held for key, held in tensors.items() if held is not None},
        values={name: dims for name, dims in values.items() if dims},
        skips=skips_of(reading, found, roles, modules),
        equal=equal_groups(found, groups, widths),
        approximate=approximate,
        counts=tuple(Count(module, attribute, held) for (module, attribute), held in counts.items()),
    )


def equal_groups(
    found: Found, groups: Sequence[Group], widths: Iterable[tuple[Atoms, Atoms]]
) -> tuple[tuple[str, ...], ...]:
    """Names of groups that must stay equally wide, in one tuple; only labels that are all of one group count."""
    numbers = {group.name: number for number, group in enumerate(groups)}
    edges = []
    for pair in widths:
        ends = []
        for label in pair:
            names = groups_in(found, groups, label)
            if len(names) == 1 and (found.units_of(label) != NO_UNIT).all():
                ends.append(np.array([numbers[names[0]]]))
        edges += [(ends[0], ends[1])] if len(ends) == 2 else []
    root = components(len(groups), edges)
    several = [np.flatnonzero(root == first) for first in np.unique(root)]
    return tuple(tuple(groups[int(number)].name for number in same) for same in several if len(same) > 1)


def groups_in(found: Found, groups: Sequence[Group], label: Atoms) -> list[str]:
    """Names of the groups that a label has units of, in order."""
    units = np.unique(found.units_of(label))
    places = np.searchsorted(found.starts, units[units != NO_UNIT], side="right") - 1
    return [groups[place].name for place in np.unique(places)]


def groups_of(reading: Reading, found: Found, roles: Sequence[Role], modules: Modules) -> tuple[Group, ...]:
    """Groups with their members: the dimensions in which their first unit sits."""
    sizes = [len(tensor.atoms) for tensor in reading.tensors]
    holder = np.repeat(np.arange(len(sizes)), sizes)
    roots = np.concatenate([found.root[tensor.atoms] for tensor in reading.tensors]) if sizes else np.zeros(0)
    order = np.argsort(roots, kind="stable")
    low = np.searchsorted(roots[order], found.first, side="left")
    high = np.searchsorted(roots[order], found.first, side="right")
    names: dict[str, int] = {}
    groups = []
    for number in range(len(found.first)):
        within = holder[order[low[number] : high[number]]]
        places = [int(place) for place in np.unique(within)]
        members = [Member(reading.tensors[place].name, reading.tensors[place].dim, roles[place]) for place in places]
        maker = next(place for place in places if roles[place] == "out")
        name = modules.holders[reading.tensors[maker].name][0]
        names[name] = names.get(name, 0) + 1
        groups.append(
            Group(
                name=name if names[name] == 1 else f"{name}:{names[name]}",
                start=int(found.starts[number]),
                size=int(found.starts[number + 1] - found.starts[number]),
                members=tuple(members),
                modules=tuple(dict.fromkeys(m for member in members for m in modules.holders[member.tensor])),
                width=int((within == maker).sum()),
            )
        )
    return tuple(groups)


def skips_of(reading: Reading, found: Found, roles: Sequence[Role], modules: Modules) -> tuple[Skip, ...]:
    """Every layer none of whose channels is a unit, with the first reason."""
    reasons: dict[str, str] = {}
    pruned: set[str] = set()
    for tensor, role in zip(reading.tensors, roles, strict=True):
        if role != "out":
            continue
        holders = modules.holders[tensor.name]
        if (found.units_of(tensor.atoms) != NO_UNIT).any():
            pruned.update(holders)
            continue
        first = int(found.reason[found.root[tensor.atoms]].min())
        for holder in holders:
            reasons.setdefault(holder, reading.reasons[first] if first != NONE else "nothing reads its channels")
    read = {tensor.name for tensor in reading.tensors}
    for name, module in modules.named.items():
        if isinstance(module, LAYERS) and name not in reasons and name not in pruned:
            own = [modules.tensor(name, key) for key, _ in module.named_parameters(recurse=False)]
            used = any(tensor in read for tensor in own)
            single = 1 in (getattr(module, key, 0) for key in ("out_channels", "out_features", "embedding_dim"))
            left = "it makes one channel" if single else "its weight is not used as it is"
            reasons[name] = left if used else UNREAD
    return tuple(Skip(name, reasons[name]) for name in modules.named if name in reasons and name not in pruned)


class Modules:
    """Names of a model's modules and tensors, each under its first one.

    Attributes:
        named: Every module.
        holders: {tensor: names of all modules that hold it}.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named: dict[str, nn.Module] = dict(model.named_modules())
        self.canonical = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.aliases = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
        self.by_id: dict[int, str] = {id(module): name for name, module in self.named.items()}
        self.holders: dict[str, list[str]] = {}
        for name, module in self.named.items():
            held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for _, tensor in held:
                self.holders.setdefault(self.canonical[id(tensor)], []).append(name)
        self.tensors = {
            name: self.canonical[id(tensor)]
            for name, tensor in [
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ]
        }

    def first(self, alias: str) -> str:
        """The first name of a module."""
        return self.by_id.get(self.aliases.get(alias, 0), alias)

    def tensor(self, module: str, key: str) -> str:
        """The first name of a tensor that a module holds."""
        return self.tensors[f"{module}.{key}" if module else key]
