"""Calibration: run data through a graph once, and keep what the observers need and no activation past its last use."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import fx

from pared.errors import DataError, QuantizeError
from pared.graph.capture import owner
from pared.step import Progress, silent
from pared.task import Batch, Inputs

# Samples that go through the graph at once: activations of larger batches leave the cache, which doubled the time.
CHUNK = 4
WORKERS = 8  # at most: each holds the activations of a chunk


class Watcher(fx.Interpreter):
    """Runs a graph and shows chosen values to their observers, one at a time."""

    def __init__(self, graph: fx.GraphModule, observers: Mapping[str, Any], lock: threading.Lock) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # of PyTorch's, in the text of our errors
        self.observers = observers
        self.lock = lock
        # Keyword arguments come in the order of the example inputs, which need not be that of every batch.
        self.keywords: list[str] = graph._in_spec.child(1).context

    def show(self, inputs: Inputs) -> None:
        """Run the graph on the inputs of one call."""
        self.run(*inputs.args, *(inputs.kwargs[name] for name in self.keywords))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        observer = self.observers.get(n.name)
        if observer is not None:
            try:
                with self.lock:
                    observer.update(value)
            except DataError as error:
                raise QuantizeError(
                    f"{owner(n) or '(root)'} ({n.name}): {error}; look at the layer before it, or at the data"
                ) from None
        return value


def calibrate(
    graph: fx.GraphModule,
    observers: Mapping[str, Any],
    batches: Iterable[Batch],
    progress: Progress = silent,
    *,
    ordered: bool = False,
) -> int:
    """Show every calibration sample to the observers.

    Args:
        graph: Its nodes' names are the observers' keys.
        observers: Objects with `update(tensor)`, to which the order of the samples makes no difference.
        batches: Calibration data, of any batch sizes.
        ordered: Show the samples in their order, for observers that sum floats.

    Returns:
        Number of samples seen.

    Raises:
        DataError: No data, or all samples identical.
        QuantizeError: An activation is not finite; names the node and the batch.
    """
    show = functools.partial(show_chunk, graph, observers, threading.Lock())
    samples = 0
    first: dict[str, torch.Tensor] = {}
    varied = False
    with one_core_each(1 if ordered else WORKERS) as pool:
        for index, batch in enumerate(batches):
            try:
                for _ in pool.map(show, batch.inputs.chunks(CHUNK)):
                    pass
            except QuantizeError as error:
                error.add_note(f"while calibrating on batch {index}")
                raise
            tensors = batch.inputs.tensors
            first = first or {name: tensor[:1] for name, tensor in tensors.items()}
            varied = varied or any(not repeats(tensor, first[name]) for name, tensor in tensors.items())
            samples += batch.inputs.size
            progress("calibrate", samples, 0, f"{samples} samples")
    if not varied and samples > 1:
        raise DataError(f"all {samples} calibration samples are identical; give real, varied data")
    progress("calibrate", samples, samples, f"{samples} samples")
    return samples


def show_chunk(graph: fx.GraphModule, observers: Mapping[str, Any], lock: threading.Lock, inputs: Inputs) -> None:
    """Run a graph on some samples, for its observers."""
    with torch.no_grad():  # a thread has its own
        Watcher(graph, observers, lock).show(inputs)


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
