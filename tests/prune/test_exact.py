from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.prune.edits import structure_of
from pared.prune.exact import Masked, difference, relative
from pared.surgery import apply_edits
from pared.task import Inputs, Task
from prune_cases import channels_of, half
from zoo_models import make

PATTERNS = ["mlp", "residual_add", "concat", "depthwise", "grouped", "squeeze_excite", "transposed_conv", "lstm"]


@pytest.mark.parametrize("name", [*PATTERNS, "module_with_two_names", "tied_weights"])
def test_difference_is_rounding_when_slices_follow_the_groups(name: str) -> None:
    model, inputs = make(name)
    task = Task(example_inputs=inputs.args)
    channels = channels_of(model, task)
    keep = half(channels)
    assert not bool(keep.all())
    pruned = apply_edits(model, structure_of(channels, keep), {})
    found = difference(model, pruned, channels, keep, task)
    assert found.dtype == "float64"
    assert found.exact
    assert found.relative < 1e-13  # a handful of layers of at most 24 terms: 2e-16 each


def test_masked_original_is_the_original_when_nothing_is_removed() -> None:
    model, inputs = make("residual_add")
    task = Task(example_inputs=inputs.args)
    channels = channels_of(model, task)
    everything = torch.ones(channels.units, dtype=torch.bool)
    (found,) = Masked(model, channels, everything).outputs(inputs)
    double = copy.deepcopy(model).double()
    assert torch.equal(found, double(inputs.args[0].double()))


@pytest.mark.parametrize("wrong", ["other units", "a bias", "twice", "nan"])
def test_difference_is_large_when_the_pruned_model_is_wrong(wrong: str) -> None:
    model, inputs = make("mlp")
    task = Task(example_inputs=inputs.args)
    channels = channels_of(model, task)
    keep = half(channels)
    cut = keep.clone()
    if wrong == "other units":
        cut[channels.groups[0].units] = keep[channels.groups[0].units].flip(0)
        assert not torch.equal(cut, keep)
    pruned = apply_edits(model, structure_of(channels, cut), {})
    with torch.no_grad():
        if wrong == "a bias":
            pruned[2].bias.zero_()
        if wrong == "twice":
            pruned[4].weight.mul_(2)
        if wrong == "nan":
            pruned[4].bias[0] = float("nan")
    found = difference(model, pruned, channels, keep, task)
    assert not found.exact
    assert not found.relative < 1e-3


def test_relative_tells_scaled_permuted_and_missing_outputs_apart() -> None:
    a = torch.tensor([1.0, -2.0, 4.0])
    assert relative([a], [a]) == 0
    assert relative([a], [2 * a]) == 1
    assert relative([a], [a + 0.4]) == pytest.approx(0.1)
    assert relative([a], [a.flip(0)]) == 0.75
    assert relative([a], [a[:2]]) == float("inf")
    assert relative([a, a], [a]) == float("inf")
    assert relative([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative([torch.zeros(2)], [torch.ones(2)]) == float("inf")
    assert not relative([a], [a * float("nan")]) <= 1


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.into(x)))


def test_masked_layer_norm_takes_statistics_over_kept_channels() -> None:
    torch.manual_seed(0)
    model = Normed()
    x = torch.randn(2, 4)
    task = Task(example_inputs=x)
    channels = channels_of(model, task)
    keep = half(channels)
    (found,) = Masked(model, channels, keep).outputs(Inputs((x,), {}))
    double = copy.deepcopy(model).double()
    kept = double.into(x.double())[:, keep]
    normed = (kept - kept.mean(1, keepdim=True)) / (kept.var(1, correction=0, keepdim=True) + double.norm.eps).sqrt()
    expected = F.linear(normed, double.head.weight[:, keep], double.head.bias)  # scales are 1, shifts 0
    # Eight terms in float64.
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-14)


class SinglePrecision(nn.Module):
    """Its code names a dtype, and makes a tensor of the default one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.float()).to(torch.float32)
        return self.head(x + torch.ones(1) + torch.zeros(1, dtype=torch.float32))


def test_difference_computes_in_float64_when_the_code_names_float32() -> None:
    torch.manual_seed(0)
    model, task = SinglePrecision(), Task(example_inputs=torch.randn(2, 4))
    channels = channels_of(model, task)
    keep = half(channels)
    found = difference(model, apply_edits(model, structure_of(channels, keep), {}), channels, keep, task)
    assert (found.dtype, found.exact) == ("float64", True)
    assert torch.get_default_dtype() == torch.float32


class Standardized(nn.Conv2d):
    """Its filters get a mean of 0 and a variance of 1 over what they read, as in timm's norm-free networks."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def test_weights_are_standardized_over_kept_channels_when_channels_are_removed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Standardized(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    task = Task(example_inputs=(torch.randn(2, 3, 9, 9),))
    channels = channels_of(model, task)
    keep = half(channels)
    pruned = apply_edits(model, structure_of(channels, keep), {})
    assert difference(model, pruned, channels, keep, task).relative < 1e-13


class OneHead(nn.Module):
    """Attention without heads, whose scale is left to PyTorch: one over the root of the width."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale, self.qkv, self.out = scale, nn.ModuleList(nn.Linear(6, 16) for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x)[:, None] for part in self.qkv)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale)[:, 0])


@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_is_scaled_by_its_kept_channels_when_the_forward_gives_no_scale(scale: float | None) -> None:
    torch.manual_seed(0)
    model, task = OneHead(scale).eval(), Task(example_inputs=torch.randn(2, 5, 6))
    channels = channels_of(model, task)
    keep = half(channels)
    pruned = apply_edits(model, structure_of(channels, keep), {})
    assert [layer.out_features for layer in pruned.qkv] == [8, 8, 8]
    assert difference(model, pruned, channels, keep, task).relative < 1e-13  # two layers and a softmax: 2e-16 each
