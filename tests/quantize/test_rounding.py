"""Rounding of weights against objectives worked out in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import QuantizeError
from pared.quantize.rounding import adaround, nearest, stochastic


def problem(seed: int, channels: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(channels, columns, generator=generator, dtype=torch.float64) * 5
    x = torch.randn(columns + 3, columns, generator=generator, dtype=torch.float64) + 1
    return steps, x.T @ x / len(x)


def cost(up: np.ndarray, steps: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """d^T M d of each channel, by loops."""
    error = np.floor(steps) + up - steps
    return np.array([sum(d[i] * moments[i, j] * d[j] for i in range(len(d)) for j in range(len(d))) for d in error])


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_adaround_is_never_worse_than_nearest_and_no_single_change_improves_it(
    seed: int, channels: int, columns: int
) -> None:
    steps, moments = problem(seed, channels, columns)
    up = adaround(steps, moments, 127, sweeps=50).numpy()
    s, m = steps.numpy(), moments.numpy()
    found, start = cost(up, s, m), cost(nearest(steps).numpy(), s, m)
    assert (found <= start * (1 + 1e-9)).all()
    for k in range(columns):
        other = up.copy()
        other[:, k] ^= True
        assert (cost(other, s, m) >= found * (1 - 1e-9) - 1e-12).all()


def test_adaround_finds_the_best_of_all_roundings_where_errors_can_cancel() -> None:
    steps = torch.tensor([[0.4, 1.4, -2.6]], dtype=torch.float64)
    moments = torch.full((3, 3), 0.9, dtype=torch.float64) + 0.1 * torch.eye(3, dtype=torch.float64)
    every = [np.array([choice], dtype=bool) for choice in itertools.product([False, True], repeat=3)]
    best = min(cost(up, steps.numpy(), moments.numpy())[0] for up in every)
    up = adaround(steps, moments, 127, sweeps=10).numpy()
    assert cost(up, steps.numpy(), moments.numpy())[0] == pytest.approx(best)
    assert best < cost(nearest(steps).numpy(), steps.numpy(), moments.numpy())[0]


def test_adaround_is_nearest_when_inputs_are_uncorrelated() -> None:
    steps, _ = problem(3, 5, 9)
    assert torch.equal(adaround(steps, torch.eye(9), 127, sweeps=4), nearest(steps))


def test_adaround_stays_inside_the_grid() -> None:
    # All inputs agree and all errors are negative: everything wants to go up, but 7 is the last integer.
    steps = torch.tensor([[7.0, 6.4, 6.4, 6.4]], dtype=torch.float64)
    up = adaround(steps, torch.ones(4, 4), 7, sweeps=4)
    assert (torch.floor(steps) + up).max().item() == 7
    assert not up[0, 0]


def test_adaround_refuses_moments_of_another_width() -> None:
    with pytest.raises(QuantizeError, match="do not fit together"):
        adaround(torch.ones(2, 3), torch.eye(4), 127, sweeps=1)


def test_stochastic_rounding_is_right_on_average_and_the_same_for_the_same_seed() -> None:
    steps = torch.full((200_000,), 3.3, dtype=torch.float64)
    up = stochastic(steps, 1, "a")
    # The standard error of a mean of 200,000 draws of probability 0.3 is 0.001.
    assert up.double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert torch.equal(up, stochastic(steps, 1, "a"))
    assert not torch.equal(up, stochastic(steps, 2, "a"))
    assert not torch.equal(up, stochastic(steps, 1, "b"))


def test_nearest_takes_halves_to_even_as_numpy_does() -> None:
    steps = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49, -0.51], dtype=torch.float64)
    assert (torch.floor(steps) + nearest(steps)).tolist() == np.rint(steps.numpy()).tolist()
