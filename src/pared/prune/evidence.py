"""What criteria judge channels by: weights, gradients of the task's loss, feature maps. Gathered when first asked for.

Memory does not grow with the number of samples: of gradients and feature maps only sums are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from pared.errors import UsageError
from pared.graph.channels import NO_UNIT, Channels, Group
from pared.seeding import isolated, seed_all
from pared.surgery import duplicate
from pared.task import Inputs, Task, call
from pared.train.objective import loss_of

PIECE = 16  # samples whose feature maps are looked at together
# Given maps (units, indices of one, samples, ...), a figure (units, samples).
Statistic = Callable[[Tensor], Tensor]


def gather(value: Tensor, dim: int, units: Tensor, group: Group) -> Tensor:
    """The parts of a tensor that belong to each unit of a group.

    A unit that has fewer indices than others is filled up with zeros.

    Args:
        value: Any tensor.
        dim: The dimension that the group runs along.
        units: The unit of each index of that dimension.
        group: The group.

    Returns:
        Shape (group.size, most indices of a unit, further dimensions of `value` in order).

    Example:
        >>> group = Group("a", 4, 2, (), ())
        >>> gather(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 0, torch.tensor([4, 5, -1, 4, 5]), group).tolist()
        [[1.0, 4.0], [2.0, 5.0]]
    """
    place = units - group.start
    if len(units) == group.size and bool((place == torch.arange(group.size)).all()):
        return value.movedim(dim, 0).unsqueeze(1)  # as most layers are: nothing is copied
    own = ((place >= 0) & (place < group.size)).nonzero().flatten()
    place = place[own]
    order = torch.argsort(place, stable=True)
    counts = torch.bincount(place, minlength=group.size)
    rows = value.movedim(dim, 0)[own[order].to(value.device)]
    most = int(counts.max()) if len(own) else 0
    if bool((counts == most).all()):
        return rows.reshape(group.size, most, *rows.shape[1:])
    found = rows.new_zeros(group.size, most, *rows.shape[1:])
    for unit, part in enumerate(torch.split(rows, counts.tolist())):
        found[unit, : len(part)] = part
    return found


def index_sums(value: Tensor, dim: int, units: Tensor, count: int) -> Tensor:
    """Sums of all that belongs to each unit, shape (count,).

    Example:
        >>> index_sums(torch.tensor([1.0, 2.0, 3.0]), 0, torch.tensor([1, -1, 1]), 2).tolist()
        [0.0, 4.0]
    """
    along = value.movedim(dim, 0).flatten(1).sum(1) if value.ndim > 1 else value
    known = units != NO_UNIT
    return along.new_zeros(count).index_add(0, units[known], along[known])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a model's channels.

    Attributes:
        channels: Of the model.
        model: Never changed.
        task: Gives the data, and the loss for gradients.
        seed: Of whatever a criterion draws, and of the order of shuffled data.
        by: Who asks, in the words of an error.
        batches: How many batches of train data the gradients are taken on.
        samples: How many samples of calibration data feature maps are looked at.
    """

    channels: Channels
    model: nn.Module
    task: Task
    seed: int = 0
    by: str = "PruneChannels"
    batches: int = 8
    samples: int = 128

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model, by the name that `Member.tensor` has."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: value.detach() for name, value in named}

    @property
    def first_order(self) -> Tensor:
        """|sum of weight x gradient| over all parameters that make, scale or shift a unit, averaged over batches:
        float64, shape (units,)."""
        return self._gradients[0]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The loss's gradient by each parameter, averaged over batches, by name."""
        return self._gradients[1]

    @functools.cached_property
    def _gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass over train data, in eval mode, so that norms use the statistics that the model has."""
        task = self.task
        if task.loss is None:
            raise UsageError(f"{self.by} needs a loss for the gradients; give Task(loss=...)")
        model = duplicate(self.model)
        if not isinstance(model, fx.GraphModule):
            model.eval()
        model.requires_grad_(True)  # a frozen model is judged all the same
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        first_order = torch.zeros(self.channels.units, dtype=torch.float64)
        count = 0
        with isolated(task):
            seed_all(task, self.seed, 0)
            for batch in task.batches("train", by=self.by, limit=self.batches):
                target = batch.target.to(device) if isinstance(batch.target, Tensor) else batch.target
                moved = batch._replace(inputs=batch.inputs.to(device), target=target)
                outputs = call(model, moved.inputs)
                loss = loss_of(task, task.loss, moved, outputs, f"train data, batch {count}")
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                gradients = {
                    name: value.double() for name, value in zip(parameters, found, strict=True) if value is not None
                }
                for name, value in gradients.items():
                    sums[name] += value
                first_order += self.removal(gradients).abs()
                count += 1
        return first_order / count, {name: value / count for name, value in sums.items()}

    def removal(self, gradients: dict[str, Tensor]) -> Tensor:
        """Sum of weight x gradient over what each unit owns: shape (units,)."""
        total = torch.zeros(self.channels.units, dtype=torch.float64)
        members = {
            (member.tensor, member.dim)
            for group in self.channels.groups
            for member in group.members
            if member.role != "in"
        }
        for tensor, dim in sorted(members):
            if tensor in gradients:
                change = (self.tensors[tensor].double() * gradients[tensor]).cpu()
                total += index_sums(change, dim, self.channels.tensors[tensor, dim], self.channels.units)
        return total

    def averages(self, statistic: Statistic) -> dict[str, list[Tensor]]:
        """A figure of each unit's feature maps, averaged over calibration samples.

        The maps are what the layers after a group read: behind its norm and activation.

        Args:
            statistic: The figure. It is computed for all groups in one pass over the data, the first time.

        Returns:
            By group, one tensor (units,) for each activation that its next layers read.
        """
        if statistic not in self._averaged:
            self._averaged[statistic] = self._average(statistic)
        return self._averaged[statistic]

    @functools.cached_property
    def _averaged(self) -> dict[Statistic, dict[str, list[Tensor]]]:
        return {}

    def _average(self, statistic: Statistic) -> dict[str, list[Tensor]]:
        names = tensor_names(self.channels, self.model)
        watched = read_by_next(self.channels, names)
        sums: dict[tuple[str, str], Tensor] = {}
        counts: dict[tuple[str, str], int] = {}

        def look(node: str, value: Tensor) -> None:
            for group, dim in watched[node]:
                units = self.channels.values[node][dim]
                maps = gather(value.unsqueeze(-1) if value.ndim == 1 else value, dim, units, group)
                found = statistic(maps).double().cpu()
                key = (group.name, node)
                sums[key] = sums.get(key, torch.zeros(group.size, dtype=torch.float64)) + found.sum(1)
                counts[key] = counts.get(key, 0) + found.shape[1]

        watcher = Watcher(self.channels, set(watched), look, tuple(self.task.example_inputs.kwargs))
        seen = 0
        with isolated(self.task):
            seed_all(self.task, self.seed, 0)
            for batch in self.task.batches("calibration", by=self.by):
                for piece in batch.inputs.chunks(PIECE):
                    watcher.show(piece.part(0, self.samples - seen))
                    seen += min(piece.size, self.samples - seen)
                    if seen >= self.samples:
                        break
                if seen >= self.samples:
                    break
        found: dict[str, list[Tensor]] = {group.name: [] for group in self.channels.groups}
        for (name, node), total in sums.items():
            found[name].append(total / counts[name, node])
        return found


def read_by_next(channels: Channels, names: Mapping[str, str]) -> dict[str, list[tuple[Group, int]]]:
    """The activations that layers after a group read: {graph node: [(group, dimension)]}.

    Where no layer reads a group by a weight, the last of its activations stands for them.

    Args:
        channels: Of the model.
        names: As `tensor_names` gives them.
    """
    found: dict[str, dict[str, int]] = {group.name: {} for group in channels.groups}
    last: dict[str, tuple[str, int]] = {}
    reading = {group.name: {m.tensor for m in group.members if m.role == "in"} for group in channels.groups}
    values = {name: list(groups_along(channels, dims)) for name, dims in channels.values.items() if name not in names}
    for node in channels.program.graph.nodes:
        for group, dim in values.get(node.name, ()):
            last[group.name] = (node.name, dim)
        weights = {names[source.name] for source in node.all_input_nodes if source.name in names}
        for source in node.all_input_nodes:
            for group, dim in values.get(source.name, ()):
                if weights & reading[group.name]:
                    found[group.name].setdefault(source.name, dim)
    nodes: dict[str, list[tuple[Group, int]]] = {}
    for group in channels.groups:
        chosen = found[group.name] or dict([last[group.name]] if group.name in last else [])
        for name, dim in chosen.items():
            nodes.setdefault(name, []).append((group, dim))
    return nodes


def groups_along(channels: Channels, dims: Mapping[int, Tensor]) -> Iterator[tuple[Group, int]]:
    """The groups that run along a value, each with its dimension; given `{dimension: units}`."""
    for dim, units in dims.items():
        present = torch.zeros(channels.units, dtype=torch.bool)
        present[units[units != NO_UNIT]] = True
        for group in channels.groups:
            if bool(present[group.units].any()):
                yield group, dim


def tensor_names(channels: Channels, model: nn.Module) -> dict[str, str]:
    """The parameter, buffer or constant that each placeholder of the graph stands for, by the first of its names in the
    model: {node: dotted name}. Inputs are left out."""
    everywhere = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    for name, value in everywhere:
        first.setdefault(id(value), name)
    canonical = {name: first[id(value)] for name, value in everywhere}
    placeholders = [node for node in channels.program.graph.nodes if node.op == "placeholder"]
    specs = channels.program.graph_signature.input_specs
    return {
        node.name: canonical.get(str(spec.target), str(spec.target))
        for node, spec in zip(placeholders, specs, strict=True)
        if spec.kind is not InputKind.USER_INPUT
    }


class Watcher(fx.Interpreter):
    """Runs a captured graph on some samples and shows some of its values as they come by."""

    def __init__(
        self, channels: Channels, nodes: set[str], look: Callable[[str, Tensor], None], keywords: Sequence[str]
    ) -> None:
        super().__init__(channels.program.graph_module)
        self.extra_traceback = False
        self.program = channels.program
        self.nodes = nodes
        self.look = look
        self.keywords = keywords

    def show(self, inputs: Inputs) -> None:
        """Run."""
        given = iter(tree_leaves((inputs.args, [inputs.kwargs[name] for name in self.keywords])))
        stored = {**self.program.state_dict, **self.program.constants}
        specs = self.program.graph_signature.input_specs
        with torch.no_grad():
            self.run(
                *(next(given) if spec.kind is InputKind.USER_INPUT else stored[str(spec.target)] for spec in specs)
            )

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.nodes and isinstance(result, Tensor):
            self.look(n.name, result)
        return result
