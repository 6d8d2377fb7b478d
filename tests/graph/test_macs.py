"""Multiply-accumulates of single operators, against what PyTorch's own counter says of running them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pared.graph.capture import capture
from pared.graph.macs import macs_of
from pared.task import Task
from zoo_models import ZOO


class Product(nn.Module):
    """A product of two tensors made from one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 7)),
    "transposed": (nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 5)),
    "linear": (nn.Linear(5, 7), (2, 3, 5)),
    "matmul": (Product(lambda x: x @ x.transpose(1, 2)), (2, 3, 5)),
    "bmm": (Product(lambda x: torch.bmm(x, x.transpose(1, 2))), (2, 3, 5)),
    "einsum": (Product(lambda x: torch.einsum("bid,bjd->bij", x, x)), (2, 3, 5)),
    "einsum_of_one": (Product(lambda x: torch.einsum("bid->b", x)), (2, 3, 5)),
    "element_wise": (Product(lambda x: x * x), (2, 3, 5)),
}


def counted(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """By us from the graph, and by PyTorch while it runs: a multiplication and an addition apart."""
    graph = capture(model.eval(), Task(example_inputs=(x,))).graph
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return sum(map(macs_of, graph.nodes)), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_macs_of_an_operator_equal_what_pytorch_counts(name: str) -> None:
    model, shape = MODELS[name]
    ours, theirs = counted(model, torch.randn(shape))
    assert ours == theirs


@pytest.mark.filterwarnings("ignore:.*assigned during export:UserWarning")
@pytest.mark.parametrize("name", ["attention_fused_qkv", "residual_add"])
def test_macs_of_a_graph_are_those_of_its_example_batch(name: str) -> None:
    model, inputs = ZOO[name]()
    graph = capture(model, Task(example_inputs=inputs)).graph
    from pared.graph.counts import count, totals

    (x,) = inputs.args
    assert sum(map(macs_of, graph.nodes)) == max(len(x), 2) * totals(count(model, inputs)).macs


def test_macs_of_a_recurrence_are_its_weights_once_a_step() -> None:
    model = nn.LSTM(6, 8, batch_first=True)
    graph = capture(model.eval(), Task(example_inputs=(torch.zeros(2, 5, 6),))).graph
    assert sum(map(macs_of, graph.nodes)) == 2 * 5 * 4 * 8 * (6 + 8)
