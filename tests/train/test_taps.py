"""Taps: what they record, in modules and in graphs of operators, and that they leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pared.errors import PlanError
from pared.train.taps import Taps


class Pair(nn.Module):
    """A layer that gives two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3


class Block(nn.Module):
    """A container, a layer used twice, a functional activation and a layer that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.twice = nn.Linear(4, 4)
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = self.twice(torch.tanh(self.twice(x)))
        return self.pair(x)[0] + 1


def expected(net: Block, x: Tensor) -> dict[str, Tensor]:
    body = net.body[1](net.body[0](x))
    twice = net.twice(torch.tanh(net.twice(body)))
    return {"body": body, "body.0": net.body[0](x), "twice": twice, "pair": twice * 2}


def test_taps_record_outputs_when_modules_run() -> None:
    torch.manual_seed(0)
    net, x = Block(), torch.randn(5, 3)
    before, wanted = net(x), expected(net, x)
    names = ["body", "body.0", "twice", "pair"]
    taps = Taps(net, [*names, "body"])
    assert torch.equal(net(x), before)
    found = taps.take()
    assert sorted(found) == sorted(names)
    for name, value in wanted.items():
        assert torch.equal(found[name], value)
    assert taps.found == {}  # nothing outlives the step
    taps.recording = False
    net(x)
    assert taps.found == {}
    with pytest.raises(PlanError, match="layer 'body' gave no tensor"):
        taps.take()
    taps.remove()
    assert all(not module._forward_hooks for module in net.modules())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_taps_record_outputs_when_a_graph_of_operators_runs() -> None:
    torch.manual_seed(0)
    net, x = Block(), torch.randn(5, 3)
    graph = torch.export.export(net, (x,)).module()
    code, names = str(graph.graph), dict(graph.named_modules()).keys()
    taps = Taps(graph, ["body", "body.0", "twice"])
    assert torch.equal(graph(x), net(x))
    found, wanted = taps.take(), expected(net, x)
    for name in ("body", "body.0", "twice"):
        torch.testing.assert_close(found[name], wanted[name])
    found["twice"].sum().backward()  # what is recorded is part of the training
    assert graph.get_parameter("body.0.weight").grad is not None
    copied = copy.deepcopy(graph)
    copied(x)
    assert taps.found == {}
    taps.remove()
    assert str(graph.graph) == code
    assert dict(graph.named_modules()).keys() == names
    assert torch.equal(graph(x), net(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_taps_name_the_nearest_layer_when_there_is_none() -> None:
    net, x = Block(), torch.randn(5, 3)
    with pytest.raises(PlanError, match="no layer 'twise' in Block; did you mean 'twice'"):
        Taps(net, ["twise"])
    graph = torch.export.export(net, (x,)).module()
    with pytest.raises(PlanError, match="no layer 'bodi' in the graph that trains; did you mean 'body'"):
        Taps(graph, ["bodi"])


def test_taps_record_what_a_layer_gave_when_the_next_one_writes_over_it() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), torch.randn(5, 3)
    taps = Taps(net, ["0"])
    net(x)
    found = taps.take()["0"]
    wanted = x @ net[0].weight.T + net[0].bias
    assert (wanted < 0).any()
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    torch.testing.assert_close(net[0].bias.grad, torch.full((4,), 5.0))
