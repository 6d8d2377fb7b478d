from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil

from pared.measure.worker import peak_bytes, serve

SERVER = """
import os, sys
from pared.measure.worker import private_streams, serve
requests, replies = private_streams()
def run():
    os.write(1, b"a runtime prints\\n")
serve(run, requests, replies)
"""
PARENT = f"""
import sys, time
from pared.measure.process import WorkerProcess
with WorkerProcess([sys.executable, "-c", {SERVER!r}], timeout_s=60) as worker:
    worker.wait_ready()
    print(worker.process.pid, flush=True)
    time.sleep(60)
"""


def answers(*requests: dict[str, object]) -> list[dict[str, object]]:
    replies = io.StringIO()
    serve(lambda: time.sleep(0.002), io.StringIO("".join(json.dumps(item) + "\n" for item in requests)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_serve_times_each_call_when_asked() -> None:
    ready, timed = answers({"do": "time", "calls": 3})
    assert ready == {"ready": True}
    durations = timed["ns"]
    assert isinstance(durations, list) and len(durations) == 3
    assert all(ns >= 2_000_000 for ns in durations)


def test_serve_makes_one_untimed_call_when_a_turn_starts() -> None:
    calls: list[int] = []
    serve(lambda: calls.append(1), io.StringIO('{"do": "time", "calls": 4}\n'), io.StringIO())
    assert len(calls) == 5


def test_serve_turns_the_collector_on_again_when_it_ends() -> None:
    seen: list[bool] = []
    serve(lambda: seen.append(gc.isenabled()), io.StringIO('{"do": "time", "calls": 1}\n'), io.StringIO())
    assert seen == [False, False]
    assert gc.isenabled()


def test_peak_bytes_is_what_the_system_says_when_asked() -> None:
    before = peak_bytes()
    assert before >= psutil.Process().memory_info().rss * 0.9
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])  # touch every page
    held = peak_bytes()
    del block
    assert held >= psutil.Process().memory_info().rss
    # The kernel counts pages by core, in batches, so the figure may move by some of them.
    assert abs(peak_bytes() - held) < 1 << 20


def test_private_streams_keep_the_protocol_clean_when_a_runtime_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER], input='{"do": "time", "calls": 2}\n', capture_output=True, text=True, timeout=60
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(line) for line in lines] == [["ready"], ["ns"]]
    assert done.stderr.count("a runtime prints") == 3


def test_worker_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        end = time.monotonic() + 20
        # Where nobody collects orphans, one that has ended stays a zombie.
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(0.02)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
