"""Placement under the rules of ONNX Runtime, on one graph pattern each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.errors import PlanError
from pared.graph.capture import capture, operator
from pared.quantize.folding import fold_batch_norms
from pared.quantize.placement import Placement, place
from pared.quantize.program import own_tensors
from pared.targets.onnxruntime import SCHEME
from pared.task import Task
from torchvision_models import torchvision_model
from zoo_models import ZOO

IMAGE = (2, 3, 8, 8)
Placed = tuple[fx.GraphModule, Placement]


class Forward(nn.Module):
    """Modules and the function that joins them."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def placed(model: nn.Module, example: Any, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> Placed:
    graph = capture(model.eval(), Task(example_inputs=example)).module(check_guards=False)
    own_tensors(graph)
    fold_batch_norms(graph)
    return graph, place(graph, SCHEME, include=include, exclude=exclude)


@functools.cache
def zoo(name: str) -> Placed:
    return placed(*ZOO[name]())


def conv(inside: int = 3, outside: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


def modules(placement: Placement) -> list[str]:
    return [anchor.module for anchor in placement.anchors]


def joined(graph: fx.GraphModule, placement: Placement) -> list[str]:
    nodes = {node.name: node for node in graph.graph.nodes}
    return [operator(nodes[name]).removeprefix("aten.") for name in placement.joins]


WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.LSTM,
    nn.GRU,
    nn.Embedding,
)


def check_every_layer_is_listed(model: nn.Module, placement: Placement, unused: frozenset[str] = frozenset()) -> None:
    names = {name for name, module in model.named_modules() if isinstance(module, WEIGHTED)} - unused
    skipped = {skip.module for skip in placement.skips}
    assert names <= set(modules(placement)) | skipped
    assert all(skip.reason for skip in placement.skips)
    assert not set(modules(placement)) & skipped


@pytest.mark.parametrize("name", ZOO)
def test_place_lists_every_weighted_layer_as_changed_or_skipped(name: str) -> None:
    unused = {"unused_parameter": frozenset({"unused"}), "branch_on_shape": frozenset({"large.0"})}
    check_every_layer_is_listed(ZOO[name]()[0], zoo(name)[1], unused.get(name, frozenset()))


# How many layers become integers, adds that run in integers, and adds in all.
ADDS = {"resnet18": (21, 7, 8), "mobilenet_v2": (53, 10, 10), "shufflenet_v2_x0_5": (57, 0, 0)}
MORE = {"mobilenet_v3_small": (54, 6, 6), "densenet121": (121, 0, 0), "squeezenet1_1": (26, 0, 0)}


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.contract) for n in [*ADDS, *MORE] if n != "resnet18")],
)
def test_place_takes_every_layer_and_residual_add_of_a_convolutional_network(name: str) -> None:
    model = torchvision_model(name)
    graph, placement = placed(model, torch.zeros(2, 3, 64, 64))
    check_every_layer_is_listed(model, placement)
    anchors, integer, adds = (ADDS | MORE)[name]
    assert len(placement.anchors) == anchors
    assert joined(graph, placement).count("add") == integer
    assert sum(operator(node) in {"aten.add", "aten.add_"} for node in graph.graph.nodes) == adds


@pytest.mark.parametrize("name", ["attention_fused_qkv", "multihead_attention"])
def test_place_leaves_residual_adds_of_a_transformer_in_float(name: str) -> None:
    graph, placement = zoo(name)
    assert "add" not in joined(graph, placement)
    assert any(skip.module == "(root):add" for skip in placement.skips)
    assert any("scaled_dot_product_attention" in skip.reason for skip in placement.skips)


def test_place_names_the_module_that_holds_the_weight_when_another_one_uses_it() -> None:
    assert modules(zoo("multihead_attention")[1]) == ["attention", "attention.out_proj", "head"]
    model = Forward(lambda s, x: F.conv2d(x, s.part.weight), part=conv())
    assert modules(placed(model, torch.zeros(IMAGE))[1]) == ["part"]
    excluded = placed(*ZOO["multihead_attention"](), exclude=("*.out_proj",))[1]
    assert modules(excluded) == ["attention", "head"]


@pytest.mark.parametrize("name", ["residual_add", "concat", "chunk_shuffle_concat", "squeeze_excite"])
def test_place_joins_what_lies_between_integer_layers(name: str) -> None:
    expected = {
        "residual_add": ["add"],
        "concat": ["cat"],
        "chunk_shuffle_concat": ["cat"],
        "squeeze_excite": ["sigmoid", "mul"],
    }
    graph, placement = zoo(name)
    assert joined(graph, placement) == expected[name]


JOINS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "add_before_a_layer": (lambda s, x: s.c(s.a(x) + s.b(x)), ["add"]),
    "add_and_relu": (lambda s, x: s.c(F.relu(s.a(x) + s.b(x))), ["add"]),
    "add_of_the_input": (lambda s, x: s.c(s.a(x) + x), ["add"]),
    "add_at_the_end": (lambda s, x: s.a(x) + s.b(x), []),
    "add_before_softmax": (lambda s, x: s.c(torch.softmax(s.a(x) + s.b(x), 1)), []),
    "add_of_a_number": (lambda s, x: s.c(s.a(x) + 1.0), []),
    "add_of_a_constant": (lambda s, x: s.c(s.a(x) + s.p.weight), []),
    "add_of_floats": (lambda s, x: s.c(torch.tanh(s.a(x)) + torch.tanh(x)), []),
    "add_of_a_float_branch": (lambda s, x: s.c(s.a(x) + torch.tanh(s.b(x))), []),
    "add_of_what_a_layer_takes": (lambda s, x: s.c(s.a(t := torch.tanh(x)) + t), ["add"]),
    "two_adds": (lambda s, x: s.c(s.a(x) + s.b(x) + s.a(x)), ["add", "add"]),
    "mul": (lambda s, x: s.c(s.a(x) * s.b(x)), ["mul"]),
    "average_pool": (lambda s, x: s.c(F.avg_pool2d(s.a(x), 2)), ["avg_pool2d"]),
    "average_pool_of_the_input": (lambda s, x: s.c(F.avg_pool2d(x, 2)), []),
}


@pytest.mark.parametrize("name", JOINS)
def test_place_joins_only_where_integers_flow_in_and_out(name: str) -> None:
    function, expected = JOINS[name]
    graph, placement = placed(Forward(function, a=conv(), b=conv(), c=conv(), p=nn.PReLU()), torch.zeros(IMAGE))
    assert joined(graph, placement) == expected
    skipped = {skip.module.split(":")[-1] for skip in placement.skips}
    left = {n.name for n in graph.graph.nodes if operator(n) in SCHEME.joining} - set(placement.joins)
    assert left <= skipped


FOLLOWING: dict[str, Callable[..., Tensor]] = {
    "max_pool": lambda s, x: s.c(F.max_pool2d(s.a(x).relu(), 2)),
    "reshape": lambda s, x: s.c(s.a(x).relu().reshape(-1, 3, 4, 16)),
    "chunk": lambda s, x: s.c(torch.cat([*s.a(x).relu().chunk(3, 1)], 1)),
    "transpose": lambda s, x: s.c(s.a(x).relu().transpose(2, 3)),
    "slice": lambda s, x: s.c(s.a(x).relu()[:, :, 1:]),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_place_shares_the_range_of_what_an_operator_moves(name: str) -> None:
    graph, placement = placed(Forward(FOLLOWING[name], a=conv(), c=conv()), torch.zeros(IMAGE))
    nodes = {node.name: node for node in graph.graph.nodes}
    moved = [tensor for tensor in placement.tensors if operator(nodes[tensor]) in SCHEME.following]
    assert moved
    assert {placement.tensors[tensor] for tensor in moved} == {"relu"}
    assert placement.tensors["relu"] == "relu"


def test_place_gives_outputs_of_an_operator_that_it_does_not_follow_their_own_range() -> None:
    graph, placement = zoo("lstm")
    assert modules(placement) == ["head"]
    assert [skip.module for skip in placement.skips] == ["lstm"]
    nodes = {node.name: node for node in graph.graph.nodes}
    for root in placement.tensors.values():
        assert isinstance(nodes[root].meta["val"], Tensor)


PADS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "zeros": (lambda s, x: s.c(F.pad(s.a(x), (1, 1, 0, 2))), True),
    "ones": (lambda s, x: s.c(F.pad(s.a(x), (1, 1, 0, 2), value=1.0)), False),
    "reflect": (lambda s, x: s.c(F.pad(s.a(x), (1, 1, 1, 1), mode="reflect")), False),
    "before_a_pool": (lambda s, x: s.c(F.max_pool2d(F.pad(s.a(x), (0, 1, 0, 1)), 2)), False),
}


@pytest.mark.parametrize("name", PADS)
def test_place_looks_through_a_padding_that_a_convolution_takes_in(name: str) -> None:
    function, through = PADS[name]
    graph, placement = placed(Forward(function, a=conv(), c=conv()), torch.zeros(IMAGE))
    assert len(placement.anchors) == 2
    assert any(operator(n) == "aten.pad" and n.name in placement.tensors for n in graph.graph.nodes) is not through


CLIPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, True),
    "relu6": (F.relu6, True),
    "hardtanh": (F.hardtanh, True),
    "clamp": (lambda x: x.clamp(-0.5, 2), True),
    "clamp_below": (lambda x: x.clamp(min=0.0), True),
    "clamp_above": (lambda x: x.clamp(max=3.0), True),
    "clamp_away_from_zero": (lambda x: x.clamp(0.25, 2), False),
    "clamp_by_tensors": (lambda x: torch.clamp(x, min=torch.zeros(3, 1, 1)), False),
    "gelu": (F.gelu, False),
}


@pytest.mark.parametrize("name", CLIPS)
def test_place_quantizes_behind_a_clip_that_quantization_can_do(name: str) -> None:
    function, fused = CLIPS[name]
    _, placement = placed(Forward(lambda s, x: s.c(function(s.a(x))), a=conv(), c=conv()), torch.zeros(IMAGE))
    assert ("conv2d" in placement.tensors) is not fused


def test_place_quantizes_the_output_of_a_linear_layer_when_a_clip_follows_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    _, placement = placed(model, torch.zeros(2, 4))
    assert {"relu", "layer_norm"} < set(placement.tensors)
    assert len(placement.tensors) == 3


def test_place_skips_with_the_reason_when_a_layer_cannot_run_in_integers() -> None:
    def function(s: Forward, ids: Tensor) -> Tensor:
        x = s.linear(s.table(ids))
        x = F.linear(x, s.linear.weight * 2)
        return F.linear(x, s.table.weight) + s.up(x.transpose(1, 2)).mean() + s.wide(x.double()).mean()

    parts = {
        "table": nn.Embedding(9, 4),
        "linear": nn.Linear(4, 4),
        "up": nn.ConvTranspose1d(4, 2, 2),
        "wide": nn.Linear(4, 2).double(),
    }
    _, placement = placed(Forward(function, **parts), torch.randint(0, 9, (2, 5)))
    reasons = {(skip.module, skip.reason) for skip in placement.skips}
    assert ("table", "aten.embedding does not run in integers here") in reasons
    assert ("table", "its weight is shared with aten.embedding, which stays in float") in reasons
    assert ("up", "aten.conv_transpose1d does not run in integers here") in reasons
    assert ("wide", "its input is torch.float64; only float32 is quantized") in reasons
    assert ("(root):linear_1", "its weight is computed, not stored") in reasons
    assert ("linear", "its weight is shared with aten.mul, which stays in float") in reasons
    assert modules(placement) == []


def test_place_obeys_include_and_exclude() -> None:
    model = nn.Sequential(conv(), nn.Sequential(conv(), nn.ReLU(), conv()), conv())
    x = torch.zeros(IMAGE)
    assert modules(placed(model, x, include=("1.*",))[1]) == ["1.0", "1.2"]
    assert modules(placed(model, x, exclude=("1.*", "0"))[1]) == ["2"]
    both = placed(model, x, include=("0", "1.?"), exclude=("1.2",))[1]
    assert modules(both) == ["0", "1.0"]
    assert {(skip.module, skip.reason) for skip in both.skips} == {
        ("1.2", "excluded by '1.2'"),
        ("2", "not in include"),
    }


@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_place_names_the_nearest_layer_when_a_pattern_matches_none(setting: str) -> None:
    model = nn.Sequential()
    model.add_module("stem", conv())
    model.add_module("head", conv())
    with pytest.raises(PlanError, match=rf"{setting}='heed' matches no layer; did you mean 'head'\?"):
        placed(model, torch.zeros(IMAGE), **{setting: ("stem", "heed")})


def test_place_takes_every_use_when_a_module_runs_twice() -> None:
    model = Forward(lambda s, x: s.a(s.a(x).relu()), a=conv())
    _, placement = placed(model, torch.zeros(IMAGE))
    assert modules(placement) == ["a", "a"]
    assert {anchor.weight for anchor in placement.anchors} == {"a.weight"}
    assert modules(zoo("module_with_two_names")[1]) == ["stem.0", "first.0", "second.0", "head.2"]
