"""The step `Train`: settings, plan, masks."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pydantic
import pytest
import torch
from torch import Tensor, nn

from pared.errors import PlanError, RecipeError, SettingError, UsageError
from pared.recipe import Recipe
from pared.step import Context, Edit, Plan, Skip, settings, settings_of
from pared.train.callbacks import Callback, KeepZeros
from pared.train.hardware import Hardware
from pared.train.optimizers import SGD, AdamW
from pared.train.schedules import Constant, Cosine, StepDecay
from pared.train.step import Train

MakeContext = Callable[..., Context]


def apply(step: Train, model: nn.Module, ctx: Context) -> nn.Module:
    return step.apply(model, step.plan(model, ctx), ctx)


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({}, Train()),
        ({"optimizer": "adamw"}, Train(optimizer=AdamW())),
        ({"optimizer": {"kind": "sgd", "momentum": 0.5}}, Train(optimizer=SGD(momentum=0.5))),
        ({"schedule": "step"}, Train(schedule=StepDecay())),
        ({"schedule": {"kind": "cosine", "warmup_epochs": 1}}, Train(schedule=Cosine(warmup_epochs=1))),
        (
            {"schedule": "constant", "epochs": 2, "lr": 0.5, "patience": 3},
            Train(epochs=2, lr=0.5, patience=3, schedule=Constant()),
        ),
    ],
)
def test_settings_read_from_plain_data_when_a_recipe_gives_them(given: dict[str, Any], step: Train) -> None:
    assert Train(**given) == step
    read = pydantic.TypeAdapter(Train)
    assert read.validate_python(given) == step
    assert read.validate_python(json.loads(json.dumps(settings_of(step)))) == step


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"patience": 0}, "patience"),
        ({"optimizer": "adam"}, "'sgd', 'adamw'"),
        ({"optimizer": {"kind": "adamw", "momentum": 0.9}}, "momentum"),
        ({"schedule": "linear"}, "'constant', 'cosine', 'step'"),
        ({"during": [3]}, "needs"),
    ],
)
def test_settings_are_refused_when_wrong(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Train(**given)


def test_schema_offers_the_names_when_an_editor_asks() -> None:
    schema = json.dumps(pydantic.TypeAdapter(Train).json_schema())
    for name in ("sgd", "adamw", "constant", "cosine", "step", "warmup_epochs"):
        assert f'"{name}"' in schema


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 3},
        {"lr": 0.02},
        {"optimizer": "adamw"},
        {"optimizer": SGD(momentum=0.5)},
        {"optimizer": SGD(weight_decay=0.1)},
        {"optimizer": SGD(nesterov=True)},
        {"optimizer": AdamW(weight_decay=0.5), "lr": 0.1},
        {"schedule": "constant"},
        {"schedule": Cosine(final=0.5)},
        {"schedule": Cosine(warmup_epochs=1)},
        {"schedule": StepDecay(every=1)},
        {"schedule": StepDecay(every=2)},
        {"schedule": StepDecay(every=1, factor_each=0.5)},
        {"patience": 1},
        {"clip_norm": 0.1},
        {"ema": 0.5},
        {"hardware": Hardware(accumulate=2)},
        {"hardware": Hardware(precision="bf16")},
    ],
    ids=str,
)
def test_every_setting_changes_the_result_when_another_value_is_given(
    changed: dict[str, Any], model: nn.Module, make_context: MakeContext
) -> None:
    # A metric that never improves makes patience end after the second epoch with the first epoch's weights.
    ctx = make_context(metrics=lambda output, target: 0.0)
    usual: dict[str, Any] = {"epochs": 4, "lr": 0.05}
    one, other = apply(Train(**usual), model, ctx), apply(Train(**(usual | changed)), model, ctx)
    assert not torch.equal(one[0].weight, other[0].weight)  # type: ignore[index,arg-type]


def test_plan_reads_only_and_is_json_when_made(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = Train(epochs=2, patience=1)
    plan = step.plan(model, ctx)
    assert plan == step.plan(model, ctx)
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert plan.edits == ()
    trained = 6 * 8 + 8 + 16 + 18
    nothing = {"keep_zeros": [], "during": [], "folded": [], "warnings": []}
    assert plan.facts == {"epochs": 2, "trained_params": trained} | nothing
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not ctx.work.exists()


def test_needs_follow_the_settings_when_asked() -> None:
    assert Train().needs == {"train"}
    assert Train(patience=1).needs == {"train", "validation"}
    assert Train(during=[Louder()]).needs == {"train", "calibration"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": None}, r"Train needs train data; give it as Task\(train=...\)"),
        ({"validation": None}, r"needs validation data; give it as Task\(validation=...\)"),
        ({"loss": None}, r"Train needs a loss; give it as Task\(loss=...\)"),
    ],
)
def test_plan_says_what_is_missing_when_the_task_lacks_it(
    changes: dict[str, Any], words: str, model: nn.Module, make_context: MakeContext
) -> None:
    with pytest.raises(UsageError, match=words):
        Train(patience=1).plan(model, make_context(**changes))


def test_plan_refuses_when_the_model_is_quantized_already(model: nn.Module, make_context: MakeContext) -> None:
    history = (Plan(step="QuantizeStatic", edits=(Edit("quantize", "0"),)),)
    with pytest.raises(PlanError, match="move Train before the step that quantizes"):
        Train().plan(model, make_context(history=history))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_plan_refuses_when_the_model_is_an_exported_program(model: nn.Module, make_context: MakeContext) -> None:
    program = torch.export.export(model, (torch.randn(4, 6),)).module()
    with pytest.raises(PlanError, match="move Train before the step that quantizes"):
        Train().plan(program, make_context())


def test_plan_accepts_a_graph_module_when_it_still_calls_modules(model: nn.Module, make_context: MakeContext) -> None:
    traced = torch.fx.symbolic_trace(model)
    trained = apply(Train(epochs=1, lr=0.1), traced, make_context())
    assert not torch.equal(trained.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_zeros_stay_when_an_earlier_step_masked_them(model: nn.Module, make_context: MakeContext) -> None:
    zeros = torch.rand(8, 6) < 0.5
    model[0].weight.detach().masked_fill_(zeros, 0)  # type: ignore[index,operator,union-attr]
    model[4].weight.detach()[0, :3] = 0  # type: ignore[index,operator,union-attr]
    edits = (Edit("mask", "0", {"tensor": "weight"}), Edit("mask", "9", {"tensor": "weight"}))
    ctx = make_context(history=(Plan(step="PruneWeights", edits=edits),))
    step = Train(epochs=2, lr=0.1, optimizer=SGD(weight_decay=0.01))
    plan = step.plan(model, ctx)
    assert plan.facts["keep_zeros"] == ["0.weight"]
    assert [(skip.module, skip.reason) for skip in plan.skips] == [
        ("9.weight", "its masked weights are gone, so no zeros to keep")
    ]
    trained = step.apply(model, Plan.from_json(plan.to_json()), ctx)
    assert torch.equal(trained[0].weight == 0, zeros)  # type: ignore[index]
    assert not torch.signbit(trained[0].weight[zeros]).any()  # type: ignore[index]
    assert not (trained[4].weight == 0).any()  # type: ignore[index]


def test_zeros_stay_when_the_model_that_trains_knows_the_weight_by_another_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.detach()[0] = 0
    keeping = KeepZeros(["0.weight"])
    keeping.on_start(net)
    other = nn.Module()
    other.shared = net[0]  # what capture makes of a layer with two names
    other.shared.weight.detach().fill_(1)
    keeping.after_step(other)
    assert net[0].weight.tolist() == [[0, 0], [1, 1]]


@settings
class Louder:
    """A technique that makes the loss larger."""

    changes: ClassVar[bool] = False
    by: float = 3.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"calibration"})

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        return Plan("Louder", skips=(Skip("3", "it has no loudness"),), facts={"by": self.by, "warnings": ["loud"]})

    def callback(self, plan: Plan, ctx: Context) -> Callback:
        assert plan.facts["by"] == self.by
        return Multiply(self.by)


class Multiply(Callback):
    def __init__(self, by: float) -> None:
        self.by = by

    def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
        return current * self.by


def test_a_technique_runs_while_training_when_named_in_during(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    plain: dict[str, Any] = {"epochs": 1, "optimizer": SGD(momentum=0.0), "schedule": "constant"}
    # Without momentum, three times the loss at a third of the rate is the same step, but for rounding.
    one = apply(Train(lr=0.3, **plain), model, ctx)
    same = apply(Train(lr=0.1, during=[Louder()], **plain), model, ctx)
    other = apply(Train(lr=0.1, **plain), model, ctx)
    assert torch.allclose(one[0].weight, same[0].weight, atol=1e-6)  # type: ignore[index,arg-type]
    assert not torch.allclose(one[0].weight, other[0].weight, atol=1e-3)  # type: ignore[index,arg-type]
    assert settings_of(Train(during=[Louder(by=2)]))["during"] == [{"Louder": {"by": 2.0}}]


def test_what_a_technique_plans_is_part_of_the_plan(model: nn.Module, make_context: MakeContext) -> None:
    plan = Train(during=[Louder()]).plan(model, make_context())
    assert plan.skips == (Skip("3", "it has no loudness"),)
    assert plan.facts["warnings"] == ["loud"]
    assert (
        Plan.from_json(plan.to_json()) == Plan.from_json(plan.to_json()) and plan.facts["during"][0]["step"] == "Louder"
    )
    assert Train(during=[Louder()]).trains


def test_plan_refuses_when_a_technique_that_changes_structure_stands_twice(
    model: nn.Module, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    Train(during=[Louder(), Louder()]).plan(model, make_context())
    monkeypatch.setattr(Louder, "changes", True)
    with pytest.raises(PlanError, match="Louder stands 2 times in `during`; keep one"):
        Train(during=[Louder(), Louder(by=2)]).plan(model, make_context())


def test_plan_refuses_when_all_is_frozen_and_no_technique_changes_that(
    model: nn.Module, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.requires_grad_(False)
    with pytest.raises(PlanError, match="unfreeze some"):
        Train(during=[Louder()]).plan(model, make_context())
    monkeypatch.setattr(Louder, "changes", True)  # which may bring scales or masks to train
    assert Train(during=[Louder()]).plan(model, make_context()).facts["trained_params"] == 0


def test_a_recipe_names_techniques_inside_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.recipe.DURING", {"Louder": f"{__name__}:Louder"})
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.SimpleNamespace(Louder=Louder)))
    data = {"model": "m", "task": "t", "steps": [{"Train": {"epochs": 2, "during": [{"Louder": {"by": 2.0}}]}}]}
    recipe = Recipe.from_json(data)
    assert recipe.steps == (Train(epochs=2, during=[Louder(by=2.0)]),)
    assert Recipe.from_json(recipe.to_json()) == recipe
    for wrong, words in (
        ({"Luder": {}}, r"steps\[0\].Train.during\[0\]: no step 'Luder'; did you mean 'Louder'"),
        ({"Louder": {"bye": 1}}, r"steps\[0\].Train.during\[0\].Louder.bye: unknown key; did you mean 'by'"),
        ({"Louder": {"by": "x"}}, r"steps\[0\].Train.during\[0\].Louder.by: should be a valid number"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.from_json({**data, "steps": [{"Train": {"during": [wrong]}}]})
