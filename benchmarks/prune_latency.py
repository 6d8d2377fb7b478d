"""Networks of the same inputs in ONNX Runtime, timed in turn: what a prune of channels is worth on the runtime.

    python benchmarks/prune_latency.py

prints how long ResNet-20 takes for CIFAR-10 with widths cut in several ways: it is not the multiply-accumulates that
decide, but whether widths are multiples of what the runtime computes at once. `rows(models, example, baseline=...)`
times the networks of another benchmark.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from distillation import Residual, block
from harness import Results
from torch import Tensor, nn

import pared
from pared.graph.counts import count, totals
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.targets import find_target
from pared.targets.worker import worker_command, write_inputs

BATCHES = (1, 32)
SECONDS_EACH = 2.0
# Channels of the three stages, and of the first convolution of the blocks in each.
WIDTHS = {
    "dense": ((16, 32, 64), (16, 32, 64)),
    "0.7 of all": ((11, 22, 45), (11, 22, 45)),
    "0.75 of all": ((8, 24, 48), (8, 24, 48)),
    "half inside the blocks": ((16, 32, 64), (8, 16, 32)),
    "half, and 0.75 of the last stage": ((16, 32, 48), (8, 16, 32)),
    "16 inside the last two stages": ((16, 32, 64), (8, 16, 16)),
    "half of the last two stages": ((16, 16, 32), (16, 16, 32)),
}


def rows(models: Mapping[str, nn.Module], example: Tensor, *, baseline: str) -> Iterator[dict[str, Any]]:
    """A row for each network and batch size: milliseconds, and the speed-up over the baseline with its interval.

    Args:
        models: In eval mode; all take a batch of the same shape.
        example: One such batch of two.
    """
    target, names = find_target("onnxruntime"), list(models)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.onnx" for number in range(len(names))]
        for file, model in zip(files, models.values(), strict=True):
            target.export(model, pared.Task(example_inputs=example), file)
        for batch in BATCHES:
            inputs = Path(folder) / f"inputs-{batch}.npz"
            write_inputs(inputs, [torch.randn(batch, *example.shape[1:]).numpy()])
            commands = [worker_command("onnxruntime", file, threads=1, inputs_file=inputs) for file in files]
            times = dict(zip(names, time_in_turn(commands, budget_s=SECONDS_EACH * len(files)), strict=True))
            for name, own in times.items():
                found, taken = speedup(times[baseline], own), percentiles(own)
                measured = {"value": found.value, "low": found.low, "high": found.high, "verdict": found.verdict}
                yield {"kind": name, "batch": batch, "threads": 1, "p50_ms": taken.p50, "p90_ms": taken.p90} | {
                    "speedup": measured
                }


class Narrow(Residual):
    """A block whose first convolution has a width of its own."""

    def __init__(self, inputs: int, inside: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.body = nn.Sequential(*block(inputs, inside, stride), *block(inside, outputs)[:2])
        if stride > 1 and isinstance(self.short, nn.Identity):
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )


def network(stages: tuple[int, ...], inside: tuple[int, ...]) -> nn.Module:
    """ResNet-20 with these widths."""
    blocks, at = [], stages[0]
    for width, within in zip(stages, inside, strict=True):
        for number in range(3):
            blocks.append(Narrow(at, within, width, 2 if number == 0 and len(blocks) > 0 else 1))
            at = width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(at, 10))
    return nn.Sequential(*block(3, stages[0]), *blocks, *head).eval()


def main() -> None:
    results, example = Results("prune_latency", fresh=True), torch.zeros(2, 3, 32, 32)
    models = {name: network(*widths) for name, widths in WIDTHS.items()}
    macs = {name: totals(count(model, (example[:1],))).macs for name, model in models.items()}
    for row in rows(models, example, baseline="dense"):
        stages, inside = WIDTHS[row["kind"]]
        results.add({**row, "stages": stages, "inside": inside, "times_fewer_macs": macs["dense"] / macs[row["kind"]]})


if __name__ == "__main__":
    main()
