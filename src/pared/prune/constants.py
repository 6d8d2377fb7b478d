"""What removed channels leave behind: the constants of their biases and shifts, taken in by what follows.

A filter whose scale is zero still gives its bias, or its batch norm's shift, through the activation: one constant a
channel. Where whatever reads it adds it up alike at every position, that sum is a change of a bias. Where it does not
(a padded border, a gate that depends on data, a sum without a bias), the channel counts as zero, and that is reported.

Which values are constants is not derived from the graph but seen in it: the original runs once on inputs that are not
a number, and whatever still is a number cannot depend on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.errors import PruneError
from pared.graph.capture import doubled, forgetful, operator, owner
from pared.graph.channels import Channels
from pared.graph.units import Modules
from pared.prune.exact import GROUP_NORMS, MAKERS, MEANS, NORMS, SCALES, SUMS, Masked
from pared.surgery import duplicate
from pared.task import Task

WINDOWS = frozenset(["conv1d", "conv2d", "conv3d", "linear"])
REDUCTIONS = MEANS | {"sum", "linalg_vector_norm", "norm"}


@dataclasses.dataclass(frozen=True)
class Constants:
    """What removing units does to the biases of the layers that read them.

    Attributes:
        changes: {tensor: float64, what is added to it}, at the tensor's full size, before it is sliced.
        folded: bool (channels.units,): removed units that are constants, taken in by all that reads them. The other
            removed units count as zero.
        left: {layer that reads them: why constants of removed channels could not be taken in, and how large they are}.
    """

    changes: Mapping[str, Tensor]
    folded: Tensor
    left: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Reader:
    """One operator that sums over removed units.

    Attributes:
        node: The operator.
        units: int64 (n,), the units whose sum it takes; one that stands at several indices is there as often.
        sums: float64 (n, out): what each of these indices adds to each output channel; NaN where that is no constant.
        why: What keeps it from taking constants in; "" where nothing does.
        largest: Largest absolute constant among them.
        target: The tensor that takes them in: a bias, or the running mean of the batch norm that follows.
        sign: -1 for a running mean.
    """

    node: fx.Node
    units: Tensor
    sums: Tensor
    why: str
    largest: float
    target: str = ""
    sign: int = 1


def constants_of(model: nn.Module, channels: Channels, keep: Tensor, task: Task) -> Constants:
    """The constants of removed units, and which biases take them in.

    Args:
        model: What `channels` was read off. It is not changed.
        channels: Its groups.
        keep: bool (channels.units,), True = stays.
        task: Gives the example inputs; their values do not matter.
    """
    watch = Watch(model, channels, keep)
    watch.outputs(doubled(task.example_inputs))
    watch.readers = [place(reader, watch.names) for reader in watch.readers]
    folded = ~keep
    left: dict[str, str] = {}
    for reader in watch.readers:
        if reader.why:
            folded[reader.units] = False
            size = f" (up to {reader.largest:.3g})" if reader.largest else ""
            left.setdefault(owner(reader.node), f"{reader.why}{size}")
    # Two operators that share a bias must ask for the same change of it; where they do not, both do without.
    while True:
        changes, disputed = changes_of(watch, folded)
        if not bool(disputed.any()):
            return Constants(changes, folded, left)
        for reader in watch.readers:
            if bool(disputed[reader.units].any()):
                left.setdefault(owner(reader.node), "another layer shares the bias that would take the constants in")
        folded = folded & ~disputed


def fold(pruned: nn.Module, model: nn.Module, channels: Channels, keep: Tensor, constants: Constants) -> nn.Module:
    """A copy of a pruned model whose biases have taken the constants in.

    Args:
        pruned: `model` without the removed units.
        model: What `channels` was read off.
        channels: Its groups.
        keep: bool (channels.units,), True = stays.
        constants: As `constants_of` gives them for the same choice.
    """
    copied = forgetful(duplicate(pruned))
    kept = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
    for name, change in constants.changes.items():
        module, _, held = name.rpartition(".")
        old, new = (getattr(root.get_submodule(module), held) for root in (model, copied))
        value = old.detach().double() + change.to(old.device)
        if (name, 0) in channels.tensors:
            value = value[kept[channels.tensors[name, 0]].to(value.device)]
        if value.shape != new.shape:
            raise PruneError(f"{name} has shape {tuple(new.shape)} where {tuple(value.shape)} was to stay")
        with torch.no_grad():
            new.copy_(value)
    return copied


def changes_of(watch: Watch, folded: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What each tensor changes by, and which units it is disputed for: bool (units,)."""
    asked: dict[str, dict[fx.Node, Tensor]] = {}
    for reader in watch.readers:
        if reader.target:
            mine = reader.sums[folded[reader.units]]
            asked.setdefault(reader.target, {})[reader.node] = reader.sign * mine.sum(0)
    disputed = torch.zeros_like(folded)
    changes = {}
    for name, found in asked.items():
        first = next(iter(found.values()))
        alike = all(torch.allclose(first, other, rtol=1e-12, atol=1e-15) for other in found.values())
        others = watch.uses.get(name, 0) > len(found)
        if (bool(first.any()) and others) or not alike:
            for reader in watch.readers:
                if reader.target == name:
                    disputed[reader.units] = True
        elif bool(first.any()):
            changes[name] = first
    return changes, disputed & folded


def place(reader: Reader, names: Mapping[str, str]) -> Reader:
    """A reader with the tensor that takes its constants in, or with why there is none."""
    if reader.why:
        return reader
    bias = argument(reader.node, "bias")
    if isinstance(bias, fx.Node):
        if bias.name in names:
            return dataclasses.replace(reader, target=names[bias.name])
    else:
        users = list(reader.node.users)
        if len(users) == 1 and operator(users[0]).removeprefix("aten.") in SCALES - {"instance_norm"}:
            mean = argument(users[0], "running_mean")
            if isinstance(mean, fx.Node) and mean.name in names:
                return dataclasses.replace(reader, target=names[mean.name], sign=-1)
    if not bool(reader.sums.any()):
        return reader
    return dataclasses.replace(reader, why="it has no bias, nor a batch norm behind it, that could take constants in")


class Watch(Masked):
    """Runs the original on inputs that are not a number, with the scales of all removed units at zero.

    Attributes:
        readers: Every operator that sums over removed units.
        names: {placeholder: first name of its tensor in the model}.
        uses: {tensor: how many operators read it}.
    """

    def __init__(self, model: nn.Module, channels: Channels, keep: Tensor) -> None:
        super().__init__(model, channels, keep, folded=~keep)
        signature = channels.program.graph_signature
        first = Modules(model).tensors
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names = {name: first[target] for name, target in held.items() if target in first}
        self.uses: dict[str, int] = {}
        self.readers: list[Reader] = []
        self.given: set[fx.Node] = set()
        self.users = frozenset(signature.user_inputs)
        for node in channels.program.graph.nodes:
            if node.name in self.names:
                name = self.names[node.name]
                self.uses[name] = self.uses.get(name, 0) + len(node.users)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node: not a number where it depends on data, and a constant for removed units where not."""
        if n.op == "placeholder":
            value = super().run_node(n)
            if n.name not in self.users:
                return value
            self.given.add(n)
            return unknown(value)
        name = operator(n).removeprefix("aten.")
        sources = [source for source in n.all_input_nodes if source in self.given]
        if n.op == "call_function":
            self.read(n, name)
        value = self.unknown_everywhere(n, name)
        value = super().run_node(n) if value is None else value
        if sources:
            self.given.add(n)
            # Integers and booleans cannot say that they depend on data; what is made of them does.
            if any(not floating(self.env[source]) and isinstance(self.env[source], Tensor) for source in sources):
                value = unknown(value)
        return self.made(n, name, value)

    def unknown_everywhere(self, node: fx.Node, name: str) -> Tensor | None:
        """What a layer gives, without computing it, that always reads a channel in which nothing is a number."""
        sources = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        if name not in WINDOWS or len(sources) < 2:
            return None
        x, weight = (self.env[source] for source in sources)
        plain = name == "linear" or all(step == 1 for step in numbers(node, "dilation", 1))
        reach = [0] if name == "linear" else numbers(node, "padding", 0)
        # A window that lies wholly in the border, or steps over all of its input, reads nothing.
        if not plain or any(wide >= size for wide, size in zip(reach, weight.shape[2:] or [1], strict=False)):
            return None
        channel = x.ndim - 1 if name == "linear" else x.ndim - weight.ndim + 1
        groups = 1 if name == "linear" else int(argument(node, "groups") or 1)
        parts = x.movedim(channel, 0).reshape(groups, x.shape[channel] // groups, -1)
        first = parts[:, :, 0].isnan().to(torch.uint8).argmax(1)
        if not bool(parts[torch.arange(groups), first].isnan().all()):
            return None
        shapes = fx.node.map_arg((node.args, node.kwargs), lambda held: without_data(self.env[held]))
        return torch.full_like(self.call_function(node.target, *shapes), float("nan"), device=x.device)

    def made(self, node: fx.Node, name: str, value: Any) -> Any:
        """A value with what a zero scale leaves at removed units: the bias, or nothing."""
        if (name not in MAKERS and name not in SCALES) or not isinstance(value, Tensor):
            return value
        bias = argument(node, "bias")
        if name in SCALES and argument(node, "weight") is None:
            return value
        dim = -1 if name == "linear" else 1
        where = self.removed(node, self.gone).get(dim % value.ndim)
        if where is None:
            return value
        left = self.env[bias] if isinstance(bias, fx.Node) else value.new_zeros(value.shape[dim])
        shape = [1] * value.ndim
        shape[dim] = -1
        return torch.where(where.reshape(shape), left.reshape(shape), value)

    def read(self, node: fx.Node, name: str) -> None:
        """Note what an operator sums up of removed units."""
        if name in MAKERS:
            self.sum_up(node, name)
            return
        if name not in SUMS | NORMS | GROUP_NORMS | MEANS:
            return
        for source in node.all_input_nodes:
            if source.name in self.names:
                continue
            dims = self.removed(source, self.gone)
            value = self.env[source]
            if name not in SUMS or name in REDUCTIONS:
                given = {"normalized_shape": node.args[1]} if name in NORMS else {}
                given |= {"dim": argument(node, "dim")}
                given |= {"num_groups": argument(node, "num_groups") or argument(node, "group")}
                dims = {dim: where for dim, where in dims.items() if dim in self.statistics(name, value, given)}
            units = [self.labels(source)[dim][where] for dim, where in dims.items()]
            if units:
                found = torch.cat(units)
                sums = torch.full((len(found), 1), float("nan"), dtype=torch.float64)
                self.readers.append(Reader(node, found, sums, f"{operator(node)} depends on data", 0.0))

    def sum_up(self, node: fx.Node, name: str) -> None:
        """Note what a convolution or a linear layer sums up of removed units."""
        source, kernel = node.args[0], node.args[1]
        if not isinstance(source, fx.Node) or not isinstance(kernel, fx.Node):
            return
        x, weight = self.env[source], self.env[kernel]
        channel = x.ndim - 1 if name == "linear" else x.ndim - weight.ndim + 1
        where = self.removed(source, self.gone).get(channel)
        if where is None:
            return
        index = where.nonzero().flatten()
        transposed = "transpose" in name
        groups = 1 if name == "linear" else int(argument(node, "groups") or 1)
        full = spread(weight, groups, transposed)
        stays = ~self.removed(node, self.gone).get(channel, torch.zeros(full.shape[0], dtype=torch.bool))
        weights = (full if full.ndim > 2 else full[..., None]).flatten(2)[stays][:, index]
        matters = (weights != 0).any(2).any(0)
        index, weights = index[matters], weights[:, matters]
        if not len(index):
            return
        units = self.labels(source)[channel][index]
        # Both are not a number where any of the values is not.
        low, constant = torch.aminmax(x.movedim(channel, 0)[index].reshape(len(index), -1), dim=1)
        known = ~constant.isnan()
        alike = known & (low == constant)
        largest = float(torch.maximum(low.abs(), constant.abs())[known].max()) if bool(known.any()) else 0.0
        # Sums by position differ at a border, and between the positions that a transposed convolution writes.
        even = not padded(node, name) and not (transposed and weight[0, 0].numel() > 1)
        sums = weights.new_zeros(len(index), full.shape[0])
        sums[:, stays] = weights.sum(2).T * constant[:, None]
        # One reader for each reason, so that only the units that it holds for do without.
        uneven = alike & (constant != 0) if not even else torch.zeros_like(alike)
        for chosen, why in (
            (~known, "the constants of its removed channels are mixed with data"),
            (known & ~alike, "the constants of its removed channels differ from place to place"),
            (uneven, "it pads, so that constants of removed channels end before its border"),
            (alike & ~uneven, ""),
        ):
            if bool(chosen.any()):
                size = largest if why and not bool((~known & chosen).any()) else 0.0
                self.readers.append(Reader(node, units[chosen], sums[chosen], why, size))


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator by name; None where it is not given."""
    names = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    named = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return named.get(name)


def spread(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A weight as it would be without groups: (out, in, ...), zero between groups."""
    parts = [part.transpose(0, 1) if transposed else part for part in weight.chunk(groups)]
    if groups == 1:
        return parts[0]
    out, inside = parts[0].shape[:2]
    full = weight.new_zeros((groups * out, groups * inside, *weight.shape[2:]))
    for number, part in enumerate(parts):
        full[number * out : (number + 1) * out, number * inside : (number + 1) * inside] = part
    return full


def padded(node: fx.Node, name: str) -> bool:
    """True for a convolution that reads zeros beyond the border of its input."""
    return name != "linear" and any(numbers(node, "padding", 0))


def numbers(node: fx.Node, name: str, default: int) -> list[int]:
    """An argument of a convolution that is one number, or one a dimension; of a padding by name, 0 or 1."""
    value = argument(node, name)
    if isinstance(value, str):
        return [int(value != "valid")]
    return list(value) if isinstance(value, (list, tuple)) else [default if value is None else value]


def unknown(value: Any) -> Any:
    """A floating-point tensor of the same shape that is not a number anywhere; other things as they are."""
    return torch.full_like(value, float("nan")) if floating(value) else value


def without_data(value: Any) -> Any:
    """The shape and dtype of a tensor; other things as they are."""
    return value.to("meta") if isinstance(value, Tensor) else value


def floating(value: Any) -> bool:
    """True for a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
