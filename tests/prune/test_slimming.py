"""Network slimming: the penalty by hand, and what is slimmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import PlanError
from pared.prune.slimming import Slim, Slimming
from pared.recipe import Recipe
from pared.step import Context, Skip
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task
from pared.train.optimizers import SGD
from pared.train.schedules import Constant


@pytest.fixture(autouse=True)
def small(one_thread: None) -> None:
    """Nothing here is large enough to share."""


class ActiveNorm(nn.BatchNorm1d):
    """A batch norm of another library."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def net(*norms: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), *norms, nn.Linear(4, 2))


def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (32,), generator=generator)
    points = torch.randn(32, 6, generator=generator) + labels[:, None]
    return Task(
        example_inputs=points[:2],
        train=[(points[:16], labels[:16]), (points[16:], labels[16:])],
        validation=[(points, labels)],
        loss=nn.CrossEntropyLoss(),
    )


def context(model: nn.Module, work: Path) -> Context:
    return Context(task=task(), target=OnnxRuntime(), work=work, dense=model)


def trained(model: nn.Module, work: Path, **settings: Any) -> nn.Module:
    given = {"epochs": 1, "lr": 0.1, "optimizer": SGD(momentum=0.0), "schedule": Constant()} | settings
    step = pared.Train(**given)
    ctx = context(model, work)
    return step.apply(model, step.plan(model, ctx), ctx)


def test_one_step_adds_strength_times_the_sign_to_a_known_gradient() -> None:
    norm = nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -0.5, 0.0, 1e-3]))
    callback = Slimming([""], strength=0.01)
    assert callback.on_start(norm) is norm
    callback.on_ready(norm)
    optimizer = torch.optim.SGD([norm.weight], lr=0.5)
    # d/dw of the sum of x * w / sqrt(1 + eps) is x / sqrt(1 + eps).
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    norm(x).sum().backward()
    callback.after_backward(norm)
    optimizer.step()
    gradient = x[0] / (1 + norm.eps) ** 0.5 + 0.01 * torch.tensor([1.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(norm.weight.detach(), torch.tensor([2.0, -0.5, 0.0, 1e-3]) - 0.5 * gradient)


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1e-3}, {"hardware": {"accumulate": 2}}])
def test_the_first_step_differs_by_the_penalty_alone_whatever_made_the_gradient(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = net(nn.BatchNorm1d(4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -0.5, 1.0, 2.0]))
    first = task().train[0]
    one = Task(
        example_inputs=first[0][:2], train=[first] * (2 if "hardware" in settings else 1), loss=nn.CrossEntropyLoss()
    )
    found = []
    for number, during in enumerate(([], [Slim(strength=0.01)])):
        step = pared.Train(
            epochs=1, lr=0.1, optimizer=SGD(momentum=0.0), schedule=Constant(), during=during, **settings
        )
        ctx = Context(task=one, target=OnnxRuntime(), work=tmp_path / str(number), dense=model)
        found.append(step.apply(model, step.plan(model, ctx), ctx))
    plain, slim = (dict(made.named_parameters()) for made in found)
    # lr * strength * sign(scale), and nothing else of the model moves otherwise.
    expected = 0.1 * 0.01 * torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(plain["1.weight"] - slim["1.weight"], expected, rtol=1e-3, atol=1e-7)
    assert all(torch.equal(plain[name], slim[name]) for name in plain if name != "1.weight")


def test_scales_end_smaller_the_stronger_the_penalty(tmp_path: Path) -> None:
    sums = [
        trained(net(nn.BatchNorm1d(4)), tmp_path / str(strength), epochs=10, during=[Slim(strength=strength)])[1]
        .weight.abs()
        .sum()
        .item()
        for strength in (1e-6, 0.1, 0.3)
    ]
    assert sums[0] > sums[1] + 0.5 > sums[2] + 1.0


def test_every_batch_norm_is_slimmed_or_skipped_with_the_reason(tmp_path: Path) -> None:
    frozen = nn.BatchNorm1d(4)
    frozen.weight.requires_grad_(False)
    model = net(
        nn.BatchNorm1d(4), ActiveNorm(4), frozen, nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4), nn.LayerNorm(4)
    )
    plan = Slim(exclude=("5",)).plan(model, context(model, tmp_path))
    assert plan.facts["slimmed"] == ["1", "2"]
    assert plan.skips == (
        Skip("3", "not slimmed: its scale is frozen"),
        Skip("4", "not slimmed: it has no scale (affine=False)"),
        Skip("5", "not slimmed: excluded by '5'"),
    )
    assert plan.facts["notes"] == ["Slim: 8 scales of 2 batch norms: 1, 2"]
    assert plan.edits == ()
    assert Slim(include=("1",)).plan(model, context(model, tmp_path)).facts["slimmed"] == ["1"]
    (whole,) = pared.dry_run(model, [pared.Train(during=[Slim(exclude=("5",))])], task())
    assert whole.skips == plan.skips


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4)])
def test_all_kinds_of_batch_norm_count(norm: nn.Module, tmp_path: Path) -> None:
    assert Slim().plan(nn.Sequential(norm), context(norm, tmp_path)).facts["slimmed"] == ["0"]


@pytest.mark.parametrize(
    ("norms", "settings", "message"),
    [
        ([], {}, r"no batch norm to slim \(the model has none\); take Slim out"),
        ([nn.BatchNorm1d(4, affine=False)], {}, r"no batch norm to slim \(1: it has no scale"),
        ([nn.BatchNorm1d(4)], {"exclude": ("*",)}, r"1: excluded by '\*'"),
        ([nn.BatchNorm1d(4)], {"include": ("head.*",)}, r"include='head\.\*' matches no batch norm"),
    ],
)
def test_slim_is_refused_when_it_finds_nothing(
    norms: list[nn.Module], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = net(*norms)
    with pytest.raises(PlanError, match=message):
        Slim(**settings).plan(model, context(model, tmp_path))


def test_a_shared_scale_counts_once_and_an_unused_one_stays() -> None:
    shared, unused = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    twin = nn.BatchNorm1d(4)
    twin.weight = shared.weight
    model = nn.ModuleList([shared, twin, unused])
    callback = Slimming(["0", "1", "2"], strength=0.5)
    callback.on_start(model)
    shared.weight.grad = torch.zeros(4)
    callback.after_backward(model)
    assert torch.equal(shared.weight.grad, torch.full((4,), 0.5))
    assert unused.weight.grad is None


def test_slim_says_so_when_the_scales_are_not_those_that_train() -> None:
    callback = Slimming(["0"], strength=0.5)
    with pytest.raises(PlanError, match="has no 0; put Slim first"):
        callback.on_start(nn.Sequential(nn.ReLU()))
    callback.on_start(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(PlanError, match="replaced the scale of 0"):
        callback.on_ready(nn.Sequential(nn.BatchNorm1d(4)))


def test_slim_trains_beside_quantization_when_it_stands_in_either_place(tmp_path: Path) -> None:
    model = net(nn.BatchNorm1d(4), nn.ReLU())
    for during in ([Slim(strength=0.1), pared.QuantizeAware()], [pared.QuantizeAware(), Slim(strength=0.1)]):
        data = task()
        given = Task(
            example_inputs=data.example_inputs, calibration=[data.train[0][0]], train=data.train, loss=data.loss
        )
        ctx = Context(task=given, target=OnnxRuntime(), work=tmp_path / during[0].__class__.__name__, dense=model)
        step = pared.Train(epochs=1, lr=0.1, during=during)
        memo = ctx.memo
        step.apply(model, step.plan(model, ctx), ctx)
        plain = pared.Train(epochs=1, lr=0.1, during=[pared.QuantizeAware()])
        other = Context(task=given, target=OnnxRuntime(), work=tmp_path / "plain", dense=model)
        plain.apply(model, plain.plan(model, other), other)
        assert memo["floating"][1].weight.abs().sum() < other.memo["floating"][1].weight.abs().sum()


def test_a_recipe_names_slim() -> None:
    data = {
        "model": "fashion_cnn",
        "task": "fashion_mnist",
        "steps": [{"Train": {"during": [{"Slim": {"strength": 0.01}}]}}],
    }
    assert Recipe.from_json(data).steps == (pared.Train(during=[pared.Slim(strength=0.01)]),)
