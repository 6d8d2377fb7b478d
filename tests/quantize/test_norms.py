"""Batch norms that cannot be folded, as depthwise convolutions: where, and that they compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.graph.capture import capture, operator
from pared.quantize.folding import fold_batch_norms
from pared.quantize.norms import write_norms_as_convolutions
from pared.quantize.placement import place
from pared.quantize.program import own_tensors
from pared.targets.onnxruntime import SCHEME
from pared.task import Task

ALL: tuple[str, ...] = ("*",)


class Forward(nn.Module):
    """Modules and the function that joins them."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d, **settings: Any) -> nn.Module:
    made: Any = kind(channels, **settings)
    made.running_mean.uniform_(-1, 1)
    made.running_var.uniform_(0.5, 2)
    if made.affine:
        nn.init.uniform_(made.weight, 0.5, 2)
        nn.init.uniform_(made.bias, -1, 1)
    return made


def dense(inplace: bool) -> nn.Module:
    """A layer of DenseNet between two convolutions."""
    return Forward(
        lambda s, x: s.c(s.act(s.n(torch.cat([y := s.a(x), s.b(y)], 1)))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 1),
        n=norm(6),
        act=nn.ReLU(inplace),
        c=nn.Conv2d(6, 5, 1),
    )


def pair(middle: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), middle, norm, nn.Conv2d(4, 5, 1))


# Name -> (model, names of the norms that become integers).
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "behind_a_concat": (lambda: dense(inplace=False), ["n"]),
    "behind_a_concat_in_place": (lambda: dense(inplace=True), ["n"]),
    "behind_a_relu": (lambda: pair(nn.ReLU(), norm(4)), ["2"]),
    "without_weights": (lambda: pair(nn.ReLU(), norm(4, affine=False)), ["2"]),
    "behind_float": (lambda: pair(nn.Tanh(), norm(4)), []),
    "before_float": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), norm(4), nn.Tanh()), []),
    "at_the_start": (lambda: nn.Sequential(norm(3), nn.Conv2d(3, 4, 1)), []),
}


def graph_of(model: nn.Module) -> Any:
    graph = capture(model.eval(), Task(example_inputs=(torch.zeros(2, 3, 4, 4),))).module(check_guards=False)
    own_tensors(graph)
    fold_batch_norms(graph)
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_norms_become_integers_where_integers_surround_them(name: str) -> None:
    make, expected = MODELS[name]
    torch.manual_seed(0)
    model = make()
    graph = graph_of(model)
    write_norms_as_convolutions(graph, SCHEME, include=ALL, exclude=())
    placement = place(graph, SCHEME, include=ALL, exclude=())
    norms = {module for module, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert [anchor.module for anchor in placement.anchors if anchor.module in norms] == expected
    left = [node for node in graph.graph.nodes if operator(node) == "aten.batch_norm"]
    assert len(left) == len(norms) - len(expected)
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        # A handful of float32 operations in another order: some units in the last place.
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_norms_stay_when_the_runtime_or_the_caller_says_so() -> None:
    model = dense(inplace=False)
    for scheme, include, exclude in (
        (dataclasses.replace(SCHEME, norms_as_convolutions=False), ALL, ()),
        (SCHEME, ("a", "b", "c"), ()),
        (SCHEME, ALL, ("n",)),
    ):
        graph = graph_of(model)
        write_norms_as_convolutions(graph, scheme, include=include, exclude=exclude)
        assert any(operator(node) == "aten.batch_norm" for node in graph.graph.nodes)


def test_norms_of_sequences_become_convolutions_of_one_dimension() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), norm(4, nn.BatchNorm1d), nn.Conv1d(4, 5, 1)).eval()
    graph: Any = capture(model, Task(example_inputs=(torch.zeros(2, 3, 4),))).module(check_guards=False)
    own_tensors(graph)
    write_norms_as_convolutions(graph, SCHEME, include=ALL, exclude=())
    assert sum(operator(node) == "aten.conv1d" for node in graph.graph.nodes) == 3
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
