from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import socket
import sys
from pathlib import Path

import pytest

from pared.measure import environment as module
from pared.measure.environment import cpu_info, environment, instruction_sets, usable_cores


def test_environment_survives_json_when_written_to_the_report() -> None:
    facts = environment(seed=3)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["seed"] == 3
    assert facts["python"] == platform.python_version()
    assert facts["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert facts["cpu"]


def test_environment_names_nobody_when_the_report_is_shared() -> None:
    text = json.dumps(environment(seed=0))
    for private in (str(Path.home()), str(Path.cwd()), sys.prefix, socket.gethostname()):
        assert private in ("", "/") or private not in text
    assert f'"{getpass.getuser()}"' not in text


def test_instruction_sets_are_what_numpy_finds_when_on_x86() -> None:
    from numpy._core._multiarray_umath import __cpu_features__ as features

    if not {"AVX2", "AVX512F"} <= features.keys() or not cpu_info():
        pytest.skip("numpy names AVX2 and AVX512F on x86 only, and the flags are read from /proc/cpuinfo")
    found = instruction_sets()
    assert ("avx2" in found, "avx512f" in found) == (features["AVX2"], features["AVX512F"])


def test_instruction_sets_know_arm_when_the_processor_has_the_dot_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_info", lambda: {"Features": "fp asimd asimddp i8mm"})
    assert instruction_sets() == ["asimd_dot", "i8mm"]


@pytest.mark.parametrize(("quota", "at_most"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", 10_000)])
def test_usable_cores_obey_the_quota_when_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, at_most: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    monkeypatch.setattr(module, "CPU_QUOTA", file)
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    assert usable_cores() == min(affinity, at_most)


def test_measuring_needs_no_torch_when_imported() -> None:
    import subprocess

    names = ["environment", "fidelity", "latency", "memory", "parity", "process", "worker"]
    code = "; ".join(
        ["import sys", *(f"import pared.measure.{name}" for name in names), "sys.exit('torch' in sys.modules)"]
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
