"""What the package promises by its names, and what importing it costs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pared

SOURCE = Path(pared.__file__).parents[1]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_what_is_promised() -> None:
    assert pared.__all__ == sorted(pared.HOMES)
    # Section 2 of the design, and what its example calls.
    assert {"Artifact", "Budget", "QuantizeStatic", "Recipe", "Report", "Task", "Train"} <= set(pared.__all__)
    assert {"compress", "dry_run", "load", "open_artifact", "ParedError"} <= set(pared.__all__)


@pytest.mark.parametrize("name", pared.__all__)
def test_public_name_comes_from_its_home_and_has_a_docstring(name: str) -> None:
    found = getattr(pared, name)
    assert found is getattr(importlib.import_module(pared.HOMES[name]), name)
    assert found.__name__ == name
    assert found.__doc__ and not found.__doc__.startswith(f"{name}(")
    assert name in dir(pared)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pared' has no attribute 'compres'"):
        _ = pared.compres
    with pytest.raises(ImportError):
        exec("from pared import nothing")  # noqa: S102 - a constant


def test_importing_needs_no_torch_and_takes_no_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import pared; taken = time.perf_counter() - start;"
        "print(taken, 'torch' in sys.modules)"
    )
    taken, torch = python(code).split()
    assert torch == "False"
    assert float(taken) < 0.15  # the bound is 0.3 s over torch; without torch it is a few milliseconds


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from pared.cli import main; main(['--help']); main(['run', '--help']);"
        "print('torch' in sys.modules)"
    )
    assert python(code).splitlines()[-1] == "False"


def test_the_package_is_typed() -> None:
    assert Path(pared.__file__).with_name("py.typed").is_file()


def test_importing_the_modules_changes_nothing_in_the_process() -> None:
    code = """
import random, sys, warnings, logging
import numpy, torch
torch.manual_seed(3)
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), list(sys.path),
        len(logging.getLogger().handlers),
    )
before = state()
import pared
for name in pared.__all__:
    getattr(pared, name)
print(before == state(), 'onnxruntime' in sys.modules, 'torchvision' in sys.modules)
"""
    assert python(code).split() == ["True", "False", "False"]
