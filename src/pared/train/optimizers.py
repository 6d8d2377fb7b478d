"""The training optimizers as settings: small frozen values that build PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import nn

from pared.step import settings

WeightDecay = Annotated[float, pydantic.Field(description="Strength of the pull of every weight towards 0.", ge=0)]


@settings
class SGD:
    """Stochastic gradient descent, as `torch.optim.SGD`."""

    default_lr: ClassVar[float] = 0.01

    kind: Annotated[Literal["sgd"], pydantic.Field(description="Name in recipes.")] = "sgd"
    momentum: Annotated[float, pydantic.Field(description="Share of the last step kept in the next.", ge=0, lt=1)] = 0.9
    weight_decay: WeightDecay = 0.0
    nesterov: Annotated[bool, pydantic.Field(description="Look ahead along the momentum, which must be above 0.")] = (
        False
    )

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")

    def make(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        return torch.optim.SGD(
            parameters, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@settings
class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW`."""

    default_lr: ClassVar[float] = 0.001

    kind: Annotated[Literal["adamw"], pydantic.Field(description="Name in recipes.")] = "adamw"
    weight_decay: WeightDecay = 0.01

    def make(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=self.weight_decay)


def by_kind(value: Any) -> Any:
    """Let a recipe say `optimizer: sgd` for `optimizer: {kind: sgd}`."""
    return {"kind": value} if isinstance(value, str) else value


Optimizer = Annotated[
    SGD | AdamW,
    pydantic.Discriminator("kind"),
    pydantic.BeforeValidator(by_kind, json_schema_input_type=Literal["sgd", "adamw"] | SGD | AdamW),
]
