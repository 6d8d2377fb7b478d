"""Equalization and migration: the same function, evener channels, and only where it is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from pared.quantize.equalize import Equalize, equalize, input_reach, output_reach, pairs
from pared.quantize.folding import tensor_of
from pared.quantize.placement import Anchor, place
from pared.quantize.program import prepare
from pared.quantize.smooth import ChannelReach, migrate, migration_scales, norms
from pared.targets.onnxruntime import SCHEME
from pared.task import Task
from zoo_models import ZOO


def prepared(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, tuple[Anchor, ...]]:
    graph, _, _ = prepare(model.eval(), Task(example_inputs=x), "test")
    return graph, place(graph, SCHEME, include=("*",), exclude=()).anchors


class Chain(nn.Module):
    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.c, self.d = nn.Conv2d(8, 12, 1, groups=2), nn.Linear(12, 4)
        self.activation, self.pool = activation(), nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c(self.activation(self.b(self.activation(self.a(x))))))
        return self.d(self.pool(x).flatten(1))


def test_equalizing_keeps_the_function_and_evens_the_ranges() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(4, 3, 8, 8)
    expected = model(x).detach()
    graph, anchors = prepared(model, x)
    before = [(first.name, second.name) for first, second in pairs(graph, anchors)]
    assert len(before) == 3
    scales = equalize(graph, anchors, Equalize(rounds=200))
    assert scales.keys() == {first for first, _ in before}
    # Scaling and unscaling by float32 numbers: some roundings on the way.
    assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5)
    for first, second in pairs(graph, anchors):
        groups = int(second.args[6]) if len(second.args) > 6 else 1
        ours = output_reach(tensor_of(graph, first.args[1]))
        theirs = input_reach(tensor_of(graph, second.args[1]), groups)
        assert torch.allclose(ours, theirs, rtol=0.02)


def test_nothing_is_equalized_through_what_depends_on_the_scale_or_has_two_readers() -> None:
    for activation in (nn.ReLU6, nn.Hardswish, nn.Sigmoid):
        graph, anchors = prepared(Chain(activation), torch.randn(2, 3, 8, 8))
        assert [(first.name, second.name) for first, second in pairs(graph, anchors)] == []
    for pattern in ("residual_add", "tied_weights", "module_with_two_names", "concat"):
        model, example = ZOO[pattern]()
        graph, anchors = prepared(model, example.args[0])
        x = torch.randn(3, *example.args[0].shape[1:])
        expected = graph(x)
        equalize(graph, anchors, Equalize())
        assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5), pattern


def test_input_reach_is_that_of_a_loop() -> None:
    weight = torch.randn(6, 2, 3, 3)
    expected = [max(weight[o, i].abs().max() for o in range(3 * g, 3 * g + 3)) for g in range(2) for i in range(2)]
    assert input_reach(weight, 2).tolist() == [value.item() for value in expected]


def test_migration_keeps_the_function_and_shrinks_the_outliers() -> None:
    model, example = ZOO["attention_fused_qkv"]()
    with torch.no_grad():
        model.norm1.weight[3] *= 40
    x = torch.randn(6, *example.args[0].shape[1:])
    graph, anchors = prepared(model, x)
    expected = graph(x)
    found = norms(graph, anchors)
    assert len(found) == 2
    reaches = {norm.name: ChannelReach() for norm, _ in found}

    def spread(name: str) -> float:
        seen = ChannelReach()

        class Show(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                value = super().run_node(n)
                if n.name == name:
                    seen.update(value)
                return value

        Show(graph).run(x)
        return (seen.reach.max() / seen.reach.median()).item()

    class All(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in reaches:
                reaches[n.name].update(value)
            return value

    All(graph).run(x)
    before = spread(found[0][0].name)
    migrate(graph, anchors, reaches, 0.5)
    assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5)
    assert spread(found[0][0].name) < before / 3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_migration_scales_are_those_of_the_paper(alpha: float) -> None:
    a, w = torch.tensor([3.0, 0.5]), torch.tensor([0.25, 2.0])
    expected = [x**alpha / y ** (1 - alpha) for x, y in zip(a.tolist(), w.tolist(), strict=True)]
    assert migration_scales(a, w, alpha).tolist() == pytest.approx(expected)


def test_a_norm_that_also_feeds_a_residual_is_left_alone() -> None:
    model, example = ZOO["multihead_attention"]()
    graph, anchors = prepared(model, example.args[0])
    assert all(len(layers) == len(norm.users) for norm, layers in norms(graph, anchors))
