"""The fast target in place of the real one, and its clock in place of the workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import pared
from fake_pipeline import Changing, FastTarget, Net, make_task
from pared.task import Task


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> FastTarget:
    made = FastTarget()
    monkeypatch.setattr("pared.pipeline.entry.find_target", lambda name: made)
    monkeypatch.setattr("pared.pipeline.run.time_in_turn", made.time_in_turn)
    monkeypatch.setattr("pared.pipeline.run.peak_memory", lambda command: 1)
    monkeypatch.setattr("pared.pipeline.run.count", lambda *_: [])
    Changing.calls.clear()
    Changing.histories.clear()
    Changing.laters.clear()
    Changing.refused.clear()
    Changing.denses.clear()
    return made


@pytest.fixture
def compress(target: FastTarget, tmp_path: Path) -> Callable[..., pared.Artifact]:
    """`pared.compress` of a fresh `Net` into one folder."""

    def run(*steps: Any, task: Task | None = None, model: nn.Module | None = None, **settings: Any) -> pared.Artifact:
        given = {"out": tmp_path / "out"} | settings
        return pared.compress(model or Net(), list(steps), task or make_task(), **given)

    return run
