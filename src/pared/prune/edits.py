"""From kept units to edits: what is cut from which tensor, and which integers that forwards read follow.

Slices follow from the groups alone. A forward that reads a number of channels or heads off its module needs that
attribute edited too; which ones is guessed from equal sizes, and then *proved by running*: shapes first, without data,
and then the values, against the masked original. What cannot be proved is pinned, with the line that is in the way.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.errors import CaptureError
from pared.graph.capture import doubled, forgetful, owner
from pared.graph.channels import Channels, Group
from pared.graph.units import Modules
from pared.prune.attributes import Read, Rehearsal, whose
from pared.prune.exact import Difference, difference, named_arguments
from pared.step import Edit
from pared.surgery import apply_edits, duplicate
from pared.task import Task

Attribute = tuple[str, str]  # module, name
Choice = dict[Attribute, Read]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What makes of a model the one without the removed units, or why nothing does.

    Attributes:
        edits: For `surgery.apply_edits`; proved, unless there are pins.
        pins: {tensor: reason}: where not empty, the groups of these tensors cannot leave, and the rest was not proved.
        difference: From the masked original; None with pins.
    """

    edits: tuple[Edit, ...]
    pins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    difference: Difference | None = None


def edits_of(
    model: nn.Module, channels: Channels, keep: Tensor, task: Task, *, trials: int = 32, prove: bool = True
) -> Fitted:
    """Find the edits that remove units, and prove them by running.

    Args:
        model: What `channels` was read off. It is not changed.
        channels: Its groups.
        keep: bool (channels.units,), True = stays.
        task: Gives the example inputs.
        trials: How many ways to set attributes are tried at most, where sizes alone do not tell.
        prove: False checks shapes alone, as in a search that measures many choices. Where several ways to set
            attributes fit the shapes, values are compared all the same.

    Raises:
        CaptureError: The model itself does not run on the example inputs.
    """
    return Search(model, channels, task, trials).fit(keep, prove=prove)


class Search:
    """Finds edits for choices of units of one model; keeps what does not depend on the choice."""

    def __init__(self, model: nn.Module, channels: Channels, task: Task, trials: int = 32) -> None:
        self.model, self.channels, self.task, self.trials = model, channels, task, trials
        self.rehearsal = Rehearsal(model, doubled(task.example_inputs))
        self.sites = Sites(model, channels)

    @functools.cached_property
    def alive(self) -> nn.Module:
        """What values are compared on; made only where any are."""
        return without_zeros(self.model, self.channels)

    def fit(self, keep: Tensor, *, prove: bool = True, blame: bool = True) -> Fitted:
        """Edits for one choice, or pins; with `blame` off, pins may be empty of names and only say that it failed."""
        base = structure_of(self.channels, keep)
        options = self.options(keep)
        sure = {key: values[0] for key, values in options.items() if len(values) == 1}
        unsure = {key: values for key, values in options.items() if len(values) > 1}
        failure: CaptureError | None = None
        worst: Difference | None = None
        ran = False
        for choice in itertools.islice(self.choices(unsure), self.trials):
            chosen = {**sure, **choice}
            new = {key: value for key, value in chosen.items() if value != self.rehearsal.reads[key[0]][key[1]]}
            edits = (*base, *settings_edits(new))
            error = self.rehearse(edits)
            if error is not None:
                failure = failure or error
                continue
            if not prove and not unsure:
                return Fitted(edits)
            found = self.compare(edits, keep)
            if found is not None and found.exact:
                return Fitted(edits, difference=found)
            # It ran, so that no line failed.
            ran, worst = True, worst or found
        if not blame:
            return Fitted(base, {"": "it failed"})
        return Fitted(base, self.blame(keep, None if ran else failure, worst))

    def options(self, keep: Tensor) -> dict[Attribute, list[Read]]:
        """Values that attributes could take, the likelier first, for each one that may have to change."""
        found: dict[Attribute, list[Read]] = {}
        for module, read in self.rehearsal.reads.items():
            moves = self.sites.moves(module, keep)
            for name, value in read.items():
                values = changes_of(value, moves)
                if values != [value]:
                    found[module, name] = values
        return found

    def choices(self, unsure: Mapping[Attribute, Sequence[Read]]) -> Iterator[Choice]:
        """Ways to set what sizes alone do not tell, alike in all modules of one class."""
        kinds: dict[tuple[type, str], list[Attribute]] = {}
        for module, name in unsure:
            kinds.setdefault((type(self.rehearsal.ghost.get_submodule(module)), name), []).append((module, name))
        # The likeliest for all, then one kind otherwise, then two, ...
        for number in range(len(kinds) + 1):
            for others in itertools.combinations(kinds, number):
                depths = [range(1, max(len(unsure[key]) for key in kinds[kind])) for kind in others]
                for places in itertools.product(*depths):
                    place = dict(zip(others, places, strict=True))
                    yield {
                        key: unsure[key][min(place.get(kind, 0), len(unsure[key]) - 1)]
                        for kind, keys in kinds.items()
                        for key in keys
                    }

    def rehearse(self, edits: Iterable[Edit]) -> CaptureError | None:
        """What goes wrong when an edited model runs, shapes alone; None where nothing does."""
        edited = self.rehearsal.edited(edits)
        with whose(edited) as running:
            try:
                shapes = self.rehearsal.run(edited)
            except CaptureError as error:
                error.add_note(running[-1] if running else "")
                return error
        same = shapes == self.rehearsal.shapes
        return None if same else CaptureError(f"outputs of shapes {shapes} instead of {self.rehearsal.shapes}")

    def compare(self, edits: Iterable[Edit], keep: Tensor) -> Difference | None:
        """How far an edited model is from the masked original; None where it does not run."""
        try:
            return difference(self.alive, apply_edits(self.alive, edits, {}), self.channels, keep, self.task)
        except RuntimeError:
            return None

    def blame(self, keep: Tensor, failure: CaptureError | None, worst: Difference | None) -> dict[str, str]:
        """Tensors whose groups stand in the way, with the reason: those at the failing line, or those without which it
        works."""
        if failure is not None:
            reason = f"its forward has a number of channels written into it: {failure}"
            groups = self.sites.groups_at(failure, keep)
            if groups:
                return {self.sites.handle(group): reason for group in groups}
        elif worst is not None:
            reason = f"without its channels the model computes something else (by {worst.relative:.1e})"
        else:
            reason = "the model does not run without its channels"
        return {self.sites.handle(group): reason for group in self.bisect(keep)}

    def bisect(self, keep: Tensor) -> list[Group]:
        """The fewest groups found, by halving, that cannot leave even alone."""
        suspects = [part for part in bundles(self.channels) if any(not bool(keep[g.units].all()) for g in part)]
        while len(suspects) > 1:
            middle = len(suspects) // 2
            for half in (suspects[:middle], suspects[middle:]):
                alone = torch.ones_like(keep)
                for group in itertools.chain.from_iterable(half):
                    alone[group.units] = keep[group.units]
                if self.fit(alone, blame=False).pins:
                    suspects = half
                    break
            else:
                break
        return list(itertools.chain.from_iterable(suspects))


def without_zeros(model: nn.Module, channels: Channels) -> nn.Module:
    """A copy whose parameters have small random numbers in the place of zeros, where the graph reads them.

    Layers are often begun at zero, and would hide whatever comes before them from a comparison of outputs.
    """
    copied = forgetful(duplicate(model))
    generator = torch.Generator().manual_seed(0)
    read = {node.name for node in channels.program.graph.nodes if node.users}
    for name, target in channels.program.graph_signature.inputs_to_parameters.items():
        value = copied.get_parameter(target)
        if name in read and value.is_floating_point():
            noise = 0.02 * torch.randn(value.shape, generator=generator)
            value.data = torch.where(value.data == 0, noise.to(value), value.data)
    return copied


def hides(model: nn.Module, channels: Channels) -> bool:
    """True where zeros of a parameter that multiplies something could hide a wrong edit from a comparison of outputs.

    That takes an index, of any dimension, at which all is zero: a channel that every filter ignores, a scale of zero. A
    single zero has others beside it that show the channel; a bias of zero is added, and hides nothing but itself.
    """
    parameters = channels.program.graph_signature.inputs_to_parameters
    for node in channels.program.graph.nodes:
        target = parameters.get(node.name) if node.op == "placeholder" and node.users else None
        value = model.get_parameter(target).detach() if target else None
        if value is None or not value.is_floating_point() or bool(value.all()):
            continue
        there = (value != 0).reshape(value.shape or (1,))
        empty = any(
            not bool(there.movedim(dim, 0).reshape(there.shape[dim], -1).any(1).all()) for dim in range(there.ndim)
        )
        if empty and not all(is_bias(user, node) for user in node.users):
            return True
    return False


def is_bias(node: fx.Node, value: fx.Node) -> bool:
    """True where all that a node does with a value is to add it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return [name for name, held in named_arguments(node).items() if held is value] == ["bias"]


class Sites:
    """Where in a graph units stand, by module and by line."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.channels = channels
        self.nodes: dict[str, list[fx.Node]] = {}
        modules = Modules(model)
        for node in channels.program.graph.nodes:
            if node.op == "call_function":
                self.nodes.setdefault(modules.first(owner(node)), []).append(node)
        self.starts = torch.tensor([group.start for group in channels.groups])

    def moves(self, module: str, keep: Tensor) -> dict[int, set[int]]:
        """{size: what it becomes} of all dimensions that a module's own operators see.

        A module without any, whose methods others call instead of itself, sees what the one that holds it sees.
        """
        while module not in self.nodes and module:
            module = module.rpartition(".")[0]
        kept = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
        found: dict[int, set[int]] = {}
        for node in self.nodes.get(module, []):
            for value in (node, *node.all_input_nodes):
                held = value.meta.get("val")
                labels = self.channels.values.get(value.name, {})
                for dim, size in enumerate(held.shape if isinstance(held, Tensor) else ()):
                    # A free dimension has no number that code could hold.
                    if isinstance(size, int):
                        new = int(kept[labels[dim]].sum()) if dim in labels else size
                        found.setdefault(size, set()).add(new)
        return found

    def groups_at(self, failure: CaptureError, keep: Tensor) -> list[Group]:
        """Groups that lose units where something failed: at its line, or else in the module that was running."""
        notes = getattr(failure, "__notes__", [""])
        nodes = self.nodes.get(notes[-1], [])
        line = line_of(failure)
        at_line = [node for node in itertools.chain(*self.nodes.values()) if line and line in stack_of(node)]
        for among in (at_line, nodes):
            groups = [group for group in self.groups_of(among) if not bool(keep[group.units].all())]
            if groups:
                return groups
        return []

    def groups_of(self, nodes: Iterable[fx.Node]) -> list[Group]:
        """Every group with a unit at some of these operators."""
        units = [
            labels
            for node in nodes
            for value in (node, *node.all_input_nodes)
            for labels in self.channels.values.get(value.name, {}).values()
        ]
        if not units:
            return []
        found = torch.cat(units)
        return [self.channels.groups[place] for place in self.places(found)]

    def places(self, units: Tensor) -> list[int]:
        """Numbers of the groups that these units are of."""
        found = torch.searchsorted(self.starts, units[units >= 0], right=True) - 1
        return sorted(set(found.tolist()))

    def handle(self, group: Group) -> str:
        """The tensor by which a group can be pinned so that fewest others are pinned with it."""

        def others(tensor: str) -> int:
            held = [labels for (name, _), labels in self.channels.tensors.items() if name == tensor]
            return len(self.places(torch.cat(held)))

        return min((member.tensor for member in group.members), key=others)


def structure_of(channels: Channels, keep: Tensor) -> tuple[Edit, ...]:
    """Slices of every tensor that holds a removed unit, and the counts that follow.

    Args:
        channels: The groups of a model.
        keep: bool (channels.units,), True = stays.
    """
    kept = torch.cat([keep, torch.ones(1, dtype=torch.bool)])  # NO_UNIT, -1, finds the last
    edits = []
    for (tensor, dim), labels in channels.tensors.items():
        stays = kept[labels]
        if not bool(stays.all()):
            module, _, name = tensor.rpartition(".")
            index = stays.nonzero().flatten().tolist()
            edits.append(Edit("slice", module, {"tensor": name, "dim": dim, "keep": index}))
    for count in channels.counts:
        stays = kept[count.units]
        if not bool(stays.all()):
            detail = {"name": count.attribute, "value": int(stays.sum())}
            edits.append(Edit("set_attribute", count.module, detail))
    return tuple(edits)


def settings_edits(choice: Mapping[Attribute, Read]) -> list[Edit]:
    """Attributes that get another value, as edits."""
    return [
        Edit("set_attribute", module, {"name": name, "value": value if isinstance(value, int) else list(value)})
        for (module, name), value in choice.items()
    ]


def changes_of(value: Read, moves: Mapping[int, set[int]]) -> list[Read]:
    """Values that an integer, or several, could become where sizes move; the old one among them if it may stay.

    Example:
        >>> changes_of(8, {8: {4}, 3: {3}}), changes_of(8, {8: {8, 4}}), changes_of((3, 8), {8: {4}})
        ([4], [4, 8], [(3, 4)])
    """
    if isinstance(value, int):
        new = moves.get(value, {value})
        return [*sorted(new - {value}), *([value] if value in new else [])]
    options = [[item for item in changes_of(single, moves) if isinstance(item, int)] for single in value]
    # Several numbers are mostly sizes of windows and the like, so that they stay where they may.
    return sorted(itertools.islice(itertools.product(*options), 8), key=lambda new: new != value)


def bundles(channels: Channels) -> list[list[Group]]:
    """Groups, those that must stay equally wide together."""
    named = {group.name: group for group in channels.groups}
    bundled = [[named[name] for name in names if name in named] for names in channels.equal]
    seen = {group.name for part in bundled for group in part}
    return [*bundled, *([group] for group in channels.groups if group.name not in seen)]


def line_of(failure: CaptureError) -> str:
    """The caller's line that failed, as stacks of graph nodes name it; "" where none is known."""
    text = str(failure)
    _, found, rest = text.rpartition(" (at ")
    file, _, line = rest.partition(", in ")[0].rpartition(":")
    return f'File "{file}", line {line},' if found and line.isdigit() else ""


def stack_of(node: fx.Node) -> str:
    """Where the forward's code made a node."""
    held: Any = node.meta.get("stack_trace")
    return str(held or "")
