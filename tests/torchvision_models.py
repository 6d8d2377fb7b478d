"""torchvision's classifiers, built on the CPU beside a PyTorch that its compiled operators do not fit.

The import fails on operator schemas that the missing library would have registered. They are only ever called by
detection models, so any schema will do.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@functools.cache
def schemas() -> torch.library.Library | None:
    """The missing schemas, which live as long as this library does; None where torchvision brings its own."""
    # It lies apart, because torchmetrics imports any torchvision that it finds, and fails with this one.
    sys.path.append(str(Path(sys.prefix) / "apart"))
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchvision is not installed")
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def torchvision_model(name: str) -> nn.Module:
    """An untrained classifier in eval mode. Skips the test where torchvision is absent."""
    schemas()
    from torchvision.models import get_model

    return get_model(name).eval()


def published(name: str) -> dict[str, Any]:
    """What torchvision states of a model's default weights: `num_params`, and `_ops` in GMACs."""
    schemas()
    from torchvision.models import get_model_weights

    return get_model_weights(name).DEFAULT.meta
