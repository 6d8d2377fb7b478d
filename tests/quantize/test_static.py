"""The step `QuantizeStatic` as a whole: its plan, its settings, what it leaves alone, and the program that it emits."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.errors import DataError, ModelError, PlanError, QuantizeError, SettingError
from pared.graph.capture import capture, operator
from pared.quantize import emission, static
from pared.quantize.program import own_tensors
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Inputs, Task, call
from zoo_models import ZOO


class Forward(nn.Module):
    """Modules and the function that joins them."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def context(model: nn.Module, data: list[Any], dry: bool = False) -> Context:
    task = Task(example_inputs=data[0], calibration=data)
    return Context(task=task, target=OnnxRuntime(), work=Path(), dense=model, dry=dry)


def quantized(model: nn.Module, data: list[Any], step: QuantizeStatic | None = None) -> tuple[fx.GraphModule, Plan]:
    model.eval()
    step = step or QuantizeStatic()
    ctx = context(model, data)
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    assert isinstance(program, fx.GraphModule)
    return program, plan


def random_data(inputs: Inputs, batches: int = 2, size: int = 4) -> list[Any]:
    def like(x: Tensor) -> Tensor:
        return torch.randn(size, *x.shape[1:])

    return [
        {name: like(x) for name, x in inputs.kwargs.items()} if inputs.kwargs else tuple(like(x) for x in inputs.args)
        for _ in range(batches)
    ]


@functools.cache
def example(name: str) -> tuple[nn.Module, list[Any], fx.GraphModule, Plan]:
    model, inputs = ZOO[name]()
    data = random_data(inputs)
    return model, data, *quantized(model, data)


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of 8 unsigned bits, worked out in numpy."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255))
    return scale, int(np.rint(-low / scale))


def to_integers(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    return np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255).astype(np.int64)


def weight_integers(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = (np.abs(weight).reshape(len(weight), -1).max(1) / 127).astype(np.float32).astype(np.float64)
    return np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int64), scales


@pytest.mark.filterwarnings("ignore:the last 3 of 7 calibration samples")
def test_program_equals_integer_arithmetic_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolution, ReLU and a linear layer, in integers throughout, as a chip would run them."""
    monkeypatch.setattr(static, "saturates_here", lambda: False)
    conv, linear = nn.Conv2d(2, 3, 3), nn.Linear(27, 4)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)
    data = [torch.randn(4, 2, 5, 5), torch.randn(3, 2, 5, 5)]
    program, _ = quantized(model, data, QuantizeStatic(repairs=(), weights={"cpu": "vnni"}))
    everything = torch.cat(data)
    hidden = torch.relu(conv(everything)).detach().numpy()
    x_scale, x_zero = affine(everything.min().item(), everything.max().item())
    h_scale, h_zero = affine(hidden.min(), hidden.max())
    assert h_zero == 0
    x = torch.randn(5, 2, 5, 5) * 1.5  # some values lie outside the calibrated range
    qx = to_integers(x.numpy(), x_scale, x_zero)
    qw, w_scale = weight_integers(conv.weight.detach().numpy())
    bias = np.rint(conv.bias.detach().numpy().astype(np.float64) / (x_scale * w_scale)).astype(np.int64)
    total = np.zeros((5, 3, 3, 3), np.int64)
    for n, o, i, j in np.ndindex(total.shape):
        total[n, o, i, j] = ((qx[n, :, i : i + 3, j : j + 3] - x_zero) * qw[o]).sum() + bias[o]
    real = total * (x_scale * w_scale).reshape(1, 3, 1, 1)
    steps = real / h_scale
    # Ties apart, float32 and exact arithmetic round alike.
    assert np.abs(steps % 1 - 0.5).min() > 1e-5
    qh = np.clip(np.rint(steps), 0, 255).astype(np.int64).reshape(5, -1)
    qw2, w2_scale = weight_integers(linear.weight.detach().numpy())
    bias2 = np.rint(linear.bias.detach().numpy().astype(np.float64) / (h_scale * w2_scale)).astype(np.int64)
    expected = (qh @ qw2.T + bias2) * (h_scale * w2_scale)
    found = program(x).detach().numpy()
    # What is left is the float32 sum of 28 products of dequantized numbers.
    assert np.abs(found - expected).max() <= 28 * 2.0**-23 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.1


CLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "clamp_below": lambda x: x.clamp(min=-0.25),
    "clamp_above": lambda x: x.clamp(max=0.5),
    "clamp_away_from_zero": lambda x: x.clamp(0.25, 2),
    "clamp_by_tensors": lambda x: torch.clamp(x, min=torch.tensor([-0.1, -1.0, 0.0]).reshape(3, 1, 1)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_program_is_the_same_when_clips_stay_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = CLIPS[name]
    model = Forward(lambda s, x: s.b(clip(s.a(x))), a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 3, 1, bias=False))
    nn.init.dirac_(model.b.weight)
    low, high = clip(torch.full((1, 3, 1, 1), -9.0)).max().item(), clip(torch.full((1, 3, 1, 1), 9.0)).min().item()
    if name in {"relu", "relu6", "clamp_below", "clamp_above"}:
        low, high = -math.inf, math.inf
    data = [torch.randn(4, 3, 6, 6) * 2]
    without, _ = quantized(model, data)
    monkeypatch.setattr(emission, "drop_implied_clips", lambda *_: None)
    with_clips, _ = quantized(model, data)

    def clips(program: fx.GraphModule) -> int:
        names = {"aten.relu", "aten.relu6", "aten.hardtanh", "aten.clamp"}
        return sum(operator(node) in names for node in program.graph.nodes)

    assert clips(with_clips) == 1
    # Quantization cannot stand for the last two: a range always holds 0, and is the same for every channel.
    assert clips(without) == (1 if name in {"clamp_away_from_zero", "clamp_by_tensors"} else 0)
    for size in (0.1, 1.0, 100.0):
        x = torch.randn(20, 3, 6, 6) * size
        difference = (without(x) - with_clips(x)).abs().max().item()
        # A range between two bounds may put them half-way between two integers: then either is as near. The layer
        # behind passes the quantum on, and may round it to two of its own.
        assert difference <= (2 * (high - low) / 255 * 1.001 if math.isfinite(high - low) else 0)


@pytest.mark.parametrize("name", ["residual_add", "tied_weights", "module_with_two_names", "attention_fused_qkv"])
def test_program_holds_integers_and_scales_where_float_weights_were(name: str) -> None:
    model, _, program, plan = example(name)
    state = program.state_dict()
    anchors = [edit.detail["node"] for edit in plan.edits]
    nodes = {node.name: node for node in program.graph.nodes}
    for key, tensor in state.items():
        if key.endswith("_scale"):
            assert tensor.dtype == torch.float32
            assert tensor.ndim == 1
        elif key.split("_weight")[0] in anchors and not key.endswith("zero_point"):
            assert tensor.dtype == torch.int8
        elif key.removesuffix("_bias") in anchors:
            # Only what takes its bias into the accumulator has it in integers: no linear layer over sequences.
            layer = nodes[key.removesuffix("_bias")]
            sequences = operator(layer) == "aten.linear" and layer.meta["val"].ndim > 2
            assert tensor.dtype == (torch.float32 if sequences else torch.int32)
    quantized_weights = {edit.detail["weight"] for edit in plan.edits}
    assert not quantized_weights & set(state)
    kept = {key: tensor for key, tensor in state.items() if tensor.is_floating_point() and not key.endswith("_scale")}
    largest = max(parameter.numel() for parameter in model.parameters())
    assert all(tensor.numel() < largest for tensor in kept.values()), "a float weight is left"


@pytest.mark.parametrize(("name", "layers", "tensors"), [("tied_weights", 4, 3), ("module_with_two_names", 4, 3)])
def test_program_stores_one_integer_tensor_when_layers_share_a_weight(name: str, layers: int, tensors: int) -> None:
    _, _, program, plan = example(name)
    assert len(plan.edits) == layers
    assert sum(tensor.dtype == torch.int8 for tensor in program.state_dict().values()) == tensors


@pytest.mark.parametrize("name", ["residual_add", "squeeze_excite", "attention_fused_qkv", "dict_output", "lstm"])
def test_program_is_near_the_model(name: str) -> None:
    model, data, program, _ = example(name)
    inputs = Task(example_inputs=data[0]).example_inputs
    with torch.no_grad():
        expected, found = call(model, inputs), call(program, inputs)
    if isinstance(expected, dict):
        assert expected.keys() == found.keys()
        expected, found = expected["logits"], found["logits"]
    # 8 bits leave some 0.4 % of a range an operator; a wrong scale, axis or zero point leaves nothing of the output.
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


def test_step_leaves_the_callers_model_alone_and_the_program_the_caller() -> None:
    model, inputs = ZOO["residual_add"]()
    model.register_buffer("unused", torch.ones(2))
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = {name: id(tensor) for name, tensor in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    data = random_data(inputs)
    step, ctx = QuantizeStatic(), context(model, data)
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == identities
    assert [module.training for module in model.modules()] == modes
    before = program(*data[0])
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert torch.equal(program(*data[0]), before)


def test_program_keeps_its_constants_when_the_caller_changes_a_plain_tensor() -> None:
    model = Forward(lambda s, x: s.a(x) * s.factor, a=nn.Linear(4, 3))
    model.factor = torch.tensor([1.0, 2.0, 3.0])
    data = [torch.randn(4, 4)]
    program, _ = quantized(model, data)
    before = program(data[0])
    model.factor.zero_()
    assert torch.equal(program(data[0]), before)


def test_plan_is_deterministic_and_survives_json() -> None:
    model, data, program, plan = example("residual_add")
    again = QuantizeStatic().plan(model, context(model, data))
    assert again == plan
    copied = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert copied.to_json() == plan.to_json()
    # Without what `plan` left in memory: `apply` rests on the plan alone.
    replayed = QuantizeStatic().apply(model, copied, context(model, data))
    found, expected = replayed.state_dict(), program.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(replayed(*data[0]), program(*data[0]))


def test_apply_uses_the_ranges_of_the_plan_and_no_data() -> None:
    model, inputs = ZOO["mlp"]()
    data = random_data(inputs)
    program, plan = quantized(model, data)
    wide = {name: [low * 4, high * 4] for name, (low, high) in plan.facts["ranges"].items()}
    other = Plan(step=plan.step, edits=plan.edits, skips=plan.skips, facts={**plan.facts, "ranges": wide})
    changed = QuantizeStatic().apply(model, other, context(model, [torch.full((2, 12), 1.0)]))
    assert not torch.equal(changed(*data[0]), program(*data[0]))


def test_apply_refuses_when_the_plan_lacks_a_range() -> None:
    model, inputs = ZOO["mlp"]()
    _, plan = quantized(model, random_data(inputs))
    lost = Plan(step=plan.step, edits=plan.edits, facts={**plan.facts, "ranges": {}})
    with pytest.raises(QuantizeError, match=r"no range for .*plan again"):
        QuantizeStatic().apply(model, lost, context(model, random_data(inputs)))


def test_dry_plan_reads_no_data_and_says_that_it_estimates() -> None:
    model, inputs = ZOO["mlp"]()
    data = random_data(inputs)
    dry = QuantizeStatic().plan(model, context(model, data, dry=True))
    full = QuantizeStatic().plan(model, context(model, data))
    assert (dry.estimate, full.estimate) == (True, False)
    assert (dry.edits, dry.skips) == (full.edits, full.skips)
    assert dry.facts["ranges"] == {}


SETTINGS: dict[str, dict[str, Any]] = {
    "ranges": {"ranges": {"kind": "percentile", "percentile": 95}},
    "include": {"include": ["0", "2"]},
    "exclude": {"exclude": ["4"]},
    "samples": {"samples": 2},
    "bits": {"weights": {"bits": 5}},
    "granularity": {"weights": {"granularity": "tensor"}},
    "symmetric": {"weights": {"granularity": "tensor", "symmetric": False}},
    "stochastic": {"weights": {"rounding": "stochastic"}},
    "adaround": {"weights": {"rounding": "adaround"}},
    "activation bits": {"activations": {"bits": 6}},
    "activation symmetric": {"activations": {"symmetric": True}},
    "no repairs": {"repairs": ()},
    "full correction": {"repairs": [{"kind": "correct_bias", "method": "full"}]},
    "equalize": {"repairs": ["equalize", "correct_bias"]},
}


class Normed(nn.Module):
    """A layer norm before two linear layers with a ReLU between them: both repairs change the first of these."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(self.norm(x))))
        return y


def test_the_order_of_repairs_makes_no_difference_and_replays_to_the_same_bits() -> None:
    torch.manual_seed(0)
    model, data = Normed().eval(), [torch.randn(32, 12) * torch.logspace(-1, 1, 12)]
    programs = []
    for repairs in (["equalize", "migrate"], ["migrate", "equalize"]):
        step = QuantizeStatic(repairs=repairs)
        program, plan = quantized(model, data, step)
        assert plan.facts["equalized"] and plan.facts["migrated"]
        programs += [program, step.apply(model, Plan.from_json(plan.to_json()), context(model, data))]
    states = [program.state_dict() for program in programs]
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in states[0])


def test_layers_wider_than_adaround_takes_are_rounded_to_nearest() -> None:
    model, data, _, _ = example("mlp")
    wide = {"kind": "adaround", "widest": 12}
    _, plan = quantized(model, data, QuantizeStatic(weights={"rounding": wide}))
    assert {edit.detail["node"]: edit.module for edit in plan.edits}.keys() - plan.facts["up"].keys() == {"linear_1"}
    assert plan.facts["corrections"].keys() == {"linear", "linear_1", "linear_2"}


@pytest.mark.parametrize("name", SETTINGS)
def test_step_has_no_dead_setting(name: str) -> None:
    model, data, program, plan = example("mlp")
    other, changed = quantized(model, data, QuantizeStatic(**SETTINGS[name]))
    assert changed.settings != plan.settings
    # How activations are coded follows from the settings alone; everything else is decided, and stands in the facts.
    if "activations" not in SETTINGS[name]:
        assert (changed.edits, changed.facts) != (plan.edits, plan.facts)
    assert not torch.equal(other(*data[0]), program(*data[0]))


WRONG: list[dict[str, Any]] = [
    {"range": "minmax"},
    {"ranges": "entropy"},
    {"samples": 0},
    {"include": 3},
    {"weights": {"bits": 9}},
    {"activations": {"bits": 1}},
    {"weights": {"rounding": "up"}},
    {"repairs": ["equalise"]},
    {"repairs": ["equalize", "equalize"]},
    {"weights": {"cpu": "avx2"}},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_step_refuses_when_a_setting_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="QuantizeStatic"):
        QuantizeStatic(**wrong)


def test_plan_stops_at_the_sample_limit() -> None:
    model, inputs = ZOO["mlp"]()
    plan = QuantizeStatic(samples=5).plan(model, context(model, random_data(inputs, batches=3)))
    assert plan.facts["samples"] == 5


def test_plan_refuses_when_nothing_would_be_quantized() -> None:
    with pytest.raises(PlanError, match="no layer: the model has none"):
        quantized(nn.Sequential(nn.ReLU()), [torch.randn(2, 3)])
    model = Forward(lambda s, ids: s.table(ids), table=nn.Embedding(5, 3))
    with pytest.raises(PlanError, match=r"no layer \(table: aten.embedding does not run in integers here\)"):
        quantized(model, [torch.randint(0, 5, (2, 3))])


def test_plan_refuses_when_the_model_is_quantized_already() -> None:
    _, data, program, _ = example("mlp")
    with pytest.raises(PlanError, match="quantized already"):
        QuantizeStatic().plan(program, context(program, data))


def test_plan_refuses_when_calibration_data_are_identical_or_absent() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(DataError, match="identical"):
        quantized(model, [torch.ones(8, 4)])
    ctx = context(model, [torch.ones(8, 4)])
    ctx.task.calibration = []
    with pytest.raises(DataError, match="calibration data is empty"):
        QuantizeStatic().plan(model, ctx)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_names_the_parameter_when_it_is_not_finite(bad: float) -> None:
    model, inputs = ZOO["mlp"]()
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    with pytest.raises(ModelError, match=r"the parameter 2.weight holds NaN or infinity"):
        quantized(model, random_data(inputs))


def test_own_tensors_keeps_shared_tensors_shared() -> None:
    model, inputs = ZOO["tied_weights"]()
    graph = capture(model, Task(example_inputs=inputs)).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    before = len({id(tensor) for tensor in graph.parameters()})
    own_tensors(graph)
    assert len({id(tensor) for tensor in graph.parameters()}) == before
    theirs = {tensor.data_ptr() for tensor in model.parameters()}
    assert not theirs & {tensor.data_ptr() for tensor in graph.parameters()}


@pytest.mark.parametrize(
    ("cpu", "here", "safe"), [("here", False, False), ("here", True, True), ("here", None, True), ("any", False, True)]
)
def test_weights_saturate_nowhere_when_the_processor_or_the_user_asks(
    monkeypatch: pytest.MonkeyPatch, cpu: Any, here: bool | None, safe: bool
) -> None:
    monkeypatch.setattr(static, "saturates_here", lambda: here)
    model, step = nn.Sequential(nn.Linear(32, 8)).eval(), QuantizeStatic(weights={"cpu": cpu})
    ctx = context(model, [torch.randn(8, 32)])
    plan = step.plan(model, ctx)
    assert plan.facts["any_cpu"] is safe
    # Another machine makes the same program of the plan.
    monkeypatch.setattr(static, "saturates_here", lambda: not here)
    ctx.memo.clear()
    program = step.apply(model, plan, ctx)
    weight = next(tensor for tensor in program.buffers() if tensor.dtype == torch.int8).int()
    pairs = weight.reshape(8, 16, 2)
    worst = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1)).max() * 255
    assert bool(worst < 2**15) is safe
