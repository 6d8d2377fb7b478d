"""One training as a value, which another process can take up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pared.train.callbacks import Callback
from pared.train.checkpoint import Checkpoint
from pared.train.hardware import Hardware
from pared.train.optimizers import SGD, AdamW
from pared.train.schedules import Constant, Cosine, StepDecay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training but for its model and data: see `fit`."""

    epochs: int
    lr: float
    optimizer: SGD | AdamW
    schedule: Constant | Cosine | StepDecay
    patience: int | None = None
    clip_norm: float | None = None
    ema: float | None = None
    log_dir: str | None = None
    hardware: Hardware = dataclasses.field(default_factory=Hardware)
    callbacks: Sequence[Callback] = ()
    seed: int = 0
    checkpoint: Path | None = None

    def is_over(self, state: Checkpoint) -> bool:
        """Whether all epochs are done, or `validation` has not improved for `patience` of them."""
        stale = self.patience is not None and state.epoch - state.best_epoch >= self.patience
        return state.epoch >= self.epochs or stale
