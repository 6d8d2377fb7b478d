"""Random numbers of a run: a function of (seed, epoch or stage), and none of the caller's states changed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from pared.task import Task


@contextlib.contextmanager
def isolated(task: Task) -> Iterator[None]:
    """Inside, gradients are on and kernels deterministic. Afterwards, whatever happened, the caller's random states,
    gradient mode and cuDNN flags are as they were, and so are the generators and epochs of the task's data."""
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    generators, parts = generators_of(task), epochs_of(task)
    states = [generator.get_state() for generator in generators]
    epochs = [getattr(part, "epoch", 0) for part in parts]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        # manual_seed seeds every GPU, so every GPU's state is kept.
        gpus = range(torch.cuda.device_count())
        with torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for part, epoch in zip(parts, epochs, strict=True):
            part.set_epoch(epoch)


def seed_all(task: Task, seed: int, epoch: int) -> None:
    """Seed Python's, numpy's and PyTorch's generators, and those that the task's data bring, from (seed, epoch), and
    tell the data the epoch.

    Nothing random then carries over from one epoch to the next, so that a checkpoint holds no random state. (The worker
    processes of a DataLoader with `persistent_workers=True` do carry theirs over: no one outside can seed them.)
    """
    words = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(2)
    value = int(words[0]) << 32 | int(words[1])
    random.seed(value)
    np.random.seed(words[0])
    torch.manual_seed(value)
    for generator in generators_of(task):
        generator.manual_seed(value)
    for part in epochs_of(task):
        part.set_epoch(epoch)


def parts_of(task: Task) -> list[Any]:
    """The task's data sources and what decides their order, each once."""
    found = []
    for source in task.sources.values():
        batch_sampler = getattr(source, "batch_sampler", None)
        found += [source, getattr(source, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(part): part for part in found if part is not None}.values())


def generators_of(task: Task) -> list[torch.Generator]:
    """Generators that the task's data draw their order from, each once."""
    found = [getattr(part, "generator", None) for part in parts_of(task)]
    return list({id(item): item for item in found if isinstance(item, torch.Generator)}.values())


def epochs_of(task: Task) -> list[Any]:
    """What among the task's data wants to know the epoch."""
    return [part for part in parts_of(task) if callable(getattr(part, "set_epoch", None))]
