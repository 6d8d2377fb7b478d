"""Two processes take the steps of one; a killed process ends the run with an error and a checkpoint to go on from."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from harness import Results
from torch import Tensor, nn

from pared.data.tasks import fashion_mnist
from pared.errors import TrainError
from pared.task import Task
from pared.train.callbacks import Callback
from pared.train.checkpoint import Checkpoint
from pared.train.hardware import Hardware
from pared.train.loop import fit
from pared.train.optimizers import SGD
from pared.train.schedules import Cosine

STEPS, BATCH, EPOCHS, KILLS = 50, 129, 3, 4  # an odd batch: parts of unequal size
SETTINGS: dict[str, Any] = {"lr": 0.05, "optimizer": SGD(), "schedule": Cosine(), "seed": 1}


class Losses(Callback):
    """Keeps the mean loss over the whole batch at every step, and ends the training after enough of them."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
        count = torch.tensor([current.item() * batch.inputs.size, float(batch.inputs.size)], dtype=torch.float64)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
        self.losses.append((count[0] / count[1]).item())
        return current

    def state_dict(self) -> Mapping[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])


def net() -> nn.Module:
    """Convolutions without batch norm."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 10)).eval()


def kill(rank: int, at: int, *told: Any) -> None:
    """Kill a process of the training from outside, as a system short of memory does; its progress calls this."""
    if told[1] == at:
        (child,) = (child for child in multiprocessing.active_children() if child.name == f"pared-{rank}")
        os.kill(child.pid or 0, signal.SIGKILL)


def small() -> Task:
    """A task of 15 batches."""
    task = fashion_mnist(batch_size=BATCH)
    task.train = [batch for batch, _ in zip(task.train, range(15), strict=False)]
    task.metrics = ()
    return task


def compare(results: Results) -> None:
    """The losses of the first steps, in one process and in two."""
    found = []
    for devices in (1, 2):
        callback = Losses()
        task = fashion_mnist(batch_size=BATCH)
        fit(
            net(),
            task,
            epochs=1,
            callbacks=[callback],
            hardware=Hardware(accelerator="cpu", devices=devices),
            **SETTINGS,
        )
        found.append(callback.losses[:STEPS])
    for step, (one, two) in enumerate(zip(*found, strict=True)):
        results.add({"step": step, "one_process": one, "two_processes": two})


def killed(results: Results) -> None:
    """Runs that lose a process, and what becomes of them."""
    settings = SETTINGS | {"epochs": EPOCHS, "hardware": Hardware(accelerator="cpu", devices=2)}
    with tempfile.TemporaryDirectory() as name:
        whole = fit(net(), small(), **settings)
        for number in range(KILLS):
            at, rank, file = 4 + 11 * number, number % 2, Path(name) / f"{number}.pt"
            message = ""
            try:
                fit(net(), small(), checkpoint=file, progress=functools.partial(kill, rank, at), **settings)
            except TrainError as error:
                message = str(error)
            saved = Checkpoint.load(file)
            resumed = fit(net(), small(), checkpoint=file, **settings)
            named = f"process {rank} of 2 was killed by SIGKILL" in message
            equal = all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
            epoch = saved.epoch if saved is not None else 0
            results.add(
                {"killed": rank, "at_step": at, "message": message, "kept_epoch": epoch, "named": named, "equal": equal}
            )


def main() -> None:
    results = Results("ddp", fresh=True)
    compare(results)
    killed(results)
    steps = [row for row in results.rows if "step" in row]
    apart = max(abs(row["one_process"] - row["two_processes"]) for row in steps)
    results.claim(
        4, f"largest difference of the loss in the first {len(steps)} steps, two processes and one", apart, "<=", 1e-4
    )
    runs = [row for row in results.rows if "killed" in row]
    good = sum(row["named"] and row["equal"] for row in runs)
    what = f"of {len(runs)} runs that lost a process, those that said so and, resumed, ended with the same weights"
    results.claim(4, what, good, ">=", len(runs))


if __name__ == "__main__":
    main()
