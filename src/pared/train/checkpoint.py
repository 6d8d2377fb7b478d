"""Checkpoints of a training: one file, replaced whole after every epoch, read without running any code from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import ArtifactError, TrainError
from pared.interrupts import uninterrupted
from pared.task import Task

FORMAT = 1


@dataclasses.dataclass(kw_only=True)
class Checkpoint:
    """Where a training stands after a whole number of epochs.

    Random states are not part of it: each epoch seeds them anew. Nor is the schedule, a function of the step's number.

    Attributes:
        epoch: Finished epochs.
        model: The trained tensors.
        optimizer: The optimizer's own state.
        callbacks: Each callback's own state, in their order.
        losses: Mean training loss of each epoch.
        values: The deciding metric on `validation` after each epoch, where it is asked for.
        best_epoch: Finished epochs when `values` was best.
        best: The trained tensors then; their averages where averages are kept.
        average: The moving averages of the trained tensors, where they are kept.
        scaler: How float16 gradients are scaled.
    """

    epoch: int = 0
    model: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    average: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write beside, then rename: a reader sees the old file or the new one. Raises: TrainError."""
        part = path.with_name(path.name + ".part")
        payload = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with uninterrupted():
                with part.open("wb") as file:
                    torch.save({"format": FORMAT} | payload, file)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer reports a full disk as either
            raise TrainError(
                f"the checkpoint of epoch {self.epoch} cannot be written to {path} ({error}); "
                "free or grant space there and run again: the last checkpoint is kept"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Checkpoint | None:
        """The checkpoint in a file, or None where there is none. Raises: ArtifactError."""
        if not path.exists():
            return None
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ArtifactError(
                f"checkpoint {path} cannot be read ({type(error).__name__}); delete it to train anew"
            ) from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ArtifactError(f"checkpoint {path} is not of format {FORMAT}; delete it to train anew")
        return cls(**data)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, shared ones once; buffers that `state_dict` leaves out too."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a model, on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors_of(model).items()}


def restore(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Write saved tensors back in place."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(saved[name])


def fingerprint(model: nn.Module, task: Task, settings: Mapping[str, Any], seed: int) -> str:
    """Names a training by all that goes into it: tensors, data, loss, settings, seed, version of PyTorch.

    Example:
        >>> task = Task(example_inputs=torch.ones(1, 2))
        >>> one, other = (fingerprint(nn.Identity(), task, {}, seed=seed) for seed in (0, 1))
        >>> one == other
        False
    """
    loss = task.loss
    plain = {
        name: value
        for name, value in getattr(loss, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str))
    }
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    digest = hashlib.sha256(json.dumps([seed, settings, name, plain, torch.__version__], sort_keys=True).encode())
    digest.update(task.id.encode())
    for name, tensor in tensors_of(model).items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
