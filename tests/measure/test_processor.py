"""Whether products saturate, from the flags of processors as systems print them."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from pared.measure import environment
from pared.measure.environment import instruction_sets
from pared.measure.processor import saturates

# Abridged /proc/cpuinfo of machines, and what follows from each.
LINUX = {
    "Haswell": ("x86_64", "flags\t\t: fpu sse4_2 avx fma avx2 bmi2", True),
    "Skylake-SP": ("x86_64", "flags\t\t: avx2 avx512f avx512bw avx512vl avx512dq", True),
    "Zen 3": ("x86_64", "flags\t\t: avx2 vaes vpclmulqdq", True),
    "Cascade Lake": ("x86_64", "flags\t\t: avx2 avx512f avx512_vnni", False),
    "Sapphire Rapids": ("x86_64", "flags\t\t: avx2 avx512f avx512_vnni avx_vnni amx_tile amx_int8", False),
    "Alder Lake": ("x86_64", "flags\t\t: avx2 avx_vnni", False),
    "Core 2, none of the flags": ("x86_64", "flags\t\t: sse2 ssse3", None),
    "Graviton 3": ("aarch64", "Features\t: fp asimd asimddp i8mm", False),
    "Raspberry Pi 4": ("aarch64", "Features\t: fp asimd crc32", False),
}


@pytest.mark.parametrize("name", LINUX)
def test_saturation_follows_from_the_flags_when_on_linux(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, line, expected = LINUX[name]
    text = f"processor\t: 0\nmodel name\t: {name}\n{line}\n\nprocessor\t: 1\n"
    monkeypatch.setattr(environment, "cpu_info", lambda: environment.parse_cpu_info(text))
    monkeypatch.setattr(environment.sys, "platform", "linux")
    assert saturates(instruction_sets(), machine) is expected


APPLE = {"hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_I8MM": "0"}
INTEL = {"machdep.cpu.features": "FPU SSE4.2 AVX1.0", "machdep.cpu.leaf7_features": "BMI1 AVX2 AVX512F AVX512VNNI"}


@pytest.mark.parametrize(
    ("answers", "machine", "sets", "expected"),
    [
        (APPLE, "arm64", ["asimd_dot"], False),
        (INTEL, "x86_64", ["avx2", "avx512f", "avx512_vnni"], False),
        ({"machdep.cpu.features": "SSE4.2", "machdep.cpu.leaf7_features": "AVX2"}, "x86_64", ["avx2"], True),
        ({}, "x86_64", [], None),
    ],
)
def test_saturation_follows_from_sysctl_when_on_macos(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], machine: str, sets: list[str], expected: bool | None
) -> None:
    def sysctl(command: list[str], **_: Any) -> Any:
        if command[-1] not in answers:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, answers[command[-1]] + "\n")

    monkeypatch.setattr(environment.sys, "platform", "darwin")
    monkeypatch.setattr(environment.subprocess, "run", sysctl)
    assert instruction_sets() == sets
    assert saturates(sets, machine) is expected


def test_saturation_is_unknown_when_the_system_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "platform", "win32")
    monkeypatch.setattr(environment, "cpu_info", dict)
    assert saturates(instruction_sets(), "AMD64") is None
    assert saturates(instruction_sets(), "ARM64") is False
