"""The loop: against a loop written out in plain PyTorch, and by what it promises to leave alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pared.errors import DataError, ModelError, PlanError, TrainError, UsageError
from pared.step import Context
from pared.task import Task
from pared.train.callbacks import Callback
from pared.train.loop import fit
from pared.train.optimizers import SGD, AdamW
from pared.train.schedules import Constant, Cosine
from pared.train.step import Train

MakeTask = Callable[..., Task]
MakeContext = Callable[..., Context]


def apply(step: Train, model: nn.Module, ctx: Context) -> nn.Module:
    return step.apply(model, step.plan(model, ctx), ctx)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def accuracy(model: nn.Module, batches: Any) -> float:
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float().mean().item() for x, y in batches]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (
            SGD(momentum=0.8, weight_decay=0.01, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, weight_decay=0.01, nesterov=True),
        ),
        (SGD(momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.05)),
        (AdamW(weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
    ],
)
def test_loop_equals_a_plain_loop_bitwise_when_the_order_is_fixed(
    optimizer: SGD | AdamW, make: Callable[..., torch.optim.Optimizer], make_task: MakeTask
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    task = make_task()
    plain = copy.deepcopy(model).train()
    stepper = make(plain.parameters())
    for _ in range(3):
        for x, y in task.train:
            stepper.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            stepper.step()
    trained = fit(model, task, epochs=3, lr=0.05, optimizer=optimizer, schedule=Constant())
    assert bits(trained) == bits(plain)


def test_loop_learns_when_the_problem_is_easy(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    # Clouds 4 * sqrt(6) apart with a spread of 1: an ideal classifier errs once in 10^6.
    assert accuracy(model, ctx.task.validation) < 0.9
    trained = apply(Train(epochs=10, lr=0.1), model, ctx)
    assert accuracy(trained, ctx.task.validation) == 1.0


def test_loop_finds_the_least_squares_solution_when_the_problem_is_linear(make_task: MakeTask) -> None:
    x = torch.randn(64, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 1, dtype=torch.float64) + 0.1 * torch.randn(64, 1, dtype=torch.float64)
    task = make_task(example_inputs=(x[:1],), train=[(x, y)], validation=None, loss=nn.MSELoss(), metrics=())
    line = nn.Linear(6, 1, bias=False).double()
    trained = fit(line, task, epochs=400, lr=0.2, optimizer=SGD(), schedule=Cosine())
    expected = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(trained.weight, expected, atol=1e-8)  # type: ignore[arg-type]


def test_loop_leaves_the_callers_model_alone_when_it_trains(model: nn.Module, make_context: MakeContext) -> None:
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = bits(model)
    trained = apply(Train(epochs=1, lr=0.1), model, make_context())
    assert bits(model) == before
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert bits(trained).keys() == before.keys()
    assert bits(trained) != before


def test_result_keeps_modes_and_flags_when_they_are_mixed(model: nn.Module, make_context: MakeContext) -> None:
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    trained = apply(Train(epochs=1, lr=0.1), model, make_context())
    assert [m.training for m in trained.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in trained.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(trained[0].bias, model[0].bias)
    assert not torch.equal(trained[0].weight, model[0].weight)
    assert all(p.grad is None for p in trained.parameters())


def test_batch_norm_follows_the_data_when_training(model: nn.Module, make_context: MakeContext) -> None:
    trained = apply(Train(epochs=2, lr=0.01), model, make_context())
    assert trained[1].num_batches_tracked.item() == 10
    assert not torch.equal(trained[1].running_mean, model[1].running_mean)


def test_global_state_is_restored_when_training_ends_or_fails(model: nn.Module, make_context: MakeContext) -> None:
    def state() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            cudnn.deterministic,
            cudnn.benchmark,
        )

    batches = DataLoader(TensorDataset(torch.randn(20, 6), torch.randint(0, 2, (20,))), batch_size=5, shuffle=True)
    good = make_context(train=batches)
    bad = make_context(train=batches, loss=lambda output, target: output.sum() * float("nan"))
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            before = state()
            apply(Train(epochs=2, patience=1), model, good)
            assert state() == before
            with pytest.raises(TrainError):
                apply(Train(epochs=1), model, bad)
            assert state() == before


@pytest.mark.parametrize("kind", ["loader", "arrays"])
def test_result_depends_on_the_seed_alone_when_data_is_shuffled(
    kind: str, model: nn.Module, make_context: MakeContext
) -> None:
    x, y = torch.randn(40, 6), torch.randint(0, 2, (40,))

    def trained(seed: int, work: str, tmp: Path) -> dict[str, bytes]:
        torch.manual_seed(random.randrange(10**6))
        # Arrays are one data set, which the task cuts into batches and shuffles.
        loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
        source = loader if kind == "loader" else (x.numpy(), y.numpy())
        ctx = make_context(train=source, seed=seed, work=tmp / work)
        return bits(apply(Train(epochs=2, lr=0.1), model, ctx))

    tmp = make_context().work
    assert trained(1, "a", tmp) == trained(1, "b", tmp)
    assert trained(1, "c", tmp) != trained(2, "d", tmp)


def test_order_is_a_function_of_seed_and_epoch_when_a_loader_has_its_own_generator(
    model: nn.Module, make_task: MakeTask
) -> None:
    seen: list[list[float]] = []

    class Watch(Callback):
        def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
            seen.append(batch.inputs.args[0][:, 0].tolist())
            return current

    data = TensorDataset(torch.randn(16, 6), torch.randint(0, 2, (16,)))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=generator)
    before = generator.get_state()
    for _ in range(2):
        fit(
            model,
            make_task(train=loader),
            epochs=2,
            lr=0.1,
            optimizer=SGD(),
            schedule=Constant(),
            callbacks=[Watch()],
        )
    assert torch.equal(generator.get_state(), before)
    first, second = seen[:2], seen[2:]
    assert first == second
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1])


def test_source_is_told_its_epoch_when_it_asks(model: nn.Module, make_task: MakeTask) -> None:
    class Source:
        epoch = 7

        def __init__(self, batches: list[Any]) -> None:
            self.batches, self.told = batches, []

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter(self.batches)

    source = Source(make_task().train)
    fit(model, make_task(train=source), epochs=3, lr=0.1, optimizer=SGD(), schedule=Constant())
    assert list(dict.fromkeys(source.told)) == [0, 1, 2, 7]
    assert source.epoch == 7


def test_inputs_may_be_named_when_the_model_takes_keywords(make_context: MakeContext) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, *, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.left(a) + self.right(b)}

    batches = [({"a": torch.randn(8, 3), "b": torch.randn(8, 4)}, torch.randint(0, 2, (8,))) for _ in range(3)]
    ctx = make_context(example_inputs=batches[0][0], train=batches, validation=batches, output="logits")
    model = Sum().eval()
    trained = apply(Train(epochs=2, lr=0.1, patience=2), model, ctx)
    assert not torch.equal(trained.left.weight, model.left.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(trained.right.weight, model.right.weight)  # type: ignore[union-attr,arg-type]


def test_training_stops_and_names_the_batch_when_the_loss_is_nan(model: nn.Module, make_context: MakeContext) -> None:
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        value = nn.functional.cross_entropy(output, target)
        return value * float("nan") if len(calls) == 8 else value

    ctx = make_context(loss=loss)
    with pytest.raises(TrainError, match="epoch 2, batch 2: the loss is nan"):
        apply(Train(epochs=3, lr=0.1), model, ctx)
    assert len(calls) == 8
    (kept,) = ctx.work.glob("*.pt")
    saved = torch.load(kept, weights_only=True)
    assert saved["epoch"] == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved["model"].values())


def test_training_stops_when_the_validation_figure_is_nan(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context(metrics=lambda output, target: float("nan"))
    with pytest.raises(TrainError, match="on validation is nan after epoch 1"):
        apply(Train(epochs=2, patience=1), model, ctx)


def test_training_stops_when_the_last_step_breaks_a_weight(model: nn.Module, make_context: MakeContext) -> None:
    class Break(Callback):
        def after_step(self, model: nn.Module) -> None:
            model[4].bias.detach().fill_(float("inf"))  # type: ignore[index,operator,union-attr]

    task = make_context(train=[(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))]).task
    with pytest.raises(TrainError, match=r"4\.bias is not finite after epoch 1"):
        fit(model, task, epochs=1, lr=0.1, optimizer=SGD(), schedule=Constant(), callbacks=[Break()])


@pytest.mark.parametrize("label", [2, -1])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy], ids=["module", "function"])
@pytest.mark.parametrize("metrics", ["accuracy", ()], ids=["metric", "no metric"])
def test_labels_are_refused_when_they_lie_outside_the_classes(
    label: int, loss: Any, metrics: Any, model: nn.Module, make_context: MakeContext
) -> None:
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 0, 1])), (torch.randn(4, 6), torch.tensor([0, 1, label, 1]))]
    ctx = make_context(train=batches, loss=loss, metrics=metrics)
    with pytest.raises(DataError, match=f"train data, epoch 1, batch 1: .*{label}"):
        apply(Train(epochs=1), model, ctx)


def test_labels_that_the_loss_ignores_are_fine_when_negative(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context(train=[(torch.randn(4, 6), torch.tensor([0, 1, -100, 1]))])
    assert bits(apply(Train(epochs=1), model, ctx)) != bits(model)


def test_data_without_targets_is_refused_when_there_is_a_loss(model: nn.Module, make_context: MakeContext) -> None:
    with pytest.raises(DataError, match=r"batch 0: the loss needs a target; .*\(inputs, target\)"):
        apply(Train(epochs=1), model, make_context(train=[torch.randn(4, 6)]))


def test_a_batch_of_one_is_explained_when_batch_norm_refuses_it(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context(train=[(torch.randn(1, 6), torch.tensor([0]))])
    with pytest.raises(DataError, match="batch norm cannot train on one sample; choose another batch size"):
        apply(Train(epochs=1), model, ctx)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda output, target: output.argmax(1).float().mean(), ModelError, "does not depend on any weight"),
        (nn.CrossEntropyLoss(reduction="none"), UsageError, r"one number as a tensor, found \(16,\)"),
        (lambda output, target: 1.0, UsageError, "found float"),
    ],
)
def test_a_loss_is_refused_when_it_cannot_train(
    loss: Any, error: type[Exception], words: str, model: nn.Module, make_context: MakeContext
) -> None:
    with pytest.raises(error, match=words):
        apply(Train(epochs=1), model, make_context(loss=loss))


def test_the_best_epoch_is_returned_when_patience_is_set(model: nn.Module, make_context: MakeContext) -> None:
    scores = iter([0.2, 0.9, 0.3, 0.4, 0.8, 0.7])

    def score(output: Tensor, target: Tensor) -> float:
        return next(scores)

    weights: list[Tensor] = []

    class Watch(Callback):
        def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
            weights.append(model[0].weight.detach().clone())  # type: ignore[index,operator,union-attr]

    ctx = make_context(metrics=score, validation=[(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))])
    trained = fit(
        model,
        ctx.task,
        epochs=9,
        lr=0.1,
        optimizer=SGD(),
        schedule=Constant(),
        patience=3,
        callbacks=[Watch()],
        checkpoint=ctx.work / "a.pt",
    )
    # 0.9 after epoch 2, then three epochs without a better one.
    assert len(weights) == 5
    assert torch.equal(trained[0].weight, weights[1])  # type: ignore[index]
    saved = torch.load(ctx.work / "a.pt", weights_only=True)
    assert saved["values"] == [0.2, 0.9, 0.3, 0.4, 0.8]
    assert saved["best_epoch"] == 2


def test_the_lowest_loss_decides_when_there_is_no_metric(model: nn.Module, make_context: MakeContext) -> None:
    batch = (torch.randn(8, 6), torch.randint(0, 2, (8,)))
    ctx = make_context(metrics=(), train=[batch], validation=[batch])
    # A rate this high makes the loss rise sooner or later; the best epoch must be no worse than the start.
    trained = apply(Train(epochs=8, lr=0.5, patience=8, schedule="constant"), model, ctx)
    (file,) = ctx.work.glob("*.pt")
    values = torch.load(file, weights_only=True)["values"]
    with torch.no_grad():
        final = nn.functional.cross_entropy(trained(batch[0]), batch[1]).item()
    assert final == pytest.approx(min(values))


def test_callbacks_are_called_in_order_when_there_are_two(model: nn.Module, make_task: MakeTask) -> None:
    log: list[str] = []

    class Record(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_start(self, model: nn.Module) -> nn.Module:
            log.append(f"{self.name} start")
            return model

        def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
            log.append(f"{self.name} loss")
            return current * 2

        def after_backward(self, model: nn.Module) -> None:
            assert model[0].weight.grad is not None  # type: ignore[index]
            log.append(f"{self.name} backward")

        def after_step(self, model: nn.Module) -> None:
            log.append(f"{self.name} step")

        def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
            log.append(f"{self.name} epoch {epoch}")

        def on_end(self, model: nn.Module) -> nn.Module:
            log.append(f"{self.name} end")
            return model

    task = make_task(train=[(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))])
    both = [Record("a"), Record("b")]
    fit(model, task, epochs=1, lr=0.1, optimizer=SGD(), schedule=Constant(), callbacks=both)
    hooks = ["start", "loss", "backward", "step", "epoch 0"]
    assert log == [f"{name} {hook}" for hook in hooks for name in "ab"] + ["b end", "a end"]


def test_a_callback_may_bring_parameters_and_replace_the_model_when_it_starts(make_task: MakeTask) -> None:
    class Scale(Callback):
        def on_start(self, model: nn.Module) -> nn.Module:
            self.scale = nn.Parameter(torch.ones(()))
            return nn.Sequential(model)

        def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
            return current * self.scale.exp()

        def parameters(self) -> list[nn.Parameter]:
            return [self.scale]

        def on_end(self, model: nn.Module) -> nn.Module:
            return model[0]  # type: ignore[index,return-value]

    scale = Scale()
    model = nn.Linear(6, 2)
    trained = fit(model, make_task(), epochs=1, lr=0.1, optimizer=SGD(), schedule=Constant(), callbacks=[scale])
    assert isinstance(trained, nn.Linear)
    assert scale.scale.item() < 1.0


def test_progress_tells_loss_metric_and_time_when_training(model: nn.Module, make_context: MakeContext) -> None:
    told: list[tuple[str, int, int, str]] = []
    ctx = make_context(progress=lambda what, done, total, note="": told.append((what, done, total, note)))
    apply(Train(epochs=2, lr=0.1, patience=5), model, ctx)
    assert [(what, done, total) for what, done, total, _ in told] == [
        *(("Train", done, 10) for done in range(1, 11)),
        ("Train", 10, 10),
    ]
    assert told[0][3].startswith("epoch 1/2, loss ")
    assert "accuracy" in told[5][3]
    assert told[5][3].endswith(" left")
    assert "of 2" in told[-1][3]


def test_nothing_is_printed_when_training(
    model: nn.Module, make_context: MakeContext, capfd: pytest.CaptureFixture[str]
) -> None:
    apply(Train(epochs=1), model, make_context())
    assert capfd.readouterr() == ("", "")


def test_frozen_models_are_refused_when_nothing_can_train(model: nn.Module, make_context: MakeContext) -> None:
    model.requires_grad_(False)
    ctx = make_context()
    with pytest.raises(PlanError, match="no parameter requires a gradient"):
        Train().plan(model, ctx)
    with pytest.raises(PlanError, match="no parameter requires a gradient"):
        fit(model, ctx.task, epochs=1, lr=0.1, optimizer=SGD(), schedule=Constant())
