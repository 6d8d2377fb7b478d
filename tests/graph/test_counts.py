from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.graph.counts import LayerCount, count, nonzero_params, totals
from pared.task import as_inputs
from torchvision_models import published, torchvision_model
from zoo_models import ZOO


def by_module(model: nn.Module, example: Any) -> dict[str, LayerCount]:
    return {row.module: row for row in count(model, as_inputs(example))}


class Calls(nn.Module):
    """A model that is one function of two inputs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def attention(query: Tensor, key: Tensor) -> Tensor:
    """The values are three of the key's four features."""
    return F.scaled_dot_product_attention(query, key, key[..., :3])


# Counted by hand: outputs times the multiplications behind each, for one sample.
BY_HAND: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...], int]] = {
    "conv1d": (nn.Conv1d(3, 4, 5), ((1, 3, 9),), 4 * 5 * 3 * 5),
    "conv2d": (nn.Conv2d(3, 4, (3, 5), stride=2, padding=1), ((1, 3, 8, 8),), 4 * 4 * 3 * 3 * 3 * 5),
    "conv2d dilated": (nn.Conv2d(3, 4, 3, dilation=2), ((1, 3, 8, 8),), 4 * 4 * 4 * 3 * 9),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), ((1, 4, 8, 8),), 6 * 6 * 6 * 2 * 9),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4), ((1, 4, 8, 8),), 4 * 6 * 6 * 9),
    "conv2d padding mode": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), ((1, 3, 8, 8),), 4 * 64 * 27),
    "conv3d": (nn.Conv3d(2, 3, 3), ((1, 2, 4, 5, 6),), 3 * 2 * 3 * 4 * 2 * 27),
    # Every input is multiplied with each of the output channels of its group and the kernel.
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), ((1, 4, 5, 5),), 4 * 25 * 3 * 9),
    "linear": (nn.Linear(7, 5), ((1, 7),), 35),
    "linear of a sequence": (nn.Linear(7, 5), ((1, 3, 7),), 3 * 35),
    "matmul": (Calls(torch.matmul), ((1, 2, 3, 4), (1, 2, 4, 5)), 2 * 3 * 4 * 5),
    "bmm": (Calls(torch.bmm), ((1, 3, 4), (1, 4, 5)), 60),
    "baddbmm": (Calls(lambda a, b: torch.baddbmm(a[:, :, :1], a, b)), ((1, 3, 4), (1, 4, 5)), 60),
    "einsum": (Calls(lambda a, b: torch.einsum("bik,bjk->bij", a, b)), ((1, 3, 4), (1, 5, 4)), 60),
    "attention": (Calls(attention), ((1, 2, 5, 4), (1, 2, 7, 4)), 2 * 5 * 7 * (4 + 3)),
    # Four gates, each with the input and the state; the second layer reads both directions of the first.
    "lstm": (nn.LSTM(6, 8, batch_first=True), ((1, 5, 6),), 5 * 4 * 8 * (6 + 8)),
    "lstm both ways": (
        nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True),
        ((1, 5, 6),),
        5 * 2 * 4 * 8 * ((6 + 8) + (16 + 8)),
    ),
    "gru": (nn.GRU(6, 8, batch_first=True), ((1, 5, 6),), 5 * 3 * 8 * (6 + 8)),
    "rnn": (nn.RNN(6, 8, batch_first=True), ((1, 5, 6),), 5 * 8 * (6 + 8)),
    "element-wise": (nn.Sequential(nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Softmax(1)), ((1, 3, 8, 8),), 0),
    "embedding": (nn.Embedding(10, 4), ((1, 3),), 0),
}


@pytest.mark.filterwarnings("ignore:.*assigned during export:UserWarning")
@pytest.mark.parametrize("name", BY_HAND)
def test_macs_equal_the_count_by_hand_when_one_operator_works(name: str) -> None:
    model, shapes, expected = BY_HAND[name]
    example = tuple(torch.zeros(shape, dtype=torch.long if name == "embedding" else None) for shape in shapes)
    assert totals(count(model, as_inputs(example))).macs == expected


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16"])
def test_figures_equal_the_published_ones_when_the_architecture_is_known(name: str) -> None:
    model, known = torchvision_model(name), published(name)
    found = totals(count(model, as_inputs(torch.zeros(1, 3, 224, 224))))
    assert found.params == known["num_params"]
    # Published with three decimals.
    assert abs(found.macs / 1e9 - known["_ops"]) <= 0.0005 + 1e-9


@pytest.mark.filterwarnings("ignore:.*assigned during export:UserWarning")
@pytest.mark.parametrize("name", ZOO)
def test_sums_equal_the_models_own_when_every_pattern_is_counted(name: str) -> None:
    model, inputs = ZOO[name]()
    before = copy.deepcopy(model.state_dict())
    model.train()
    rows = count(model, inputs)
    found = totals(rows)
    assert found.params == sum(parameter.numel() for parameter in model.parameters())
    assert found.bytes == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert found.macs > 0
    assert {row.module for row in rows} <= {module for module, _ in model.named_modules()}
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_macs_and_shapes_are_of_one_sample_when_the_batch_is_larger() -> None:
    model, _ = ZOO["attention_fused_qkv"]()
    one, three = (count(model, as_inputs(torch.zeros(size, 7, 6))) for size in (1, 3))
    assert one == three
    # Embedding, qkv, attention, projection and the two layers of the perceptron for 7 tokens; the head for their mean.
    assert totals(one).macs == 7 * (6 * 16 + 16 * 48 + 7 * 32 + 16 * 16 + 2 * 16 * 32) + 16 * 5


def test_macs_follow_the_example_when_the_length_is_dynamic() -> None:
    model, _ = ZOO["multihead_attention"]()
    short, long = (count(model, as_inputs(torch.zeros(2, n, 16)), {0: {1: "length"}}) for n in (7, 11))
    macs = {row.module: row.macs for row in short}, {row.module: row.macs for row in long}
    assert macs[0]["attention.out_proj"] * 11 == macs[1]["attention.out_proj"] * 7
    assert (short[0].shape, long[0].shape) == ((1, 7, 16), (1, 11, 16))


def test_each_use_works_but_weights_count_once_when_a_module_has_two_names() -> None:
    model, inputs = ZOO["module_with_two_names"]()
    rows = {row.module: row for row in count(model, inputs)}
    # 8 filters of 8 x 3 x 3 on 8 x 8 positions, under the first of its names.
    assert rows["first.0"].macs == 2 * 8 * 64 * 72
    assert rows["first.0"].params == 8 * 72
    assert not any(name.startswith("second") for name in rows)


def test_work_stays_with_the_layer_but_weights_with_the_first_when_tied() -> None:
    model, inputs = ZOO["tied_weights"]()
    rows = {row.module: row for row in count(model, inputs)}
    assert (rows["first"].params, rows["second"].params) == (64 + 8, 8)
    assert (rows["first"].macs, rows["second"].macs) == (64, 64)


def test_work_goes_to_the_weights_holder_when_another_module_runs_it() -> None:
    model, inputs = ZOO["multihead_attention"]()
    rows = {row.module: row for row in count(model, inputs)}
    # nn.MultiheadAttention never calls its out_proj, it borrows the weight.
    assert rows["attention.out_proj"].macs == 7 * 16 * 16
    assert rows["attention"].macs == 7 * 16 * 48 + 7 * 7 * 32


def test_rows_are_there_without_work_when_parameters_are_unused() -> None:
    model, inputs = ZOO["unused_parameter"]()
    rows = {row.module: row for row in count(model, inputs)}
    assert (rows["unused"].shape, rows["unused"].macs, rows["unused"].params) == ((), 0, 16)
    assert rows[""].params == 8


def test_only_the_branch_taken_works_when_python_looks_at_a_shape() -> None:
    model, _ = ZOO["branch_on_shape"]()
    small, large = (by_module(model, torch.zeros(1, 3, size, size)) for size in (8, 32))
    assert (small["small.0"].macs, small["large.0"].macs) == (8 * 64 * 27, 0)
    assert (large["small.0"].macs, large["large.0"].macs) == (0, 8 * 1024 * 75)


def test_rows_tell_shape_kind_and_bytes_when_layers_differ() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    rows = by_module(model, torch.zeros(5, 3, 9, 9))
    assert list(rows) == ["0", "1"]
    assert rows["0"].kind == "Conv2d"
    assert rows["0"].shape == rows["1"].shape == (1, 4, 4, 4)
    assert rows["0"].bytes == 4 * (4 * 27 + 4)
    # Scale, shift, mean and variance in float32, and a counter in int64.
    assert rows["1"].bytes == 4 * 4 * 4 + 8


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), "quantize prune factorize winograd"),
        (nn.Conv2d(4, 8, 3, stride=2), "quantize prune factorize"),
        (nn.Conv2d(4, 8, 3, dilation=2), "quantize prune factorize"),
        (nn.Conv2d(4, 8, 1), "quantize prune factorize"),
        (nn.Conv2d(4, 8, 3, groups=2), "quantize prune"),
        (nn.ConvTranspose2d(4, 8, 3), "prune"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 2)), "quantize prune factorize"),
        (nn.BatchNorm2d(4), ""),
    ],
    ids=str,
)
def test_techniques_are_those_that_the_operator_allows_when_a_layer_runs(layer: nn.Module, expected: str) -> None:
    rows = count(layer, as_inputs(torch.zeros(1, 4, 8, 8)))
    assert set(rows[0].techniques) == set(expected.split())


def test_nonzero_params_counts_each_once_when_weights_are_tied_and_masked() -> None:
    model, _ = ZOO["tied_weights"]()
    full = nonzero_params(model)
    with torch.no_grad():
        model.first.weight[0] = 0
    assert full == sum(parameter.numel() for parameter in model.parameters())
    assert nonzero_params(model) == full - 8
