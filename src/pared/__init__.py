"""pared: make a trained PyTorch network smaller and faster, with the proof measured on the file that ships.

The names below are imported when they are first used, so that `import pared` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pared.artifact import Artifact, load, open_artifact
    from pared.distill.step import Distill
    from pared.errors import ParedError
    from pared.pipeline import compress, dry_run
    from pared.prune.slimming import Slim
    from pared.prune.step import PruneChannels
    from pared.quantize.aware import QuantizeAware
    from pared.quantize.dynamic import QuantizeDynamic
    from pared.quantize.half import CastHalf
    from pared.quantize.static import QuantizeStatic
    from pared.quantize.weights import QuantizeWeights
    from pared.recipe import Budget, Recipe, Repeat, TimingSettings
    from pared.report.data import Report
    from pared.task import Task
    from pared.train.step import Train

HOMES = {
    "Artifact": "pared.artifact",
    "Budget": "pared.recipe",
    "CastHalf": "pared.quantize.half",
    "Distill": "pared.distill.step",
    "ParedError": "pared.errors",
    "PruneChannels": "pared.prune.step",
    "QuantizeAware": "pared.quantize.aware",
    "QuantizeDynamic": "pared.quantize.dynamic",
    "QuantizeStatic": "pared.quantize.static",
    "QuantizeWeights": "pared.quantize.weights",
    "Recipe": "pared.recipe",
    "Repeat": "pared.recipe",
    "Report": "pared.report.data",
    "Slim": "pared.prune.slimming",
    "Task": "pared.task",
    "TimingSettings": "pared.recipe",
    "Train": "pared.train.step",
    "compress": "pared.pipeline",
    "dry_run": "pared.pipeline",
    "load": "pared.artifact",
    "open_artifact": "pared.artifact",
}

__all__ = [
    "Artifact",
    "Budget",
    "CastHalf",
    "Distill",
    "ParedError",
    "PruneChannels",
    "QuantizeAware",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "Recipe",
    "Repeat",
    "Report",
    "Slim",
    "Task",
    "TimingSettings",
    "Train",
    "compress",
    "dry_run",
    "load",
    "open_artifact",
]


# Rooms with functions for the caller's own loop, as `pared.distill.ResponseLoss`.
ROOMS = ("distill", "prune")


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return importlib.import_module(f"pared.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'pared' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *ROOMS})
