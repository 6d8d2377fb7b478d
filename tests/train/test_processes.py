"""Several processes against one, what they say when one dies, and that they go on exactly."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import processes_cases as cases
from pared.errors import TrainError, UsageError
from pared.train.checkpoint import Checkpoint
from pared.train.hardware import Hardware
from pared.train.loop import fit
from pared.train.optimizers import SGD
from pared.train.schedules import Constant

TWO = Hardware(accelerator="cpu", devices=2)
ONE = Hardware(accelerator="cpu")
USUAL: dict[str, Any] = {"lr": 0.05, "optimizer": SGD(weight_decay=0.01), "schedule": Constant()}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_two_processes_take_the_steps_of_one_when_batches_are_the_same() -> None:
    told: list[int] = []
    model, before = cases.net(), cases.net()
    one, two = cases.Record(), cases.Record()
    alone = fit(model, cases.task(), epochs=5, callbacks=[one], hardware=ONE, **USUAL)
    both = fit(
        model,
        cases.task(),
        epochs=5,
        callbacks=[two],
        hardware=TWO,
        progress=lambda what, done, total, note="": told.append(done),
        **USUAL,
    )
    assert len(one.losses) == len(two.losses) == 50
    # Sums of the same numbers in another order; 50 steps of rate 0.05 multiply the rounding a little.
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    assert two.scale.item() == pytest.approx(one.scale.item(), abs=1e-5)
    for (name, here), there in zip(alone.named_parameters(), both.parameters(), strict=True):
        assert torch.allclose(here, there, atol=1e-5), name
    assert torch.equal(both.unused.weight, before.unused.weight)  # type: ignore[union-attr,arg-type]
    assert bits(model) == bits(before)
    assert told == [*range(1, 51), 50]


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that share one import of PyTorch, which takes most of the time of a small training."""
    monkeypatch.setattr("pared.train.processes.START", "forkserver")
    multiprocessing.set_forkserver_preload(["pared.train.loop", "torch._dynamo"])


@pytest.mark.usefixtures("quick_start")
def test_a_killed_process_ends_the_run_and_resuming_is_exact_when_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**USUAL, "epochs": 3, "hardware": TWO, "patience": 3, "ema": 0.9, "seed": 5}
    task = cases.task(validation=True)
    model = cases.net(cases.WithDropout)
    whole = fit(model, task, callbacks=[cases.Record()], checkpoint=tmp_path / "whole.pt", **settings)
    words = r"process 1 of 2 was killed by SIGKILL .*; the checkpoint of epoch 1 is kept: run again with resume"
    with pytest.raises(TrainError, match=words):
        fit(model, task, callbacks=[cases.Record(kill=(1, 1))], checkpoint=tmp_path / "cut.pt", **settings)
    saved = Checkpoint.load(tmp_path / "cut.pt")
    assert saved is not None
    assert saved.epoch == 1
    resumed = fit(model, task, callbacks=[cases.Record()], checkpoint=tmp_path / "cut.pt", **settings)
    assert bits(resumed) == bits(whole)
    assert not torch.equal(whole.seen, model.seen)  # type: ignore[arg-type]

    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("a training that has ended was started again")

    monkeypatch.setattr("pared.train.loop.launch", launch)
    again = fit(model, task, callbacks=[cases.Record()], checkpoint=tmp_path / "cut.pt", **settings)
    assert bits(again) == bits(whole)


def test_what_cannot_be_sent_is_named_when_there_are_several_processes() -> None:
    task = cases.task()
    task.loss = lambda output, target: output.sum()
    with pytest.raises(UsageError, match=r"Task\(loss=...\) cannot be sent .*no lambda"):
        fit(cases.net(), task, epochs=1, hardware=TWO, **USUAL)
