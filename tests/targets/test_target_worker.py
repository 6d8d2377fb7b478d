from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pared.errors import MeasureError
from pared.measure.memory import peak_memory
from pared.targets.worker import read_inputs, worker_command, write_inputs
from tiny_onnx import write_chain


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    inputs = tmp_path / "inputs.npz"
    write_inputs(inputs, [np.ones((2, 4), np.float32)])
    return worker_command("onnxruntime", write_chain(tmp_path / "chain.onnx"), threads=1, inputs_file=inputs)


def test_worker_times_the_file_when_asked(command: list[str]) -> None:
    request = '{"do": "time", "calls": 3}\n{"do": "memory"}\n'
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=60)
    ready, timed, memory = (json.loads(line) for line in done.stdout.splitlines())
    assert (done.returncode, ready) == (0, {"ready": True})
    assert len(timed["ns"]) == 3 and min(timed["ns"]) > 0
    assert memory["peak_bytes"] > 10 << 20


def test_worker_imports_no_torch_when_it_serves(command: list[str]) -> None:
    code = (
        "import sys; from pared.targets.worker import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    arguments = command[command.index("pared.targets.worker") + 1 :]
    request = '{"do": "time", "calls": 1}\n'
    done = subprocess.run([sys.executable, "-c", code, *arguments], input=request, text=True, capture_output=True)
    assert (done.returncode, done.stdout.count("\n")) == (0, 2), done.stderr


def test_worker_runs_no_code_when_it_lies_in_the_current_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    assert peak_memory(command) > 0


def test_worker_says_why_when_the_runtime_refuses_the_file(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "chain.onnx").write_bytes(b"broken")
    with pytest.raises(MeasureError, match=r"exit status 1; its last words: onnxruntime refuses chain\.onnx"):
        peak_memory(command)


def test_worker_says_why_when_the_inputs_do_not_fit(command: list[str], tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs.npz", [np.ones((2, 3), np.float32)])
    with pytest.raises(MeasureError, match="cannot run the file on these inputs"):
        peak_memory(command)


def test_inputs_come_back_in_order_when_there_are_many(tmp_path: Path) -> None:
    arrays = [np.full((1, i), i, np.float32 if i % 2 else np.int64) for i in range(1, 13)]
    write_inputs(tmp_path / "inputs.npz", arrays)
    found = read_inputs(tmp_path / "inputs.npz")
    assert [(array.dtype, array.shape) for array in found] == [(array.dtype, array.shape) for array in arrays]
    assert all((a == b).all() for a, b in zip(found, arrays, strict=True))
