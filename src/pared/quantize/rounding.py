"""Rounding of weights: to the nearest integer, at random, or to where the layer's output suffers least (AdaRound).

A rounding is a tensor of booleans, True where a weight goes up to the next integer. A code is floor(w / s) plus that.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from pared.errors import QuantizeError
from pared.step import settings


@settings
class Nearest:
    """To the nearest integer, halves to even, as the runtime would."""

    kind: Literal["nearest"] = "nearest"


@settings
class Stochastic:
    """Up with the probability of the fraction, so that the expected weight is exact. Follows the run's seed.

    Source: Gupta et al. 2015, arXiv:1502.02551, sec. 3.
    """

    kind: Literal["stochastic"] = "stochastic"


@settings
class AdaRound:
    """Up or down as the layer's output suffers least on calibration data; see `adaround`."""

    kind: Literal["adaround"] = "adaround"
    sweeps: Annotated[int, pydantic.Field(ge=1, description="Most passes over the columns of a weight.")] = 4
    positions: Annotated[
        int, pydantic.Field(ge=1, description="Most positions of an image that a convolution's statistics take.")
    ] = 64
    widest: Annotated[
        int, pydantic.Field(ge=1, description="Layers with more inputs per output than this are rounded to nearest.")
    ] = 4608


ROUNDINGS = {"nearest": Nearest, "stochastic": Stochastic, "adaround": AdaRound}


def nearest(steps: Tensor) -> Tensor:
    """Which weights go up when each takes the nearest integer, halves to even.

    Args:
        steps: Weights in units of their scale, any shape.

    Example:
        >>> nearest(torch.tensor([0.4, 0.5, 1.5, -0.6])).tolist()
        [False, False, True, False]
    """
    return torch.round(steps) > torch.floor(steps)


def stochastic(steps: Tensor, seed: int, name: str) -> Tensor:
    """Which weights go up when the fraction is the probability. The same seed and name give the same choice.

    Example:
        >>> bool(stochastic(torch.full((4,), 0.999999), 0, "layer").all())
        True
    """
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(mixed)
    fraction = steps - torch.floor(steps)
    return torch.rand(steps.shape, generator=generator, dtype=torch.float64) < fraction


def adaround(steps: Tensor, moments: Tensor, highest: int, *, sweeps: int) -> Tensor:
    """Which weights go up so that the mean squared error of the layer's output is small.

    For one output channel with the weight error d, that error is d^T M d, M being the second moments of the inputs
    (their covariance, where the bias is corrected afterwards). From the nearest integers on, column by column, every
    weight whose change to its other neighbour lowers the error is changed, until a pass changes none. So the result is
    never worse than nearest, and deterministic.

    Args:
        steps: Weights in units of their scale, shape (channels, columns).
            The scale of a channel has no influence on the choice.
        moments: Shape (columns, columns), symmetric, positive semidefinite.
        highest: Largest integer of the grid, beyond which nothing goes up.
        sweeps: Most passes.

    Returns:
        Booleans, the shape of `steps`.

    Raises:
        QuantizeError: The shapes do not fit.

    Source: Nagel et al. 2020, arXiv:2004.10568, eq. 13. Deviation: coordinate descent on the binary problem itself
    instead of gradient descent on its relaxation; needs the moments alone, no activations.

    Example:
        >>> moments = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # inputs that all but agree: let errors cancel
        >>> adaround(torch.tensor([[0.4, 0.4]]), moments, 127, sweeps=4).tolist()
        [[True, False]]
    """
    columns = steps.shape[1]
    if steps.ndim != 2 or moments.shape != (columns, columns):
        raise QuantizeError(f"weights {tuple(steps.shape)} and moments {tuple(moments.shape)} do not fit together")
    exact, weights = moments.double(), steps.double()
    floor = torch.floor(weights)
    up = nearest(weights)
    stuck = floor >= highest
    pull = (floor + up - weights) @ exact
    own = exact.diagonal()
    for _ in range(sweeps):
        changed = False
        for k in range(columns):
            change = 1.0 - 2.0 * up[:, k].double()
            better = (2 * change * pull[:, k] + own[k] < -1e-12 * own[k]) & ~(stuck[:, k] & ~up[:, k])
            if bool(better.any()):
                up[:, k] ^= better
                pull += (change * better).unsqueeze(1) * exact[k]
                changed = True
        if not changed:
            break
    return up
