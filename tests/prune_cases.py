"""What the tests of pruning share: a choice of units, and the model without them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.graph.capture import capture
from pared.graph.channels import Channels
from pared.graph.labels import find_channels
from pared.task import Task


def channels_of(model: nn.Module, task: Task) -> Channels:
    return find_channels(capture(model, task), model)


def half(channels: Channels, seed: int = 0) -> Tensor:
    """A random half of each group goes; groups that must keep the same fraction keep that of the smallest."""
    generator = torch.Generator().manual_seed(seed)
    named = {group.name: group for group in channels.groups}
    count = {group.name: max(1, group.size // 2) for group in channels.groups}
    for names in channels.equal:
        least = min((named[name] for name in names), key=lambda group: group.size)
        count |= {name: named[name].size * count[least.name] // least.size for name in names}
    keep = torch.zeros(channels.units, dtype=torch.bool)
    for group in channels.groups:
        keep[group.start + torch.randperm(group.size, generator=generator)[: count[group.name]]] = True
    return keep
