"""Folding against the model's own outputs in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.errors import QuantizeError
from pared.graph.capture import capture, operator
from pared.quantize.folding import fold_batch_norms, folded
from pared.quantize.program import own_tensors
from pared.task import Task

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IMAGE, SEQUENCE, VOLUME, VECTOR = (2, 4, 7, 7), (2, 4, 9), (2, 4, 5, 5, 5), (2, 6)


class Forward(nn.Module):
    """Modules and the function that joins them."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def prepared(model: nn.Module) -> nn.Module:
    """The model with statistics that are far from trivial, in eval mode."""
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -2.0, 2.0)
                nn.init.normal_(module.bias)
    return model.eval()


def fold(model: nn.Module, shape: tuple[int, ...]) -> tuple[fx.GraphModule, list[str]]:
    graph = capture(model, Task(example_inputs=torch.zeros(shape))).module(check_guards=False)
    own_tensors(graph)
    return graph, fold_batch_norms(graph)


def norms_left(graph: fx.GraphModule) -> int:
    return sum("batch_norm" in operator(node) for node in graph.graph.nodes)


def check_same_function(model: nn.Module, graph: fx.GraphModule, shape: tuple[int, ...]) -> None:
    """Outputs agree to what float32 rounding explains, as a float64 run of the original tells."""
    x = torch.randn(5, *shape[1:])
    with torch.no_grad():
        exact = model.double()(x.double())
        model.float()
        before, after = model(x), graph(x)
    scale = exact.abs().max()
    # Both round at most 100 products and sums a value by 2^-24 of the largest partial result each; and folding rounds
    # every weight once more. Cancelling against a mean can make partial results a few times the output.
    tolerance = 100 * 2.0**-24 * 8
    assert (before - exact).abs().max() / scale < tolerance
    assert (after - exact).abs().max() / scale < tolerance
    assert (exact.abs().max() > 1e-3).item()


def layers(inplace: bool = False, **norm: bool) -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """Models of which every batch norm folds: (model, input shape, how many)."""
    relu = nn.ReLU(inplace=inplace)
    one, two, three = ((lambda c, kind=kind: kind(c, **norm)) for kind in NORMS)
    return {
        "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3), one(6), relu), SEQUENCE, 1),
        "conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), two(6), relu, nn.Conv2d(6, 3, 1), two(3)), IMAGE, 2),
        "conv2d_without_bias": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), two(6), relu), IMAGE, 1),
        "conv3d": (nn.Sequential(nn.Conv3d(4, 6, 2, bias=False), three(6)), VOLUME, 1),
        "grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), two(6)), IMAGE, 1),
        "depthwise": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), two(8)), IMAGE, 1),
        "transposed1d": (nn.Sequential(nn.ConvTranspose1d(4, 6, 2, bias=False), one(6)), SEQUENCE, 1),
        "transposed2d": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), two(6), relu), IMAGE, 1),
        "transposed2d_grouped": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), two(6)), IMAGE, 1),
        "transposed3d_depthwise": (
            nn.Sequential(nn.ConvTranspose3d(4, 4, 2, groups=4, bias=False), three(4)),
            VOLUME,
            1,
        ),
        "linear": (nn.Sequential(nn.Linear(6, 5), one(5), relu, nn.Linear(5, 3, bias=False), one(3)), VECTOR, 2),
    }


@pytest.mark.parametrize("name", layers())
def test_fold_keeps_the_function_when_a_norm_follows_a_layer(name: str) -> None:
    model, shape, count = layers()[name]
    graph, names = fold(prepared(model), shape)
    assert len(names) == count
    assert norms_left(graph) == 0
    check_same_function(model, graph, shape)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_without_bias", "transposed2d", "linear"])
@pytest.mark.parametrize("affine", [True, False])
def test_fold_keeps_the_function_when_operators_work_in_place(name: str, affine: bool) -> None:
    model, shape, count = layers(inplace=True, affine=affine)[name]
    graph, names = fold(prepared(model), shape)
    assert (len(names), norms_left(graph)) == (count, 0)
    check_same_function(model, graph, shape)


def shared_output(s: Forward, x: Tensor) -> Tensor:
    y = s.conv(x)
    return s.norm(y) + y


def two_norms(s: Forward, x: Tensor) -> Tensor:
    return s.second(s.conv(s.first(s.conv(x))))


def one_weight(s: Forward, x: Tensor) -> Tensor:
    plain = F.conv2d(x, s.conv.weight, padding=1)
    return s.first(s.conv(x)) * plain + s.second(F.conv2d(x, s.conv.weight, padding=1))


KEPT = {
    "relu_between": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE, 0, 1),
    "norm_first": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE, 0, 1),
    "shared_output": (Forward(shared_output, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)), IMAGE, 0, 1),
    "linear_3d": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(3)), (2, 3, 6), 0, 1),
    "linear_3d_square": (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), (2, 3, 6), 0, 1),
    "layer_twice": (
        Forward(two_norms, conv=nn.Conv2d(4, 4, 3, padding=1), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)),
        IMAGE,
        2,
        0,
    ),
    "weight_thrice": (
        Forward(one_weight, conv=nn.Conv2d(4, 4, 3, padding=1), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)),
        IMAGE,
        2,
        0,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_fold_leaves_what_it_must_and_keeps_the_function(name: str) -> None:
    model, shape, folds, left = KEPT[name]
    graph, names = fold(prepared(model), shape)
    assert (len(names), norms_left(graph)) == (folds, left)
    check_same_function(model, graph, shape)


def test_fold_stores_one_weight_when_a_layer_and_its_norm_are_used_twice() -> None:
    part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    model = prepared(Forward(lambda s, x: s.part(F.relu(s.part(x))), part=part))
    graph, names = fold(model, IMAGE)
    weights = {node.args[1].target for node in graph.graph.nodes if operator(node) == "aten.conv2d"}
    assert (len(names), len(weights), norms_left(graph)) == (2, 1, 0)
    check_same_function(model, graph, IMAGE)


def test_fold_keeps_batch_statistics_when_the_norm_has_no_running_ones() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    graph, names = fold(model, IMAGE)
    assert names == []
    x = torch.randn(3, *IMAGE[1:])
    torch.testing.assert_close(graph(x), model(x))


def test_fold_leaves_the_callers_tensors_alone() -> None:
    model, shape, _ = layers()["conv2d"]
    prepared(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model, shape)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_folded_refuses_when_there_are_no_statistics() -> None:
    with pytest.raises(QuantizeError, match="track_running_stats"):
        folded(torch.ones(1, 1, 1, 1), None, None, None, None, None, 1e-5)
