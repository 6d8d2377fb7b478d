"""What every step promises, on every pattern of model. A new step joins by one line in `contract_cases.py`.

The default run takes a covering set of (step, pattern); `make contract` takes all of them.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import pared
from contract_cases import BY_NAME, CASES, Case, batch_of, model_and_task
from pared.errors import PlanError, SettingError
from pared.recipe import DURING, STEPS
from pared.step import Context, Plan, settings_of
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task, call
from zoo_models import ZOO

# Patterns that a step has nothing to do on, with what it says of them.
REFUSED = {
    ("Train", "frozen_parameters"): "no parameter requires a gradient",
    ("Distill", "frozen_parameters"): "no parameter requires a gradient",
    ("Slim", "frozen_parameters"): "no parameter requires a gradient",
    **{
        ("Slim", pattern): r"no batch norm to slim \(the model has none\)"
        for pattern in ("mlp", "attention_fused_qkv", "multihead_attention", "lstm", "tied_weights")
    },
    ("PruneChannels", "dict_output"): "body.0: its channels are the model's output",
    ("PruneChannels", "multihead_attention"): "attention: nn.MultiheadAttention is as wide as its input",
}
# Settings that measure, and change nothing by themselves.
MEASURES = {("QuantizeStatic", "sensitivity")}
# Between them, these have every kind of layer, sharing and form of inputs and outputs.
COVERING = {
    "Train": ["residual_add", "tied_weights", "module_with_two_names", "dict_output"],
    "QuantizeStatic": [
        "residual_add",
        "attention_fused_qkv",
        "tied_weights",
        "lstm",
        "unused_parameter",
        "dict_output",
    ],
    "CastHalf": ["multihead_attention", "tied_weights", "chunk_shuffle_concat", "lstm"],
    "QuantizeWeights": ["attention_fused_qkv", "tied_weights", "grouped", "lstm"],
    "QuantizeDynamic": ["attention_fused_qkv", "tied_weights", "lstm"],
    "QuantizeAware": ["residual_add", "tied_weights", "dict_output"],
    "Distill": ["residual_add", "tied_weights", "dict_output"],
    "Slim": ["residual_add", "grouped"],
    "PruneChannels": [
        "residual_add",
        "attention_fused_qkv",
        "lstm",
        "tied_weights",
    ],
}
SHIPPED = {
    "Train": ["tied_weights"],
    "QuantizeStatic": ["module_with_two_names", "dict_output"],
    "CastHalf": ["tied_weights"],
    "QuantizeWeights": ["tied_weights"],
    "QuantizeDynamic": ["tied_weights"],
    "QuantizeAware": ["module_with_two_names"],
    "Distill": ["tied_weights"],
    "Slim": ["depthwise"],
    "PruneChannels": ["residual_add"],
}


def product(covering: dict[str, list[str]]) -> list[Any]:
    """Every (case, pattern); those outside the covering set only for `make contract`."""
    pairs = []
    for case in CASES:
        for pattern in ZOO:
            if (case.name, pattern) not in REFUSED:
                marks = () if pattern in covering.get(case.name, [pattern]) else pytest.mark.contract
                pairs.append(pytest.param(case, pattern, id=f"{case.name}-{pattern}", marks=marks))
    return pairs


def context(model: nn.Module, task: Task, work: Path, **changes: Any) -> Context:
    return Context(task=task, target=OnnxRuntime(), work=work, dense=model, **changes)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every tensor of a model, to the bit, with its type, layout and flags."""
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.requires_grad,
            tensor.grad is None,
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"",
        )
        for name, tensor in tensors(model).items()
    }


def everything(model: nn.Module, task: Task) -> dict[str, Any]:
    """All that a step must leave as it found it."""
    cudnn = torch.backends.cudnn
    return {
        "tensors": bits(model),
        "identities": {name: id(tensor) for name, tensor in tensors(model).items()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "inputs": [array.tobytes() for array in task.example_inputs.arrays()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "flags": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "printing": str(torch.tensor(1 / 3)),
    }


def outputs(model: nn.Module, task: Task, size: int = 3, seed: int = 9) -> Tensor:
    was = model.training
    if not isinstance(model, fx.GraphModule):
        model.eval()
    with torch.no_grad():
        found = task.pick(call(model, batch_of(task.example_inputs, size, seed)))
    if not isinstance(model, fx.GraphModule):
        model.train(was)
    return found


def run(case: Case, model: nn.Module, task: Task, work: Path) -> tuple[Plan, nn.Module]:
    ctx = context(model, task, work)
    plan = case.step.plan(model, ctx)
    return plan, case.step.apply(model, plan, ctx)


def test_every_step_of_the_recipe_is_in_the_suite_with_every_setting() -> None:
    assert BY_NAME.keys() == STEPS.keys() | DURING.keys()
    for case in CASES:
        assert case.others.keys() == {field.name for field in dataclasses.fields(case.part)}


@pytest.mark.parametrize(("case", "pattern"), product(COVERING))
def test_step_changes_nothing_of_the_callers_when_planned_and_applied(case: Case, pattern: str, tmp_path: Path) -> None:
    for training in (False, True):
        model, task = model_and_task(pattern)
        model.train(training)
        ctx, before = context(model, task, tmp_path / str(training)), everything(model, task)
        plan = case.step.plan(model, ctx)
        assert everything(model, task) == before
        changed = case.step.apply(model, plan, ctx)
        assert everything(model, task) == before
        assert changed is not model
        own = {id(tensor) for tensor in tensors(model).values()} & {id(tensor) for tensor in tensors(changed).values()}
        assert own == set()
        with torch.no_grad():  # nor may they share memory
            for tensor in tensors(model).values():
                tensor.zero_()
        assert any(bool(tensor.any()) for tensor in tensors(changed).values())


@pytest.mark.parametrize(("case", "pattern"), product(COVERING))
def test_plan_is_json_and_deterministic_and_replaying_it_gives_the_same_bits(
    case: Case, pattern: str, tmp_path: Path
) -> None:
    model, task = model_and_task(pattern)
    torch.manual_seed(1)
    plan, changed = run(case, model, task, tmp_path / "a")
    torch.manual_seed(2)
    again, other = model_and_task(pattern)
    assert case.step.plan(again, context(again, other, tmp_path / "b")) == plan
    text = json.dumps(plan.to_json(), allow_nan=False)
    read = Plan.from_json(json.loads(text))
    assert read == plan
    assert json.dumps(read.to_json()) == text
    fresh, third = model_and_task(pattern)
    replayed = case.step.apply(fresh, read, context(fresh, third, tmp_path / "c"))
    assert bits(replayed) == bits(changed)
    assert torch.equal(outputs(replayed, task), outputs(changed, task))


@pytest.mark.parametrize(("case", "pattern"), product(COVERING))
def test_outputs_keep_their_shape_and_type_and_ties_stay_tied_when_applied(
    case: Case, pattern: str, tmp_path: Path
) -> None:
    model, task = model_and_task(pattern)
    _, changed = run(case, model, task, tmp_path)
    for size in (1, 3):
        before, after = outputs(model, task, size), outputs(changed, task, size)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert bool(torch.isfinite(after).all())
    if isinstance(changed, fx.GraphModule):  # a program: which weights it shares is its own test's subject
        return
    assert groups(changed) == groups(model)
    assert {n: m.training for n, m in changed.named_modules()} == {n: m.training for n, m in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in changed.named_parameters()} == flags


class SteadyClock:
    """A clock by which a network takes as long as it has parameters."""

    def __init__(self, ctx: Context) -> None:
        self.dense = ctx.dense

    def shares(self, models: list[nn.Module]) -> list[float]:
        sizes = [sum(tensor.numel() for tensor in model.parameters()) for model in (self.dense, *models)]
        return [size / sizes[0] for size in sizes[1:]]


def groups(model: nn.Module) -> set[frozenset[str]]:
    """Names that stand for one tensor."""
    shared: dict[int, set[str]] = {}
    for name, tensor in tensors(model).items():
        shared.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in shared.values()}


@pytest.mark.parametrize(("case", "pattern"), product(COVERING))
def test_every_candidate_is_changed_or_skipped_with_a_reason(case: Case, pattern: str, tmp_path: Path) -> None:
    model, task = model_and_task(pattern)
    ctx = context(model, task, tmp_path)
    plan = case.step.plan(model, ctx)
    listed = [*plan.changed, *(skip.module for skip in plan.skips)]
    missing = [
        name
        for name in case.candidates(model)
        if not any(entry == name or entry.startswith((f"{name}.", f"{name}:")) for entry in listed)
    ]
    assert missing == []
    assert all(len(skip.reason.split()) > 1 for skip in plan.skips)
    both = set(plan.changed) & {skip.module for skip in plan.skips}
    if case.name == "PruneChannels":  # a layer that reads fewer channels may be skipped for those that it makes
        changed = case.step.apply(model, plan, ctx)
        both = {name for name in both if width(changed, name) != width(model, name)}
    assert both == set()


def width(model: nn.Module, name: str) -> int:
    """How many channels a layer makes."""
    layer = model.get_submodule(name)
    return next(
        getattr(layer, size) for size in ("out_channels", "out_features", "hidden_size") if hasattr(layer, size)
    )


@pytest.mark.parametrize(("name", "pattern"), REFUSED)
def test_step_says_so_when_a_pattern_has_nothing_for_it(name: str, pattern: str, tmp_path: Path) -> None:
    model, task = model_and_task(pattern)
    before = everything(model, task)
    with pytest.raises(PlanError, match=REFUSED[name, pattern]):
        BY_NAME[name].step.plan(model, context(model, task, tmp_path))
    assert everything(model, task) == before


@pytest.mark.parametrize(
    ("case", "setting"),
    # What is logged changes no result; tests/train/test_logs.py reads the log.
    [(case, setting) for case in CASES for setting in case.others if setting != "log_dir"],
)
def test_no_setting_is_dead(case: Case, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a processor with VNNI: where products saturate, "here" asks for what "any" asks for.
    for module in ("static", "aware"):
        monkeypatch.setattr(f"pared.quantize.{module}.saturates_here", lambda: False)
    monkeypatch.setattr("pared.prune.choosing.Clock", SteadyClock)
    other = case.others[setting]
    part, value = other if isinstance(other, tuple) else (case.part, other)
    found, facts = [], []
    for number, chosen in enumerate(map(case.step_of, (part, dataclasses.replace(part, **{setting: value})))):
        model, task = model_and_task(case.on)
        plan, changed = run(dataclasses.replace(case, step=chosen), model, task, tmp_path / str(number))
        found.append((plan.edits, plan.skips, bits(changed), outputs(changed, task).tolist()))
        facts.append(plan.facts)
        assert settings_of(chosen) == plan.settings
    if (case.name, setting) in MEASURES:
        assert facts[0] != facts[1]
        return
    assert found[0] != found[1]
    assert found[0][2:] != found[1][2:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_misspelt_setting_is_refused_with_the_nearest_name(case: Case) -> None:
    kind = type(case.part)
    for field in dataclasses.fields(kind):
        wrong = field.name + "x"
        with pytest.raises(
            SettingError, match=f"{kind.__name__} has no setting '{wrong}'; did you mean '{field.name}'"
        ):
            kind(**{wrong: getattr(case.part, field.name)})
    with pytest.raises(SettingError, match="takes its settings by name"):
        kind(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(case.part, dataclasses.fields(kind)[0].name, None)


@pytest.mark.parametrize(("case", "pattern"), product(SHIPPED))
def test_the_file_agrees_in_its_runtime_and_loading_gives_the_same_bits(
    case: Case, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared.pipeline.run.time_in_turn", lambda commands, **_: [[[[1.0]] * 2] * 2 for _ in commands])
    monkeypatch.setattr("pared.pipeline.run.peak_memory", lambda command: 1)
    kept: list[nn.Module] = []
    apply = type(case.step).apply

    def keeping(self: Any, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        kept.append(apply(self, model, plan, ctx))
        return kept[0]

    monkeypatch.setattr(type(case.step), "apply", keeping)
    model, task = model_and_task(pattern)
    before = everything(model, task)
    # These files are so small that scales and zero points make them larger.
    artifact = pared.compress(model, [case.step], task, out=tmp_path / "a", budget=pared.Budget(allow_larger=True))
    assert everything(model, task) == before
    row = artifact.report.stages[1]
    assert row.kept and row.parity is not None  # the gate let it pass: file and model agree
    fresh, _ = model_and_task(pattern)
    quantized = isinstance(kept[0], fx.GraphModule)
    loaded = pared.load(artifact.path, model=fresh, quantized=quantized, trust=quantized)
    for size in (1, 3):
        assert torch.equal(outputs(loaded, task, size), outputs(kept[0], task, size))
        inputs = batch_of(task.example_inputs, size, 9)
        predicted = artifact.predict(*inputs.args, **inputs.kwargs)
        expected = outputs(kept[0], task, size)
        assert predicted.shape == expected.shape
        assert (predicted - expected).norm() <= 0.2 * expected.norm()
