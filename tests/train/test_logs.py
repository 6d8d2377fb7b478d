"""TensorBoard, read back by its own reader."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pared.errors import UsageError
from pared.step import Context
from pared.train.step import Train

MakeContext = Callable[..., Context]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_figures_are_logged_at_every_step_when_a_folder_is_given(
    model: nn.Module, make_context: MakeContext, tmp_path: Path
) -> None:
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ctx = make_context()
    step = Train(epochs=2, lr=0.1, patience=2, log_dir=str(tmp_path / "log"))
    step.apply(model, step.plan(model, ctx), ctx)
    events = reader.EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(10))
    rates = [event.value for event in events.Scalars("lr")]
    assert rates[0] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    (file,) = ctx.work.glob("train-*.pt")
    saved = torch.load(file, weights_only=True)
    figures = [(event.step, event.value) for event in events.Scalars("accuracy")]
    assert figures == [(4, pytest.approx(saved["values"][0])), (9, pytest.approx(saved["values"][1]))]
    losses = [event.value for event in events.Scalars("loss")]
    assert saved["losses"] == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5], rel=1e-5)


def test_plan_says_what_to_install_when_tensorboard_is_missing(
    model: nn.Module, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'pared\[tensorboard\]'"):
        Train(log_dir="log").plan(model, make_context())


def test_a_checkpoint_is_taken_up_when_only_the_log_differs(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    step = Train(epochs=1)
    plan = step.plan(model, ctx)
    step.apply(model, plan, ctx)
    pytest.importorskip("tensorboard")
    Train(epochs=1, log_dir=str(ctx.work / "log")).apply(model, plan, ctx)
    assert len(list(ctx.work.glob("train-*.pt"))) == 1
