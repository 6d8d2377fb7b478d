"""Tasks: what a batch is, what is checked, and what their fingerprint sees."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.errors import DataError, ModelError, UsageError
from pared.task import Batch, Inputs, Task, as_batch, as_inputs

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])


def same(found: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    pairs = [*zip(found.args, args, strict=True), *((found.kwargs[name], kwargs[name]) for name in kwargs)]
    return found.kwargs.keys() == kwargs.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("value", "args", "kwargs"),
    [
        (X, (X,), {}),
        (X.numpy(), (X,), {}),
        ((X, Y), (X, Y), {}),
        ([X, Y.numpy()], (X, Y), {}),
        ({"b": X, "a": Y}, (), {"b": X, "a": Y}),
        (Inputs((X,), {"a": Y}), (X,), {"a": Y}),
    ],
)
def test_inputs_are_read_from_every_form(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert same(as_inputs(value), args, kwargs)


@pytest.mark.parametrize(
    ("item", "positional", "args", "labelled"),
    [
        (X, 1, (X,), False),
        ((X, Y), 1, (X,), True),
        ([X, Y], 1, (X,), True),
        ((X,), 1, (X,), False),
        ([X], 1, (X,), False),
        # A model of two inputs: a pair of tensors is both of them, a pair of inputs and target is nested.
        ((X, Y), 2, (X, Y), False),
        (((X, X), Y), 2, (X, X), True),
        ((X, X, X), 3, (X, X, X), False),
        (Batch(as_inputs(X), Y), 1, (X,), True),
    ],
)
def test_batches_are_read_from_every_form(item: Any, positional: int, args: tuple[Any, ...], labelled: bool) -> None:
    batch = as_batch(item, positional)
    assert same(batch.inputs, args, {})
    assert (batch.target is not None) == labelled


def test_arrays_come_in_the_files_order_when_keywords_are_among_its_names() -> None:
    one, two, three = (torch.full((1,), float(i)) for i in range(3))
    order = [array.item() for array in Inputs((), {"b": one, "a": two}).arrays(["a", "b"])]
    assert order == [1, 0]
    mixed = Inputs((one, two), {"k": three})
    assert [array.item() for array in mixed.arrays(["x", "k", "y"])] == [0, 2, 1]
    # Names that the exporter made up say nothing: the order given stands.
    assert [array.item() for array in mixed.arrays(["input_1", "input_2", "input_3"])] == [0, 1, 2]
    assert [array.item() for array in mixed.arrays()] == [0, 1, 2]
    flags = Inputs((one, None, 3), {"mask": None, "k": two})
    assert [array.item() for array in flags.arrays(["x", "k"])] == [0, 1]
    assert (flags.size, flags.to("cpu").args[1:]) == (1, (None, 3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"example_inputs": "x"},
            DataError,
            "must be a tensor, a tuple of tensors or a dict of keyword arguments, not str",
        ),
        ({"example_inputs": ()}, DataError, r"example_inputs hold no tensor; give one call's inputs"),
        ({"example_inputs": (1, 2)}, DataError, "hold no tensor"),
        ({"example_inputs": torch.tensor(1.0)}, DataError, r"input 0 has shape \(\); every input has the batch first"),
        ({"example_inputs": (X, torch.ones(2, 2))}, DataError, r"input 1 has shape \(2, 2\); .* of one size"),
        ({"example_inputs": X * torch.nan}, DataError, "example_inputs: input 0 holds NaN or infinity"),
        ({"dynamic": {"1": {1: "length"}}}, UsageError, r"Task\(dynamic=\.\.\.\): no input '1'; valid: 0"),
        ({"dynamic": {0: {0: "batch"}}}, UsageError, "dimensions 1 to 1"),
        ({"dynamic": {0: {2: "length"}}}, UsageError, r"dimensions 1 to 1, found \{2: 'length'\}"),
        ({"dynamic": {0: "length"}}, UsageError, "write {dimension: name}"),
        ({"metrics": "acuracy"}, UsageError, "did you mean 'accuracy'"),
        ({"train": iter([X])}, DataError, "train data: .* can be read only once"),
        ({"test": []}, DataError, "test data: there is no batch in it"),
    ],
)
def test_task_is_refused_with_the_name_of_what_is_wrong(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Task(**({"example_inputs": X} | changes))


def test_input_names_are_suggested_when_dynamic_misspells_one() -> None:
    with pytest.raises(UsageError, match="no input 'token'; did you mean 'tokens'"):
        Task(example_inputs={"tokens": X}, dynamic={"token": {1: "length"}})
    assert Task(example_inputs={"tokens": X}, dynamic={"tokens": {1: "length"}}).dynamic_of("tokens") == {1: "length"}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 3), r"train data, batch 1: input 0 has shape \(2, 3\), the example has \(3, 2\)"),
        (X.double(), r"train data, batch 1: input 0 is torch\.float64, the example is torch\.float32; convert it"),
        (X / 0, "train data, batch 1: input 0 holds NaN or infinity"),
        ({"x": X}, r"train data, batch 1: inputs \['x'\] where the example inputs have \['0'\]"),
        (((X, X), Y), r"inputs \['0', '1'\] where the example inputs have \['0'\]"),
        ("text", "not str"),
    ],
)
def test_batches_name_the_first_that_does_not_fit(batch: Any, message: str) -> None:
    batches = Task(example_inputs=X, train=[X, batch, X]).batches("train")
    assert next(batches).inputs.size == 3
    with pytest.raises(DataError, match=message):
        next(batches)


def test_dimensions_may_differ_when_dynamic_names_them() -> None:
    task = Task(example_inputs=X, train=[torch.ones(5, 7)], dynamic={0: {1: "length"}})
    assert next(task.batches("train")).inputs.size == 5


def test_batches_stop_at_the_limit_and_say_so_when_there_are_none() -> None:
    class Nothing:
        def __iter__(self) -> Any:
            return iter([])

    assert len(list(Task(example_inputs=X, train=[X, X, X]).batches("train", limit=2))) == 2
    with pytest.raises(DataError, match="validation data is empty; Train needs at least one batch"):
        list(Task(example_inputs=X, validation=Nothing()).batches("validation", "Train"))
    with pytest.raises(UsageError, match=r"Train needs validation data; give it as Task\(validation=\.\.\.\)"):
        list(Task(example_inputs=X).batches("validation", "Train"))
    assert len(list(Task(example_inputs=X, train=[X]).batches("calibration"))) == 1


@pytest.mark.parametrize(
    ("output", "raw", "found"),
    [
        (None, X, X),
        (None, (X,), X),
        ("logits", {"logits": X, "loss": Y}, X),
        ("logits", SimpleNamespace(logits=X), X),
        (1, (Y, X), X),
        (-1, [Y, X], X),
        (lambda raw: raw["a"][0], {"a": [X]}, X),
    ],
)
def test_pick_finds_the_tensor_that_counts(output: Any, raw: Any, found: Tensor) -> None:
    assert Task(example_inputs=X, output=output).pick(raw) is found


@pytest.mark.parametrize(
    ("output", "raw", "message"),
    [
        (None, (X, Y), r"output is a tuple, not a tensor; say which part counts with Task\(output=<key"),
        (None, {"logits": X}, "output is a dict"),
        ("logit", {"logits": X}, "no such part; did you mean 'logits'"),
        ("logits", X, "no such part"),
        (2, (X, Y), "tuple of 2; no such index"),
        (0, {"logits": X}, "is a dict; no such index"),
        (lambda raw: None, X, "not a tensor"),
    ],
)
def test_pick_says_what_there_is_when_it_does_not_find_it(output: Any, raw: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Task(example_inputs=X, output=output).pick(raw)


def scaled(output: Tensor, target: Tensor, factor: float = 1.0) -> Tensor:
    return (output * factor).mean()


def other_constant(output: Tensor, target: Tensor) -> Tensor:
    return output.mean() * LEVEL


LEVEL = 2.0
BASE: dict[str, Any] = {"example_inputs": X, "train": [(X, Y)], "loss": nn.CrossEntropyLoss(), "metrics": scaled}
CHANGED: dict[str, dict[str, Any]] = {
    "example": {"example_inputs": X + 1},
    "values": {"train": [(X + 1, Y)]},
    "labels": {"train": [(X, 1 - Y)]},
    "role": {"train": None, "validation": [(X, Y)]},
    "second batch": {"train": [(X, Y), (X, Y)]},
    "a setting of the loss": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "a tensor of the loss": {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))},
    "loss": {"loss": nn.NLLLoss()},
    "a bound argument": {"metrics": functools.partial(scaled, factor=2.0)},
    "another function": {"metrics": other_constant},
    "output": {"output": 0},
    "dynamic": {"dynamic": {0: {1: "length"}}},
}


def test_id_differs_when_anything_that_counts_does() -> None:
    ids = {name: Task(**(BASE | change)).id for name, change in CHANGED.items()}
    ids["base"] = Task(**BASE).id
    assert len(set(ids.values())) == len(CHANGED) + 1


def test_id_is_the_same_when_the_task_is() -> None:
    copied = BASE | {"example_inputs": X.clone(), "train": [(X.clone(), Y.clone())], "loss": nn.CrossEntropyLoss()}
    first = Task(**BASE)
    assert first.id == first.id == Task(**copied).id
    assert Task(**BASE, test=[(X, Y)]).id == first.id  # test data are not looked at before the end


def test_id_differs_when_a_constant_or_closure_of_a_function_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def task_of(function: Any) -> Task:
        return Task(**(BASE | {"loss": function}))

    def closing(over: Any) -> Any:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return output.mean() * over

        return loss

    assert task_of(closing(1.0)).id == task_of(closing(1.0)).id != task_of(closing(2.0)).id
    assert task_of(closing(torch.ones(2))).id != task_of(closing(torch.zeros(2))).id
    before = task_of(other_constant).id
    monkeypatch.setitem(globals(), "LEVEL", 3.0)
    assert task_of(other_constant).id != before


def test_id_is_that_of_the_start_when_a_loss_counts_its_calls() -> None:
    calls: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return output.mean()

    task = Task(**(BASE | {"loss": loss}))
    before = task.id
    loss(X, Y)
    assert task.id == before


def test_id_sees_strings_and_half_precision_when_data_have_them() -> None:
    named = [Task(example_inputs=X, train=[(X, [word])]).id for word in ("cat", "dog")]
    assert named[0] != named[1]
    halves = [Task(example_inputs=X.bfloat16() + i).id for i in range(2)]
    assert halves[0] != halves[1]
    assert Task(example_inputs=np.ones((1, 2), np.float32)).id == Task(example_inputs=torch.ones(1, 2)).id


def test_chunks_cut_every_input_alike_when_the_last_is_smaller() -> None:
    inputs = as_inputs({"a": torch.arange(40).reshape(40, 1), "b": torch.arange(40)})
    parts = list(inputs.chunks(12))
    assert [part.size for part in parts] == [12, 12, 12, 4]
    for part in parts:
        assert torch.equal(part.kwargs["a"][:, 0], part.kwargs["b"])
    assert torch.equal(torch.cat([part.kwargs["b"] for part in parts]), inputs.kwargs["b"])
