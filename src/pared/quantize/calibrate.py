"""Calibration: run data through a graph once, and keep what the observers need and no activation past its last use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import fx

from pared.errors import DataError, QuantizeError
from pared.graph.capture import owner
from pared.sensitivity import flat
from pared.step import Progress, silent
from pared.task import Batch, Inputs

# Samples that go through the graph at once: activations of larger batches leave the cache, which doubled the time. Of
# samples of many numbers fewer go at once, which is no slower, and takes less memory.
CHUNK = 4
NUMBERS = 2**18
# Samples after which all threads wait for one another, so that ranges can be looked at as they were then.
PIECE = 32
WORKERS = 8  # at most: each holds the activations of a chunk


class Watcher(fx.Interpreter):
    """Runs a graph and shows chosen values to their observers, each to one thread at a time."""

    def __init__(
        self, graph: fx.GraphModule, observers: Mapping[str, Any], locks: Mapping[str, threading.Lock], first: int = 0
    ) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.extra_traceback = False  # of PyTorch's, in the text of our errors
        self.observers = observers
        self.locks = locks
        self.first = first  # samples that come before these
        self.samples = 0

    def show(self, inputs: Inputs) -> None:
        """Run the graph on the inputs of one call."""
        self.samples = inputs.size
        self.run(*flat(self.graph_module, inputs))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        observer = self.observers.get(n.name)
        if observer is not None:
            try:
                with self.locks[n.name]:
                    tell(observer, value, self.first, self.samples)
            except DataError as error:
                raise QuantizeError(
                    f"{owner(n) or '(root)'} ({n.name}): {error}; look at the layer before it, or at the data"
                ) from None
        return value


def tell(observer: Any, value: Any, first: int, samples: int) -> None:
    """Show a tensor to an observer, with its place in the data if that matters to it."""
    if hasattr(observer, "update_at"):
        observer.update_at(value, first, samples)
    else:
        observer.update(value)


def calibrate(
    graph: fx.GraphModule,
    observers: Mapping[str, Any],
    batches: Iterable[Batch],
    progress: Progress = silent,
    paused: Callable[[int], None] | None = None,
    *,
    ordered: bool = False,
) -> int:
    """Show every calibration sample to the observers.

    Args:
        graph: Its nodes' names are the observers' keys.
        observers: Objects with `update(tensor)`, to which the order of the samples makes no difference, or with
            `update_at(tensor, first, samples)`, which says where in the data the samples stand.
        batches: Calibration data, of any batch sizes.
        paused: Called with the number of samples seen so far, after some 32 each time, while no observer changes.
        ordered: Show the samples in their order, for observers that sum floats.

    Returns:
        Number of samples seen.

    Raises:
        DataError: No data, or all samples identical.
        QuantizeError: An activation is not finite; names the node and the batch.
    """
    count = 0
    first: dict[str, torch.Tensor] = {}
    varied = False

    def noted() -> Iterator[Batch]:
        nonlocal count, varied
        for batch in batches:
            yield batch
            tensors = batch.inputs.tensors
            first.update({name: tensor[:1] for name, tensor in tensors.items() if name not in first})
            varied = varied or any(not repeats(tensor, first[name]) for name, tensor in tensors.items())
            count += batch.inputs.size
            progress("calibrate", count, 0, f"{count} samples")

    samples = show(graph, observers, noted(), paused, ordered=ordered)
    if not varied and samples > 1:
        raise DataError(f"all {samples} calibration samples are identical; give real, varied data")
    progress("calibrate", samples, samples, f"{samples} samples")
    return samples


def show(
    graph: fx.GraphModule,
    observers: Mapping[str, Any],
    batches: Iterable[Batch],
    paused: Callable[[int], None] | None = None,
    *,
    ordered: bool = False,
) -> int:
    """Show samples to the observers, whatever they are. See `calibrate`."""
    show_part = functools.partial(show_chunk, graph, observers, {name: threading.Lock() for name in observers})
    samples = 0
    with one_core_each(1 if ordered else WORKERS) as pool:
        for index, batch in enumerate(batches):
            try:
                for piece in batch.inputs.chunks(PIECE):
                    parts = list(piece.chunks(at_once(piece)))
                    starts = itertools.accumulate((part.size for part in parts), initial=samples)
                    for _ in pool.map(show_part, parts, starts):
                        pass
                    samples += piece.size
                    give_back_memory()
                    if paused is not None:
                        paused(samples)
            except QuantizeError as error:
                error.add_note(f"while calibrating on batch {index}")
                raise
    return samples


def give_back_memory() -> None:
    """Return what was freed to the system: glibc would keep it in parts for each thread, more with every piece."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def at_once(inputs: Inputs) -> int:
    """How many samples to run together."""
    largest = max(tensor.numel() for tensor in inputs.tensors.values()) // inputs.size
    return max(1, min(CHUNK, NUMBERS // max(largest, 1)))


def show_chunk(
    graph: fx.GraphModule,
    observers: Mapping[str, Any],
    locks: Mapping[str, threading.Lock],
    inputs: Inputs,
    first: int,
) -> None:
    """Run a graph on some samples, for its observers."""
    with torch.no_grad():  # a thread has its own
        Watcher(graph, observers, locks, first).show(inputs)


@contextlib.contextmanager
def one_core_each(most: int = WORKERS) -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch may use, up to `most`, and PyTorch on one core in each; one thread gets all cores.

    Threads that share one operator wait for the slowest at its end, spinning: beside a busy process, that made
    calibration seven times slower. Samples need not wait for one another, and their results do not depend on how many
    threads there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if most > 1 else threads)
    try:
        with ThreadPoolExecutor(min(threads, most)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def repeats(tensor: torch.Tensor, sample: torch.Tensor) -> bool:
    """True where every sample of a tensor equals the given one."""
    return tensor.shape[1:] == sample.shape[1:] and bool((tensor == sample).all())


def first_samples(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """Batches up to a number of samples, the last one cut to fit; all of them where `limit` is None."""
    left = limit
    for batch in batches:
        if left is not None and batch.inputs.size >= left:
            yield Batch(batch.inputs.part(0, left), None)
            return
        yield batch
        if left is not None:
            left -= batch.inputs.size
