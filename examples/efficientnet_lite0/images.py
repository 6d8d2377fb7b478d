"""The task: ImageNet photographs from a parquet file, prepared as the network was trained."""

import torch
from torch import nn

import pared
from pared.data.images import parquet_images

# Shorter side 256 by bicubic interpolation, centre crop 224, (rgb - 127) / 128.
PREPARED = {"size": 224, "resize": 256, "mean": 127.0, "std": 128.0, "batch_size": 16}


def imagenet(images: str, calibration: int = 128, validation: int = 100) -> pared.Task:
    """A task on a file in the Hugging Face layout: columns `image` and `label`, labels 0 to 999.

    Args:
        images: The parquet file.
        calibration: So many images, from the first on, choose ranges.
        validation: So many after these decide; the rest is the test set, read once at the end.
    """
    return pared.Task(
        example_inputs=(torch.zeros(1, 3, 224, 224),),
        calibration=parquet_images(images, limit=calibration, **PREPARED),
        validation=parquet_images(images, start=calibration, limit=validation, **PREPARED),
        test=parquet_images(images, start=calibration + validation, **PREPARED),
        loss=nn.CrossEntropyLoss(),
        metrics=("accuracy", "top5"),
    )
