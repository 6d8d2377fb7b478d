"""On what machine and with which versions a figure was taken. Describes the hardware; names no user, host or folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("pared", "torch", "numpy", "onnx", "onnxruntime")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# What decides how fast, and on x86 how exactly, int8 arithmetic runs. Keys are the kernel's names of the flags.
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimddp": "asimd_dot",
    "i8mm": "i8mm",
}
# The same by the names that macOS has for them: words in lists of Intel's flags, and questions about Apple's cores.
INTEL_FLAGS = {
    "AVX2": "avx2",
    "AVX512F": "avx512f",
    "AVX512VNNI": "avx512_vnni",
}
APPLE_QUESTIONS = {"hw.optional.arm.FEAT_DotProd": "asimd_dot", "hw.optional.arm.FEAT_I8MM": "i8mm"}


def environment(seed: int) -> dict[str, Any]:
    """The machine, the versions and the seed, as plain data for the report."""
    return {
        "cpu": cpu_model(),
        "logical_cores": psutil.cpu_count(logical=True),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_sets": instruction_sets(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
        "seed": seed,
    }


def usable_cores() -> int:
    """How many cores this process may use: its affinity, cut by a container's quota."""
    affinity = os.sched_getaffinity(0) if sys.platform == "linux" else ()
    cores = len(affinity) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, max(int(quota) // int(period), 1))  # "max" is no number: no quota
    return cores


def cpu_info() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace")
    except OSError:
        return {}
    return parse_cpu_info(text)


def parse_cpu_info(text: str) -> dict[str, str]:
    """The entries of the first processor in a text like /proc/cpuinfo."""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def sysctl(name: str) -> str:
    """One answer of macOS about the machine, or ""."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["/usr/sbin/sysctl", "-n", name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return ""


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    if sys.platform == "darwin" and (brand := sysctl("machdep.cpu.brand_string")):
        return brand
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The instruction sets that integer kernels use, of those that this processor has.

    Empty where it has none, and where the system tells none: Windows does not say whether there is VNNI.
    """
    if sys.platform == "darwin":
        words = f"{sysctl('machdep.cpu.features')} {sysctl('machdep.cpu.leaf7_features')}".split()
        found = [name for word, name in INTEL_FLAGS.items() if word in words]
        return found + [name for question, name in APPLE_QUESTIONS.items() if sysctl(question) == "1"]
    info = cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
