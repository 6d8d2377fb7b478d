from __future__ import annotations

import sys
import time

import pytest

from pared.errors import MeasureError
from pared.measure.process import WorkerProcess

READY = "import sys, time; print('{\"ready\": true}', flush=True); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ask(code: str, *, timeout_s: float = 30.0) -> None:
    with WorkerProcess(python(READY + code), timeout_s=timeout_s) as worker:
        worker.wait_ready()
        worker.time(1)


def test_worker_process_tells_the_last_words_when_the_worker_fails() -> None:
    with pytest.raises(MeasureError, match=r"exit status 3; its last words: the model is broken"):
        ask("sys.stderr.write('noise ' * 9999 + 'the model is broken'); sys.exit(3)".replace("noise", "\\n"))


def test_worker_process_names_the_signal_when_the_worker_is_killed() -> None:
    with pytest.raises(MeasureError, match=r"killed by signal 9; its last words: \(none\)"):
        ask("import os, signal; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)")


def test_worker_process_gives_up_when_there_is_no_answer_in_time() -> None:
    start = time.monotonic()
    with pytest.raises(MeasureError, match=r"no answer within 0\.2 s"):
        ask("time.sleep(60)", timeout_s=0.2)
    assert time.monotonic() - start < 20


def test_worker_process_gives_up_when_the_worker_closes_its_pipe_and_lives_on() -> None:
    with pytest.raises(MeasureError, match=r"no answer within 0\.4 s"):
        ask("import os; os.close(1); time.sleep(60)", timeout_s=0.4)


def test_worker_process_refuses_an_answer_when_it_is_not_of_the_protocol() -> None:
    with pytest.raises(MeasureError, match="'hello', which is not of our protocol"):
        ask("sys.stdin.readline(); print('hello', flush=True); time.sleep(60)")


def test_worker_process_says_what_it_could_not_start_when_the_program_is_missing() -> None:
    with (
        pytest.raises(MeasureError, match="could not be started: no-such-program"),
        WorkerProcess(["no-such-program"], timeout_s=1.0),
    ):
        pass


def test_worker_process_leaves_no_process_when_the_block_ends_with_an_error() -> None:
    worker = WorkerProcess(python(READY + "time.sleep(60)"), timeout_s=30.0)
    with pytest.raises(KeyboardInterrupt), worker:
        worker.wait_ready()
        raise KeyboardInterrupt
    assert worker.process.poll() is not None
