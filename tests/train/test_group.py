"""The parts of a batch, random numbers of a process, and the order in which failures are told."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import nn

from pared.errors import DataError, TrainError, UsageError
from pared.task import Batch, as_inputs
from pared.train.group import BUCKET, Group, bounds, buckets, part_of
from pared.train.processes import Worker, explain, portable


def group(rank: int, size: int) -> Group:
    return Group(SimpleNamespace(global_rank=rank, world_size=size, device=torch.device("cpu")))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [1, 2, 5, 16])
def test_parts_make_up_the_batch_when_put_together(total: int, size: int) -> None:
    found = [bounds(total, rank, size) for rank in range(size)]
    assert [i for start, stop in found for i in range(start, stop)] == list(range(total))
    counts = [stop - start for start, stop in found]
    assert max(counts) - min(counts) <= 1
    assert counts[0] > 0


def test_a_process_computes_without_weight_when_no_sample_is_left() -> None:
    batch = Batch(as_inputs(torch.tensor([[5.0]])), torch.tensor([3]))
    (own, count), (other, none) = (group(rank, 2).part(batch, "batch 0") for rank in range(2))
    assert (count, none) == (1, 0)
    assert own.target.tolist() == other.target.tolist() == [3]
    assert other.inputs.size == 1


def test_targets_are_divided_when_they_are_nested() -> None:
    target = {"a": (torch.arange(4), [torch.arange(8).view(4, 2)]), "b": None}
    part = part_of(target, 1, 3, 4)
    assert part["a"][0].tolist() == [1, 2]
    assert part["a"][1][0].tolist() == [[2, 3], [4, 5]]
    assert part["b"] is None


@pytest.mark.parametrize("target", [torch.tensor(1.0), torch.zeros(3)])
def test_a_target_is_refused_when_it_cannot_be_divided(target: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"batch 7: a target of shape .* for 2 samples cannot be divided"):
        group(0, 2).part(Batch(as_inputs(torch.zeros(2, 1)), target), "batch 7")


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


def test_random_numbers_are_the_processes_own_inside_and_common_outside() -> None:
    inside: list[Any] = []
    outside: list[Any] = []
    for rank in (0, 1, 0):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        here = group(rank, 2)
        here.seed(7, epoch=2)
        draws = []
        for _ in range(2):
            with here.own_random():
                draws.append(drawn())
            outside.append(drawn())
        inside.append(draws)
    assert outside[:2] == outside[2:4] == outside[4:]
    assert inside[0] == inside[2]
    numbers = [number for draws in inside[:2] for three in draws for number in three]
    assert len(set(numbers)) == len(numbers)


def test_batches_are_refused_when_processes_read_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(as_inputs(torch.zeros(2, 1)), None)
    others: list[str] = []

    def gather(found: list[Any], own: str) -> None:
        found[:] = [own, *(others or [own])]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    group(0, 2).check_same(batch, "batch 0")
    others.append("of other content")
    with pytest.raises(DataError, match=r"batch 0: processes read different batches.*set_epoch"):
        group(0, 2).check_same(batch, "batch 0")


def test_buckets_hold_everything_once_when_dtypes_differ() -> None:
    tensors = [torch.zeros(3), torch.zeros(BUCKET), torch.zeros(2, dtype=torch.float64), torch.zeros(5)]
    found = list(buckets(tensors))
    assert sorted(id(tensor) for bucket in found for tensor in bucket) == sorted(map(id, tensors))
    assert all(len({tensor.dtype for tensor in bucket}) == 1 for bucket in found)
    assert len(found) == 3


def worker(code: int | None, started: bool = True, failure: tuple[float, Exception] | None = None) -> Worker:
    return Worker(SimpleNamespace(exitcode=code), None, started, failure)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workers", "error", "words"),
    [
        ([worker(0), worker(0)], None, ""),
        ([worker(1, failure=(1.0, RuntimeError("lost"))), worker(-9)], TrainError, "process 1 of 2 was killed by SIGK"),
        (
            [worker(1, failure=(2.0, RuntimeError("lost"))), worker(1, failure=(1.0, DataError("why")))],
            DataError,
            "why",
        ),
        ([worker(None), worker(3)], TrainError, "process 1 of 2 ended with exit code 3; kept"),
        ([worker(1, started=False), worker(None)], UsageError, "if __name__"),
    ],
)
def test_the_first_cause_is_told_when_processes_fail(
    workers: list[Worker], error: type[Exception] | None, words: str
) -> None:
    if error is None:
        explain(workers, lambda: "kept")
        return
    with pytest.raises(error, match=words):
        explain(workers, lambda: "kept")


def test_an_error_becomes_text_when_it_cannot_be_sent() -> None:
    class LocalError(Exception):
        pass

    error = portable(LocalError("inner"))
    assert type(error) is TrainError
    assert str(error) == "LocalError in a process of the training: inner"
    kept = DataError("as it is")
    assert portable(kept) is kept


def test_nothing_is_divided_when_a_process_is_alone() -> None:
    batch = Batch(as_inputs(torch.zeros(3, 1)), torch.tensor(1.0))
    assert group(0, 1).part(batch, "batch 0") == (batch, 3)
    layer = nn.Linear(1, 1)
    group(0, 1).sum_gradients(list(layer.parameters()))
    assert layer.weight.grad is None
