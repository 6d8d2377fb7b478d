from __future__ import annotations

import sys

from pared.measure.memory import peak_memory

SERVER = """
from pared.measure.worker import private_streams, serve
held = bytearray({size})
held[::4096] = held[::4096]  # touch every page
serve(lambda: {run}, *private_streams())
"""


def command(*, size: int = 1, run: str = "None") -> list[str]:
    return [sys.executable, "-c", SERVER.format(size=size, run=run)]


def test_peak_memory_is_larger_by_what_is_held_when_a_file_is_larger() -> None:
    small, large = peak_memory(command()), peak_memory(command(size=100 << 20))
    # The interpreter's own share varies by a few MiB.
    assert abs(large - small - (100 << 20)) < 16 << 20


def test_peak_memory_counts_what_was_freed_when_a_call_needs_it_for_a_moment() -> None:
    small = peak_memory(command())
    assert peak_memory(command(run="bytes(b'x') * (80 << 20)")) > small + (64 << 20)


def test_peak_memory_leaves_the_parent_out_when_the_parent_is_large() -> None:
    block = b"x" * (200 << 20)
    assert peak_memory(command()) < len(block) // 2
