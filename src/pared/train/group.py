"""The processes of one training, seen from one of them: its part of each batch, and what all agree on.

Gradients are those of the mean over the whole batch, whatever the sizes of the parts. Alone, a process has the whole
batch and nothing to agree on.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from pared.errors import DataError
from pared.task import Batch, content_of
from pared.train.callbacks import Callback

BUCKET = 2**23  # numbers that travel together: enough to hide latency, and few beside the gradients themselves


class Group:
    """The processes of a training.

    Attributes:
        rank: Number of this process, from 0. Process 0 validates, writes checkpoints and reports.
        size: How many there are.
        sharded: Whether each holds a part of the model only.
    """

    def __init__(self, fabric: Fabric, *, sharded: bool = False) -> None:
        self.rank, self.size, self.device = fabric.global_rank, fabric.world_size, fabric.device
        self.sharded = sharded
        self.states: tuple[Any, ...] | None = None

    def part(self, batch: Batch, where: str) -> tuple[Batch, int]:
        """This process's samples of a batch, and how many of them count.

        A process for which none is left computes the first one again, with no weight, so that all take equal steps.

        Raises:
            DataError: A target that cannot be divided.
        """
        total = batch.inputs.size
        if self.size == 1:
            return batch, total
        start, stop = bounds(total, self.rank, self.size)
        shown = (start, stop) if stop > start else (0, 1)
        try:
            target = part_of(batch.target, *shown, total)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return Batch(batch.inputs.part(*shown), target), stop - start

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of some numbers over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes. Where none has one, there is still none."""
        if self.size == 1:
            return
        has = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device).int()
        torch.distributed.all_reduce(has)
        used = [parameter for parameter, count in zip(parameters, has.tolist(), strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in buckets([parameter.grad for parameter in used if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            for gradient, summed in zip(bucket, torch.split(flat, [part.numel() for part in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def check_same(self, batch: Batch, where: str) -> None:
        """Raise `DataError` unless every process has read this batch."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, content_of(batch))
        if len(set(found)) > 1:
            raise DataError(
                f"{where}: processes read different batches, so the data draw their order from more than the seed and "
                "epoch; give a generator to the sampler, or write set_epoch(epoch)"
            )

    def broadcast(self, value: Any) -> Any:
        """What process 0 has."""
        if self.size == 1:
            return value
        held = [move_data_to_device(value, "cpu")]
        torch.distributed.broadcast_object_list(held, 0)
        return held[0]

    def agree(self, model: nn.Module, callbacks: Sequence[Callback]) -> None:
        """Take over the buffers and callbacks' states of process 0, as a resumed training does. Weights are the same
        already: they all start alike and take the same steps."""
        if self.size == 1:
            return
        own = (dict(model.named_buffers()), [callback.state_dict() for callback in callbacks]) if self.rank == 0 else ()
        buffers, states = self.broadcast(own)
        if self.rank > 0:
            for name, buffer in model.named_buffers():
                buffer.detach().copy_(buffers[name])
            for callback, state in zip(callbacks, states, strict=True):
                callback.load_state_dict(state)

    def seed(self, seed: int, epoch: int) -> None:
        """Begin this process's own random numbers of an epoch. Those that are common go on unchanged."""
        if self.size == 1:
            return
        words = np.random.SeedSequence([seed % 2**64, epoch, self.rank + 1]).generate_state(2)
        common = self.random_states()
        random.seed(int(words[0]))
        np.random.seed(words[0])
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        self.states = self.random_states()
        self.set_random_states(common)

    @contextlib.contextmanager
    def own_random(self) -> Iterator[None]:
        """Inside, random numbers are this process's own (dropout); outside, all draw the same (the order of data)."""
        if self.states is None:
            yield
            return
        common = self.random_states()
        self.set_random_states(self.states)
        try:
            yield
        finally:
            self.states = self.random_states()
            self.set_random_states(common)

    def random_states(self) -> tuple[Any, ...]:
        gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu

    def set_random_states(self, states: tuple[Any, ...]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if states[3] is not None:
            torch.cuda.set_rng_state(states[3], self.device)


def bounds(total: int, rank: int, size: int) -> tuple[int, int]:
    """First sample of a process's part, and the one behind its last; earlier processes take what is left over.

    Example:
        >>> [bounds(5, rank, size=3) for rank in range(3)]
        [(0, 2), (2, 4), (4, 5)]
    """
    least, over = divmod(total, size)
    start = rank * least + min(rank, over)
    return start, start + least + (rank < over)


def part_of(target: Any, start: int, stop: int, total: int) -> Any:
    """Samples `start` to `stop` of a target of `total`: of a tensor, or of every tensor in tuples, lists and dicts.

    Raises:
        DataError: A tensor whose first dimension is not the batch's.

    Example:
        >>> part_of({"a": torch.arange(4), "b": "all"}, 1, 3, 4)
        {'a': tensor([1, 2]), 'b': 'all'}
    """
    if isinstance(target, Tensor):
        if target.ndim == 0 or target.shape[0] != total:
            raise DataError(
                f"a target of shape {tuple(target.shape)} for {total} samples cannot be divided among processes; "
                "give targets with the batch first"
            )
        return target[start:stop]
    if isinstance(target, Mapping):
        return {name: part_of(value, start, stop, total) for name, value in target.items()}
    if isinstance(target, (tuple, list)):
        parts = [part_of(value, start, stop, total) for value in target]
        return type(target)(*parts) if hasattr(target, "_fields") else type(target)(parts)
    return target


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, some at a time."""
    bucket: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda tensor: str(tensor.dtype)):
        if bucket and (tensor.dtype != bucket[0].dtype or sum(part.numel() for part in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
