"""Tiny trainings: a task of two separable clouds, and the context of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pared.step import Context
from pared.task import Task


def clouds(batches: int, size: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of points around (2, 2, ...) labelled 1 and (-2, -2, ...) labelled 0, with a spread of 1."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        labels = torch.randint(0, 2, (size,), generator=generator)
        points = torch.randn(size, 6, generator=generator) + (labels[:, None] * 4 - 2)
        made.append((points, labels))
    return made


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fraction of right answers, written out: the loop must serve any callable."""
    return (output.argmax(1) == target).float().mean()


def net(seed: int = 0) -> nn.Module:
    """A network with weights, running statistics and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)).eval()


@pytest.fixture(autouse=True)
def small(one_thread: None) -> None:
    """Nothing here is large enough to share."""


@pytest.fixture
def model() -> nn.Module:
    return net()


@pytest.fixture
def make_task() -> Callable[..., Task]:
    def make(**changes: Any) -> Task:
        given = {
            "example_inputs": (torch.zeros(2, 6),),
            "train": clouds(5, 16, seed=1),
            "validation": clouds(2, 32, seed=2),
            "loss": nn.CrossEntropyLoss(),
            "metrics": accuracy,
        }
        return Task(**(given | changes))

    return make


@pytest.fixture
def make_context(tmp_path: Path, make_task: Callable[..., Task]) -> Callable[..., Context]:
    def make(**changes: Any) -> Context:
        fields = {field.name for field in dataclasses.fields(Context)}
        task = make_task(**{name: value for name, value in changes.items() if name not in fields})
        given = {"task": task, "target": None, "work": tmp_path / "work", "dense": net()}
        return Context(**(given | {name: value for name, value in changes.items() if name in fields}))

    return make
