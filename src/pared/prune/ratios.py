"""How a budget is spread over the groups of a model, and which numbers of channels are allowed: settings alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import PydanticCustomError

from pared.errors import SettingError
from pared.step import settings


@settings
class Equal:
    """Every group loses the same fraction."""

    kind: Literal["equal"] = "equal"


@settings
class Global:
    """The channels with the lowest scores of the whole model go, whichever groups they are in."""

    kind: Literal["global"] = "global"
    normalize: Annotated[
        Literal["mean", "max", "none"],
        pydantic.Field(description="What a group's scores are divided by before they are compared with others."),
    ] = "mean"


@settings
class Sensitivity:
    """Every group loses as much as costs the same drop of the first metric on validation data."""

    kind: Literal["sensitivity"] = "sensitivity"
    samples: Annotated[int, pydantic.Field(ge=1, description="Look at this many samples at most.")] = 256


RATIOS = {"equal": Equal, "global": Global, "sensitivity": Sensitivity}
Ratios = Equal | Global | Sensitivity


def named_ratios(value: Any) -> Any:
    """Let a bare name stand for a way with its default settings; say which there are where there is none of a name."""
    kind = value.get("kind", "equal") if isinstance(value, Mapping) else value
    if isinstance(kind, str) and kind not in RATIOS:
        raise PydanticCustomError("ratios", "should be 'equal', 'global' or 'sensitivity'")
    return RATIOS[value]() if isinstance(value, str) else value


@settings
class Widths:
    """Which numbers of channels are allowed."""

    round_to: Annotated[
        int | Literal["measured"],
        pydantic.Field(description="Widths become multiples of it; measured: of 1, 8, 16 or 32, as is fastest here."),
    ] = 8
    limits: Annotated[
        dict[str, tuple[float, float]],
        pydantic.Field(
            description="By pattern of layers, the least and the most that stays, as fractions of the dense model."
        ),
    ] = dataclasses.field(default_factory=dict)
    attention: Annotated[
        Literal["heads", "head_dim"],
        pydantic.Field(description="Whole heads leave an attention, or the same indices of every head."),
    ] = "heads"

    def __post_init__(self) -> None:
        if isinstance(self.round_to, int) and self.round_to < 1:
            raise SettingError(f"Widths.round_to: a multiple is 1 or more, found {self.round_to}")
        for pattern, (least, most) in self.limits.items():
            if not 0 <= least <= most <= 1:
                raise SettingError(
                    f"Widths.limits: {pattern!r} needs [least, most] fractions, 0 <= least <= most <= 1, "
                    f"found {[least, most]}"
                )
