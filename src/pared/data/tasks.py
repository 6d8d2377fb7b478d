"""The table of embedded tasks: data, loss and metrics that come with the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pared.data import fashion_mnist as fashion
from pared.data.batches import Arrays, Batches
from pared.task import Task

CALIBRATION = 512


def fashion_mnist(full: bool = False, batch_size: int = 128) -> Task:
    """Ten kinds of clothes, grey images of 28 x 28; judged by accuracy.

    Args:
        full: All 70,000 images, where they are on disk, instead of the 12,000 embedded ones.
        batch_size: Images in a batch.

    Raises:
        DataError: `full`, and the files are not on disk.
    """
    splits = fashion.load(full)
    images, labels = splits.train
    return Task(
        example_inputs=(torch.from_numpy(images[:1].copy()),),
        calibration=Batches(Arrays(images[:CALIBRATION], labels[:CALIBRATION]), batch_size=batch_size),
        train=Batches(Arrays(images, labels), batch_size=batch_size),
        validation=Batches(Arrays(*splits.validation), batch_size=batch_size),
        test=Batches(Arrays(*splits.test), batch_size=batch_size),
        loss=nn.CrossEntropyLoss(),
        metrics=("accuracy",),
    )


TASKS: dict[str, Callable[..., Task]] = {"fashion_mnist": fashion_mnist}
