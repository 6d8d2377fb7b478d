"""Starting the processes of one training, and watching them until all have ended or one has failed.

They are spawned: each is a fresh interpreter that imports the caller's program and is sent the work. A function tells
what is done with it; here nothing is known of training.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed

from pared.errors import ParedError, TrainError, UsageError
from pared.step import Progress, silent

GUARD = 'put what starts the training under `if __name__ == "__main__":`'
FOREVER = timedelta(days=1)  # a process that dies is seen by its parent; one that only works long is waited for
GRACE_S = 3.0  # in which those that fail because another died are told apart from the one that died
START: Literal["spawn"] = "spawn"  # forked processes could not use a GPU that the caller has touched
Entry = Callable[[Any, Progress], None]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a process must know before it gets its work."""

    size: int
    backend: str
    store: str
    threads: int
    dtype: torch.dtype


@dataclasses.dataclass
class Worker:
    """A process, and the end of the pipe to it."""

    process: BaseProcess
    pipe: Connection
    started: bool = False
    failure: tuple[float, Exception] | None = None


def launch(
    entry: Entry, work: Mapping[str, Any], size: int, *, gpu: bool, progress: Progress, kept: Callable[[], str]
) -> None:
    """Run `entry(work, progress)` in `size` processes that form a group of `torch.distributed`.

    Args:
        entry: A function of a module.
        work: Named parts, each of which can be pickled; tensors arrive on the CPU.
        gpu: Whether the group talks from GPU to GPU.
        progress: Is told what process 0 tells.
        kept: What there is to say of the state that survives, at the end of a message that a process died.

    Raises:
        UsageError: A part cannot be sent, or the program cannot be imported by the processes.
        TrainError: A process died.
        Exception: What a process raised first.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(f"a process of the training would start the training again; {GUARD}")
    content = packed(work)
    context = multiprocessing.get_context(START)
    with tempfile.TemporaryDirectory() as folder:
        threads = max(1, torch.get_num_threads() // size)
        store = str(Path(folder) / "store")
        setup = Setup(size, "nccl" if gpu else "gloo", store, threads, torch.get_default_dtype())
        workers = []
        try:
            for rank in range(size):
                pipe, theirs = context.Pipe()
                process = context.Process(target=run, args=(entry, theirs, rank, setup), name=f"pared-{rank}")
                process.start()
                theirs.close()
                workers.append(Worker(process, pipe))
            for worker in workers:
                with contextlib.suppress(OSError):  # it has died, which `follow` sees
                    worker.pipe.send_bytes(content)
            follow(workers, progress)
            explain(workers, kept)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()


def packed(work: Mapping[str, Any]) -> bytes:
    """The work as bytes. Raises: UsageError that names the part that cannot be sent."""
    try:
        return pack(work)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        whole = error
    for name, part in work.items():
        try:
            pack(part)
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(
                f"{name} cannot be sent to the processes of the training ({error}); define functions and classes at "
                "the top of a module, with no lambda in them, or train with one device"
            ) from error
    raise UsageError(f"the training cannot be sent to its processes ({whole}); train with one device") from whole


def pack(item: Any) -> bytes:
    # PyTorch's own format, not that of its processes: shared memory is short in containers, and weights shared between
    # processes would be trained by all of them.
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


def follow(workers: list[Worker], progress: Progress) -> None:
    """Pass progress on until all processes have ended, or a while after the first has failed."""
    deadline = None
    open_pipes = {worker.pipe: worker for worker in workers}
    alive = {worker.process.sentinel: worker for worker in workers}
    while alive or open_pipes:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for ready in wait([*open_pipes, *alive], left):
            if isinstance(ready, int):
                worker = alive.pop(ready)
                worker.process.join()
            elif not hear(open_pipes[ready], progress):  # type: ignore[index]
                del open_pipes[ready]  # type: ignore[arg-type]
        if deadline is None and any(worker.failure or worker.process.exitcode for worker in workers):
            deadline = time.monotonic() + GRACE_S
        killed = any((worker.process.exitcode or 0) < 0 for worker in workers)
        if killed or (deadline is not None and time.monotonic() >= deadline):
            return


def hear(worker: Worker, progress: Progress) -> bool:
    """Take one message of a process; False where there will be none any more."""
    try:
        kind, *content = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    if kind == "progress":
        progress(*content)
    elif kind == "failed":
        worker.failure = (content[0], content[1])
    worker.started = True
    return True


def explain(workers: list[Worker], kept: Callable[[], str]) -> None:
    """Raise what went wrong first, if anything did. A process that was killed comes before those that missed it."""
    for rank, worker in enumerate(workers):
        code = worker.process.exitcode
        if code is not None and code != 0 and worker.failure is None:
            if not worker.started and code > 0:
                raise UsageError(
                    f"process {rank} of {len(workers)} ended before the training began (exit code {code}); the program "
                    f"must be a file that can be imported: {GUARD}"
                )
            raise TrainError(f"process {rank} of {len(workers)} {ending(code)}; {kept()}")
    failures = [worker.failure for worker in workers if worker.failure is not None]
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


def ending(code: int) -> str:
    """How a process ended, in words.

    Example:
        >>> ending(-9)
        'was killed by SIGKILL (out of memory?)'
        >>> ending(3)
        'ended with exit code 3'
    """
    if code > 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


def run(entry: Entry, pipe: Connection, rank: int, setup: Setup) -> None:
    """One of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its processes
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        pipe.send(("started",))
        work = unpacked(pipe.recv_bytes())
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        os.environ["LOCAL_RANK"] = str(rank)
        if setup.backend == "nccl":
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(
            setup.backend, init_method=f"file://{setup.store}", rank=rank, world_size=setup.size, timeout=FOREVER
        )
        entry(work, (lambda *told: pipe.send(("progress", *told))) if rank == 0 else silent)
        torch.distributed.destroy_process_group()
    except Exception as error:
        pipe.send(("failed", time.monotonic(), portable(error)))
        raise SystemExit(1) from error


def unpacked(content: bytes) -> Any:
    """The work. Raises: UsageError where this process does not find the classes and functions in it."""
    try:
        # These bytes come from the parent, not from a file.
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise UsageError(
            f"a process of the training does not find what it is to train ({error}); define models, losses and data "
            "in a file that can be imported, not in a notebook or at a prompt"
        ) from error


def end_with_parent() -> None:
    """End this process when the one that started it is gone, or it would go on writing checkpoints."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def portable(error: Exception) -> Exception:
    """An exception that can be sent: the same with its traceback as a note, or its text."""
    if not isinstance(error, ParedError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        copy.copy(error)
        pickle.dumps(error)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError):
        return TrainError(f"{type(error).__name__} in a process of the training: {error}")
    return error
