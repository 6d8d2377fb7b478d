from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from pared.graph.capture import capture
from pared.graph.labels import find_channels
from pared.prune.edits import changes_of, edits_of, hides
from pared.step import Edit
from pared.surgery import apply_edits
from pared.task import Task
from prune_cases import channels_of, half
from torchvision_models import schemas
from zoo_models import FusedAttention, make


def attributes(edits: tuple[Edit, ...]) -> dict[str, int]:
    found = [edit for edit in edits if edit.kind == "set_attribute"]
    return {f"{edit.module}.{edit.detail['name']}".lstrip("."): edit.detail["value"] for edit in found}


def test_changes_of_puts_the_likelier_value_first() -> None:
    assert changes_of(8, {8: {4}, 3: {3}}) == [4]
    assert changes_of(8, {8: {8, 4}}) == [4, 8]
    assert changes_of(5, {8: {4}}) == [5]
    assert changes_of((3, 8), {8: {4}}) == [(3, 4)]
    assert changes_of((8, 8), {8: {4, 8}})[0] == (8, 8)


def test_attention_with_equal_heads_and_head_width_loses_heads_only() -> None:
    # Four heads of four: sizes alone do not tell which attribute follows; a wrong choice has fitting shapes.
    model, inputs = make("attention_fused_qkv")
    task = Task(example_inputs=inputs.args)
    channels = channels_of(model, task)
    fitted = edits_of(model, channels, half(channels), task)
    assert not fitted.pins
    assert fitted.difference is not None
    assert fitted.difference.exact
    assert attributes(fitted.edits) == {"heads": 2}


def test_nothing_is_set_when_shapes_come_from_tensors() -> None:
    model, inputs = make("residual_add")
    task = Task(example_inputs=inputs.args)
    channels = channels_of(model, task)
    fitted = edits_of(model, channels, half(channels), task)
    assert {edit.kind for edit in fitted.edits} == {"slice"}


class Written(nn.Module):
    """The number of channels stands in the code; only those of `first` are flattened by it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.before(x)).relu()
        return self.head(x.view(-1, 32))


class Counting(nn.Module):
    """Runs without some channels, and computes something else: it scales by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.before(x).relu()).relu()
        return self.head(x * x.shape[1])


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (Written(), torch.randn(2, 3, 2, 2), r"test_edits\.py:\d+, in forward: return self\.head\(x\.view\(-1, 32\)\)"),
        (Counting(), torch.randn(2, 4), "computes something else"),
    ],
    ids=["line", "values"],
)
def test_group_in_the_way_is_pinned_with_the_reason_and_the_rest_leaves(
    model: nn.Module, x: Tensor, reason: str
) -> None:
    task = Task(example_inputs=x)
    program = capture(model, task)
    channels = find_channels(program, model)
    fitted = edits_of(model, channels, half(channels), task)
    assert set(fitted.pins) <= {"first.bias", "first.weight"}
    (text,) = fitted.pins.values()
    assert re.search(reason, text)
    channels = find_channels(program, model, pinned=fitted.pins)
    assert [group.name for group in channels.groups] == ["before"]
    again = edits_of(model, channels, half(channels), task)
    assert not again.pins
    assert {edit.module for edit in again.edits} == {"before", "first"}


class Sections(nn.Module):
    """Reads a list: queries, keys and values of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.sections, self.into, self.head = [8, 8], nn.Linear(4, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.into(x), self.sections, dim=1)
        return self.head(first * second)


def test_list_of_sizes_follows() -> None:
    torch.manual_seed(0)
    model, task = Sections(), Task(example_inputs=torch.randn(2, 4))
    channels = channels_of(model, task)
    fitted = edits_of(model, channels, half(channels), task)
    assert attributes(fitted.edits) == {"sections": [4, 4]}


def test_shapes_alone_are_enough_in_a_search() -> None:
    model = FusedAttention(width=16, heads=2)
    task = Task(example_inputs=torch.randn(2, 7, 6))
    channels = channels_of(model, task)
    fitted = edits_of(model, channels, half(channels), task, prove=False)
    assert fitted.difference is None
    assert attributes(fitted.edits) == {"heads": 1}
    assert apply_edits(model, fitted.edits, {})(torch.randn(3, 7, 6)).shape == (3, 5)


def small(kind: str) -> nn.Module:
    schemas()
    from torchvision.models import SwinTransformer, VisionTransformer

    if kind == "swin":
        return SwinTransformer([4, 4], 24, [2, 1], [2, 4], [2, 2], num_classes=5)
    return VisionTransformer(16, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5)


@pytest.mark.parametrize(("kind", "attention"), [("swin", "num_heads"), ("vit", "hidden_dim")])
def test_transformer_of_another_library_loses_heads_and_width(kind: str, attention: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small(kind).eval()
    task = Task(example_inputs=torch.zeros(1, 3, 16, 16))
    channels = channels_of(model, task)
    keep = half(channels)
    fitted = edits_of(model, channels, keep, task)
    assert not fitted.pins
    assert fitted.difference is not None
    assert fitted.difference.relative < 1e-12
    assert any(edit.kind == "set_attribute" and edit.detail["name"] == attention for edit in fitted.edits)
    pruned = apply_edits(model, fitted.edits, {})
    kept, all_of_it = (sum(p.numel() for p in m.parameters()) for m in (pruned, model))
    assert kept < 0.4 * all_of_it


@pytest.mark.parametrize(
    ("tensor", "index", "hidden"),
    [
        ("1.weight", 3, True),  # a scale of zero: the channel is seen nowhere
        ("3.weight", (slice(None), 3), True),  # nothing reads the channel
        ("0.weight", 3, True),  # nothing makes it
        ("3.weight", (0, 3, 0, 0), False),  # one zero among others
        ("1.bias", slice(None), False),  # added, not multiplied
    ],
)
def test_zeros_hide_an_edit_where_nothing_else_is_at_an_index(tensor: str, index: object, hidden: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    task = Task(example_inputs=torch.randn(1, 3, 8, 8))
    channels = channels_of(model, task)
    assert not hides(model, channels)
    with torch.no_grad():
        model.get_parameter(tensor)[index] = 0  # type: ignore[index]
    assert hides(model, channels) == hidden


class Biased(nn.Module):
    """A table of one bias a head, which the attention asks for by a method: this module itself never runs."""

    def __init__(self, heads: int, length: int) -> None:
        super().__init__()
        self.table, self.shape = nn.Parameter(torch.randn(length * length, heads)), (length, length, heads)

    def bias(self) -> torch.Tensor:
        return self.table[torch.arange(len(self.table))].view(self.shape).permute(2, 0, 1)


class Asks(nn.Module):
    """Attention of four heads with biases from a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(6, 48), nn.Linear(16, 3)
        self.biases = Biased(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) + self.biases.bias()).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_edits_set_the_numbers_of_a_module_whose_methods_another_one_calls() -> None:
    torch.manual_seed(0)
    model, task = Asks(), Task(example_inputs=(torch.randn(2, 5, 6),))
    channels = channels_of(model, task)
    fitted = edits_of(model, channels, half(channels), task)
    assert not fitted.pins
    pruned = apply_edits(model, fitted.edits, {})
    assert (pruned.heads, pruned.biases.shape) == (2, (5, 5, 2))
