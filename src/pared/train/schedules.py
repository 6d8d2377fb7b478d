"""How the learning rate moves: a factor on `lr`, a pure function of the step's number.

No schedule has a state, so there is none to save: a resumed run asks for the same numbers. Warm-up and cosine move at
every batch, steps at the end of an epoch.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pydantic

from pared.step import settings
from pared.train.optimizers import by_kind

Warmup = Annotated[
    float, pydantic.Field(description="Epochs, or part of one, in which the rate first rises in a line.", ge=0)
]


def warmup_steps(warmup_epochs: float, per_epoch: int) -> int:
    """Batches before the full rate is reached."""
    return round(warmup_epochs * per_epoch)


@settings
class Constant:
    """The rate stays as it is."""

    kind: Annotated[Literal["constant"], pydantic.Field(description="Name in recipes.")] = "constant"
    warmup_epochs: Warmup = 0.0

    def factor(self, step: int, per_epoch: int, epochs: int) -> float:
        """What `lr` is multiplied by at batch `step`, counted from 0 over the whole run.

        Example:
            >>> Constant().factor(7, per_epoch=10, epochs=2)
            1.0
        """
        warm = warmup_steps(self.warmup_epochs, per_epoch)
        return (step + 1) / (warm + 1) if step < warm else 1.0


@settings
class Cosine:
    """Half a cosine from `lr` down to `final * lr`.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, one period and no restart.
    """

    kind: Annotated[Literal["cosine"], pydantic.Field(description="Name in recipes.")] = "cosine"
    warmup_epochs: Warmup = 0.0
    final: Annotated[float, pydantic.Field(description="Where it ends, as a factor of lr.", ge=0, le=1)] = 0.0

    def factor(self, step: int, per_epoch: int, epochs: int) -> float:
        """What `lr` is multiplied by at batch `step`, counted from 0 over the whole run.

        Example:
            >>> [Cosine().factor(step, per_epoch=2, epochs=2) for step in (0, 2)]
            [1.0, 0.5]
        """
        warm = warmup_steps(self.warmup_epochs, per_epoch)
        if step < warm:
            return (step + 1) / (warm + 1)
        done = (step - warm) / max(1, per_epoch * epochs - warm)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@settings
class StepDecay:
    """The rate falls to `factor_each` of itself after every `every` epochs."""

    kind: Annotated[Literal["step"], pydantic.Field(description="Name in recipes.")] = "step"
    warmup_epochs: Warmup = 0.0
    every: Annotated[int, pydantic.Field(description="Epochs between two falls.", ge=1)] = 1
    factor_each: Annotated[float, pydantic.Field(description="What each fall multiplies lr by.", gt=0, le=1)] = 0.1

    def factor(self, step: int, per_epoch: int, epochs: int) -> float:
        """What `lr` is multiplied by at batch `step`, counted from 0 over the whole run.

        Example:
            >>> [StepDecay(every=1).factor(step, per_epoch=2, epochs=2) for step in (0, 1, 2)]
            [1.0, 1.0, 0.1]
        """
        warm = warmup_steps(self.warmup_epochs, per_epoch)
        rise = (step + 1) / (warm + 1) if step < warm else 1.0
        return rise * self.factor_each ** (step // per_epoch // self.every)


Schedule = Annotated[
    Constant | Cosine | StepDecay,
    pydantic.Discriminator("kind"),
    pydantic.BeforeValidator(
        by_kind, json_schema_input_type=Literal["constant", "cosine", "step"] | Constant | Cosine | StepDecay
    ),
]
