"""Batches that can be read again and again, in an order that is a function of (seed, epoch) and of nothing else.

A source hands out its samples; `Batches` decides how many at a time and in which order. Decoding images is `images`'s
work, choosing a source for what a user gave is `adapters`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from pared.errors import DataError

BATCH_SIZE = 32
Array = np.ndarray | Tensor


class Source(Protocol):
    """Samples that can be read again and again."""

    def __len__(self) -> int: ...

    def batches(self, size: int, rng: np.random.Generator | None) -> Iterator[Any]:
        """All samples, `size` at a time, the last batch perhaps smaller; in their own order where `rng` is None."""


class Batches:
    """A source, cut into batches.

    The order is drawn from (the seed of `generator`, the epoch), and reading draws nothing from `generator`: until
    one of the two is set anew, every reading gives the same batches. `Train` sets both, from the seed of the run.

    Args:
        source: What is cut: `Arrays`, `Items`, or the images of a file or folder.
        batch_size: Samples in a batch, at least 1; the last batch may hold fewer.
        shuffle: None leaves it to the role in a `Task`: train data are shuffled, all other are not.
        seed: First seed of the order, at least 0.

    Raises:
        DataError: No sample, or a batch size below 1.

    Example:
        >>> batches = Batches(Arrays(np.arange(4.0), None), batch_size=3)
        >>> [inputs.tolist() for inputs, _ in batches]
        [[0.0, 1.0, 2.0], [3.0]]
    """

    def __init__(
        self, source: Source, *, batch_size: int = BATCH_SIZE, shuffle: bool | None = None, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, found {batch_size}")
        if len(source) == 0:
            raise DataError("the data hold no sample")
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.epoch = 0
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng([self.generator.initial_seed(), self.epoch]) if self.shuffle else None
        return self.source.batches(self.batch_size, rng)

    def set_epoch(self, epoch: int) -> None:
        """Order the next readings for this epoch."""
        self.epoch = epoch

    def shuffled(self, seed: int = 0) -> Batches:
        """The same samples, in an order of their own for each epoch."""
        return Batches(self.source, batch_size=self.batch_size, shuffle=True, seed=seed)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label, where the source knows them."""
        return tuple(getattr(self.source, "classes", ()))


class Arrays:
    """Samples along the first dimension of numpy arrays or tensors. Memory-mapped arrays are read a batch at a time.

    Args:
        inputs: An array, a tuple of arrays or a dict of arrays by keyword.
        target: An array as long as the inputs, or None. Integers become int64, which the losses of PyTorch want.

    Raises:
        DataError: Lengths differ, an array has no first dimension, or holds something else than numbers.
    """

    def __init__(self, inputs: Any, target: Array | None) -> None:
        named = {"target": target} if target is not None else {}
        named |= {f"input {name}": array for name, array in entries(inputs)}
        for name, array in named.items():
            check_array(array, name)
        lengths = {name: len(array) for name, array in named.items()}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise DataError(f"arrays of one data set must be equally long, found: {found} samples")
        self.inputs = inputs
        self.target = target
        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def batches(self, size: int, rng: np.random.Generator | None) -> Iterator[tuple[Any, Tensor | None]]:
        for index in cut(self.length, size, rng):
            yield self.take_inputs(index), None if self.target is None else as_label(take(self.target, index))

    def take_inputs(self, index: np.ndarray) -> Any:
        if isinstance(self.inputs, Mapping):
            return {name: take(array, index) for name, array in self.inputs.items()}
        if isinstance(self.inputs, (tuple, list)):
            return tuple(take(array, index) for array in self.inputs)
        return take(self.inputs, index)


class Items:
    """Samples by number, put together by `collate`, as a map-style Dataset of PyTorch has them."""

    def __init__(self, samples: Any, collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.samples = samples
        self.collate = collate
        self.classes = getattr(samples, "classes", ())

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int, rng: np.random.Generator | None) -> Iterator[Any]:
        for index in cut(len(self), size, rng):
            samples = [self.samples[int(i)] for i in index]
            try:
                batch = self.collate(samples)
            except (TypeError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(
                    f"samples {index.tolist()} of {type(self.samples).__name__} do not make a batch: {reason}; "
                    "let each sample be tensors of one shape, or give a DataLoader with a collate_fn"
                ) from error
            yield batch


def cut(length: int, size: int, rng: np.random.Generator | None) -> Iterator[np.ndarray]:
    """The numbers 0 to `length` - 1, `size` at a time, shuffled where there is an `rng`."""
    order = np.arange(length) if rng is None else rng.permutation(length)
    for start in range(0, length, size):
        yield order[start : start + size]


def entries(inputs: Any) -> list[tuple[Any, Any]]:
    """The arrays of a data set's inputs, each with its name or position."""
    if isinstance(inputs, Mapping):
        return list(inputs.items())
    return list(enumerate(inputs)) if isinstance(inputs, (tuple, list)) else [(0, inputs)]


def check_array(array: Array, name: str) -> None:
    if array.ndim == 0:
        raise DataError(f"{name} is a single number; give an array with one entry for each sample")
    if isinstance(array, np.ndarray) and (array.dtype.kind not in "biufc" or not array.dtype.isnative):
        raise DataError(f"{name} is an array of {array.dtype}; convert it to numbers in native byte order first")


def take(array: Array, index: np.ndarray) -> Tensor:
    """A copy of the given rows, so that no batch shares memory with the data set."""
    return array[torch.from_numpy(index)] if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array[index]))


def as_label(target: Tensor) -> Tensor:
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return target.long() if whole else target


def stack_labelled(samples: Sequence[tuple[Tensor, int | None]]) -> tuple[Tensor, Tensor | None]:
    """A batch of (image, label) pairs; without target where there are no labels."""
    labels = [label for _, label in samples]
    target = None if labels[0] is None else torch.tensor(labels, dtype=torch.int64)
    return torch.stack([image for image, _ in samples]), target
