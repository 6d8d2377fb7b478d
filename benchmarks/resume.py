"""A run killed with `kill -9` at ten moments and resumed ends with the bytes of the run that was not killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Results

KILLS = 10
RECIPE = """
model: fashion_cnn
task: {factory: fashion_mnist, arguments: {batch_size: 256}}
timing: {rounds: 16}
steps:
  - Train: {epochs: 2, lr: 0.05}
  - QuantizeStatic: {samples: 128}
"""
FILES = ("model.onnx", "tensors.safetensors", "plans.json")


def start(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    """The run as a process of its own, in a group of its own."""
    command = [sys.executable, "-m", "pared", "run", "recipe.yaml", "--out", out, *options]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run to end well."""
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the run ended with status {process.returncode}: {errors.decode()[-500:]}")


def fingerprints(artifact: Path) -> dict[str, str]:
    """SHA-256 of what must be equal."""
    return {name: hashlib.sha256((artifact / name).read_bytes()).hexdigest() for name in FILES}


def main() -> None:
    results = Results("resume")
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf8")
        begin = time.perf_counter()
        finish(start(folder, "whole"))
        seconds = time.perf_counter() - begin
        whole = fingerprints(folder / "whole")
        for number in range(KILLS):
            # One moment in each tenth of the run, so that every part of it is hit.
            moment = (number + generator.random()) / KILLS
            if results.done(kill=number):
                continue
            out = f"killed-{number}"
            process = start(folder, out)
            time.sleep(moment * seconds)
            over = process.poll() is not None
            if not over:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            finish(start(folder, out, "--resume"))
            found = fingerprints(folder / out)
            results.add({"kill": number, "moment": moment, "was_over": over} | {f: found[f] == whole[f] for f in FILES})
    equal = sum(all(row[name] for name in FILES) for row in results.rows)
    results.claim(
        2, "killed runs that ended, resumed, with equal tensors, plans and exported bytes", equal, ">=", KILLS
    )


if __name__ == "__main__":
    main()
