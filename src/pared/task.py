"""What a model is for: example inputs, data, loss, metrics. Also how a batch is read and a model is called.

A batch is `(inputs, target)`, or inputs alone; inputs are a tensor, a tuple of tensors or a dict of keyword arguments.
Loading data from files is `data`'s work, training is `train`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pared.data.adapters import adapt
from pared.errors import DataError, ModelError, UsageError
from pared.metrics import Metric, resolve_metrics

Role = Literal["calibration", "train", "validation", "test"]
ROLES: tuple[Role, ...] = ("calibration", "train", "validation", "test")
Output = str | int | Callable[[Any], Tensor] | None


class Inputs(NamedTuple):
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by position ("0", "1", ...) or keyword."""
        named = {str(i): value for i, value in enumerate(self.args)} | self.kwargs
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def arrays(self) -> list[np.ndarray]:
        """Every tensor as a numpy array, in the order of the exported file's inputs."""
        return [value.detach().cpu().numpy() for value in self.tensors.values()]

    @property
    def size(self) -> int:
        """Number of samples: the first tensor's first dimension."""
        return next(iter(self.tensors.values())).shape[0]

    def to(self, device: torch.device | str) -> Inputs:
        """The same inputs on another device."""
        moved = {name: value.to(device) for name, value in self.tensors.items()}
        args = tuple(moved.get(str(i), value) for i, value in enumerate(self.args))
        return Inputs(args, {name: moved.get(name, value) for name, value in self.kwargs.items()})


class Batch(NamedTuple):
    """One batch of data."""

    inputs: Inputs
    target: Any


def as_inputs(value: Any) -> Inputs:
    """Inputs from a tensor, a tuple of tensors or a dict of keyword arguments.

    Example:
        >>> as_inputs({"x": torch.ones(2, 3)}).size
        2
    """
    if isinstance(value, Inputs):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        value = (value,)
    if isinstance(value, Mapping):
        return Inputs((), {str(name): as_tensor(item) for name, item in value.items()})
    if isinstance(value, (tuple, list)):
        return Inputs(tuple(as_tensor(item) for item in value), {})
    raise DataError(
        f"model inputs must be a tensor, a tuple of tensors or a dict of keyword arguments, not {type(value).__name__}"
    )


def as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def as_batch(item: Any) -> Batch:
    """A batch from what a data source yields: a pair is (inputs, target), anything else is inputs alone."""
    if isinstance(item, (tuple, list)) and not isinstance(item, (Batch, Inputs)) and len(item) == 2:
        return Batch(as_inputs(item[0]), as_tensor(item[1]))
    return item if isinstance(item, Batch) else Batch(as_inputs(item), None)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's raw output."""
    return model(*inputs.args, **inputs.kwargs)


@dataclasses.dataclass(kw_only=True, eq=False)
class Task:
    """What a model is for.

    Only `example_inputs` is required: each step says what else it needs, and without `validation` the ledger has
    fidelity but no metric. Data sources may be a DataLoader, a torch Dataset, a list of batches, a pair of numpy
    arrays, a Hugging Face dataset, a parquet file of images or a folder of class folders; one-shot iterators are
    refused.

    Attributes:
        example_inputs: Inputs of one call, with the batch first.
        calibration: Inputs for choosing quantization ranges. `train` serves where this is None.
        train: Batches to train on.
        validation: Batches that decide: early stopping, roll back, search.
        test: Batches that are read once, for the final figures.
        loss: `loss(output, target) -> scalar`.
        metrics: Names (accuracy, top5, f1, mse), callables `f(output, target) -> number`, `Metric` or torchmetrics
            objects. The first one decides.
        teachers: Live teacher models by name.
        dynamic: Further dynamic dimensions: {input name or position: {dimension: name}}. The batch always is.
        output: Key, index or function that picks the tensor out of a rich output.
    """

    example_inputs: Any
    calibration: Any = None
    train: Any = None
    validation: Any = None
    test: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    metrics: Any = ()
    teachers: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    dynamic: Mapping[str | int, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    output: Output = None

    def __post_init__(self) -> None:
        self.example_inputs = as_inputs(self.example_inputs)
        if not self.example_inputs.tensors:
            raise DataError("example_inputs hold no tensor; give one call's inputs, e.g. example_inputs=(x,)")
        shape = tuple(next(iter(self.example_inputs.tensors.values())).shape)
        for role in ROLES:
            source = getattr(self, role)
            if source is not None:
                setattr(self, role, adapt(source, role=role, example_shape=shape))
        self.metrics: tuple[Metric, ...] = resolve_metrics(self.metrics)

    @property
    def metric(self) -> Metric | None:
        """The metric that decides, or None."""
        return self.metrics[0] if self.metrics else None

    def require(self, role: Role, by: str) -> Any:
        """The data source of a role. Raises: UsageError where the task has none."""
        source = getattr(self, role)
        if source is None and role == "calibration":
            source = self.train
        if source is None:
            raise UsageError(f"{by} needs {role} data; give it as Task({role}=...)")
        return source

    def batches(self, role: Role, by: str = "this run", limit: int | None = None) -> Iterator[Batch]:
        """The batches of a role, each checked against the example inputs. Raises: DataError."""
        count = 0
        for item in self.require(role, by):
            batch = as_batch(item)
            self.check(batch, role, count)
            yield batch
            count += 1
            if limit is not None and count >= limit:
                return
        if count == 0:
            raise DataError(f"{role} data is empty; {by} needs at least one batch")

    def check(self, batch: Batch, role: str, index: int) -> None:
        """Raise `DataError` unless a batch has the names, shapes, dtypes of the example inputs and is finite."""
        expected, found = self.example_inputs.tensors, batch.inputs.tensors
        where = f"{role} data, batch {index}"
        if found.keys() != expected.keys():
            raise DataError(f"{where}: inputs {sorted(found)} where the example inputs have {sorted(expected)}")
        for name, want in expected.items():
            have = found[name]
            free = {0, *self.dynamic_of(name)}
            same = have.ndim == want.ndim and all(d in free or have.shape[d] == want.shape[d] for d in range(want.ndim))
            if not same:
                raise DataError(
                    f"{where}: input {name} has shape {tuple(have.shape)}, the example has {tuple(want.shape)}; "
                    "only the batch and the dimensions named in Task(dynamic=...) may differ"
                )
            if have.dtype != want.dtype:
                raise DataError(f"{where}: input {name} is {have.dtype}, the example is {want.dtype}; convert it")
            if have.is_floating_point() and not bool(torch.isfinite(have).all()):
                raise DataError(f"{where}: input {name} holds NaN or infinity; clean the data")

    def dynamic_of(self, name: str) -> Mapping[int, str]:
        """Further dynamic dimensions of one input."""
        if name in self.dynamic:
            return self.dynamic[name]
        return self.dynamic.get(int(name), {}) if name.isdigit() else {}

    def pick(self, output: Any) -> Tensor:
        """The tensor that the loss and metrics see, out of a model's raw output. Raises: ModelError."""
        if isinstance(self.output, str):
            picked = output[self.output] if isinstance(output, Mapping) else getattr(output, self.output, None)
        elif isinstance(self.output, int):
            picked = output[self.output]
        elif self.output is not None:
            picked = self.output(output)
        else:
            picked = output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output
        if not isinstance(picked, Tensor):
            raise ModelError(
                f"the model's output is a {type(output).__name__}, not a tensor; "
                "say which part counts with Task(output=<key, index or function>)"
            )
        return picked

    @property
    def id(self) -> str:
        """Fingerprint of the task and of the content of its first batches; part of every cache key."""
        digest = hashlib.sha256()
        digest.update(repr([metric.name for metric in self.metrics]).encode())
        digest.update(repr(sorted((str(k), sorted(v.items())) for k, v in self.dynamic.items())).encode())
        for array in self.example_inputs.arrays():
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        for role in ROLES:
            if getattr(self, role) is None:
                continue
            digest.update(role.encode())
            for batch in first_batches(getattr(self, role)):
                tensors = [
                    *batch.inputs.arrays(),
                    *([batch.target.numpy()] if isinstance(batch.target, Tensor) else []),
                ]
                for array in tensors:
                    digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def first_batches(source: Iterable[Any], count: int = 2) -> list[Batch]:
    """The first batches of a source."""
    batches = []
    for item in source:
        batches.append(as_batch(item))
        if len(batches) == count:
            break
    return batches


def evaluate(
    predict: Callable[[Inputs], Tensor], batches: Iterable[Batch], metrics: Sequence[Metric]
) -> dict[str, float]:
    """Every metric of a prediction function over labelled batches, by name.

    Raises:
        DataError: A batch has no target, or a label lies outside the output's classes.
    """
    states = [metric.start() for metric in metrics]
    for batch in batches:
        if batch.target is None:
            raise DataError("metrics need labelled batches: (inputs, target)")
        output = predict(batch.inputs)
        for metric, state in zip(metrics, states, strict=True):
            metric.update(state, output, batch.target)
    return {metric.name: metric.result(state) for metric, state in zip(metrics, states, strict=True)}
