"""What an epoch of distillation costs beside a plain one, on the CPU: with the teacher's outputs on disk, and live.

    python benchmarks/distill_cost.py [--batch 64 128] [--samples 8000] [--rounds 7] [--quick]

A small CNN on Fashion-MNIST as it comes with the package, on one thread. Three trainings take turns, epoch by epoch,
in one process (plain, cached, live, plain, ...), so that what else the machine does falls on all alike. Each is the
loop of `pared.Train`, resumed again and again; the first epoch, which fills the cache, is told apart. Seconds are the
processor's, which a busy machine does not stretch as it does those on the wall; both are in the rows. No rival: what is
compared is the same loop without the teacher.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Results
from torch import Tensor, nn

import pared
from pared.data import fashion_mnist
from pared.distill import Distill, Offline
from pared.step import Context
from pared.train.callbacks import Callback

ISSUE = 4


class Clock(Callback):
    """Seconds of an epoch: of the processor, and on the wall."""

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        self.start = time.process_time(), time.perf_counter()

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        self.seconds = time.process_time() - self.start[0], time.perf_counter() - self.start[1]


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


def network(width: int) -> nn.Module:
    """Three convolutions, each halving the size."""
    layers = [*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def data(samples: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """The first samples of the embedded train data, in batches."""
    images, labels = (torch.from_numpy(part[:samples].copy()) for part in fashion_mnist.load().train)
    return list(zip(images.split(batch), labels.split(batch), strict=True))


class Runner:
    """One training, an epoch at a time: each call resumes it from its checkpoint with one epoch more."""

    def __init__(self, task: pared.Task, distill: Distill | None, work: Path) -> None:
        from pared.train.loop import fit

        self.fit, self.task, self.work, self.distill = fit, task, work, distill
        torch.manual_seed(0)
        self.model = network(16)
        self.ctx = Context(task=task, target=None, work=work, dense=network(64))  # type: ignore[arg-type]
        self.plan = distill.plan(self.model, self.ctx) if distill else None
        self.epochs = 0

    def epoch(self) -> tuple[float, float]:
        """Seconds of the next epoch, processor and wall: its batches, and nothing before or after."""
        self.epochs += 1
        clock = Clock()
        own: list[Any] = [self.distill.callback(self.plan, self.ctx)] if self.distill and self.plan else []
        self.fit(
            self.model,
            self.task,
            epochs=self.epochs,
            lr=0.05,
            optimizer=pared.Train().optimizer,
            schedule=pared.Train().schedule,
            callbacks=[*own, clock],
            checkpoint=self.work / "checkpoint.pt",
        )
        return clock.seconds


def measure(batch: int, options: argparse.Namespace, results: Results) -> None:
    """The rows of one batch size."""
    task = pared.Task(
        example_inputs=torch.zeros(2, 1, 28, 28), train=data(options.samples, batch), loss=nn.CrossEntropyLoss()
    )
    with tempfile.TemporaryDirectory() as name:
        kinds = {"plain": None, "cached": Distill(teacher=Offline(cache=True)), "live": Distill()}
        runners = {kind: Runner(task, distill, Path(name) / kind) for kind, distill in kinds.items()}
        filling = {kind: runner.epoch() for kind, runner in runners.items()}
        rounds = [{kind: runner.epoch() for kind, runner in runners.items()} for _ in range(options.rounds)]
    row: dict[str, Any] = {"batch": batch, "samples": options.samples, "rounds": len(rounds)}
    row |= {f"{kind}_s": statistics.median(found[kind][0] for found in rounds) for kind in kinds}
    row |= {"filling": filling["cached"][0] / filling["plain"][0]}
    for kind in ("cached", "live"):
        row[kind] = statistics.median(found[kind][0] / found["plain"][0] for found in rounds)
        row[f"{kind}_wall"] = statistics.median(found[kind][1] / found["plain"][1] for found in rounds)
    ratios = sorted(found["cached"][0] / found["plain"][0] for found in rounds)
    results.add(row | {"low": ratios[0], "high": ratios[-1]})
    what = f"epoch with cached teacher outputs against a plain one, batch {batch}, ratio"
    results.claim(ISSUE, what, row["cached"], "<=", 1.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few samples, no JSON")
    options = parser.parse_args()
    options.samples = 1000 if options.quick else options.samples
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        results = Results("distill_cost", fresh=True, folder=Path(name) if options.quick else RESULTS)
        for batch in options.batch:
            measure(batch, options, results)


if __name__ == "__main__":
    main()
