"""Metrics against figures counted by hand, and what they say of targets that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pared.errors import DataError, UsageError
from pared.metrics import METRICS, Metric, resolve_metrics
from pared.task import Batch, as_inputs, evaluate, evaluate_all

# Six samples, three classes, in batches of 4 and 2; the third and the last are wrong.
SCORES = torch.tensor([[9.0, 1, 0], [0, 9, 1], [9, 1, 0], [0, 1, 9], [1, 9, 0], [9, 0, 1]])
LABELS = torch.tensor([0, 1, 1, 2, 1, 2])
BATCHES = [Batch(as_inputs(SCORES[:4]), LABELS[:4]), Batch(as_inputs(SCORES[4:]), LABELS[4:])]


def figure(metric: Any, batches: Any = BATCHES) -> float:
    (found,) = evaluate(lambda inputs: inputs.args[0], batches, resolve_metrics(metric)).values()
    return found


def test_metrics_equal_figures_counted_by_hand_when_batches_are_uneven() -> None:
    assert figure("accuracy") == pytest.approx(4 / 6)
    # Class 0: 1 of 3 answers right, 1 of 1 found. Class 1: 2 of 2, 2 of 3. Class 2: 1 of 1, 1 of 2.
    assert figure("f1") == pytest.approx((2 * 1 / 4 + 2 * 2 / 5 + 2 * 1 / 3) / 3)
    assert figure("top5") == 1.0  # fewer than five classes: every class is among the first
    values = [Batch(as_inputs(torch.tensor([[1.0], [2.0]])), torch.tensor([[0.0], [4.0]]))]
    assert figure("mse", values) == pytest.approx((1 + 4) / 2)


def test_top5_counts_the_five_highest_when_there_are_more_classes() -> None:
    scores = torch.arange(7.0).repeat(7, 1)
    assert figure("top5", [Batch(as_inputs(scores), torch.arange(7))]) == pytest.approx(5 / 7)


def test_a_callable_is_weighted_by_batch_size_when_batches_are_uneven() -> None:
    def right(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().mean()

    assert figure(right) == pytest.approx(4 / 6)  # the mean of the batches' means would be 0.625


def test_a_torchmetrics_object_starts_anew_when_it_has_counted_before() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    used = MulticlassAccuracy(num_classes=3, average="micro")
    used.update(SCORES, (LABELS + 1) % 3)
    before = used.compute()
    assert figure(used) == pytest.approx(4 / 6)
    assert figure(used) == pytest.approx(4 / 6)
    assert used.compute() == before


def test_direction_decides_what_a_drop_is() -> None:
    assert METRICS["accuracy"].drop(0.9, 0.8) == pytest.approx(0.1)
    assert METRICS["mse"].drop(0.9, 0.8) == pytest.approx(-0.1)
    assert math.isnan(METRICS["mse"].drop(0.9, math.nan))

    def error(output: Tensor, target: Tensor) -> float:
        return 0.0

    assert resolve_metrics(error)[0].higher_is_better
    error.higher_is_better = False  # type: ignore[attr-defined]
    assert not resolve_metrics([error])[0].higher_is_better


def test_several_functions_are_judged_on_one_reading() -> None:
    readings = []

    def once() -> Any:
        readings.append(1)
        yield from BATCHES

    metrics = resolve_metrics(["accuracy", "f1"])
    right, wrong = evaluate_all([lambda i: i.args[0], lambda i: -i.args[0]], once(), metrics)
    assert readings == [1]
    assert right["accuracy"] == pytest.approx(4 / 6)
    assert wrong["accuracy"] == 0.0  # no label has the lowest score


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("acuracy", "no metric 'acuracy'; did you mean 'accuracy'"),
        (["accuracy", "accuracy"], "metrics must have different names"),
        (3, "a metric is a name, a callable or a torchmetrics object, found int"),
        ({"accuracy": 1}, "found dict"),
    ],
)
def test_metrics_are_refused_when_they_are_none(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_metrics(given)


@pytest.mark.parametrize(
    ("metric", "target", "message"),
    [
        ("accuracy", torch.tensor([0, 1, 2, 3]), r"label 3 lies outside the model's classes 0\.\.2"),
        ("f1", torch.tensor([0, -1, 2, 2]), r"label -1 lies outside the model's classes 0\.\.2"),
        ("accuracy", torch.zeros(4), "labels must be integer class indices, found torch.float32"),
        ("accuracy", [0, 1, 2, 0], "labels must be integer class indices, found list"),
        ("top5", torch.tensor([0, 1]), r"\(2,\) labels for an output of shape \(4, 3\); give one label for each"),
        ("accuracy", torch.eye(4, 3, dtype=torch.int64), "give one label for each sample, as a class index"),
        ("mse", torch.zeros(4, 2), r"metric mse cannot compare output \(4, 3\) with target \(4, 2\)"),
        (lambda output, target: "high", torch.zeros(4), r"cannot compare .* could not convert string to float"),
    ],
)
def test_targets_are_refused_with_what_to_give_when_they_do_not_fit(metric: Any, target: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        figure(metric, [Batch(as_inputs(SCORES[:4]), target)])


def test_labels_are_refused_when_the_output_has_no_classes() -> None:
    with pytest.raises(DataError, match=r"outputs of shape \(batch, classes\), found \(4,\)"):
        figure("accuracy", [Batch(as_inputs(torch.ones(4)), torch.zeros(4, dtype=torch.int64))])


def test_labels_of_every_position_count_when_the_output_has_more_dimensions() -> None:
    scores = torch.nn.functional.one_hot(torch.tensor([[0, 1], [2, 0]]), 3).permute(0, 2, 1).float()
    target = torch.tensor([[0, 1], [1, 0]])
    assert figure("accuracy", [Batch(as_inputs(scores), target)]) == pytest.approx(3 / 4)


def test_metric_says_so_when_it_gives_several_numbers_or_saw_no_batch() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    with pytest.raises(UsageError, match="gives a Tensor where one number is expected; average it"):
        figure(MulticlassAccuracy(num_classes=3, average=None))
    with pytest.raises(DataError, match="no batch to measure on"):
        figure("accuracy", [])
    with pytest.raises(DataError, match=r"labelled batches: \(inputs, target\)"):
        figure("accuracy", [Batch(as_inputs(SCORES), None)])


def test_a_metric_of_ones_own_decides_like_any_other() -> None:
    class Count:
        def __init__(self) -> None:
            self.seen = 0

        def update(self, output: Tensor, target: Tensor) -> None:
            self.seen += len(target)

        def compute(self) -> int:
            return self.seen

    assert figure(Metric("count", True, lambda _: Count())) == 6


def test_accuracy_says_what_to_do_when_torchvision_does_not_fit_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("pared.metrics.importlib.import_module", broken)
    with pytest.raises(UsageError, match=r"torchvision::nms does not exist.*install a torchvision that fits"):
        resolve_metrics("accuracy")[0].make(torch.zeros(1, 3))
