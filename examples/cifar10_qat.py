"""A network from the days of QuantStub, on CIFAR-10, through quantization-aware training to a tested int8 file.

QuantStub, DeQuantStub, FloatFunctional and fuse_modules are dropped: what runs in integers is read from the graph.

    python examples/cifar10_qat.py FOLDER   # holds train.parquet and test.parquet; about half an hour on two cores
"""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import pared
from pared.data.images import parquet_images
from pared.task import evaluate

GET = """{} is missing; write both files once (pip install datasets; it downloads 140 MB):
from datasets import load_dataset
for part in ("train", "test"): load_dataset("uoft-cs/cifar10", split=part).to_parquet(f"{}/{{part}}.parquet")"""
ANY = pared.Budget(allow_slower=True, allow_larger=True)  # accuracies are compared here, so nothing is rolled back


def conv_bn_relu(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """What `fuse_modules` was called on; now batch norms are folded without being told."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class Network(nn.Module):
    """Stages of halved size, each with a residual sum."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        shapes = [(before, width, 1 if before == 3 else 2) for before, width in pairwise((3, *widths))]
        self.down = nn.ModuleList(conv_bn_relu(*shape) for shape in shapes)
        self.inner = nn.ModuleList(nn.Sequential(conv_bn_relu(w, w), conv_bn_relu(w, w)) for _, w, _ in shapes)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for down, inner in zip(self.down, self.inner, strict=True):  # x = self.quant(x) stood above
            x = down(x)
            x = x + inner(x)  # self.add.add(x, inner(x)), with an nn.quantized.FloatFunctional
        return self.head(x.mean((2, 3)))  # self.dequant(self.head(...))


def cifar10(folder: Path, train: int = 45_000) -> pared.Task:
    """The task: of the training file's rows, the first `train` to learn from, the rest to decide by."""
    for missing in (name for name in ("train", "test") if not (folder / f"{name}.parquet").is_file()):
        raise SystemExit(GET.format(folder / f"{missing}.parquet", folder))
    images = partial(parquet_images, size=32, mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), batch_size=128)
    learn = partial(images, folder / "train.parquet")
    return pared.Task(
        example_inputs=(torch.zeros(1, 3, 32, 32),),
        train=learn(limit=train),
        validation=learn(start=train),
        test=images(folder / "test.parquet"),
        loss=nn.CrossEntropyLoss(),
        metrics="accuracy",
    )


def main(task: pared.Task, out: Path, epochs: int = 6, tune: int = 2, widths=(16, 32, 64)) -> dict[str, float]:
    """Accuracy on test data of the float file, of the file quantized after training, and of the one trained for it."""
    steps = [pared.Train(epochs=epochs, lr=0.05), pared.QuantizeStatic()]
    pared.compress(Network(widths), steps, task, budget=ANY, out=out / "static")
    trained = pared.load(out / "static", model=Network(widths))  # as it was before it was quantized
    aware = pared.Train(epochs=tune, lr=0.005, during=[pared.QuantizeAware()])
    pared.compress(trained, [aware], task, budget=ANY, out=out / "aware")
    static, aware = pared.open_artifact(out / "static"), pared.open_artifact(out / "aware")
    tested = evaluate(lambda inputs: aware.predict(*inputs.args), task.batches("test"), task.metrics)
    found = {"float": aware.report.final.baseline_metrics, "static": static.report.final.metrics, "aware": tested}
    return {name: metrics["accuracy"] for name, metrics in found.items()}


if __name__ == "__main__":
    for name, accuracy in main(cifar10(Path(*sys.argv[1:2])), Path("runs/cifar10_qat")).items():
        print(f"{name:6} {accuracy:.2%}")
