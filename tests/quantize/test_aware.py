"""Quantization-aware training: the graph against written-out float and quantized networks, and the step end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pared
from pared.errors import PlanError, SettingError
from pared.graph.capture import operator
from pared.quantize.aware import AwareTraining
from pared.quantize.aware_layers import Activation, Freezable
from pared.step import Context, Edit, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task
from zoo_models import ZOO, make

EIGHT = pared.QuantizeAware()
USUAL = ("residual_add", "attention_fused_qkv", "tied_weights", "squeeze_excite", "frozen_parameters")


pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    """Convolution, norm, in-place ReLU, dropout, and a linear layer; statistics that differ from those of its data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 4)
    )
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.normal_()
        model[1].bias.normal_()
    return model.eval()


def task_of(example: Tensor, **changes: Any) -> Task:
    torch.manual_seed(1)
    data = [(torch.randn(8, *example.shape[1:]), torch.randint(0, 4, (8,))) for _ in range(3)]
    given = {"example_inputs": (example,), "train": data, "loss": nn.CrossEntropyLoss()}
    return Task(**given | changes)


IMAGES = torch.zeros(1, 3, 6, 6)


def context(model: nn.Module, tmp_path: Path, task: Task | None = None, **changes: Any) -> Context:
    given = {"task": task or task_of(IMAGES), "target": OnnxRuntime(), "work": tmp_path, "dense": model}
    return Context(**given | changes)


def started(aware: pared.QuantizeAware, model: nn.Module, ctx: Context) -> tuple[AwareTraining, nn.Module]:
    """A training that has begun, and the graph that it trains."""
    training = aware.callback(aware.plan(model, ctx), ctx)
    assert isinstance(training, AwareTraining)
    graph = training.on_start(model)
    training.on_epoch_start(graph, 0, 4)
    return training, graph


def trained(step: pared.Train, model: nn.Module, ctx: Context) -> nn.Module:
    return step.apply(model, step.plan(model, ctx), ctx)


@pytest.fixture
def float_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake quantization that changes nothing: what is left must be the float network, to rounding."""
    same: Callable[..., Tensor] = lambda x, scale, zero_point, numbers: x  # noqa: E731
    monkeypatch.setattr("pared.quantize.aware_layers.fake_quantize_trained", same)


@pytest.mark.usefixtures("float_graph")
@pytest.mark.parametrize(
    "pattern",
    ["net", *(name if name in USUAL else pytest.param(name, marks=pytest.mark.contract) for name in ZOO)],
)
def test_graph_computes_and_trains_what_the_model_does_when_nothing_is_rounded(pattern: str, tmp_path: Path) -> None:
    model, inputs = (net(), None) if pattern == "net" else make(pattern)
    example = (torch.randn(4, 3, 6, 6),) if inputs is None else inputs
    task = Task(example_inputs=example, calibration=[example] if inputs is None else [inputs])
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    twin = make(pattern)[0] if inputs is not None else net()
    for dropout in (module for module in twin.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    x = task.example_inputs
    double = type(x)(
        tuple(torch.cat([v, v * 0.5]) if v.is_floating_point() else torch.cat([v, v]) for v in x.args),
        {k: torch.cat([v, v * 0.5]) if v.is_floating_point() else torch.cat([v, v]) for k, v in x.kwargs.items()},
    )
    training, graph = started(EIGHT, model, context(model, tmp_path, task))
    for mode in (False, True):
        graph.train(mode)
        twin.train(mode)
        ours, theirs = (torch.utils._pytree.tree_leaves(m(*double.args, **double.kwargs)) for m in (graph, twin))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for outputs in (ours, theirs):
        total = torch.stack([leaf.square().sum() for leaf in outputs]).sum()
        if total.requires_grad:  # the twin of a frozen model has nothing to train; the graph has its scales
            total.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            # What a norm takes out again (a bias before it) has a gradient of 0, up to rounding.
            scale = float(other.grad.abs().max())
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-2, atol=1e-3 * scale + 1e-4, msg=name)
    training.on_end(graph)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-5, msg=name)


def test_graph_and_program_compute_the_same_when_norms_are_frozen(tmp_path: Path) -> None:
    model = net()
    training, graph = started(EIGHT, model, context(model, tmp_path))
    training.on_epoch_start(graph, 3, 4)
    graph.train()
    graph.get_submodule("free_dropout").p = 0.0  # type: ignore[assignment]
    x = torch.randn(16, 3, 6, 6)
    simulated = graph(x).detach()
    assert not torch.equal(simulated, graph(x + 0.5).detach())
    program = training.on_end(graph)
    found = program(x)
    # Biases are integers in the program, of 1 / 2**16 or less of a step each; a step is 1 / 255 of the range.
    assert float((simulated - found.detach()).norm() / found.detach().norm()) < 0.01


def test_batch_norm_behind_a_quantized_weight_is_written_out(tmp_path: Path) -> None:
    """Krishnamoorthi's graph, by hand: quantize the folded weight, take the folding back, then norm by the batch."""
    model = net()
    _, graph = started(pared.QuantizeAware(scales="follow", weight_bits=4), model, context(model, tmp_path))
    layer = graph.get_submodule("quantized_conv2d")
    layer.train()
    x = torch.randn(8, 3, 6, 6)
    conv, norm = model[0], model[1]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    factor = (norm.weight / torch.sqrt(var + norm.eps)).reshape(-1, 1, 1, 1)
    folded = conv.weight * factor
    scale = folded.abs().amax((1, 2, 3), keepdim=True) / 7
    rounded = (folded / scale).round().clamp(-7, 7) * scale
    between = F.conv2d(x, rounded / factor, conv.bias)
    expected = F.batch_norm(between, mean, var, norm.weight, norm.bias, training=True)
    found = layer(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


def test_dropout_and_norms_follow_the_modes_until_frozen(tmp_path: Path) -> None:
    model = net()
    training, graph = started(EIGHT, model, context(model, tmp_path))
    x = torch.randn(8, 3, 6, 6)
    graph.eval()
    assert torch.equal(graph(x), graph(x))
    before = model[1].running_mean.clone()
    graph.train()
    assert not torch.equal(graph(x), graph(x))
    assert not torch.equal(model[1].running_mean, before)
    training.on_epoch_start(graph, 3, 4)
    frozen = model[1].running_mean.clone()
    graph(x)
    assert torch.equal(model[1].running_mean, frozen)
    assert all(m.frozen for m in graph.modules() if isinstance(m, Freezable))


def test_plan_refuses_a_norm_that_averages_over_all_batches(tmp_path: Path) -> None:
    model = net()
    model[1].momentum = None
    with pytest.raises(PlanError, match=r"'1' has momentum=None, .* give it a momentum"):
        EIGHT.plan(model, context(model, tmp_path))


class Overwriting(nn.Module):
    """Operators that write into their argument, and each way to say dropout."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.drop, self.head = nn.Conv2d(3, 6, 3), drop, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.conv(x), inplace=True)).mean((2, 3))
        return self.head(x if isinstance(self.drop, nn.Dropout2d) else F.dropout(x, 0.25, self.training))


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_dropout_is_found_when_operators_write_into_their_argument(drop: nn.Module, tmp_path: Path) -> None:
    model = Overwriting(drop).eval()
    training, graph = started(EIGHT, model, context(model, tmp_path))
    kinds = [type(drop), *([nn.Dropout] if isinstance(drop, nn.Dropout) else [])]
    found = [module for module in graph.modules() if isinstance(module, (nn.Dropout, nn.Dropout2d))]
    assert [(type(module), module.p) for module in found] == list(zip(kinds, [0.5, 0.25], strict=False))
    x = torch.randn(8, 3, 6, 6)
    graph.eval()
    assert torch.equal(graph(x), graph(x))
    graph.train()
    assert not torch.equal(graph(x), graph(x))
    program = training.on_end(graph)
    assert torch.equal(program(x), program(x))


def test_range_follows_the_data_only_where_asked_and_not_frozen() -> None:
    numbers = pared.QuantizeAware().activations().grid(OnnxRuntime().scheme)
    follow = Activation(0.0, 1.0, numbers, symmetric=False, learned=False).train()
    follow(torch.tensor([-1.0, 3.0]))
    assert follow.ends.tolist() == pytest.approx([-0.01, 1.02])
    follow.frozen = True
    follow(torch.tensor([-9.0, 9.0]))
    assert follow.ends.tolist() == pytest.approx([-0.01, 1.02])
    learned = Activation(0.0, 1.0, numbers, symmetric=False, learned=True).train()
    learned(torch.tensor([0.0, 3.0], requires_grad=True)).sum().backward()
    assert learned.ends.tolist() == [0.0, 1.0]
    # Above the range a value stands for its end, 255 steps of scale exp(log): its derivative by the log is the end.
    assert learned.log is not None and learned.log.grad is not None
    assert learned.log.grad.item() == pytest.approx(1.0)


def test_scale_goes_where_the_error_is_least_when_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096)
    numbers = pared.QuantizeAware(activation_bits=2).activations().grid(OnnxRuntime().scheme)
    part = Activation(0.0, 12.0, numbers, symmetric=False, learned=True)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.5)
    data = x.abs()
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(part(data), data).backward()
        optimizer.step()
    reached = float(F.mse_loss(part(data), data).detach())

    def error(scale: float) -> float:
        return float(((data / scale).round().clamp(0, 3) * scale - data).square().mean())

    assert reached <= 1.02 * min(error(0.2 + 0.01 * step) for step in range(100))


def test_training_lowers_the_loss_of_few_bits_and_leaves_the_float_model_beside(tmp_path: Path) -> None:
    model, task = net(), task_of(IMAGES)
    ctx = context(model, tmp_path, task)
    step = pared.Train(epochs=8, lr=0.1, during=[pared.QuantizeAware(weight_bits=3, activation_bits=3)])
    program = trained(step, model, ctx)
    one = trained(dataclasses.replace(step, epochs=1, lr=1e-9), model, context(model, tmp_path / "b", task))

    def loss(of: nn.Module) -> float:
        with torch.no_grad():
            return float(sum(F.cross_entropy(of(x), y) for x, y in task.train) / 3)

    assert isinstance(program, fx.GraphModule)
    assert loss(program) < 0.5 * loss(one)
    floating = ctx.memo["floating"]
    assert [name for name, _ in floating.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not torch.equal(floating[0].weight, model[0].weight)
    assert type(floating) is type(model) and not floating.training
    assert floating[2].inplace and model[2].inplace


def test_a_finished_training_is_not_repeated_when_it_is_applied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a resumed run does with a finished stage: the checkpoint in its work folder is all of the training.
    model, ctx = net(), context(net(), tmp_path)
    step = pared.Train(epochs=2, lr=0.05, during=[EIGHT])
    plan = step.plan(model, ctx)
    first = step.apply(model, plan, ctx)
    trained_on = ctx.memo["floating"].state_dict()

    def no_epoch(*_: Any) -> None:
        raise AssertionError("it trained again")

    monkeypatch.setattr("pared.train.loop.Loop.train_epoch", no_epoch)
    again_ctx = context(net(), tmp_path)
    again = step.apply(model, Plan.from_json(plan.to_json()), again_ctx)
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(first(x), again(x))
    for name, tensor in again_ctx.memo["floating"].state_dict().items():
        assert torch.equal(tensor, trained_on[name]), name


def test_bits_are_those_of_each_layer_in_the_program(tmp_path: Path) -> None:
    model = net()
    ctx = context(model, tmp_path)
    aware = pared.QuantizeAware(weight_bits=4, activation_bits=5, layer_bits={"5": 3, "*": 8})
    step = pared.Train(epochs=1, during=[aware])
    plan = step.plan(model, ctx)
    assert {edit.module: edit.detail["bits"] for edit in plan.edits} == {"0": 8, "5": 3}
    program = step.apply(model, plan, ctx)
    highest = {
        name: int(tensor.abs().max()) for name, tensor in program.named_parameters() if tensor.dtype == torch.int8
    } | {name: int(tensor.abs().max()) for name, tensor in program.named_buffers() if tensor.dtype == torch.int8}
    assert sorted(highest.values())[0] <= 3 and sorted(highest.values())[1] > 7
    ends = [n.args[4] for n in program.graph.nodes if operator(n) == "quantized_decomposed.quantize_per_tensor"]
    assert ends == [255, 7, 7]  # the input of the convolution; that of the linear layer, before and after flattening
    # The first pattern that matches counts; a pattern that matches nothing is a mistake.
    with pytest.raises(PlanError, match=r"layer_bits='head' matches no layer"):
        pared.QuantizeAware(layer_bits={"head": 4}).plan(model, ctx)


def test_ranges_come_from_post_training_quantization_when_the_recipe_had_it(tmp_path: Path) -> None:
    model = net()
    ctx = context(model, tmp_path)
    first = EIGHT.plan(model, ctx)
    assert first.facts["start"] == "calibration"
    ranges = {name: [low * 2, high * 2] for name, (low, high) in first.facts["ranges"].items()}
    done = Plan("QuantizeStatic", edits=(Edit("quantize", "0"),), facts={"ranges": ranges})
    ctx = context(model, tmp_path, history=(done,), floating=model)
    step = pared.Train(epochs=1, during=[EIGHT])
    plan = step.plan(nn.Identity(), ctx)  # the program: what trains is what it was made of
    assert plan.facts["during"][0]["facts"]["start"] == "post-training"
    assert plan.facts["during"][0]["facts"]["ranges"] == ranges
    assert not step.trains
    assert plan.facts["folded"] == ["1"]  # what the report's table of layers looks for
    # Repairs that changed the weights changed the ranges with them.
    moved = dataclasses.replace(done, facts={"ranges": ranges, "equalized": {"conv2d": 1}})
    assert EIGHT.plan(model, context(model, tmp_path, history=(moved,))).facts["start"] == "calibration"
    with pytest.raises(PlanError, match="move Train before the step that quantizes"):
        pared.Train().plan(nn.Identity(), ctx)


def test_masked_weights_stay_zero_in_the_program(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:, 1] = 0.0
        model[5].weight[2] = 0.0
    edits = (Edit("mask", "0", {"tensor": "weight"}), Edit("mask", "5", {"tensor": "weight"}))
    ctx = context(model, tmp_path, history=(Plan("PruneWeights", edits=edits),))
    program = trained(pared.Train(epochs=2, lr=0.1, during=[EIGHT]), model, ctx)
    integers = [tensor for tensor in program.state_dict().values() if tensor.dtype == torch.int8]
    conv, linear = (next(t for t in integers if t.ndim == ndim) for ndim in (4, 2))
    assert not conv[:, 1].any() and conv[:, 0].any()
    assert not linear[2].any() and linear[1].any()


def test_weights_stay_within_7_bits_when_the_file_must_suit_any_cpu(tmp_path: Path) -> None:
    model = net()
    ctx = context(model, tmp_path)
    step = pared.Train(epochs=1, during=[pared.QuantizeAware(cpu="any")])
    assert {edit.detail["bits"] for edit in step.plan(model, ctx).edits} == {7}
    program = trained(step, model, ctx)
    integers = [tensor for tensor in program.state_dict().values() if tensor.dtype == torch.int8]
    assert len(integers) == 2 and all(int(tensor.abs().max()) <= 63 for tensor in integers)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"weight_bits": 9}, "weight_bits"),
        ({"activation_bits": 1}, "activation_bits"),
        ({"layer_bits": {"0": 1}}, "layer_bits"),
        ({"scales": "fixed"}, "'learned' or 'follow'"),
        ({"ranges": "auto"}, "auto measures fixed ranges"),
        ({"weight_bit": 4}, "did you mean 'weight_bits'"),
    ],
)
def test_settings_are_refused_when_wrong(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        pared.QuantizeAware(**wrong)


def test_plan_refuses_when_nothing_would_be_quantized(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(PlanError, match="QuantizeAware would quantize no layer"):
        EIGHT.plan(model, context(model, tmp_path))


def test_dry_plan_reads_no_data(tmp_path: Path) -> None:
    model = net()
    plan = pared.Train(during=[EIGHT]).plan(model, context(model, tmp_path, dry=True))
    assert plan.estimate and plan.changed == ("0", "5")
    assert plan.facts["during"][0]["facts"]["ranges"] == {}
