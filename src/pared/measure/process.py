"""The parent's side of a measurement: starts a worker, hands it turns, and says what happened when it dies."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pared.errors import MeasureError

STDERR_TAIL = 2000  # characters: enough for a runtime's last message


class WorkerProcess:
    """One worker (`measure.worker.serve` on the other side), from start to end of a `with` block.

    Args:
        command: The worker's arguments, program first.
        timeout_s: How long one answer may take.
    """

    def __init__(self, command: Sequence[str], *, timeout_s: float) -> None:
        self.command = list(command)
        self.timeout_s = timeout_s
        self.deadline = float("inf")
        self.timed_out = False
        self.closed = threading.Event()

    def __enter__(self) -> Self:
        self.stderr = tempfile.TemporaryFile()  # a pipe could fill up and block the worker
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                text=True,
                encoding="utf8",
            )
        except OSError as error:
            self.stderr.close()
            raise MeasureError(f"a worker could not be started: {' '.join(self.command)}: {error.strerror}") from None
        self.watchdog = threading.Thread(target=self.watch, daemon=True)
        self.watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        self.watchdog.join()
        self.process.kill()  # a worker owns nothing that would need a tidy end
        self.process.communicate()
        self.stderr.close()

    def watch(self) -> None:
        """End the worker when an answer is overdue; one thread for its life, so that a turn costs none."""
        while not self.closed.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() > self.deadline:
                self.timed_out = True
                self.process.kill()
                return

    def wait_ready(self) -> None:
        """Return when the file is open. Raises: MeasureError."""
        self.receive()

    def time(self, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls. Raises: MeasureError."""
        return [ns / 1e6 for ns in self.ask({"do": "time", "calls": calls})["ns"]]

    def peak_bytes(self) -> int:
        """The worker's peak resident memory so far. Raises: MeasureError."""
        peak: int = self.ask({"do": "memory"})["peak_bytes"]
        return peak

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin = self.process.stdin
        self.deadline = time.monotonic() + self.timeout_s
        try:
            if stdin is not None:
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
        except BrokenPipeError:
            raise self.failure() from None
        return self.receive()

    def receive(self) -> dict[str, Any]:
        self.deadline = time.monotonic() + self.timeout_s
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        if not line.endswith("\n"):
            raise self.failure()
        self.deadline = float("inf")
        try:
            answer: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise MeasureError(f"a worker answered {line.strip()[:80]!r}, which is not of our protocol") from None
        return answer

    def failure(self) -> MeasureError:
        """What to say about a worker that gives no answer."""
        status = self.process.wait()  # the deadline still holds, for one that closed its pipe and lives on
        if self.timed_out:
            how = f"gave no answer within {self.timeout_s:g} s and was stopped"
        else:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        self.stderr.seek(0)
        tail = self.stderr.read().decode("utf8", errors="replace").strip()[-STDERR_TAIL:]
        return MeasureError(f"the worker {' '.join(self.command)} {how}; its last words: {tail or '(none)'}")
