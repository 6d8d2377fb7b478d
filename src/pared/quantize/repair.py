"""The repairs of a static quantization, one setting each: what can be switched on alone, and what is on by default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from pared.errors import nearest
from pared.quantize.correction import CorrectBias
from pared.quantize.equalize import Equalize
from pared.quantize.smooth import Migrate
from pared.step import settings


@settings
class FoldBatchNorms:
    """Fold batch norms into the layers before them. Without it these layers cannot write integers."""

    kind: Literal["fold_batch_norms"] = "fold_batch_norms"


REPAIRS = {
    "fold_batch_norms": FoldBatchNorms,
    "equalize": Equalize,
    "migrate": Migrate,
    "correct_bias": CorrectBias,
}


def named_repair(value: Any) -> Any:
    """Let a bare name stand for a repair with its default settings. Raises: ValueError for an unknown one."""
    if isinstance(value, str) and value not in REPAIRS:
        raise ValueError(f"no repair {value!r}; {nearest(value, REPAIRS)}")
    return REPAIRS[value]() if isinstance(value, str) else value


Repair = Annotated[
    FoldBatchNorms | Equalize | Migrate | CorrectBias,
    pydantic.Field(discriminator="kind"),
    pydantic.BeforeValidator(
        named_repair,
        json_schema_input_type=Literal["fold_batch_norms", "equalize", "migrate", "correct_bias"]
        | FoldBatchNorms
        | Equalize
        | Migrate
        | CorrectBias,
    ),
]
DEFAULT: tuple[Repair, ...] = (FoldBatchNorms(), CorrectBias())
