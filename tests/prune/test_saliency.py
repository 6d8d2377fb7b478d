"""Criteria: each against a naive loop over the units of small models with groups made by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pared.graph.capture import capture
from pared.graph.channels import Channels, Group, Member
from pared.prune.evidence import Evidence
from pared.prune.saliency import score
from pared.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """Convolution, norm, ReLU; a residual; a flattened fully connected end: units of several indices."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 1)
        self.conv3 = nn.Conv2d(6, 4, 3)
        self.fc = nn.Linear(4 * 9, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + self.conv2(x)
        return self.fc(F.relu(self.conv3(x)).flatten(1))


def labelled(model, task):
    """The channels of `Tiny`, by hand: the residual's six, and the four of conv3 that fc reads nine indices each of."""
    first, second = torch.arange(6), torch.arange(6, 10)
    along = [("norm1.weight", 0), ("norm1.bias", 0), ("conv2.bias", 0)]
    out = [("conv1.weight", 0), ("conv2.weight", 0)]
    reads = [("conv2.weight", 1), ("conv3.weight", 1)]
    members = [Member(t, d, "out") for t, d in out] + [Member(t, d, "along") for t, d in along]
    members += [Member(t, d, "in") for t, d in reads]
    a = Group("conv1", 0, 6, tuple(members), ("conv1", "norm1", "conv2", "conv3"))
    own = (Member("conv3.weight", 0, "out"), Member("conv3.bias", 0, "along"), Member("fc.weight", 1, "in"))
    b = Group("conv3", 6, 4, own, ("conv3", "fc"))
    tensors = dict.fromkeys([*along, *out, *reads], first)
    tensors |= {("conv3.weight", 0): second, ("conv3.bias", 0): second, ("fc.weight", 1): second.repeat_interleave(9)}
    program = capture(model, task)
    values = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and value.ndim == 4:
            values[node.name] = {1: first if value.shape[1] == 6 else second}
        elif node.op == "call_function" and value.shape[1] == 36:
            values[node.name] = {1: second.repeat_interleave(9)}
    return Channels(program, (a, b), 10, tensors, values)


def evidence(**settings):
    torch.manual_seed(1)
    model = Tiny().eval()
    nn.init.uniform_(model.norm1.weight, -1.5, 1.5)
    x, y = torch.randn(12, 3, 5, 5), torch.randint(5, (12,))
    task = Task(
        example_inputs=x[:2], calibration=[x[:8], x[8:]], train=[(x[:6], y[:6]), (x[6:], y[6:])], loss=F.cross_entropy
    )
    channels = labelled(model, task)
    return Evidence(channels=channels, model=model, task=task, **settings), x, y


NAIVE = {
    "l1": lambda w: sum(abs(v) for v in w.flatten().tolist()),
    "l2": lambda w: sum(v * v for v in w.flatten().tolist()) ** 0.5,
    "std": lambda w: torch.std(w.double(), correction=0).item(),
    "mean": lambda w: abs(sum(w.flatten().tolist())) / w.numel(),
}


@pytest.mark.parametrize("name", NAIVE)
def test_weight_criteria_agree_with_a_loop_over_filters(name):
    known, _, _ = evidence()
    found, skips = score(known, name, known.channels.groups)
    want = torch.tensor([NAIVE[name](w) for w in known.model.conv3.weight], dtype=torch.float64)
    assert not skips
    torch.testing.assert_close(found["conv3"], want)
    pair = [torch.tensor([NAIVE[name](w) for w in conv.weight]) for conv in (known.model.conv1, known.model.conv2)]
    means = [values.mean() for values in pair]
    both = sum(values / m for values, m in zip(pair, means, strict=True)) / 2 * sum(means) / 2
    torch.testing.assert_close(found["conv1"], both.double())
