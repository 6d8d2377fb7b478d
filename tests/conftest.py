"""What holds for every test: the same seeds, two threads or processes, and no global state left behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def global_state() -> dict[str, object]:
    """Settings of the process that the library promises to leave as they are."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def same_start_and_end() -> Iterator[None]:
    """Seed everything before a test; fail one that leaves global state changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = global_state()
    yield
    after = global_state()
    assert after == before, "this test, or the code under it, changed the state of the process"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what is too small to share: threads that wait for one another cost seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
