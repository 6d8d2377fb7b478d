"""How numbers are written as integers: the settings of weights and of activations, plain values without arithmetic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from pared.errors import SettingError
from pared.quantize.affine import Grid, grid
from pared.quantize.rounding import ROUNDINGS, AdaRound, Nearest, Stochastic
from pared.step import Scheme, settings

Cpu = Annotated[
    Literal["here", "any", "vnni"],
    pydantic.Field(
        description="Where the file must be right: any: on every processor, at some precision of the weights, for"
        " 8-bit products saturate on x86 without VNNI; vnni: on processors with VNNI; here: on one like this."
    ),
]


def kept_safe(cpu: str, scheme: Scheme, *, here: bool | None) -> bool:
    """Whether weights must be kept from saturating: a fact of the plan, so that it is replayed the same elsewhere.

    Args:
        cpu: As the setting.
        scheme: The runtime's rules.
        here: Whether products saturate on this processor. Where the system does not tell, a little precision is lost
            rather than an unknown amount of it.
    """
    return scheme.saturating != "no" and (cpu == "any" or (cpu == "here" and here is not False))


def named_rounding(value: Any) -> Any:
    """Let a bare name stand for a rounding with its default settings."""
    return ROUNDINGS[value]() if isinstance(value, str) and value in ROUNDINGS else value


@settings
class Weights:
    """How weights become integers."""

    bits: Annotated[int, pydantic.Field(ge=2, le=8, description="Width of the integers; they are stored as int8.")] = 8
    granularity: Annotated[
        Literal["channel", "tensor"], pydantic.Field(description="One scale for each output channel, or for all.")
    ] = "channel"
    symmetric: Annotated[
        bool, pydantic.Field(description="Zero point 0; false gives the tensor a zero point of its own.")
    ] = True
    cpu: Cpu = "here"
    rounding: Annotated[
        Nearest | Stochastic | AdaRound,
        pydantic.Field(discriminator="kind", description="nearest, stochastic or adaround."),
        pydantic.BeforeValidator(
            named_rounding,
            json_schema_input_type=Literal["nearest", "stochastic", "adaround"] | Nearest | Stochastic | AdaRound,
        ),
    ] = Nearest()

    def __post_init__(self) -> None:
        if not self.symmetric and self.granularity == "channel":
            raise SettingError(
                "Weights.symmetric: no runtime takes a zero point for each channel; use granularity='tensor' with it"
            )

    def grid(self) -> Grid:
        """The integers of a weight."""
        return grid(bits=self.bits, signed=True, symmetric=self.symmetric)


@settings
class Activations:
    """How activations become integers. Their type is the target's."""

    bits: Annotated[
        int,
        pydantic.Field(
            ge=2,
            le=8,
            description="Width of the integers; they are stored in 8. Fewer than 8: on onnxruntime and openvino alone.",
        ),
    ] = 8
    symmetric: Annotated[
        bool | None, pydantic.Field(description="Centre each range on 0; null does as the target wants.")
    ] = None

    def is_symmetric(self, scheme: Scheme) -> bool:
        """Whether ranges are centred on 0. Raises: SettingError where the target cannot run what is asked."""
        if self.symmetric is False and scheme.activation_symmetric:
            raise SettingError("Activations.symmetric: the target takes zero point 0 alone; leave it null or true")
        return scheme.activation_symmetric if self.symmetric is None else self.symmetric

    def grid(self, scheme: Scheme) -> Grid:
        """The integers of an activation. Raises: SettingError where the target does not clip so few bits."""
        if self.bits < 8 and not scheme.narrow_activations:
            raise SettingError(
                f"activations of {self.bits} bits: this target clips at the ends of 8 bits alone, so the file would "
                "compute something else; use 8 bits here, or the target onnxruntime or openvino"
            )
        return grid(bits=self.bits, signed=scheme.activation_dtype == "int8", symmetric=self.is_symmetric(scheme))
