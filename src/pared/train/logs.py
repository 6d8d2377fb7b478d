"""TensorBoard, through Fabric's logger; an extra, for it brings a server."""

from __future__ import annotations

import importlib.util
from typing import Any

from lightning_fabric.loggers import TensorBoardLogger

from pared.errors import UsageError


def check_tensorboard() -> None:
    """Raise `UsageError` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "Train(log_dir=...) writes for TensorBoard, which is not installed: pip install 'pared[tensorboard]'"
        )


def open_log(folder: str) -> Any:
    """A log in `folder` itself; what was logged there before stays. Raises: UsageError."""
    check_tensorboard()
    return TensorBoardLogger(folder, name="", version="")
