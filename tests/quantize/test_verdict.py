"""The verdict before the work: what a plan counts, against hand counts, and when it warns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.graph.capture import capture
from pared.quantize.folding import fold_batch_norms
from pared.quantize.placement import place
from pared.quantize.program import own_tensors
from pared.quantize.verdict import Work, warnings_of, work_of
from pared.targets.onnxruntime import SCHEME
from pared.task import Task

GOOD = Work(macs=10**8, integer_macs=10**8, layers=10, conversions=2, converted=10**5, middle=10**7)


def work(model: nn.Module, *shape: int, batch: int = 1, exclude: tuple[str, ...] = ()) -> Work:
    example = torch.zeros(batch, *shape)
    graph: Any = capture(model.eval(), Task(example_inputs=(example,))).module(check_guards=False)
    own_tensors(graph)
    fold_batch_norms(graph)
    return work_of(graph, place(graph, SCHEME, include=("*",), exclude=exclude), SCHEME)


@pytest.mark.parametrize("batch", [1, 3])
def test_work_equals_the_count_by_hand_for_one_sample(batch: int) -> None:
    # The input is quantized, the first convolution's result read by SiLU in float, its result quantized, the last read.
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    found = work(model, 3, 6, 6, batch=batch)
    first, last = 36 * 8 * 3 * 9, 36 * 4 * 8
    assert (found.macs, found.integer_macs, found.layers) == (first + last, first + last, 2)
    assert found.conversions == 4
    assert found.converted == 36 * (3 + 8 + 8 + 4)
    assert found.middle == first


def test_work_has_no_conversion_between_layers_that_integers_join() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            result: Tensor = self.c((self.b(x) + x).relu())
            return result

    assert work(Residual(), 4, 6, 6).conversions == 2


def test_layers_that_stay_count_as_work_that_is_not_in_integers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 24))
    found = work(model, 8, exclude=("2",))
    assert (found.integer_macs, found.macs, found.share) == (64, 256, 0.25)


WARNED = {
    "nothing": ({}, []),
    "little_in_integers": ({"integer_macs": 4 * 10**7}, ["only 40 % of the multiply-accumulates"]),
    "all_conversions": ({"conversions": 21, "converted": 10**7}, ["21 conversions between float and integers"]),
    "tiny_layers": ({"middle": 100}, ["half of the integer layers have 100 multiply-accumulates or fewer"]),
    "one_layer": ({"integer_macs": 4 * 10**7, "layers": 1}, ["run in integers (1 layer)"]),
}


@pytest.mark.parametrize("name", WARNED)
def test_warnings_say_what_speaks_against_a_speed_up(name: str) -> None:
    changed, expected = WARNED[name]
    found = warnings_of(dataclasses.replace(GOOD, **changed))
    assert len(found) == len(expected)
    for sentence, part in zip(found, expected, strict=True):
        assert sentence.startswith("no speed-up is to be expected: ")
        assert part in sentence


def test_warnings_tell_depthwise_layers_between_float_operators_from_dense_ones() -> None:
    depthwise = nn.Sequential(nn.GELU(), nn.Conv2d(64, 64, 3, groups=64), nn.GELU(), nn.Conv2d(64, 64, 3, groups=64))
    dense = nn.Sequential(nn.GELU(), nn.Conv2d(64, 64, 3), nn.GELU(), nn.Conv2d(64, 64, 3))
    assert any("conversions" in sentence for sentence in warnings_of(work(depthwise, 64, 16, 16)))
    assert warnings_of(work(dense, 64, 16, 16)) == []
