"""Ctrl-C waits for what must be whole, and comes then."""

from __future__ import annotations

import signal
import threading

import pytest

from pared.interrupts import uninterrupted


def test_ctrl_c_comes_when_the_body_is_done() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_the_handler_is_as_before_when_the_body_is_done_or_fails() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_leaves_the_handler_alone() -> None:
    found = []

    def body() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
