"""Calibration against a plain run of the model on all the data at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.activations import Extremes
from pared.errors import DataError, QuantizeError
from pared.graph.capture import capture
from pared.quantize.calibrate import CHUNK, calibrate, first_samples
from pared.task import Batch, Task, as_batch, as_inputs


class Sizes:
    """Remembers what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x.clone())


class TwoInputs(nn.Module):
    """Told apart: swapping the inputs changes every value."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.left(query) - 10 * self.right(key)


def graph_of(model: nn.Module, example: Any, dynamic: Mapping[str | int, Mapping[int, str]] | None = None) -> Any:
    return capture(model.eval(), Task(example_inputs=example, dynamic=dynamic or {})).module(check_guards=False)


def last(graph: Any) -> str:
    """The node whose value is the output."""
    return graph.graph.output_node().args[0][0].name


def in_order(*rows: Tensor) -> Tensor:
    """Rows sorted by their first value: chunks run side by side, and may be seen in any order."""
    joined = torch.cat(rows)
    return joined[joined[:, 0].argsort()]


def as_batches(*items: Any) -> Iterator[Batch]:
    return (Batch(as_inputs(item), None) for item in items)


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Any]:
    model = nn.Linear(4, 3)
    return model, graph_of(model, torch.zeros(2, 4))


@pytest.mark.parametrize("sizes", [[1, 1], [CHUNK], [CHUNK + 1], [2 * CHUNK + 3, 5], [3, 2, 1]])
def test_calibrate_shows_every_sample_once_in_small_chunks(linear: tuple[nn.Module, Any], sizes: list[int]) -> None:
    model, graph = linear
    data = [torch.randn(n, 4) for n in sizes]
    observer = Sizes()
    told: list[int] = []
    count = calibrate(graph, {last(graph): observer}, as_batches(*data), lambda what, done, *_: told.append(done))
    assert count == sum(sizes)
    assert told[-1] == count
    assert max(len(x) for x in observer.seen) <= CHUNK
    torch.testing.assert_close(in_order(*observer.seen), in_order(model(torch.cat(data))))


def test_calibrate_takes_one_batch_at_a_time(linear: tuple[nn.Module, Any]) -> None:
    _, graph = linear
    observer = Sizes()

    def source() -> Iterator[Batch]:
        for index in range(4):
            assert len(observer.seen) == index, "the batch before was not used up when this one was asked for"
            yield as_batch(torch.randn(2, 4))

    assert calibrate(graph, {last(graph): observer}, source()) == 8


def test_calibrate_refuses_when_all_samples_are_identical(linear: tuple[nn.Module, Any]) -> None:
    _, graph = linear
    for data in ([torch.ones(8, 4)], [torch.ones(2, 4), torch.ones(1, 4)]):
        with pytest.raises(DataError, match="samples are identical"):
            calibrate(graph, {}, as_batches(*data))
    varied = torch.ones(4, 4)
    varied[3, 3] = 2
    assert calibrate(graph, {}, as_batches(torch.ones(8, 4), varied)) == 12


def test_calibrate_sees_the_same_whatever_the_number_of_threads(linear: tuple[nn.Module, Any]) -> None:
    data = [torch.randn(30, 4), torch.randn(7, 4)]
    ends = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        seen = Extremes()
        try:
            calibrate(linear[1], {last(linear[1]): seen}, as_batches(*data))
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        ends.append((seen.low, seen.high))
    assert ends[0] == ends[1]


def test_calibrate_accepts_a_single_sample(linear: tuple[nn.Module, Any]) -> None:
    assert calibrate(linear[1], {}, as_batches(torch.ones(1, 4))) == 1


def test_calibrate_names_node_and_batch_when_an_activation_is_not_finite() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x).relu()

    graph = graph_of(Log(), torch.ones(2, 4))
    data = as_batches(torch.rand(3, 4) + 1, torch.rand(3, 4) + 1, torch.zeros(3, 4))
    with pytest.raises(QuantizeError, match=r"\(root\) \(log\): values are not finite") as caught:
        calibrate(graph, {"log": Extremes()}, data)
    assert caught.value.__notes__ == ["while calibrating on batch 2"]


def test_calibrate_binds_inputs_by_name_when_batches_order_them_otherwise() -> None:
    model = TwoInputs().eval()
    query, key = torch.randn(5, 4), torch.randn(5, 4)
    expected = model(query, key)
    for example in ({"query": query, "key": key}, {"key": key, "query": query}, (query, key)):
        graph = graph_of(model, example)
        found = Sizes()
        for item in ({"query": query, "key": key}, {"key": key, "query": query}):
            given = item if isinstance(example, dict) else (query, key)
            calibrate(graph, {last(graph): found}, as_batches(given))
        torch.testing.assert_close(in_order(*found.seen), in_order(expected, expected))


def test_calibrate_takes_dynamic_lengths() -> None:
    model = nn.Linear(4, 3)
    graph = graph_of(model, torch.zeros(2, 6, 4), {0: {1: "length"}})
    observer = Sizes()
    data = [torch.randn(2, length, 4) for length in (6, 9, 1)]
    assert calibrate(graph, {last(graph): observer}, as_batches(*data)) == 6
    for x, y in zip(data, observer.seen, strict=True):
        torch.testing.assert_close(y, model(x))
    with pytest.raises(DataError, match="identical"):
        calibrate(graph, {}, as_batches(torch.ones(2, 5, 4), torch.ones(3, 5, 4)))


@pytest.mark.parametrize(
    ("limit", "sizes"), [(None, [3, 4, 2]), (1, [1]), (3, [3]), (5, [3, 2]), (9, [3, 4, 2]), (99, [3, 4, 2])]
)
def test_first_samples_cuts_at_the_limit(limit: int | None, sizes: list[int]) -> None:
    data = torch.arange(9.0).reshape(9, 1).split([3, 4, 2])
    found = [batch.inputs.args[0] for batch in first_samples(as_batches(*data), limit)]
    assert [len(x) for x in found] == sizes
    assert torch.equal(torch.cat(found), torch.arange(float(sum(sizes))).reshape(-1, 1))


def test_first_samples_reads_no_further_than_it_must() -> None:
    read: list[int] = []

    def source() -> Iterator[Batch]:
        for index in range(5):
            read.append(index)
            yield as_batch(torch.zeros(2, 1))

    assert len(list(first_samples(source(), 4))) == 2
    assert read == [0, 1]
