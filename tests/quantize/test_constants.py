"""What does not depend on the input is computed once; the outputs stay the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pared.graph.capture import capture, operator
from pared.quantize.constants import fold_constants
from pared.quantize.placement import place
from pared.quantize.program import own_tensors
from pared.targets.onnxruntime import SCHEME
from pared.task import Task


class Forward(nn.Module):
    """Modules, stored tensors and the function that joins them."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def zeroed(bias: Tensor) -> Tensor:
    """As Swin v2 does with the part of its bias that belongs to the keys."""
    bias = bias.clone()
    bias[2:4].zero_()
    return bias


TABLE = torch.arange(6.0).reshape(3, 2)
# Name -> (model, layers that become integers, layers whose result is stored).
MODELS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "bias_with_zeros": (
        lambda: Forward(lambda s, x: F.linear(x, s.a.weight, zeroed(s.a.bias)), a=nn.Linear(4, 6)),
        1,
        [],
    ),
    "part_of_a_packed_weight": (
        lambda: Forward(lambda s, x: F.linear(x, s.a.weight.chunk(3)[1]), a=nn.Linear(4, 6)),
        1,
        [],
    ),
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 6)), 1, []),
    "bias_from_a_table": (
        lambda: Forward(
            lambda s, x: s.a(x) + s.c(F.relu(s.b(s.table))).mean(0),
            a=nn.Linear(4, 6),
            b=nn.Linear(2, 5),
            c=nn.Linear(5, 6),
            table=TABLE,
        ),
        1,
        ["b", "c"],
    ),
    "nothing_to_fold": (lambda: Forward(lambda s, x: s.a(x * 2), a=nn.Linear(4, 6)), 1, []),
}


def graph_of(model: nn.Module) -> Any:
    graph = capture(model.eval(), Task(example_inputs=(torch.zeros(2, 4),))).module(check_guards=False)
    own_tensors(graph)
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_fold_constants_leaves_layers_with_stored_weights_and_the_same_outputs(name: str) -> None:
    make, layers, stored = MODELS[name]
    torch.manual_seed(0)
    model = make()
    graph = graph_of(model)
    assert fold_constants(graph) == stored
    anchors = place(graph, SCHEME, include=("*",), exclude=()).anchors
    assert len(anchors) == layers
    assert sum(operator(node) == "aten.linear" for node in graph.graph.nodes) == layers
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_fold_constants_leaves_what_depends_on_chance() -> None:
    model = Forward(lambda s, x: F.linear(x, s.a.weight * torch.rand(6, 4)), a=nn.Linear(4, 6))
    graph = graph_of(model)
    fold_constants(graph)
    assert any(operator(node) == "aten.rand" for node in graph.graph.nodes)
    assert not place(graph, SCHEME, include=("*",), exclude=()).anchors


def test_a_layer_of_a_computed_weight_keeps_the_name_of_its_module() -> None:
    model = Forward(lambda s, x: F.linear(x, s.a.weight * 2), a=nn.Linear(4, 6))
    graph = graph_of(model)
    fold_constants(graph)
    (anchor,) = place(graph, SCHEME, include=("a",), exclude=()).anchors
    assert (anchor.module, anchor.weight) == ("a", "a.weight")
