"""Exported files timed in turn on random inputs: what `pared bench` shows. Nothing here needs the model or torch."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pared.errors import UsageError
from pared.measure.environment import usable_cores
from pared.measure.latency import ROUNDS, percentiles, speedup, time_in_turn
from pared.measure.memory import peak_memory
from pared.report.data import Latency, Speedup
from pared.targets.risk import warning
from pared.targets.sessions import InputSpec, open_session, runtime, size_of
from pared.targets.worker import worker_command, write_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRow:
    """What was measured on one file. `speedup` is against the first file, whose own is None.

    `warning` says what is wrong with it on this processor, or nothing.
    """

    file: Path
    latency_ms: Latency
    speedup: Speedup | None
    size_bytes: int
    peak_memory_bytes: int
    warning: str = ""


def bench(
    files: Sequence[Path],
    *,
    target: str = "onnxruntime",
    batch_size: int = 1,
    threads: int | None = None,
    rounds: int = ROUNDS,
    dimensions: Mapping[str, int] | None = None,
    seed: int = 0,
    trust: bool = False,
) -> list[BenchRow]:
    """Time files in turn, each in a worker process of its own, and weigh them.

    Args:
        files: Exported files, or folders of artifacts; the first is the baseline.
        target: The runtime that opens them.
        batch_size: Samples in one call.
        threads: Threads of one call; by default every usable core.
        rounds: Most turns that each file gets.
        dimensions: Sizes of free dimensions other than the batch, by name.
        seed: Of the random inputs and of the intervals.
        trust: Say that the files come from someone you trust: some runtimes' files carry code.

    Raises:
        UsageError: A file is missing or not trusted, has another fixed batch size, or a free dimension without a size.
        TargetError: The runtime is missing or refuses a file.
        MeasureError: A worker died or gave no answer in time.
    """
    if not files:
        raise UsageError("there is nothing to time; give at least one exported file or artifact folder")
    used_threads = threads or usable_cores()
    exported = [path / runtime(target).filename if path.is_dir() else path for path in files]
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for index, file in enumerate(exported):
            specs = open_session(target, file, threads=used_threads, trust=trust).inputs
            arrays = random_inputs(specs, file.name, batch_size=batch_size, dimensions=dimensions or {}, seed=seed)
            inputs_file = Path(folder) / f"{index}.npz"
            write_inputs(inputs_file, arrays)
            commands.append(worker_command(target, file, threads=used_threads, inputs_file=inputs_file, trust=trust))
        turns = time_in_turn(commands, rounds=rounds)
        peaks = [peak_memory(command) for command in commands]
    return [
        BenchRow(
            file=file,
            latency_ms=percentiles(own),
            speedup=speedup(turns[0], own, seed=seed) if index else None,
            size_bytes=size_of(target, path),
            peak_memory_bytes=peak,
            warning=warning(path, target),
        )
        for index, (file, path, own, peak) in enumerate(zip(files, exported, turns, peaks, strict=True))
    ]


def random_inputs(
    specs: Sequence[InputSpec], file: str, *, batch_size: int, dimensions: Mapping[str, int], seed: int
) -> list[np.ndarray]:
    """Inputs of one call: standard normal floats; integers 0 or 1, which index any table.

    Raises:
        UsageError: The file has another fixed batch size, or a free dimension without a size.
    """
    generator = np.random.default_rng(seed)
    arrays = []
    for spec in specs:
        shape = shape_of(spec, file, batch_size, dimensions)
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            arrays.append(generator.standard_normal(shape).astype(spec.dtype))
        else:
            arrays.append(generator.integers(0, 2, shape).astype(spec.dtype))
    return arrays


def shape_of(spec: InputSpec, file: str, batch_size: int, dimensions: Mapping[str, int]) -> list[int]:
    """An input's shape with every free dimension filled in. Raises: UsageError."""
    shape = []
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int):
            if axis == 0 and size != batch_size:
                raise UsageError(
                    f"{file}: input {spec.name!r} has a fixed batch of {size}, not {batch_size}; "
                    f"ask for batch size {size}"
                )
            shape.append(size)
        elif size in dimensions:
            shape.append(dimensions[size])
        elif axis == 0:
            shape.append(batch_size)
        elif size:
            raise UsageError(
                f"{file}: input {spec.name!r} has a free dimension {size!r} (axis {axis}); "
                f"give its size, as in dimensions={{{size!r}: 128}} or --dimension {size}=128"
            )
        else:
            raise UsageError(
                f"{file}: input {spec.name!r} has a free dimension without a name (axis {axis}); "
                "export the file with this dimension named or fixed"
            )
    return shape
