"""The moving average: against the sum written out, and what is validated, returned and resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.step import Context, Edit, Plan
from pared.task import Task
from pared.train.average import Average
from pared.train.callbacks import Callback
from pared.train.loop import fit
from pared.train.optimizers import SGD
from pared.train.schedules import Constant
from pared.train.step import Train

MakeTask = Callable[..., Task]
MakeContext = Callable[..., Context]
USUAL: dict[str, Any] = {"lr": 0.1, "optimizer": SGD(), "schedule": Constant()}


class Watch(Callback):
    """Keeps the tensors after every step."""

    def on_ready(self, model: nn.Module) -> None:
        self.seen = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]

    def after_step(self, model: nn.Module) -> None:
        self.seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_average_equals_the_sum_written_out_when_trained(model: nn.Module, make_task: MakeTask) -> None:
    watch, decay = Watch(), 0.8
    trained = fit(model, make_task(), epochs=2, ema=decay, callbacks=[watch], **USUAL)
    steps = len(watch.seen) - 1
    assert steps == 10
    for name, found in trained.state_dict().items():
        values = [seen[name].double() for seen in watch.seen]
        # Unrolled: the start counts decay^n, the tensor after step i (1 - decay) decay^(n - i).
        expected = decay**steps * values[0]
        expected += sum((1 - decay) * decay ** (steps - i) * values[i] for i in range(1, steps + 1))
        if name.endswith("num_batches_tracked"):
            expected = values[-1]
        assert torch.allclose(found.double(), expected, atol=1e-6), name


def test_averages_are_validated_and_returned_when_patience_is_set(model: nn.Module, make_context: MakeContext) -> None:
    def level(output: Tensor, target: Tensor) -> float:
        return output.mean().item()

    ctx = make_context(metrics=level, validation=[(torch.randn(64, 6), torch.zeros(64, dtype=torch.int64))])
    step = Train(epochs=3, lr=0.3, ema=0.9, patience=3, schedule="constant")
    trained = step.apply(model, step.plan(model, ctx), ctx)
    (file,) = ctx.work.glob("train-*.pt")
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        found = trained(ctx.task.validation[0][0]).mean().item()
    assert found == pytest.approx(max(saved["values"]), abs=1e-6)
    assert not torch.equal(saved["model"]["0.weight"], saved["average"]["0.weight"])


def test_zeros_stay_when_masked_weights_are_averaged(model: nn.Module, make_context: MakeContext) -> None:
    zeros = torch.rand(8, 6) < 0.5
    model[0].weight.detach().masked_fill_(zeros, 0)  # type: ignore[index,operator,union-attr]
    history = (Plan(step="PruneWeights", edits=(Edit("mask", "0", {"tensor": "weight"}),)),)
    ctx, step = make_context(history=history), Train(epochs=2, lr=0.1, ema=0.7)
    trained = step.apply(model, step.plan(model, ctx), ctx)
    assert torch.equal(trained[0].weight == 0, zeros)  # type: ignore[index]


def test_the_models_own_tensors_come_back_when_averages_were_in_place() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, 0.5)
    start = model.weight.detach().clone()
    model.weight.detach().add_(1)
    with pytest.raises(RuntimeError, match="stop"), average.in_place():
        assert torch.equal(model.weight, start)
        raise RuntimeError("stop")
    assert torch.equal(model.weight, start + 1)
