"""A tiny model whose channel groups are written down by hand, so that tests of what uses them need no graph rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pared.graph.capture import capture
from pared.graph.channels import Channels, Group, Member
from pared.task import Task


class Tiny(nn.Module):
    """Convolution, norm, ReLU; a residual; a concat; a flattened fully connected end: units of several indices."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 1, bias=False)
        self.conv3 = nn.Conv2d(6, 4, 3, bias=False)
        self.norm3 = nn.BatchNorm2d(4)
        self.conv4 = nn.Conv2d(10, 3, 1, bias=False)
        self.fc = nn.Linear(3 * 9, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + self.conv2(x)
        y = F.relu(self.norm3(self.conv3(x)))
        x = torch.cat([x[:, :, 1:-1, 1:-1], y], 1)
        return self.fc(self.conv4(x).flatten(1))


# Group: (its units, {tensor: (dimension, role, indices of a unit)}).
GROUPS = {
    "conv1": (
        range(6),
        {
            "conv1.weight": (0, "out", 1),
            **{f"norm1.{name}": (0, "along", 1) for name in ("weight", "bias", "running_mean", "running_var")},
            "conv2.weight": (0, "out", 1),
        },
    ),
    "conv3": (
        range(6, 10),
        {
            "conv3.weight": (0, "out", 1),
            **{f"norm3.{name}": (0, "along", 1) for name in ("weight", "bias", "running_mean", "running_var")},
        },
    ),
    "conv4": (range(10, 13), {"conv4.weight": (0, "out", 1), "fc.weight": (1, "in", 9)}),
}
READS = {("conv2.weight", 1): range(6), ("conv3.weight", 1): range(6), ("conv4.weight", 1): range(10)}


def tiny():
    """A fresh `Tiny`, its data (inputs, labels), its task and its channels."""
    torch.manual_seed(1)
    model = Tiny().eval()
    for norm in (model.norm1, model.norm3):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
    x, y = torch.randn(12, 3, 5, 5), torch.randint(5, (12,))
    task = Task(
        example_inputs=x[:1], calibration=[x[:8], x[8:]], train=[(x[:6], y[:6]), (x[6:], y[6:])], loss=F.cross_entropy
    )
    return model, (x, y), task, channels_of_tiny(model, task)


def channels_of_tiny(model, task):
    tensors = {key: torch.tensor(units) for key, units in READS.items()}
    groups = []
    for name, (units, held) in GROUPS.items():
        members = [Member(tensor, dim, role) for tensor, (dim, role, _) in held.items()]
        members += [Member(*key, "in") for key, read in READS.items() if units[0] in read]
        for tensor, (dim, _, takes) in held.items():
            tensors[tensor, dim] = torch.tensor(units).repeat_interleave(takes)
        modules = tuple(dict.fromkeys(member.tensor.rpartition(".")[0] for member in members))
        groups.append(Group(name, units[0], len(units), tuple(members), modules))
    program = capture(model, task)
    along = {6: torch.arange(6), 4: torch.arange(6, 10), 10: torch.arange(10), 3: torch.arange(10, 13)}
    along[27] = along[3].repeat_interleave(9)
    values = {
        node.name: {1: along[node.meta["val"].shape[1]]}
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta["val"].shape[1] in along
    }
    return Channels(program, tuple(groups), 13, tensors, values)
