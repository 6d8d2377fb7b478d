"""What a quantized file will score on x86 without VNNI, emulated on data that may judge."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.measure.fidelity import Comparison
from pared.metrics import Metric
from pared.quantize.calibrate import CHUNK
from pared.quantize.emulation import Emulation, layers_at_risk
from pared.step import Target
from pared.task import Batch, Inputs, Task, evaluate_all

# Emulation does some 3 billion multiplications a second on a core: a quarter of a minute in the worst case.
MACS = 40_000_000_000
SAMPLES = 256
FEWEST = 8


def emulate_without_vnni(
    model: nn.Module, target: Target, task: Task, batches: Iterable[Batch], metrics: tuple[Metric, ...]
) -> dict[str, Any] | None:
    """Metrics and distance of a program with and without saturation; None where nothing can saturate.

    Both are emulated on the same samples, so that they differ by saturation alone.

    Args:
        model: The quantized program.
        target: For the runtime's rules.
        task: For the output to look at.
        batches: Data that may judge; as many samples are read as there is time for.
        metrics: To take; empty where the data have no targets.

    Returns:
        The entries of `report.data.WithoutVnni`.
    """
    # Other runtimes saturate too, and round otherwise: of them nothing is claimed.
    if target.name != "onnxruntime" or not isinstance(model, fx.GraphModule) or not layers_at_risk(model):
        return None
    start = time.monotonic()
    exact, saturating = (Emulation(model, saturate=flag) for flag in (False, True))
    comparison = Comparison()
    outputs: list[Tensor] = []

    def with_vnni(inputs: Inputs) -> Tensor:
        outputs[:] = [predict(exact, task, inputs)]
        return outputs[0]

    def without(inputs: Inputs) -> Tensor:
        found = predict(saturating, task, inputs)
        comparison.update(outputs[0].numpy(), found.numpy())
        return found

    batches = iter(batches)
    first = next(batches)
    predict(exact, task, first.inputs.part(0, 1))
    samples = max(FEWEST, min(SAMPLES, MACS // max(exact.macs, 1)))
    seen = list(limited(itertools.chain([first], batches), samples))
    before, after = (
        evaluate_all([with_vnni, without], seen, metrics) if metrics else unlabelled(with_vnni, without, seen)
    )
    agreement = comparison.result()
    return {
        "metrics": after,
        "metrics_with": before,
        "sqnr_db": agreement.sqnr_db,
        "agreement": agreement.agreement,
        "samples": sum(batch.inputs.size for batch in seen),
        "seconds": time.monotonic() - start,
    }


def unlabelled(
    first: Callable[[Inputs], Tensor], second: Callable[[Inputs], Tensor], batches: Iterable[Batch]
) -> tuple[dict[str, float], dict[str, float]]:
    """Run both on data without targets; there are no metrics then."""
    for batch in batches:
        first(batch.inputs)
        second(batch.inputs)
    return {}, {}


def predict(emulation: Emulation, task: Task, inputs: Inputs) -> Tensor:
    """The output that the task looks at, a few samples at a time."""
    return torch.cat([task.pick(emulation(part)) for part in inputs.chunks(CHUNK)])


def limited(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first samples, with their targets."""
    left = samples
    for batch in batches:
        size = min(batch.inputs.size, left)
        cut = isinstance(batch.target, Tensor) and size < batch.inputs.size
        yield Batch(batch.inputs.part(0, size), batch.target[:size] if cut else batch.target)
        left -= size
        if left <= 0:
            return
