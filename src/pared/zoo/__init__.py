"""Networks that come with pared, by name. Listing the names costs no import of torch; making one does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def lazy(place: str, about: str) -> Callable[..., nn.Module]:
    """A maker whose module is imported at its first call.

    Args:
        place: `module:callable`.
        about: One line for lists, kept as the docstring.
    """
    module, _, name = place.partition(":")

    def make(**settings: Any) -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), name)(**settings)
        return model

    make.__name__ = make.__qualname__ = name
    make.__doc__ = about
    return make


MODELS: dict[str, Callable[..., nn.Module]] = {
    "fashion_cnn": lazy(
        "pared.zoo.fashion_cnn:fashion_cnn",
        "A residual network for grey images of 28 x 28 in ten classes; the demo's.",
    ),
}
