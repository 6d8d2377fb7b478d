"""What `Task` accepts as data, turned into something that gives batches each time it is read.

    a DataLoader, `Batches`, a list of batches    taken as it is (`Batches` are shuffled for train)
    a Dataset of PyTorch                          samples, put together as a DataLoader does
    arrays                                        a tuple (inputs, target), or inputs alone: numpy arrays or tensors
    a Hugging Face dataset                        columns `image` and `label`
    a path                                        a parquet file of images, or a folder of class folders

A tuple of arrays is a whole data set; a list holds batches. Only where the two entries of a list cannot both be batches
(they differ in type or number of dimensions) is it read as the tuple. Images are cut to the shape of the example
inputs, values 0 to 1; where a model wants other values, use `images.parquet_images` or `images.folder_images`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pared.data.batches import Arrays, Batches, Items, stack_labelled
from pared.data.images import HubImages, Prepare, folder_images, parquet_images
from pared.errors import DataError


def adapt(source: Any, *, role: str, example_shape: tuple[int, ...]) -> Iterable[Any]:
    """Batches of a data source, to be read as often as one likes.

    Args:
        source: Any of the sources above.
        role: calibration, train, validation or test. Train data that we cut into batches are shuffled.
        example_shape: Shape of the model's first input, batch first; decides the size and colours of images.

    Raises:
        DataError: The source can be read only once, is empty, missing or of an unknown kind.
    """
    try:
        batches = recognise(source, example_shape)
    except DataError as error:
        raise DataError(f"{role} data: {error}") from error
    if isinstance(batches, Batches) and batches.shuffle is None and role == "train":
        return batches.shuffled(batches.generator.initial_seed())
    return batches


def recognise(source: Any, example_shape: tuple[int, ...]) -> Iterable[Any]:
    if isinstance(source, (str, Path)):
        return from_path(Path(source), example_shape)
    if isinstance(source, (Batches, DataLoader)):
        return source
    if isinstance(source, Dataset):
        return from_dataset(source)
    if all(hasattr(source, name) for name in ("features", "column_names", "__getitem__", "__len__")):
        return Batches(Items(HubImages(source, image_form(example_shape)), stack_labelled))
    if is_array(source) or (isinstance(source, Mapping) and is_inputs(source)):
        return Batches(Arrays(source, None))
    if is_whole_set(source):
        return Batches(Arrays(source[0], source[1]))
    return from_batches(source)


def from_path(path: Path, example_shape: tuple[int, ...]) -> Batches:
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if not path.is_dir() and path.suffix != ".parquet":
        raise DataError(f"{path} is neither a parquet file of images nor a folder of class folders")
    form = image_form(example_shape)
    images = folder_images if path.is_dir() else parquet_images
    return images(path, size=form.size, channels=form.channels)


def image_form(example_shape: tuple[int, ...]) -> Prepare:
    """Images in the shape of the example inputs, values 0 to 1. Raises: DataError where that is no shape of images."""
    if len(example_shape) != 4 or example_shape[1] not in (1, 3):
        raise DataError(
            f"images need example inputs of shape (batch, 1 or 3, height, width), found {example_shape}; "
            "give batches of your own, for example a DataLoader"
        )
    return Prepare((example_shape[2], example_shape[3]), channels=example_shape[1])


def from_dataset(source: Any) -> Batches:
    if isinstance(source, IterableDataset) or not isinstance(source, Sized):
        raise DataError(
            f"{type(source).__name__} gives single samples and has no length; "
            "wrap it: DataLoader(dataset, batch_size=32)"
        )
    return Batches(Items(source))


def from_batches(source: Any) -> Iterable[Any]:
    """A source that gives batches itself."""
    if isinstance(source, Mapping):
        found = ", ".join(map(str, source))
        raise DataError(f"a dict must hold arrays by input name, found entries {found}; choose one of its splits")
    if not isinstance(source, Iterable):
        raise DataError(
            f"{type(source).__name__} is no data source; give a DataLoader, a Dataset, a list of batches, "
            "arrays (inputs, target), or the path of a parquet file or folder of images"
        )
    if iter(source) is source:
        raise DataError(
            f"{type(source).__name__} can be read only once, and data are read several times; "
            "give list(...) of it, a DataLoader, or an object whose __iter__ starts anew"
        )
    if isinstance(source, Sized) and len(source) == 0:
        raise DataError("there is no batch in it")
    return source


def is_whole_set(source: Any) -> bool:
    """True for (inputs, target) arrays that stand for all samples, False for a sequence of batches."""
    if not isinstance(source, (tuple, list)) or len(source) != 2:
        return False
    inputs, target = source
    if not is_array(target) or not is_inputs(inputs):
        return False
    alike = is_array(inputs) and inputs.ndim == target.ndim and inputs.dtype == target.dtype
    return isinstance(source, tuple) or not alike


def is_inputs(value: Any) -> bool:
    """True for an array, or a tuple or dict of arrays."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(is_array, value.values()))
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(is_array, value))
    return is_array(value)


def is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Tensor))
