"""A network for clothes that is pruned to a third of its work in rounds, taught by what it was, then made int8.

    python examples/fashion_prune.py [FOLDER]   # some minutes on two cores; what ships is in FOLDER/small

The images are the 12,000 of Fashion-MNIST that pared carries.
"""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import pared
from pared.data.tasks import fashion_mnist
from pared.task import call, evaluate


def conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class Residual(nn.Sequential):
    """Layers whose input is added to their output: what leaves the sum must leave on both sides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def network(widths: tuple[int, ...]) -> nn.Module:
    """Stages of halved size, then one linear layer. Nothing in it knows of pruning."""
    parts: list[nn.Module] = []
    for inside, outside in pairwise((1, *widths)):
        parts += [conv(inside, outside, 1 if inside == 1 else 2), Residual(conv(outside, outside))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def rounds(macs: float, times: int, epochs: int) -> list[object]:
    """Prune a little and train again, some times over; then integers. A nameless teacher is the dense network."""
    prune = pared.PruneChannels(macs=macs, saliency="l2", ratios="sensitivity")
    recover = pared.Train(epochs=epochs, lr=0.001, optimizer="adamw", during=[pared.Distill(temperature=4)])
    return [pared.Repeat(times, [prune, recover]), pared.QuantizeStatic()]


def main(
    task: pared.Task,
    out: Path,
    *,
    widths=(16, 64, 128),
    epochs: int = 8,
    steps=(),
    budget=pared.Budget(max_drop=0.02),  # noqa: B008  # it is frozen
) -> dict[str, float]:
    """Accuracy on test data of the dense network, of what pruning left of it, and of the int8 file that ships."""
    learn = pared.Train(epochs=epochs, lr=0.003, optimizer="adamw")
    pared.compress(network(widths), [learn], task, out=out / "dense")
    dense = pared.load(out / "dense", model=network(widths))
    made = pared.compress(dense, steps or rounds(0.33, 3, 4), task, budget=budget, out=out / "run")
    made.save(out / "small")
    print(made.report)

    # Elsewhere: the folder and the class are enough. The file runs in its runtime, the network can be trained on.
    shipped = pared.open_artifact(out / "small")
    again = pared.load(out / "small", model=network(widths)).eval()
    runs = {"dense": partial(call, dense.eval()), "pruned": partial(call, again)}
    runs["int8 file"] = lambda inputs: shipped.predict(*inputs.args)
    with torch.no_grad():
        return {name: evaluate(run, task.batches("test"), task.metrics)["accuracy"] for name, run in runs.items()}


if __name__ == "__main__":
    for name, accuracy in main(fashion_mnist(), Path(*sys.argv[1:2] or ["runs/fashion_prune"])).items():
        print(f"{name:10} {accuracy:.2%}")
