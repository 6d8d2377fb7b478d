"""Equalization and migration: the same function, evener channels, and only where it is allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from pared.quantize.correction import CorrectBias
from pared.quantize.equalize import Equalize, equalize, input_reach, output_reach, pairs
from pared.quantize.folding import tensor_of
from pared.quantize.placement import Anchor, place
from pared.quantize.program import prepare
from pared.quantize.smooth import (
    MOST,
    ROOM,
    ChannelReach,
    Migrate,
    make_room,
    migrate,
    migrate_without_data,
    migration_scales,
    norms,
)
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.onnxruntime import SCHEME, OnnxRuntime
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
    reaches = {norm.name: ChannelReach() for norm, _, _ in found}

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
    assert all(len(layers) == len(norm.users) for norm, layers, _ in norms(graph, anchors))


class PostNorm(nn.Module):
    """A norm that feeds two layers, one through a dropout, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.1)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.last = nn.LayerNorm(16)
        with torch.no_grad():
            self.norm.weight[3] *= 40

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.c(self.last(torch.tanh(self.a(x)) * self.b(self.drop(x)) + x))


def test_a_norm_with_other_readers_gets_a_multiplication_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = PostNorm(), torch.randn(8, 5, 16)
    graph, anchors = prepared(model, x)
    assert [norm.target for norm, _, _ in norms(graph, anchors)] == [torch.ops.aten.layer_norm.default]  # `last`
    expected = model(x)
    make_room(graph, anchors)
    assert torch.equal(graph(x), expected)
    found = norms(graph, anchors)
    assert [(ROOM in norm.meta, len(layers)) for norm, layers, _ in found] == [(True, 2), (False, 1)]
    make_room(graph, anchors)
    assert norms(graph, anchors) == found  # nothing more to do
    # The layers read it, so it is what becomes integers; the sum still reads the norm.
    placement = place(graph, SCHEME, include=("*",), exclude=())
    assert placement.anchors == anchors
    assert found[0][0].name in placement.tensors
    assert found[0][0].args[0].name not in placement.tensors
    reaches = {norm.name: ChannelReach() for norm, _, _ in found}
    with torch.no_grad():
        hidden = model.norm(x)
        reaches[found[0][0].name].update(hidden)
        reaches[found[1][0].name].update(torch.randn(9, 16))
    scales = migrate(graph, anchors, reaches, 0.5)
    assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5)
    weights = torch.cat([model.a.weight, model.b.weight]).detach().abs().amax(0)
    by_hand = (hidden.abs().amax((0, 1)) / weights).sqrt()
    assert torch.allclose(scales[found[0][0].name], by_hand, rtol=1e-5)
    assert torch.allclose(tensor_of(graph, found[0][0].args[1]), 1 / by_hand, rtol=1e-5)


def test_spread_is_migrated_by_the_norms_own_parameters_when_there_are_no_data() -> None:
    torch.manual_seed(0)
    model, x = PostNorm(), torch.randn(8, 5, 16)
    with torch.no_grad():
        model.norm.bias[5] = 9.0
    graph, anchors = prepared(model, x)
    expected = graph(x)
    found = migrate_without_data(graph, anchors)
    assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5)
    assert found == {norm.name for norm, _, _ in norms(graph, anchors)}
    (room,) = (norm for norm, _, _ in norms(graph, anchors) if ROOM in norm.meta)
    # What channels reach: four deviations of a normal variable, times the weight, and the bias.
    reach = torch.full((16,), 4.0)
    reach[3], reach[5] = 160.0, 13.0
    weights = torch.cat([model.a.weight, model.b.weight]).detach().abs().amax(0)
    by_hand = reach**MOST / weights ** (1 - MOST)
    assert torch.allclose(tensor_of(graph, room.args[1]), 1 / by_hand, rtol=1e-5)


def test_a_replayed_plan_migrates_to_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = PostNorm().eval(), [torch.randn(8, 5, 16)]
    step = QuantizeStatic(repairs=[Migrate(), CorrectBias()])
    task = Task(example_inputs=data[0], calibration=data)
    programs, ctx = [], Context(task=task, target=OnnxRuntime(), work=tmp_path, dense=model)
    plan = step.plan(model, ctx)
    for replay in (ctx, dataclasses.replace(ctx, memo={})):
        programs.append(step.apply(model, plan, replay))
    first, second = (program.state_dict() for program in programs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(programs[0](data[0]), programs[1](data[0]))
    ctx.target.export(programs[1], ctx.task, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert kinds.count("MatMul") + kinds.count("Gemm") == 0
