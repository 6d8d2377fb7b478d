"""`PruneChannels` as the caller meets it: what stays, what is said of it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from contract_cases import WIDTHS, model_and_task
from pared.errors import CaptureError, PlanError, SettingError, UsageError
from pared.graph.counts import count
from pared.prune import Equal, Global, PruneChannels, Sensitivity, Widths, channels
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task
from zoo_models import make

HALF = PruneChannels(ratio=0.5, widths=WIDTHS)


def context(model: nn.Module, task: Task, work: Path = Path(), **changes: Any) -> Context:
    return Context(task=task, target=OnnxRuntime(), work=work, dense=model, **changes)


def pruned(pattern: str, step: PruneChannels, **changes: Any) -> tuple[nn.Module, Task, Plan, nn.Module]:
    model, task = model_and_task(pattern)
    ctx = context(model, task, **changes)
    plan = step.plan(model, ctx)
    return model, task, plan, step.apply(model, plan, ctx)


def params(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


def macs(model: nn.Module, task: Task) -> int:
    return sum(layer.macs for layer in count(model, task.example_inputs))


def outputs(model: nn.Module) -> list[int]:
    """Output channels of every convolution."""
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


IMAGES = Task(example_inputs=torch.zeros(1, 3, 8, 8))
VECTORS = Task(example_inputs=torch.zeros(1, 6))


@pytest.mark.parametrize(("budget", "ratios"), [("params", "global"), ("macs", "equal")])
def test_a_budget_is_met_by_the_pruned_model_itself(budget: str, ratios: str) -> None:
    model, task, plan, smaller = pruned("residual_add", PruneChannels(**{budget: 0.4}, ratios=ratios, widths=WIDTHS))
    shares = {"params": params(smaller) / params(model), "macs": macs(smaller, task) / macs(model, task)}
    assert 0.3 < shares[budget] <= 0.4
    # What the plan says is what was built.
    assert plan.facts["params"] == pytest.approx(shares["params"], abs=1e-12)
    assert plan.facts["macs"] == pytest.approx(shares["macs"], abs=1e-12)


def test_widths_limits_and_patterns_are_kept() -> None:
    limits = Widths(round_to=4, limits={"2": (0.75, 1.0)})
    kept = channels(small(), IMAGES, ratio=0.5, widths=limits)
    assert [kept[0].out_channels, kept[2].out_channels] == [4, 12]
    kept = channels(small(), IMAGES, ratio=0.5, include=["2"])
    assert [kept[0].out_channels, kept[2].out_channels] == [8, 8]
    kept = channels(small(), IMAGES, ratio=0.75, exclude=["0"], widths={"round_to": 1})
    assert [kept[0].out_channels, kept[2].out_channels] == [8, 4]


def test_the_weakest_filters_go_and_the_others_stay_as_they_are() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
        model[0].weight.mul_(torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6]).reshape(-1, 1, 1, 1))
    smaller = channels(model, IMAGES, ratio=0.5, include=["0"], widths=WIDTHS)
    assert torch.equal(smaller[0].weight, model[0].weight[[1, 3, 5, 7]])
    assert torch.equal(smaller[2].weight, model[2].weight[:, [1, 3, 5, 7]])


def test_applying_without_what_planning_left_gives_the_same_bits() -> None:
    _, task, plan, smaller = pruned("residual_add", HALF)
    fresh, _ = model_and_task("residual_add")
    read = Plan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    again = HALF.apply(fresh, read, context(fresh, task))
    ours, theirs = smaller.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_plan_that_is_not_the_last_one_is_applied_as_it_stands() -> None:
    model, task = model_and_task("conv_bn_relu")
    ctx = context(model, task)
    first = HALF.plan(model, ctx)
    quarter = dataclasses.replace(HALF, ratio=0.25)
    quarter.plan(model, ctx)
    assert outputs(HALF.apply(model, first, ctx)) == [4, 4]


def test_a_frozen_model_is_pruned_and_stays_frozen() -> None:
    _, _, _, smaller = pruned("frozen_parameters", HALF)
    assert outputs(smaller) == [4, 4]
    assert not any(parameter.requires_grad for parameter in smaller.parameters())
    _, _, _, smaller = pruned("frozen_parameters", dataclasses.replace(HALF, saliency="taylor"))
    assert outputs(smaller) == [4, 4]


@pytest.mark.parametrize(("budget", "rounds"), [("ratio", [6, 4]), ("macs", None)])
def test_rounds_count_budgets_of_the_dense_model(budget: str, rounds: list[int] | None) -> None:
    model, task = model_and_task("conv_bn_relu")
    step = PruneChannels(**{budget: 0.5}, widths=WIDTHS)
    measure = {"macs": lambda net: macs(net, task)}.get(budget, lambda net: 0)
    dense, current, history = measure(model), model, ()
    for number, fraction in enumerate((0.5, 1.0)):
        part = step.at(fraction)
        ctx = dataclasses.replace(context(model, task), history=history)
        plan = part.plan(current, ctx)
        current = part.apply(current, plan, ctx)
        history = (*history, plan)
        if rounds:
            assert outputs(current) == [rounds[number]] * 2
        else:
            assert measure(current) / dense <= 1 - 0.5 * fraction
            assert measure(current) / dense > 1 - 0.5 * fraction - 0.1


def test_a_round_that_asks_for_no_more_than_before_says_so() -> None:
    model, task = model_and_task("conv_bn_relu")
    ctx = context(model, task)
    plan = HALF.plan(model, ctx)
    smaller = HALF.apply(model, plan, ctx)
    later = dataclasses.replace(ctx, history=(plan,))
    again = HALF.plan(smaller, later)
    assert not again.edits  # a round of `Repeat` that finds nothing left to do must not end the run
    assert {skip.module: skip.reason for skip in again.skips}["0.0"] == (
        "as few of its channels as are asked for are left already"
    )
    looser = PruneChannels(macs=0.9, widths=WIDTHS).plan(smaller, later)
    assert not looser.edits
    assert looser.facts["warnings"][0] == "macs=0.9 of the dense model is met already"
    assert outputs(HALF.apply(smaller, again, later)) == outputs(smaller)


def test_a_first_round_may_leave_all_to_later_ones_and_the_last_may_not() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    first, second, third = pared.dry_run(model, [pared.Repeat(3, [PruneChannels(ratio=0.4)])], VECTORS)
    assert [plan.facts["widths"]["0"][0] for plan in (first, second, third)] == [16, 8, 8]
    assert not first.edits
    assert first.facts["warnings"] == [
        "no channel is removed yet, a later PruneChannels has to: 0: the budget rounds to all its 16 channels, as "
        "multiples of 8 (widths.round_to)"
    ]
    ctx = context(model, VECTORS, later=(PruneChannels(ratio=0.4),))
    assert PruneChannels(ratio=0.13).apply(model, first, ctx)[0].out_features == 16
    for last, step in ((1, PruneChannels(ratio=0.2)), (3, pared.Repeat(3, [PruneChannels(ratio=0.2)]))):
        with pytest.raises(PlanError, match=r"no channel can be removed \(0: the budget rounds to") as caught:
            pared.dry_run(model, [step], VECTORS)
        assert caught.value.__notes__ == [f"in step {last}, PruneChannels"]


def test_every_group_that_stays_whole_is_listed_with_the_reason() -> None:
    model = small()
    step = PruneChannels(ratio=0.5, widths=Widths(round_to=8))
    plan = step.plan(model, context(model, IMAGES))
    assert plan.facts["widths"] == {"0": [8, 8], "2": [8, 16]}
    assert {skip.module: skip.reason for skip in plan.skips} == {
        "6": "its channels are the model's output",
        "0": "the budget rounds to all its 8 channels, as multiples of 8 (widths.round_to)",
    }
    step = PruneChannels(ratio=0.5, widths=Widths(round_to=1, limits={"0": (1.0, 1.0)}))
    assert any(skip.reason == "limits keep all its channels" for skip in step.plan(model, context(model, IMAGES)).skips)


def test_order_is_refused_when_the_model_is_quantized_and_says_what_to_move() -> None:
    _, task = model_and_task("conv_bn_relu")
    model, _ = make("conv_bn_relu")
    ctx = context(model, task)
    static = pared.QuantizeStatic()
    plan = static.plan(model, ctx)
    program = static.apply(model, plan, ctx)
    expected = "quantized already.*move PruneChannels, and the training after it, before the quantization"
    with pytest.raises(PlanError, match=expected):
        HALF.plan(program, context(model, task, history=(plan,)))
    with pytest.raises(PlanError, match=expected):
        pared.dry_run(model, [static, HALF], task)


class Body(nn.Module):
    """Eight channels between two layers, and something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(self.before(x)))


class Transformed(Body):
    def between(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class Reshaped(Body):
    def between(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, 4).transpose(1, 2).reshape(x.shape[0], 8)


class Added(Body):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.ones(8)


def test_an_operator_without_a_rule_on_every_path_is_an_error_that_names_it() -> None:
    with pytest.raises(PlanError, match=r"no channel can be removed \(before: .* operator aten\.fft_fft; after: its"):
        channels(Transformed(), VECTORS, ratio=0.5, widths=WIDTHS)


@pytest.mark.parametrize(("kind", "line"), [(Reshaped, "x.reshape(-1, 2, 4)"), (Added, "x + torch.ones(8)")])
def test_a_number_of_channels_in_a_forward_is_named_with_its_line(kind: type[nn.Module], line: str) -> None:
    with pytest.raises(PlanError) as caught:
        channels(kind(), VECTORS, ratio=0.5, widths=WIDTHS)
    assert "before: its forward has a number of channels written into it" in str(caught.value)
    assert "test_step.py:" in str(caught.value)
    assert line in str(caught.value)


def test_plans_name_lines_without_the_folders_of_this_machine() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), Added())
    plan = HALF.plan(model, context(model, VECTORS))
    reasons = [skip.reason for skip in plan.skips if skip.module == "3.before"]
    assert "(at test_step.py:" in reasons[0]
    assert str(Path(__file__).parent) not in json.dumps(plan.to_json())


NARROW = {"widths": WIDTHS}
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, SettingError, "give exactly one budget, ratio, params, macs or latency; found none"),
    ({"ratio": 0.5, "macs": 0.5}, SettingError, "found ratio and macs"),
    ({"ratio": 1.0}, SettingError, "PruneChannels.ratio: input should be less than 1, found 1.0"),
    ({"ratio": 0.5, "saliency": "tailor"}, SettingError, "no saliency 'tailor'; did you mean 'taylor'"),
    ({"ratio": 0.5, "ratios": "globl"}, SettingError, "ratios: should be 'equal', 'global' or 'sensitivity', found"),
    ({"ratio": 0.5, "ratios": {"kind": "globl"}}, SettingError, "ratios: should be 'equal', 'global' or 'sensitiv"),
    ({"ratio": 0.5, "widths": {"limits": {"0": [0.5, 2]}}}, SettingError, r"limits: '0' needs .* found \[0.5, 2.0\]"),
    ({"ratio": 0.5, "widths": {"limits": {"0": [0.5, 0.2]}}}, SettingError, "least <= most"),
    ({"ratio": 0.5, "widths": {"round_to": 0}}, SettingError, "round_to: a multiple is 1 or more"),
    ({"ratio": 0.5, "widths": {"limits": {"9": [0.5, 1]}}}, PlanError, "limits='9' matches no layer"),
    ({"ratio": 0.5, "include": ["6"]}, PlanError, "include='6': the channels of 6 .*: its channels are the model's o"),
    ({"ratio": 0.5, "include": ["conv"]}, PlanError, "include='conv' matches no layer that can be pruned; valid: 0, 2"),
    ({"ratio": 0.5, "exclude": ["*"]}, PlanError, r"no channel can be removed \(.*0: excluded by '\*'"),
    ({"ratio": 0.1}, PlanError, "0: the budget rounds to all its 8 channels, as multiples of 8"),
    ({"params": 0.01, **NARROW}, PlanError, r"params=0.01 cannot be met: the least that can be reached is 0.0\d\d \("),
    ({"macs": 0.001, **NARROW}, PlanError, r"macs=0.001 cannot be met: the least that can be reached is"),
    ({"ratio": 0.5, "saliency": "taylor"}, UsageError, r"needs train data; give it as Task\(train="),
    ({"ratio": 0.5, "ratios": "sensitivity"}, UsageError, r"needs validation data; give it as Task\(validation="),
    ({"latency": 0.5, "target": "tensort"}, UsageError, "no target 'tensort'; did you mean 'tensorrt'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_in_the_callers_words(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        channels(small(), IMAGES, **settings)


def test_a_layer_keeps_one_channel_and_says_so_when_all_were_to_go() -> None:
    model = small()
    plan = PruneChannels(ratio=0.99, widths=WIDTHS).plan(model, context(model, IMAGES))
    assert plan.facts["widths"] == {"0": [1, 8], "2": [1, 16]}
    assert plan.facts["warnings"][0] == ("0: one of its 8 units stays, though all were to go: a layer needs one")


def test_a_prune_says_what_it_removes_inexactly() -> None:
    model, task = model_and_task("residual_add")
    (warning,) = HALF.plan(model, context(model, task)).facts["warnings"]
    assert warning.startswith(
        "biases and shifts of removed channels count as zero where no bias could take them in, before body.0.0, "
        "body.1, next.0; the first: it pads, so that constants of removed channels end before its border (up to 0."
    )
    model, task = model_and_task("attention_fused_qkv")
    assert HALF.plan(model, context(model, task)).facts["warnings"] == [
        "embed: removed up to this: the mean of a layer norm of norm1 runs over fewer channels"
    ]


def test_example_inputs_that_do_not_run_are_told_as_such() -> None:
    with pytest.raises(CaptureError, match=r"the model does not run on the example inputs: .* to have 3 channels, but"):
        channels(small(), Task(example_inputs=torch.zeros(1, 4, 8, 8)), ratio=0.5)
    with pytest.raises(UsageError, match=r"task must be a pared\.Task, found Tensor"):
        channels(small(), torch.zeros(1, 3, 8, 8), ratio=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "plain", "notes"),
    [
        ({"ratio": 0.5, "saliency": "taylor"}, {"ratio": 0.5}, ["channels are ranked by l2, since taylor reads data"]),
        (
            {"ratio": 0.5, "ratios": Sensitivity()},
            {"ratio": 0.5},
            ["every group loses the same fraction, since sensitivity is measured on data"],
        ),
        ({"latency": 0.4}, {"macs": 0.4}, ["multiply-accumulates stand for the latency, which only a run measures"]),
    ],
)
def test_a_dry_plan_reads_no_data_times_nothing_and_says_what_it_guesses(
    settings: dict[str, Any], plain: dict[str, Any], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared.prune.choosing.Clock", None)
    model, _ = make("conv_bn_relu")
    task = Task(example_inputs=torch.zeros(1, 3, 8, 8))  # it has no data
    step = PruneChannels(**settings, widths=WIDTHS)
    plan = step.plan(model, context(model, task, dry=True))
    assert plan.estimate
    assert plan.facts["warnings"][: len(notes)] == [f"an estimate: {note}" for note in notes]
    exact = PruneChannels(**plain, widths=WIDTHS).plan(model, context(model, task, dry=True))
    assert not exact.estimate
    assert plan.edits == exact.edits
    assert plan.settings["latency"] == settings.get("latency")


def test_a_dry_plan_of_measured_widths_takes_multiples_of_8() -> None:
    step, notes = PruneChannels(
        ratio=0.5, widths=Widths(round_to="measured", limits={"0": (0.5, 1)})
    ).without_measuring()
    assert step == PruneChannels(ratio=0.5, widths=Widths(round_to=8, limits={"0": (0.5, 1)}))
    assert notes == ["an estimate: widths are multiples of 8; only a run measures which are fastest"]


def test_settings_are_read_as_plain_data() -> None:
    given = {
        "PruneChannels": {
            "macs": 0.5,
            "ratios": {"kind": "global", "normalize": "max"},
            "widths": {"round_to": 4, "limits": {"0.*": [0.25, 1]}, "attention": "head_dim"},
        }
    }
    whole = {"model": "fashion_cnn", "task": "fashion_mnist"}
    read = pared.Recipe.from_json({**whole, "steps": [given, {"PruneChannels": {"ratio": 0.5, "ratios": "global"}}]})
    limits = Widths(round_to=4, limits={"0.*": (0.25, 1.0)}, attention="head_dim")
    assert read.steps[0] == PruneChannels(macs=0.5, ratios=Global(normalize="max"), widths=limits)
    assert read.steps[1] == PruneChannels(ratio=0.5, ratios=Global())
    assert PruneChannels(ratio=0.5).ratios == Equal()
    assert pared.Recipe.from_json(read.to_json()) == read


def test_one_call_leaves_the_model_and_the_callers_random_state_alone() -> None:
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    smaller = pared.prune.channels(model, IMAGES, ratio=0.5, saliency="random", widths={"round_to": 1})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert smaller.training and smaller[0].training
    assert outputs(smaller) == [4, 8]
    smaller(torch.zeros(2, 3, 8, 8)).sum().backward()
    assert smaller[0].weight.grad is not None
    assert model[0].weight.grad is None


def test_layers_that_only_run_in_training_are_warned_of() -> None:
    model, task = model_and_task("branch_on_shape")
    warnings = HALF.plan(model, context(model, task)).facts["warnings"]
    assert any(text.startswith("large.0: no forward reads them in eval mode") for text in warnings)


def test_limits_are_of_the_dense_model_when_rounds_repeat() -> None:
    model, task = model_and_task("conv_bn_relu")
    step = PruneChannels(ratio=0.5, widths=Widths(round_to=1, limits={"0.0": (0.75, 0.75)}))
    ctx = context(model, task)
    plan = step.plan(model, ctx)
    smaller = step.apply(model, plan, ctx)
    again = step.plan(smaller, dataclasses.replace(ctx, history=(plan,)))
    kept, before = plan.facts["widths"]["0.0"]
    assert (kept, before) == (6, 8)
    assert again.facts["widths"]["0.0"] == [6, 6]  # three quarters of what there was at first, not of that again


class Halves(nn.Module):
    """A layer makes the channels of two groups, `layer` and `layer:2`, each tied to one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((self.layer(x) + torch.cat([self.left(x), self.right(x)], 1)).relu())
        return y


def test_each_group_of_a_layer_keeps_its_own_share_when_rounds_repeat() -> None:
    model = current = Halves()
    with torch.no_grad():  # the first group goes to its floor before the second loses anything
        model.layer.weight[:8] *= 0.01
        model.left.weight *= 0.01
    limits = Widths(round_to=1, limits={"layer": (0.5, 1.0)})
    ctx, history, found = context(model, VECTORS), (), []
    for ratio in (0.25, 0.45):
        step = PruneChannels(ratio=ratio, ratios=Global(normalize="none"), widths=limits)
        plan = step.plan(current, dataclasses.replace(ctx, history=history))
        current = step.apply(current, plan, ctx)
        history = (*history, plan)
        found.append(plan.facts["widths"])
    assert found == [{"layer": [4, 8], "layer:2": [8, 8]}, {"layer": [4, 4], "layer:2": [4, 8]}]
