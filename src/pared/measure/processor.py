"""What int8 arithmetic this processor has, and whether it saturates in it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Collection

from pared.measure.environment import instruction_sets

X86 = frozenset({"x86_64", "amd64", "x64", "i386", "i686", "x86"})
# Either multiplies and adds bytes in 32 bits. ONNX Runtime uses AMX and AVX-VNNI-INT8 only beside one of them.
EXACT = frozenset({"avx512_vnni", "avx_vnni"})


def saturates(sets: Collection[str], machine: str) -> bool | None:
    """Whether products of unsigned and signed bytes saturate on a processor, in ONNX Runtime's kernels.

    Args:
        sets: Its instruction sets, by the names of `environment.INSTRUCTION_SETS`; empty where the system tells none.
        machine: Its architecture, as `platform.machine()` names it.

    Returns:
        None where it cannot be told.

    Example:
        >>> saturates(["avx2"], "x86_64"), saturates(["avx2", "avx_vnni"], "x86_64"), saturates([], "AMD64")
        (True, False, None)
    """
    if machine.lower() not in X86:
        return False
    if EXACT & set(sets):
        return False
    return True if sets else None


@functools.cache
def saturates_here() -> bool | None:
    """`saturates` for the processor that this runs on."""
    return saturates(instruction_sets(), platform.machine())
