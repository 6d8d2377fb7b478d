"""Costs of changes against running the whole graph for each of them."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from pared.errors import ModelError
from pared.graph.capture import capture
from pared.metrics import resolve_metrics
from pared.quantize.program import prepare
from pared.sensitivity import CHUNK, Kept, costs, dependents, flat
from pared.task import Batch, Task, as_inputs
from zoo_models import ZOO


class Whole(fx.Interpreter):
    """The slow way: the whole graph with one node's value scaled."""

    def __init__(self, graph: fx.GraphModule, name: str, factor: float) -> None:
        super().__init__(graph)
        self.name, self.factor = name, factor

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value * self.factor if n.name == self.name else value


def coarse(x: Tensor) -> Tensor:
    return torch.round(x * 4) / 4


def graph_of(pattern: str) -> tuple[fx.GraphModule, Task]:
    model, example = ZOO[pattern]()
    task = Task(example_inputs=example, output="logits" if pattern == "dict_output" else None)
    return prepare(model, task, "test")[0], task


def batch_of(task: Task, size: int) -> Batch:
    torch.manual_seed(0)
    example = task.example_inputs
    like = {name: torch.randn(size, *x.shape[1:]) for name, x in example.tensors.items()}
    inputs = as_inputs(like) if example.kwargs else as_inputs(tuple(like.values()))
    return Batch(inputs, torch.randint(0, 5, (size,)))


def computed(graph: fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("pattern", ["residual_add", "attention_fused_qkv", "dict_output", "chunk_shuffle_concat"])
def test_replay_equals_a_whole_run_for_every_node(pattern: str) -> None:
    graph, task = graph_of(pattern)
    batch = batch_of(task, 3)
    with torch.no_grad():
        kept = Kept(graph, batch.inputs)
        for name in computed(graph):
            if not isinstance(kept.values.get(next(n for n in graph.graph.nodes if n.name == name)), torch.Tensor):
                continue
            changes = {name: lambda value, args: value * 1.5}
            found = task.pick(kept.replay(changes, dependents(graph, changes)))
            expected = task.pick(Whole(graph, name, 1.5).run(*flat(graph, batch.inputs)))
            assert torch.equal(found, expected), name
        again = task.pick(kept.replay({}, []))
        assert torch.equal(again, task.pick(kept.result))


def test_costs_are_those_of_the_outputs_and_labels() -> None:
    graph, task = graph_of("conv_bn_relu")
    batches = [batch_of(task, 5), batch_of(task, CHUNK + 2)]
    name = computed(graph)[0]
    metrics = resolve_metrics("accuracy")
    changes = {"all": {name: lambda value, args: value * -1}, "none": {}}
    found = costs(graph, batches, changes, task.pick, metrics=metrics, samples=100)
    with torch.no_grad():
        x = [batch.inputs for batch in batches]
        exact = torch.cat([fx.Interpreter(graph).run(*flat(graph, i)) for i in x]).numpy().astype(np.float64)
        rough = torch.cat([Whole(graph, name, -1.0).run(*flat(graph, i)) for i in x]).numpy().astype(np.float64)
    labels = torch.cat([batch.target for batch in batches]).numpy()
    sqnr = 10 * math.log10((exact**2).sum() / ((exact - rough) ** 2).sum())
    assert found["all"].agreement.sqnr_db == pytest.approx(sqnr, rel=1e-4)
    assert found["all"].metrics["accuracy"] == pytest.approx((rough.argmax(1) == labels).mean())
    assert found["none"].metrics["accuracy"] == pytest.approx((exact.argmax(1) == labels).mean())
    assert found["none"].agreement.sqnr_db is None
    assert found["all"].samples == found["none"].samples == 11


def test_costs_look_at_no_more_samples_than_asked_and_stop_at_the_deadline() -> None:
    graph, task = graph_of("conv_bn_relu")
    batches = [batch_of(task, 6)] * 4
    changes = {"none": {}}
    assert costs(graph, batches, changes, task.pick, samples=7)["none"].samples == 7
    late = costs(graph, batches, changes, task.pick, samples=24, deadline=time.monotonic() - 1)
    assert late["none"].samples == CHUNK


def test_costs_refuse_an_unknown_node_and_empty_data() -> None:
    graph, task = graph_of("conv_bn_relu")
    with pytest.raises(ModelError, match="no node 'conv9'"):
        costs(graph, [batch_of(task, 2)], {"a": {"conv9": lambda value, args: value}}, task.pick)
    with pytest.raises(ModelError, match="no data"):
        costs(graph, [], {"a": {}}, task.pick)


def test_only_what_depends_on_a_change_is_computed_again() -> None:
    graph, _ = graph_of("residual_add")
    last = computed(graph)[-1]
    assert [node.name for node in dependents(graph, [last])] == [last, "output"]
    assert isinstance(graph, nn.Module)


@pytest.mark.parametrize("changed", ["stem", "body.0", "down.0"])
def test_replay_equals_the_whole_model_with_one_output_changed(changed: str) -> None:
    model, inputs = ZOO["residual_add"]()
    graph: Any = capture(model, Task(example_inputs=inputs)).module(check_guards=False)
    before = [*graph.graph.nodes]
    x = as_inputs(torch.randn(3, 3, 8, 8))
    module = model.get_submodule(changed)
    with torch.no_grad(), torch.inference_mode(False):
        plain = module(*captured_input(model, module, x.args[0]))
        hook = module.register_forward_hook(lambda *call: coarse(call[-1]))
        expected = model(*x.args)
        hook.remove()
    run = Kept(graph, x)
    values = run.values
    node = next(
        node
        for node in before
        if isinstance(values.get(node), Tensor)
        and values[node].shape == plain.shape
        and torch.allclose(values[node], plain, atol=1e-6)
    )
    kept = {other: value.clone() for other, value in values.items() if isinstance(value, Tensor)}
    found = run.replay({node.name: lambda value, _: coarse(value)}, dependents(graph, [node.name]))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(*x.args))
    assert all(torch.equal(values[other], value) for other, value in kept.items())


def captured_input(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    given: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: given.append(args))
    model(x)
    hook.remove()
    return given[0]
