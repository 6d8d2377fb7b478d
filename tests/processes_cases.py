"""What the tests of several processes train: here, because each process imports it anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from pared.task import Task
from pared.train.callbacks import Callback

# Samples in each batch: parts of unequal size, and fewer samples than processes.
SIZES = (16, 7, 1, 16, 9, 3, 16, 2, 5, 16)


class Net(nn.Module):
    """Layers without statistics of the batch, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.first(x).relu())
        return output


class WithDropout(Net):
    """Random numbers of the model, and a buffer that follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.first(x).relu(), 0.3, self.training)
        if self.training:
            self.seen.mul_(0.9).add_(hidden.mean().detach())
        output: Tensor = self.last(hidden)
        return output + self.seen


def mean_loss(output: Tensor, target: Mapping[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(output, target["labels"][0])


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(3)
    return kind().eval()


def task(validation: bool = False) -> Task:
    """Batches of unequal size whose targets are nested."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 6, generator=generator), {"labels": (torch.randint(0, 3, (n,), generator=generator),)})
        for n in SIZES
    ]
    kept = batches[:2] if validation else None
    return Task(example_inputs=torch.zeros(1, 6), train=batches, validation=kept, loss=mean_loss)


class Record(Callback):
    """Scales the loss by a learned number, and keeps the loss of every step over all samples."""

    def __init__(self, kill: tuple[int, int] | None = None) -> None:
        self.scale = nn.Parameter(torch.zeros(()))
        self.losses: list[float] = []
        self.kill = kill

    def parameters(self) -> list[nn.Parameter]:
        return [self.scale]

    def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
        loss = current * self.scale.exp() + self.scale**2
        total, count = loss.item() * batch.inputs.size, float(batch.inputs.size)
        size = SIZES[len(self.losses) % len(SIZES)]
        if torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
            counts = rank < size  # one that had no sample of its own has computed another's
            both = torch.tensor([total * counts, count * counts], dtype=torch.float64)
            torch.distributed.all_reduce(both)
            total, count = both.tolist()
            assert processes == 2
        assert count == size
        self.losses.append(total / count)
        return loss

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if self.kill is not None and torch.distributed.is_initialized():
            rank, when = self.kill
            if (torch.distributed.get_rank(), epoch) == (rank, when):
                os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "scale": self.scale.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])
        self.scale.detach().copy_(state["scale"])


def wait_for(path: Path, seconds: float = 60) -> None:
    """Until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)
