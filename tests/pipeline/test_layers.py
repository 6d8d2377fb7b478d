"""What the report says of each layer after a prune, and of the prune itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pared.graph.counts import LayerCount
from pared.pipeline.layers import kind_of, layer_table, pruned, smaller
from pared.step import Edit, Plan
from pared.surgery import apply_edits


class Positions(nn.Module):
    """A bare parameter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 5, 8))
        self.embed = nn.Linear(3, 8)


def cut(module: str, tensor: str, dim: int, keep: int) -> Edit:
    return Edit("slice", module, {"tensor": tensor, "dim": dim, "keep": list(range(keep))})


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4), Positions())


EDITS = (
    cut("0", "weight", 0, 6),
    cut("0", "bias", 0, 6),
    *(cut("1", name, 0, 6) for name in ("weight", "bias", "running_mean", "running_var")),
    cut("3", "weight", 1, 24),
    cut("4", "place", 2, 4),
    cut("4.embed", "weight", 0, 4),
    cut("4.embed", "bias", 0, 4),
)


def table(*plans: Plan) -> dict[str, str]:
    before = network()
    after = apply_edits(before, [e for plan in plans for e in plan.edits if e.kind == "slice"], {})
    counts = [
        LayerCount(name, type(module).__name__, (), 1, 4, 1, ())
        for name, module in before.named_modules()
        if list(module.parameters(recurse=False))
    ]
    return {layer.module: layer.became for layer in layer_table(counts, plans, before, after)}


def test_layers_say_what_they_still_make_and_read_when_channels_were_removed() -> None:
    assert table(Plan("PruneChannels", edits=EDITS)) == {
        "0": "6 of 8 channels",
        "1": "6 of 8 channels",
        "3": "reads 24 of 32 features",
        "4": "4 of 8 along dimension 2 of place",
        "4.embed": "4 of 8 features",
    }


def test_layers_count_from_the_network_as_it_came_in_when_pruned_in_rounds() -> None:
    second = Plan("PruneChannels", edits=(cut("4", "place", 2, 2), cut("4", "place", 1, 3)))
    became = table(Plan("PruneChannels", edits=EDITS), second)
    assert became["4"] == "3 of 5 along dimension 1 of place; 2 of 8 along dimension 2 of place"
    assert became["0"] == "6 of 8 channels"


def test_layers_say_both_when_they_were_pruned_and_quantized() -> None:
    edits = (Edit("quantize", "0", {"bits": 8}), Edit("cast", "3", {"dtype": "float16"}))
    became = table(Plan("PruneChannels", edits=EDITS), Plan("QuantizeStatic", edits=edits, facts={"folded": ["1"]}))
    assert (became["0"], became["1"]) == ("int8, 6 of 8 channels", "folded, 6 of 8 channels")
    assert became["3"] == "float16, reads 24 of 32 features"


def test_layers_stay_float32_when_nothing_touched_them() -> None:
    assert set(table(Plan("Train")).values()) == {"float32"}


def test_heads_are_counted_when_they_left_an_attention() -> None:
    before = nn.Sequential(nn.MultiheadAttention(8, 4))
    after = copy.deepcopy(before)
    after[0].num_heads = 3
    assert smaller(before, after, "0") == "3 of 4 heads"


def test_nothing_is_said_of_a_layer_when_it_was_replaced() -> None:
    assert smaller(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Conv1d(4, 2, 1)), "0") == ""
    assert smaller(nn.Sequential(), nn.Sequential(nn.Conv1d(4, 2, 1)), "0") == ""


FACTS: dict[str, Any] = {
    "widths": {"0": [6, 8], "3": [4, 4], "3:2": [1, 2], "gone": [1, 2]},
    "params": 0.5,
    "macs": 0.25,
    "difference": 1e-16,
    "taken_in": 3,
    "constants": {"3": "a padded border (up to 0.1)"},
    "approximate": {"3:2": "a mean runs over fewer channels"},
    "curves": {"0": [[0.0, 0.0], [0.5, 0.1]]},
}


def test_prune_is_told_from_its_plan_when_it_has_curves() -> None:
    found = pruned(Plan("PruneChannels", facts=FACTS), network())
    assert found is not None
    assert [(group.name, group.kind, group.kept, group.before) for group in found.groups] == [
        ("0", "convolution", 6, 8),
        ("3", "fully connected", 4, 4),
        ("3:2", "fully connected", 1, 2),
        ("gone", "", 1, 2),
    ]
    assert found.groups[0].curve == ((0.0, 0.0), (0.5, 0.1))
    assert found.groups[2].approximate == "a mean runs over fewer channels"
    assert (found.params, found.macs, found.taken_in) == (0.5, 0.25, 3)
    assert (found.left[0].module, found.left[0].reason) == ("3", "a padded border (up to 0.1)")


@pytest.mark.parametrize("plan", [None, Plan("Train")])
def test_prune_is_none_when_the_step_is_another(plan: Plan | None) -> None:
    assert pruned(plan, network()) is None


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.ConvTranspose1d(1, 1, 1), "convolution"),
        (nn.LSTM(2, 2), "fully connected"),
        (nn.Embedding(2, 2), ""),
        (nn.LayerNorm(2), ""),
        (Positions(), ""),
    ],
)
def test_kind_is_that_of_the_layer(module: nn.Module, kind: str) -> None:
    assert kind_of(module) == kind
