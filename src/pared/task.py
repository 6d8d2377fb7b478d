"""What a model is for: example inputs, data, loss, metrics. Also how a batch is read and a model is called.

A batch is `(inputs, target)`, or inputs alone; inputs are a tensor, a tuple of tensors or a dict of keyword arguments.
Loading data from files is `data`'s work, training is `train`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pared.data.adapters import adapt
from pared.errors import DataError, ModelError, UsageError, nearest
from pared.identity import identity
from pared.metrics import Metric, resolve_metrics
from pared.seeding import isolated, seed_all

Role = Literal["calibration", "train", "validation", "test"]
ROLES: tuple[Role, ...] = ("calibration", "train", "validation", "test")
FIRST = 2  # batches of each source that count for `Task.id`
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

    def arrays(self, names: Sequence[str] = ()) -> list[np.ndarray]:
        """Every tensor as a numpy array.

        Args:
            names: The exported file's inputs. Where every keyword is among them, keyword arguments go by name and
                positional ones fill the rest; otherwise all come in the order that they were given.

        Raises:
            DataError: A dtype that numpy does not have.
        """
        arrays = {name: as_array(value, name) for name, value in self.tensors.items()}
        keywords = {name: array for name, array in arrays.items() if name in self.kwargs}
        if not keywords or not keywords.keys() <= set(names) or len(arrays) != len(names):
            return list(arrays.values())
        rest = iter(array for name, array in arrays.items() if name not in keywords)
        return [keywords[name] if name in keywords else next(rest) for name in names]

    @property
    def size(self) -> int:
        """Number of samples: the first tensor's first dimension."""
        return next(iter(self.tensors.values())).shape[0]

    def part(self, start: int, stop: int) -> Inputs:
        """Samples `start` to `stop`."""
        part = {name: tensor[start:stop] for name, tensor in self.tensors.items()}
        args = tuple(part.get(str(i), value) for i, value in enumerate(self.args))
        return Inputs(args, {name: part.get(name, value) for name, value in self.kwargs.items()})

    def chunks(self, size: int) -> Iterator[Inputs]:
        """The same samples, `size` at a time; the last part may be smaller."""
        return (self.part(start, start + size) for start in range(0, self.size, size))

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


def as_array(value: Tensor, name: str) -> np.ndarray:
    """A tensor as a numpy array. Raises: DataError for a dtype that numpy does not have."""
    try:
        array: np.ndarray = value.detach().cpu().numpy()
    except TypeError:
        raise DataError(f"input {name} is {value.dtype}, which exported files do not take; use float32") from None
    return array


def as_batch(item: Any, positional: int = 1) -> Batch:
    """A batch from what a data source yields: a pair is (inputs, target), anything else is inputs alone.

    Args:
        positional: How many positional inputs the model takes. Where it takes two, a pair of tensors is both of them.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, (tuple, list)) and not isinstance(item, Inputs) and len(item) == 2:
        both = positional == 2 and all(isinstance(part, (Tensor, np.ndarray)) for part in item)
        return Batch(as_inputs(item), None) if both else Batch(as_inputs(item[0]), as_tensor(item[1]))
    return Batch(as_inputs(item), None)


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
        check_values(self.example_inputs, "example_inputs")
        for key, dimensions in self.dynamic.items():
            self.check_dynamic(str(key), dimensions)
        shape = tuple(next(iter(self.example_inputs.tensors.values())).shape)
        for role in ROLES:
            source = getattr(self, role)
            if source is not None:
                setattr(self, role, adapt(source, role=role, example_shape=shape))
        self.metrics: tuple[Metric, ...] = resolve_metrics(self.metrics)
        # Taken now: a loss or metric that counts its calls is another object, to look at, after each of them.
        metrics = [(metric.name, metric.higher_is_better, metric.make) for metric in self.metrics]
        dynamic = sorted((str(key), sorted(dims.items())) for key, dims in self.dynamic.items())
        self.behaviour = identity([self.loss, metrics, dynamic, self.output])

    def check_dynamic(self, name: str, dimensions: Mapping[int, str]) -> None:
        """Raise `UsageError` where `dynamic` names an input or a dimension that there is not."""
        inputs = self.example_inputs.tensors
        if name not in inputs:
            raise UsageError(f"Task(dynamic=...): no input {name!r}; {nearest(name, inputs)}")
        ranks = inputs[name].ndim
        if not isinstance(dimensions, Mapping) or any(type(d) is not int or not 0 < d < ranks for d in dimensions):
            raise UsageError(
                f"Task(dynamic=...): {name}: write {{dimension: name}} with dimensions 1 to {ranks - 1}, "
                f"found {dimensions!r}"
            )

    @property
    def sources(self) -> dict[Role, Any]:
        """The data that were given, by role."""
        return {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}

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
            batch = as_batch(item, len(self.example_inputs.args))
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
        check_values(batch.inputs, where)

    def dynamic_of(self, name: str) -> Mapping[int, str]:
        """Further dynamic dimensions of one input."""
        if name in self.dynamic:
            return self.dynamic[name]
        return self.dynamic.get(int(name), {}) if name.isdigit() else {}

    def pick(self, output: Any) -> Tensor:
        """The tensor that the loss and metrics see, out of a model's raw output. Raises: ModelError."""
        if isinstance(self.output, str):
            named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
            if self.output not in named:
                raise ModelError(f"Task(output={self.output!r}): no such part; {nearest(self.output, map(str, named))}")
            picked = named[self.output]
        elif isinstance(self.output, int):
            if not isinstance(output, (tuple, list)) or not -len(output) <= self.output < len(output):
                size = f" of {len(output)}" if isinstance(output, (tuple, list)) else ""
                raise ModelError(
                    f"Task(output={self.output}): the output is a {type(output).__name__}{size}; no such index"
                )
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
        """Fingerprint of the task and of the content of its first batches; part of every cache key.

        Shuffled data show the same batches to every call, and the caller's random states stay as they are. `test` is
        not looked at: it is read once, at the end of a run.
        """
        digest = hashlib.sha256(self.behaviour.encode())
        digest.update(content_of(Batch(self.example_inputs, None)))
        with isolated(self):
            seed_all(self, 0, 0)
            for role, source in self.sources.items():
                if role != "test":
                    digest.update(role.encode())
                    for batch in itertools.islice(source, FIRST):
                        digest.update(content_of(as_batch(batch, len(self.example_inputs.args))))
        return digest.hexdigest()


def check_values(inputs: Inputs, where: str) -> None:
    """Raise `DataError` unless all inputs have one batch size and are finite."""
    for name, tensor in inputs.tensors.items():
        if tensor.ndim == 0 or tensor.shape[0] != inputs.size:
            raise DataError(
                f"{where}: input {name} has shape {tuple(tensor.shape)}; every input has the batch first, of one size"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}: input {name} holds NaN or infinity; clean the data")


def content_of(batch: Batch) -> bytes:
    """A digest of the values in a batch."""
    return identity([list(batch.inputs.tensors.items()), batch.target]).encode()


def evaluate(
    predict: Callable[[Inputs], Tensor], batches: Iterable[Batch], metrics: Sequence[Metric]
) -> dict[str, float]:
    """Every metric of a prediction function over labelled batches, by name.

    Raises:
        DataError: A batch has no target, or a label lies outside the output's classes.
    """
    return evaluate_all([predict], batches, metrics)[0]


def evaluate_all(
    predictors: Sequence[Callable[[Inputs], Tensor]], batches: Iterable[Batch], metrics: Sequence[Metric]
) -> list[dict[str, float]]:
    """`evaluate` for several prediction functions, over one reading of the batches."""
    states = [[metric.start() for metric in metrics] for _ in predictors]
    for batch in batches:
        if batch.target is None:
            raise DataError("metrics need labelled batches: (inputs, target)")
        for predict, own in zip(predictors, states, strict=True):
            output = predict(batch.inputs)
            for metric, state in zip(metrics, own, strict=True):
                metric.update(state, output, batch.target)
    return [{metric.name: metric.result(state) for metric, state in zip(metrics, own, strict=True)} for own in states]
