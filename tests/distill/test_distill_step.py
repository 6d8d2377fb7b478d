"""`Distill`: settings, plans, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared.distill import (
    AverageTeacher,
    BornAgain,
    Contrastive,
    Distill,
    Hint,
    Offline,
    Online,
    Relational,
    SelfDeep,
)
from pared.errors import ModelError, PlanError, RecipeError, SettingError
from pared.recipe import Recipe
from pared.step import Context, Plan, settings_of

MakeContext = Callable[..., Context]


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({}, Distill()),
        ({"teacher": "born_again"}, Distill(teacher=BornAgain())),
        ({"teacher": {"kind": "average", "decay": 0.5}}, Distill(teacher=AverageTeacher(decay=0.5))),
        ({"teacher": {"kind": "online", "peers": 2}}, Distill(teacher=Online(peers=2))),
        ({"teacher": {"kind": "online", "peers": ["big"]}}, Distill(teacher=Online(peers=("big",)))),
        ({"teacher": {"kind": "deep", "exits": ["2"], "hint": 0.5}}, Distill(teacher=SelfDeep(exits=["2"], hint=0.5))),
        ({"knowledge": ["hint"]}, Distill(knowledge=(Hint(),))),
        (
            {"response": "none", "knowledge": [{"kind": "hint", "layers": [["1", "2"]]}, "relational"]},
            Distill(response="none", knowledge=[Hint(layers=[("1", "2")]), Relational()]),
        ),
    ],
)
def test_settings_read_from_plain_data_when_a_recipe_gives_them(given: dict[str, Any], step: Distill) -> None:
    assert Distill(**given) == step
    data = {"model": "m", "task": "t", "steps": [{"Train": {"epochs": 2, "during": [{"Distill": given}]}}]}
    recipe = Recipe.from_json(json.loads(json.dumps(data)))
    assert recipe.steps == (pared.Train(epochs=2, during=[step]),)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temprature": 2}, "did you mean 'temperature'"),
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"response": "l2"}, "response"),
        ({"teacher": "offlin"}, "'offline', 'born_again', 'average', 'online', 'deep'"),
        ({"knowledge": ["hints"]}, "'hint', 'attention'"),
        ({"response": "none"}, "leaves nothing to learn"),
        ({"knowledge": ["hint"], "teacher": "online"}, "teacher 'online' passes on responses only"),
        ({"knowledge": ["hint"], "teacher": {"kind": "offline", "cache": True}}, "set cache=False"),
        ({"teacher": {"kind": "online", "peers": 0}}, "at least one"),
        ({"teacher": {"kind": "average", "decay": 1.0}}, "decay"),
        ({"knowledge": [{"kind": "hint", "weight": 0.0}]}, "weight"),
    ],
)
def test_settings_are_refused_when_wrong(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Distill(**given)
    with pytest.raises(RecipeError):
        Recipe.from_json({"model": "m", "task": "t", "steps": [{"Train": {"during": [{"Distill": given}]}}]})


def test_plan_reads_only_and_is_json_when_made(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for step in (Distill(knowledge=[Hint(), Contrastive()]), Distill(teacher="deep"), Distill(teacher="online")):
        plan = step.plan(model, ctx)
        assert plan == step.plan(model, ctx)
        assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
        assert plan.settings == settings_of(step)
        assert (plan.edits, step.changes, step.needs) == ((), False, frozenset())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not ctx.work.exists()


def test_plan_lists_the_pairs_and_exits_that_were_chosen(model: nn.Module, make_context: MakeContext) -> None:
    plan = Distill(knowledge=["hint", "relational"], teacher=Offline(name="big")).plan(model, make_context())
    hint, relational = plan.facts["pairs"]
    assert hint == [
        {"student": "2", "teacher": "2", "student_shape": [4, 8, 8], "teacher_shape": [8, 8, 8]},
        {"student": "5", "teacher": "5", "student_shape": [8, 4, 4], "teacher_shape": [16, 4, 4]},
    ]
    assert relational == [{"student": "7", "teacher": "7", "student_shape": [8], "teacher_shape": [16]}]
    assert plan.facts["notes"] == [
        "Distill: teacher offline 'big', response kl, alpha 0.9, temperature 4",
        "Distill: hint compares 2 with the teacher's 2, 5 with the teacher's 5",
        "Distill: relational compares 7 with the teacher's 7",
    ]
    plan = Distill(teacher="deep").plan(model, make_context())
    assert plan.facts["exits"] == [{"layer": "2", "shape": [4, 8, 8]}]
    assert plan.facts["deepest"] == {"layer": "5", "shape": [8, 4, 4]}
    assert plan.facts["notes"] == [
        "Distill: teacher deep, response kl, alpha 0.3, temperature 3",
        "Distill: exits at 2, taught by 5",
    ]
    named = Distill(teacher=SelfDeep(exits=["[12]"])).plan(model, make_context())
    assert [item["layer"] for item in named.facts["exits"]] == ["1", "2"]


@pytest.mark.parametrize(
    ("step", "usual"),
    [
        (Distill(), (4.0, 0.9)),
        (Distill(teacher="born_again"), (1.0, 0.5)),
        (Distill(teacher="average"), (1.0, 0.2)),
        (Distill(teacher="online"), (1.0, 0.5)),
        (Distill(teacher="deep"), (3.0, 0.3)),
        (Distill(teacher="online", temperature=2), (2.0, 0.5)),
        (Distill(teacher="online", alpha=0.0), (1.0, 0.0)),
        (Distill(temperature=1.0, alpha=1.0), (1.0, 1.0)),
    ],
)
def test_temperature_and_alpha_suit_the_teacher_when_not_given(
    step: Distill, usual: tuple[float, float], model: nn.Module, make_context: MakeContext
) -> None:
    plan = step.plan(model, make_context())
    assert (plan.facts["temperature"], plan.facts["alpha"]) == usual


def test_plan_tells_teachers_apart_when_one_weight_differs(model: nn.Module, make_context: MakeContext) -> None:
    # So that a checkpoint or a cache of another teacher is never taken up.
    ctx = make_context()
    found = []
    for _ in range(2):
        found.append(Distill().plan(model, ctx).facts["teacher_id"])
        with torch.no_grad():
            next(ctx.dense.parameters())[0] += 1
    assert found[0] != found[1]


def custom(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target.float()) ** 2).mean()


BITS = torch.randint(0, 2, (8, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("loss", "target", "kind"),
    [
        (nn.CrossEntropyLoss(), None, "kl"),
        (F.cross_entropy, None, "kl"),
        (nn.NLLLoss(), None, "kl"),
        (nn.BCEWithLogitsLoss(), None, "bernoulli"),
        (nn.SmoothL1Loss(), None, "mse"),
        (custom, torch.zeros(8, dtype=torch.int64), "kl"),
        (custom, torch.rand(8, 4), "mse"),
        (custom, BITS.float(), "bernoulli"),
        (custom, BITS.bool(), "bernoulli"),
    ],
)
def test_response_follows_the_loss_and_the_targets_when_it_is_auto(
    loss: Any, target: Any, kind: str, model: nn.Module, make_context: MakeContext
) -> None:
    ctx = make_context(loss=loss, train=[(torch.zeros(8, 1, 8, 8), target)])
    assert Distill().plan(model, ctx).facts["response"] == kind
    assert Distill(response="decoupled").plan(model, ctx).facts["response"] == "decoupled"


class Odd(nn.Module):
    """Has a parameter, and no way to draw it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_plan_refuses_a_teacher_that_does_not_suit(model: nn.Module, make_context: MakeContext) -> None:
    five = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    nn.init.constant_(broken[1].bias, float("nan"))
    flat = nn.Linear(64, 4)
    ctx = make_context(teachers={"five": five, "broken": broken, "flat": flat})
    with pytest.raises(
        PlanError, match=r"outputs have shape \(2, 4\), those of teacher 'five' \(2, 5\); both must have"
    ):
        Distill(teacher=Offline(name="five")).plan(model, ctx)
    with pytest.raises(PlanError, match=r"shape \(2, 4\), those of teacher 'five' \(2, 5\)"):
        Distill(teacher=Online(peers=["five"])).plan(model, ctx)
    with pytest.raises(ModelError, match="teacher 'broken' gives NaN or infinity"):
        Distill(teacher=Offline(name="broken")).plan(model, ctx)
    with pytest.raises(ModelError, match="teacher 'flat': Linear does not run on the example inputs"):
        Distill(teacher=Offline(name="flat")).plan(model, ctx)
    with pytest.raises(PlanError, match=r"no teacher 'fife' in Task.teachers; did you mean 'five'"):
        Distill(teacher=Offline(name="fife")).plan(model, ctx)


def test_plan_refuses_layers_that_do_not_exist_or_do_not_suit(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    with pytest.raises(PlanError, match="no layer 'feature' in the student; valid: 0, 1"):
        Distill(knowledge=[Hint(layers=[("feature", "1")])]).plan(model, ctx)
    with pytest.raises(PlanError, match="no layer '77' in the teacher; did you mean '7'"):
        Distill(knowledge=[Hint(layers=[("1", "77")])]).plan(model, ctx)
    with pytest.raises(PlanError, match="no layer '10' in the student"):
        Distill(teacher=SelfDeep(exits=["10"])).plan(model, ctx)
    with pytest.raises(PlanError, match="give vectors, which have no places"):
        Distill(knowledge=[{"kind": "attention", "layers": [("7", "7")]}]).plan(model, ctx)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(PlanError, match="finds no layer shallower than the last"):
        Distill(teacher="deep").plan(linear, ctx)


@pytest.mark.parametrize("teacher", ["online", "born_again"])
def test_plan_refuses_to_start_anew_when_a_layer_does_not_know_how(teacher: str, make_context: MakeContext) -> None:
    model = nn.Sequential(nn.Flatten(), Odd(), nn.Linear(64, 4))
    with pytest.raises(PlanError, match=r"layer '1' \(Odd\) has parameters and no reset_parameters\(\)"):
        Distill(teacher=teacher).plan(model, make_context())


def test_public_names_serve_an_own_loop() -> None:
    assert pared.Distill is Distill
    assert set(pared.distill.__all__) >= {"ResponseLoss", "Hint", "Attention", "Contrastive", "Flow", "Distill"}
    for name in pared.distill.__all__:
        assert getattr(pared.distill, name).__doc__
