"""The worker's side of a measurement: a process that runs one file, told over a pipe when.

One JSON object a line. The worker says `{"ready": true}` once, then answers `{"do": "time", "calls": N}` with
`{"ns": [N durations]}` and `{"do": "memory"}` with `{"peak_bytes": M}`. It ends when the pipe closes, so nothing is
left behind when the parent is killed. Only the standard library is imported: what the process weighs is the runtime's.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


def serve(run: Callable[[], object], requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more.

    Args:
        run: One call of the file.
        requests: Where requests are read.
        replies: Where answers are written; nothing else may write there (see `private_streams`).
    """
    # A collection inside a timed call would be charged to the model.
    gc.collect()
    gc.disable()
    try:
        reply(replies, {"ready": True})
        for line in requests:
            request = json.loads(line)
            if request["do"] == "time":
                reply(replies, {"ns": time_calls(run, request["calls"])})
            else:
                reply(replies, {"peak_bytes": peak_bytes()})
    except BrokenPipeError:
        return  # the parent is gone
    finally:
        gc.enable()


def private_streams() -> tuple[TextIO, TextIO]:
    """Standard input, and standard output moved to a descriptor of its own, so that a runtime's prints go to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return sys.stdin, replies


def reply(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def time_calls(run: Callable[[], object], calls: int) -> list[int]:
    """Nanoseconds of each of `calls` calls, after an untimed one that wins the caches back from the other workers."""
    run()
    durations = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        run()
        durations.append(time.perf_counter_ns() - start)
    return durations


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage here: on Linux its figure starts from what the parent had when it forked.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
