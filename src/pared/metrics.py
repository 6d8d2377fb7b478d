"""Metrics by name, computed by torchmetrics, or by any callable. A metric has a name and a direction."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pared.errors import DataError, UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of merit.

    Attributes:
        name: Its key in reports.
        higher_is_better: Direction.
        make: Given the first output (batch first), an object with `update(output, target)` and `compute()`.
        labels: True where the target is a class index, which is then checked against the output's width.
    """

    name: str
    higher_is_better: bool
    make: Callable[[Tensor], Any]
    labels: bool = False

    def start(self) -> list[Any]:
        """An empty state."""
        return []

    def update(self, state: list[Any], output: Tensor, target: Any) -> None:
        """Count one batch in. Raises: DataError for a target that does not fit the output."""
        if self.labels:
            check_labels(output, target)
            check_one_each(output, target)
        if not state:
            state.append(self.make(output))
        try:
            state[0].update(output, target)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"metric {self.name} cannot compare output {tuple(output.shape)} with target {found}: "
                f"{first_line(error)}"
            ) from error

    def result(self, state: list[Any]) -> float:
        """The figure over all batches counted. Raises: DataError where there were none."""
        if not state:
            raise DataError(f"metric {self.name}: no batch to measure on")
        found = state[0].compute()
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(
                f"metric {self.name} gives a {type(found).__name__} where one number is expected; average it"
            ) from None

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is, in the metric's own unit; negative where it is better."""
        return before - after if self.higher_is_better else after - before


def check_labels(output: Tensor, target: Tensor) -> None:
    """Raise `DataError` unless every label is an index of the output's classes (dimension 1)."""
    if output.ndim < 2:
        raise DataError(f"labels are judged on outputs of shape (batch, classes), found {tuple(output.shape)}")
    classes = output.shape[1]
    if not isinstance(target, Tensor) or target.is_floating_point():
        raise DataError(
            f"labels must be integer class indices, found {getattr(target, 'dtype', type(target).__name__)}"
        )
    if target.numel() == 0:
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise DataError(f"label {low if low < 0 else high} lies outside the model's classes 0..{classes - 1}")


def check_one_each(output: Tensor, target: Tensor) -> None:
    """Raise `DataError` unless there is one label for each sample (and position)."""
    if target.shape != (output.shape[0], *output.shape[2:]):
        raise DataError(
            f"{tuple(target.shape)} labels for an output of shape {tuple(output.shape)}; give one label for each "
            "sample, as a class index"
        )


class MeanOf:
    """The mean of a callable over batches, weighted by batch size."""

    def __init__(self, function: Callable[[Tensor, Any], Any]) -> None:
        self.function = function
        self.total = 0.0
        self.count = 0

    def update(self, output: Tensor, target: Any) -> None:
        self.total += float(self.function(output, target)) * output.shape[0]
        self.count += output.shape[0]

    def compute(self) -> float:
        return self.total / self.count


def torchmetrics(part: str) -> Any:
    """A part of torchmetrics, imported late for it is slow. Raises: UsageError where it cannot be."""
    try:
        return importlib.import_module(f"torchmetrics.{part}")
    except RuntimeError as error:
        # It imports any torchvision it finds, and one that was built for another torch fails like this.
        raise UsageError(
            f"torchmetrics cannot be imported ({str(error).splitlines()[0]}); "
            "install a torchvision that fits your torch, or uninstall it"
        ) from None


def accuracy(output: Tensor) -> Any:
    kind = torchmetrics("classification").MulticlassAccuracy
    return kind(num_classes=output.shape[1], average="micro", validate_args=False)


def top5(output: Tensor) -> Any:
    kind, classes = torchmetrics("classification").MulticlassAccuracy, output.shape[1]
    return kind(num_classes=classes, average="micro", top_k=min(5, classes), validate_args=False)


def f1(output: Tensor) -> Any:
    kind = torchmetrics("classification").MulticlassF1Score
    return kind(num_classes=output.shape[1], average="macro", validate_args=False)


def mse(_output: Tensor) -> Any:
    return torchmetrics("regression").MeanSquaredError()


METRICS = {
    "accuracy": Metric("accuracy", True, accuracy, labels=True),
    "top5": Metric("top5", True, top5, labels=True),
    "f1": Metric("f1", True, f1, labels=True),
    "mse": Metric("mse", False, mse),
}


def resolve_metrics(given: Any) -> tuple[Metric, ...]:
    """Metrics from a name, a `Metric`, a torchmetrics object, a callable, or a sequence of these.

    A callable counts as "higher is better" unless it has an attribute `higher_is_better`. Raises: UsageError.

    Example:
        >>> [metric.name for metric in resolve_metrics("accuracy")]
        ['accuracy']
    """
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    metrics = tuple(resolve_metric(item) for item in items)
    names = [metric.name for metric in metrics]
    if len(set(names)) != len(names):
        raise UsageError(f"metrics must have different names, found {names}")
    return metrics


def resolve_metric(item: Any) -> Metric:
    if isinstance(item, Metric):
        return item
    if isinstance(item, str):
        if item not in METRICS:
            raise UsageError(f"no metric {item!r}; {nearest(item, METRICS)}")
        return METRICS[item]
    name = getattr(item, "__name__", type(item).__name__)
    better = getattr(item, "higher_is_better", None)
    if hasattr(item, "update") and hasattr(item, "compute") and hasattr(item, "clone"):
        return Metric(name, better is not False, functools.partial(emptied, item))
    if callable(item):
        return Metric(name, better is not False, functools.partial(mean_of, item))
    raise UsageError(f"a metric is a name, a callable or a torchmetrics object, found {type(item).__name__}")


def mean_of(function: Callable[[Tensor, Any], Any], _output: Tensor) -> MeanOf:
    return MeanOf(function)


def emptied(metric: Any, _output: Tensor) -> Any:
    """A copy of a torchmetrics object that has counted nothing yet."""
    copied = metric.clone()
    copied.reset()
    return copied


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
