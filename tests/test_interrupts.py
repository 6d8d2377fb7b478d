"""Ctrl-C waits for what must be whole, and comes then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pared.artifact import save_program
from pared.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard, as it is not by what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_a_program_is_written_whole_when_ctrl_c_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, model, write, written = torch.ones(1, 2), nn.Linear(2, 2).eval(), torch.export.save, []

    def interrupted(program: Any, buffer: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(program, buffer)
        written.append(torch.export.load(buffer).module()(x))

    monkeypatch.setattr(torch.export, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_program(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    assert torch.equal(written[0], model(x))
