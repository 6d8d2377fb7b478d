from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.graph.capture import doubled
from pared.prune.constants import Watch, constants_of, fold, padded, spread
from pared.prune.edits import structure_of
from pared.prune.exact import difference
from pared.surgery import apply_edits
from pared.task import Task
from prune_cases import channels_of, half
from zoo_models import make


def randomized(model: nn.Module) -> nn.Module:
    """Batch norms whose shifts and statistics are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def test_bias_of_a_linear_layer_takes_in_what_removed_units_gave() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, 2.0, -3.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]))
        model[2].bias.zero_()
    task = Task(example_inputs=torch.zeros(1, 2))
    channels = channels_of(model, task)
    found = constants_of(model, channels, torch.tensor([True, False, False]), task)
    # relu(2) = 2 and relu(-3) = 0, times their weights.
    assert {name: change.tolist() for name, change in found.changes.items()} == {"2.bias": [20.0, 40.0]}
    assert found.folded.tolist() == [False, True, True]
    assert not found.left


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid])
def test_pruned_model_is_the_one_with_scales_at_zero(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)]
    model = randomized(nn.Sequential(*blocks, activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    x = torch.randn(2, 3, 5, 5)
    task = Task(example_inputs=x)
    channels = channels_of(model, task)
    keep = half(channels)
    first, second = (~keep[group.units] for group in channels.groups)
    found = constants_of(model, channels, keep, task)
    assert set(found.changes) == {"4.running_mean", "8.bias"}
    pruned = fold(apply_edits(model, structure_of(channels, keep), {}).double(), model, channels, keep, found)
    silent = copy.deepcopy(model).double()
    with torch.no_grad():
        silent[1].weight[first] = 0
        silent[4].weight[second] = 0
        # Sums of at most 72 terms, twice, in float64.
        assert torch.allclose(pruned(x.double()), silent(x.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "residual_add", "concat", "depthwise", "grouped", "squeeze_excite"])
def test_folded_and_zeroed_units_together_are_exact(name: str) -> None:
    model, inputs = make(name)
    task = Task(example_inputs=inputs.args)
    channels = channels_of(model, task)
    keep = half(channels)
    found = constants_of(model, channels, keep, task)
    assert not bool((found.folded & keep).any())
    pruned = apply_edits(model, structure_of(channels, keep), {}).double()
    folded = fold(pruned, model, channels, keep, found)
    assert difference(model, folded, channels, keep, task, folded=found.folded).relative < 1e-13
    if found.changes:
        assert not difference(model, pruned, channels, keep, task, folded=found.folded).exact


def test_constant_before_a_padded_convolution_counts_as_zero_and_is_reported() -> None:
    torch.manual_seed(0)
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1))
    )
    task = Task(example_inputs=torch.randn(1, 3, 4, 4))
    channels = channels_of(model, task)
    keep = torch.tensor([True, False, True, False])
    found = constants_of(model, channels, keep, task)
    largest = float(model[1].bias.detach()[~keep].sigmoid().max())
    assert not found.changes
    assert not bool(found.folded.any())
    assert found.left == {
        "3": f"it pads, so that constants of removed channels end before its border (up to {largest:.3g})"
    }


class Gated(nn.Module):
    """A gate that depends on data, and a sum that has nowhere to put a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate, self.out, self.head = nn.Linear(4, 6), nn.Linear(4, 1), nn.Linear(6, 3), nn.Linear(3, 2)
        self.plain = nn.Linear(4, 6)
        self.bare = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.out(self.into(x) * (self.gate(x) > 0))
        return self.head(gated + self.bare(F.sigmoid(self.plain(x))))


def test_constants_that_meet_data_or_find_no_bias_are_left() -> None:
    torch.manual_seed(0)
    model, task = Gated(), Task(example_inputs=torch.randn(2, 4))
    channels = channels_of(model, task)
    found = constants_of(model, channels, half(channels), task)
    assert found.left["out"] == "the constants of its removed channels are mixed with data"
    assert found.left["bare"].startswith("it has no bias")
    for group in channels.groups:
        if group.name in {"into", "plain"}:
            assert not bool(found.folded[group.units].any())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, padding=4),  # some windows lie wholly in the border
        nn.Conv2d(4, 6, 2, dilation=4, padding=3),  # some step over all of a small input
        nn.Conv2d(4, 6, 3, groups=2, padding="same"),
        nn.Conv2d(4, 4, 1, groups=4, stride=2),
        nn.ConvTranspose2d(4, 6, 2, stride=3),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_is_no_number_is_told_without_computing_it(
    layer: nn.Module, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(int(layer.out_channels), 2, 1)
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), layer, last))
    task = Task(example_inputs=torch.randn(1, 3, size, size))
    channels = channels_of(model, task)
    keep = half(channels)

    def outputs() -> list[Tensor]:
        return Watch(model, channels, keep).outputs(doubled(task.example_inputs))

    quick = outputs()
    monkeypatch.setattr(Watch, "unknown_everywhere", lambda *_: None)
    for first, second in zip(quick, outputs(), strict=True):
        assert torch.equal(first.isnan(), second.isnan())
        assert torch.allclose(first, second, rtol=1e-15, equal_nan=True)


class Remembering(nn.Module):
    """Keeps what it computed in eval mode, until it trains again, as LeViT's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.shift, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        self.known = {} if mode else self.known
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.known.setdefault("shift", self.shift.detach() * 2)
        return self.head(self.into(x) + shift)


def test_folded_model_forgets_what_the_original_computed_ahead() -> None:
    torch.manual_seed(0)
    model, task = Remembering().eval(), Task(example_inputs=torch.randn(2, 4))
    channels = channels_of(model, task)
    keep = half(channels)
    model(torch.randn(2, 4))
    found = constants_of(model, channels, keep, task)
    folded = fold(apply_edits(model, structure_of(channels, keep), {}), model, channels, keep, found)
    assert folded(torch.randn(3, 4)).shape == (3, 2)
    assert not folded.training


class Shared(nn.Module):
    """One layer reads two sets of channels, with two different constants for one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.both = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.sigmoid(self.first(x))
        x = self.both(x)
        return self.head(self.both(F.relu(x)))


def test_bias_that_two_readers_would_change_differently_stays() -> None:
    torch.manual_seed(0)
    model, task = Shared(), Task(example_inputs=torch.randn(2, 4))
    channels = channels_of(model, task)
    keep = half(channels)
    found = constants_of(model, channels, keep, task)
    assert "both.bias" not in found.changes
    assert found.left["both"] == "another layer shares the bias that would take the constants in"
    pruned = fold(apply_edits(model, structure_of(channels, keep), {}).double(), model, channels, keep, found)
    assert difference(model, pruned, channels, keep, task, folded=found.folded).exact


@pytest.mark.parametrize("name", ["relu6", "leaky_relu", "elu", "selu", "softplus", "mish", "tanh", "hardtanh", "relu"])
def test_activation_says_that_it_depends_on_data(name: str) -> None:
    # Constants are told from data by what is still a number; an activation that clips NaN away would hide data.
    for size in (1, 64):
        assert bool(getattr(F, name)(torch.full((size,), float("nan"), dtype=torch.float64)).isnan().all())


def test_spread_weight_gives_the_grouped_convolution() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 6, 3, 3).double(), torch.randn(4, 3, 2, 2).double()
    assert torch.allclose(F.conv2d(x, weight, groups=2), F.conv2d(x, spread(weight, 2, False)), rtol=1e-12, atol=1e-12)
    weight = torch.randn(6, 2, 2, 2).double()
    expected = F.conv_transpose2d(x, weight, groups=2)
    found = F.conv_transpose2d(x, spread(weight, 2, True).transpose(0, 1))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_padded_knows_names_and_numbers() -> None:
    def node(**settings: object) -> torch.fx.Node:
        model = nn.Conv2d(2, 2, 3, **settings)  # type: ignore[arg-type]
        program = torch.export.export(model, (torch.zeros(1, 2, 5, 5),))
        return next(node for node in program.graph.nodes if node.op == "call_function")

    assert not padded(node(), "conv2d")
    assert padded(node(padding=1), "conv2d")
    assert padded(node(padding="same"), "conv2d")
