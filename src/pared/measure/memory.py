"""Peak memory of a fresh process that runs one file."""

from __future__ import annotations

from collections.abc import Sequence

from pared.measure.process import WorkerProcess

CALLS = 3  # a runtime's arena has its final size after the first calls


def peak_memory(command: Sequence[str], *, timeout_s: float = 120.0) -> int:
    """Peak resident bytes of a worker that opens its file and runs it a few times, runtime and interpreter included.

    Raises:
        MeasureError: The worker died or gave no answer in time.
    """
    with WorkerProcess(command, timeout_s=timeout_s) as worker:
        worker.wait_ready()
        worker.time(CALLS)
        return worker.peak_bytes()
