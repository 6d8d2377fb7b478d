"""Tiny students and teachers on images of two kinds, and the context of a run."""

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

CLASSES = 4


def images(batches: int = 3, size: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of small images whose mean tells their class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        made.append((torch.randn(size, 1, 8, 8, generator=generator) + labels[:, None, None, None], labels))
    return made


def net(channels: int = 4, seed: int = 0, classes: int = CLASSES) -> nn.Sequential:
    """Two convolutions at 8x8 and 4x4, batch norm, dropout: layers 2 and 5 end the sizes, 7 is the embedding."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * channels, classes),
    ).eval()


@pytest.fixture(autouse=True)
def small(one_thread: None) -> None:
    """Nothing here is large enough to share."""


@pytest.fixture
def model() -> nn.Module:
    return net()


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    def make(**changes: Any) -> Context:
        fields = {field.name for field in dataclasses.fields(Context)}
        given: dict[str, Any] = {
            "example_inputs": (torch.zeros(2, 1, 8, 8),),
            "train": images(),
            "loss": nn.CrossEntropyLoss(),
            "teachers": {"big": net(8, seed=5)},
        }
        task = Task(**(given | {name: value for name, value in changes.items() if name not in fields}))
        rest = {"task": task, "target": None, "work": tmp_path / "work", "dense": net(6, seed=3)}
        return Context(**(rest | {name: value for name, value in changes.items() if name in fields}))

    return make
