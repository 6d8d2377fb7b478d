"""The task's loss of one batch, with the mistakes in a batch's target explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pared.errors import DataError, ModelError, UsageError
from pared.metrics import check_labels
from pared.task import Batch, Task


def loss_of(task: Task, criterion: Callable[[Any, Any], Tensor], batch: Batch, outputs: Any, where: str) -> Tensor:
    """The loss of a batch as one number, checked.

    Args:
        task: Picks the output that counts.
        criterion: Its loss, on the device that trains.
        batch: On that device too.
        outputs: The model's raw output.
        where: The batch, in words.

    Raises:
        DataError: No target, or one that does not fit the output.
        UsageError: The loss is not one number.
        ModelError: It does not depend on what is trained.
    """
    if batch.target is None:
        raise DataError(f"{where}: the loss needs a target; give batches of train data as (inputs, target)")
    output = task.pick(outputs)
    try:
        check_target(task, criterion, output, batch.target)
        loss = criterion(output, batch.target)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except IndexError as error:
        raise DataError(
            f"{where}: the loss finds no place for a label ({error}); the model's output is {tuple(output.shape)}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"the loss must return one number as a tensor, found {found}; reduce it, e.g. by its mean")
    if not loss.requires_grad:
        raise ModelError(
            f"{where}: the loss does not depend on any weight that is trained; look for detach() or no_grad()"
        )
    return loss


def check_target(task: Task, criterion: Any, output: Tensor, target: Any) -> None:
    """Check class indices before the loss does: on a GPU its own check kills the process."""
    indices = isinstance(target, Tensor) and not target.is_floating_point() and output.ndim > 1
    labels = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) or (
        task.metric is not None and task.metric.labels
    )
    if not indices or not labels:
        return
    counted = target[target != getattr(criterion, "ignore_index", -100)]
    if counted.numel() > 0:
        check_labels(output, counted)
