"""Which data decide, which data claim, and how often each is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pared
from fake_pipeline import Change, Changing, Net, Tune, make_task
from pared.errors import DataError
from pared.task import Task
from pared.train.step import Train

Compress = Callable[..., pared.Artifact]
ONES = torch.ones(4, 2)


class Counted:
    """Batches that know how often they are read, and what had happened by then."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.readings: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        self.readings.append(len([what for what, _ in Changing.calls if what == "apply"]))
        yield from self.batches


def test_test_data_are_read_once_at_the_end_when_a_run_decides_on_validation(compress: Compress) -> None:
    # On test data every change is an improvement, on validation data a loss: the test data must not be heard.
    test = Counted([(-ONES, torch.zeros(4))])
    net = Net()
    nn.init.ones_(net.linear.weight)

    task = make_task(validation=[(ONES, torch.zeros(4))], test=test)
    steps = (Change(level=-1.0), Tune(), Change(level=-5.0))
    artifact = compress(*steps, model=net, task=task, budget=pared.Budget(max_drop=2.0))
    assert test.readings == [3]
    final = artifact.report.final
    assert final is not None and final.stage == "2 Tune"
    assert final.metrics["level"] == pytest.approx(-3.0, abs=1e-4)
    assert final.baseline_metrics["level"] == pytest.approx(-2.0, abs=1e-4)


def test_both_files_see_the_same_test_data_when_every_reading_differs(compress: Compress) -> None:
    class Random:
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.rand(4, 2), torch.zeros(4))])

    net = Net()
    nn.init.ones_(net.linear.weight)
    final = compress(Change(), model=net, task=make_task(test=Random())).report.final
    assert final is not None
    assert final.metrics["level"] == pytest.approx(final.baseline_metrics["level"], abs=1e-4)


def test_test_data_are_never_read_when_the_run_stops_before_its_end(compress: Compress) -> None:
    test = Counted([(ONES, torch.zeros(4))])
    with pytest.raises(ZeroDivisionError):
        compress(Change(), Change(error=True), task=make_task(test=test))
    assert test.readings == []


def test_the_final_figures_have_no_metric_when_there_is_no_test_data(compress: Compress) -> None:
    final = compress(Change(level=1.0)).report.final
    assert final is not None
    assert (dict(final.metrics), dict(final.baseline_metrics)) == ({}, {})


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def loader(seed: int | None = None) -> DataLoader[Any]:
    """Shuffled batches of distinct samples; without a generator the order comes from PyTorch's own."""
    samples = TensorDataset(torch.arange(32.0).reshape(16, 2), torch.zeros(16))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(samples, batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_tasks_id_neither_reads_nor_moves_the_callers_random_states_when_data_are_shuffled(
    seed: int | None,
) -> None:
    train = loader(seed)
    task = Task(example_inputs=ONES, train=train)
    before, own = states(), train.generator and train.generator.get_state()
    first = task.id
    assert states() == before
    assert train.generator is None or torch.equal(train.generator.get_state(), own)
    torch.manual_seed(99)
    assert task.id == first
    samples = TensorDataset(torch.arange(32.0).reshape(16, 2) + 1, torch.zeros(16))
    assert Task(example_inputs=ONES, train=DataLoader(samples, batch_size=4, shuffle=True)).id != first


class Recording(Changing):
    """A step that reads calibration data."""

    seen: list[Tensor]
    trains = False
    needs = frozenset({"calibration"})

    def plan(self, model: nn.Module, ctx: Any) -> Any:
        self.seen = [batch.inputs.args[0] for batch in ctx.task.batches("calibration", "Recording")]
        return Change().plan(model, ctx)

    def apply(self, model: nn.Module, plan: Any, ctx: Any) -> nn.Module:
        return model


@pytest.mark.parametrize("role", ["calibration", "train"])
def test_calibration_is_a_function_of_the_seed_alone_when_the_loader_has_no_generator(
    target: Any, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr("pared.pipeline.keys.settings_of", lambda step: {})
    monkeypatch.setattr("pared.pipeline.arguments.settings_of", lambda step: {})
    monkeypatch.setattr("pared.pipeline.run.settings_of", lambda step: {})
    orders = []
    for caller_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(caller_seed)
        step, net = Recording(), Net()
        before = states()
        pared.compress(net, [step], Task(example_inputs=ONES, **{role: loader()}), seed=seed)
        assert states() == before
        orders.append(torch.cat(step.seen)[:, 0].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(0, 32, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": [(torch.ones(4, 3), torch.zeros(4))]}, r"validation data, batch 0: input 0 has shape \(4, 3\)"),
        ({"validation": [(ONES.double(), torch.zeros(4))]}, r"batch 0: input 0 is torch.float64, .*convert it"),
        ({"validation": [(ONES * float("nan"), torch.zeros(4))]}, "input 0 holds NaN or infinity; clean the data"),
        ({"validation": [ONES]}, r"metrics need labelled batches: \(inputs, target\)"),
        (
            {"validation": [(ONES, torch.tensor([0, 1, 2, 1]))], "metrics": "accuracy"},
            "lies outside the model's classes",
        ),
        ({"validation": [(ONES, torch.zeros(4))], "metrics": "accuracy"}, "labels must be integer class indices"),
        ({"validation": [(ONES, torch.zeros(3, dtype=int))], "metrics": "accuracy"}, "one label for each sample"),
        ({"validation": [(ONES, torch.zeros(3, 1))], "metrics": "mse"}, r"metric mse cannot compare output \(4, 1\)"),
    ],
)
def test_a_run_names_the_batch_or_what_is_wrong_when_data_do_not_fit(
    compress: Compress, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        compress(Change(), task=make_task(**changes))


def test_labels_below_zero_are_refused_when_training() -> None:
    task = make_task(
        train=[(ONES, torch.tensor([0, 0, -1, 0]))], loss=nn.CrossEntropyLoss(), metrics=(), validation=None
    )
    with pytest.raises(
        DataError, match=r"train data, epoch 1, batch 0: label -1 lies outside the model's classes 0..0"
    ):
        pared.compress(Net(), [Train(epochs=1)], task)
