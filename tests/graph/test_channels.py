"""Channel groups of tiny models: spelled out by hand, and proved by slicing them against the masked original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.graph.capture import capture
from pared.graph.channels import Channels
from pared.graph.labels import find_channels
from pared.graph.reading import Mode
from pared.step import Edit
from pared.surgery import apply_edits
from pared.task import Inputs, Task, as_inputs, call
from torchvision_models import torchvision_model
from zoo_models import ZOO, conv_norm, head, image

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*assigned during export:UserWarning"),
]


class Does(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def read(model: nn.Module, inputs: Any, **settings: Any) -> Channels:
    given = inputs if isinstance(inputs, Inputs) else as_inputs(inputs)
    return find_channels(capture(model, Task(example_inputs=given)), model, **settings)


def sizes(channels: Channels) -> dict[str, int]:
    """Number of units of each group, by name."""
    return {group.name: group.size for group in channels.groups}


def reasons(channels: Channels) -> dict[str, str]:
    return {skip.module: skip.reason for skip in channels.skips}


# --- the oracle: slicing equals masking ------------------------------------------------------------------------------


def choose(channels: Channels, exact_only: bool = True) -> Tensor:
    """A random half of the units of each group stays; all of those whose removal is not exact."""
    keep = torch.ones(channels.units, dtype=torch.bool)
    for group in channels.groups:
        if group.name not in channels.approximate or not exact_only:
            order = torch.randperm(group.size)
            keep[group.start + order[: group.size // 2]] = False
    return keep


def sliced(model: nn.Module, channels: Channels, keep: Tensor, attributes: dict[str, int]) -> nn.Module:
    """The model without the removed units, by surgery alone."""
    stays = torch.cat([keep, torch.ones(1, dtype=torch.bool)])  # the last one stands for NO_UNIT, -1
    edits = []
    for (name, dim), units in channels.tensors.items():
        module, _, tensor = name.rpartition(".")
        kept = stays[units].nonzero().ravel().tolist()
        edits.append(Edit("slice", module, {"tensor": tensor, "dim": dim, "keep": kept}))
    for count in channels.counts:
        value = int(stays[count.units].sum())
        edits.append(Edit("set_attribute", count.module, {"name": count.attribute, "value": value}))
    for name, value in attributes.items():
        module, _, attribute = name.rpartition(".")
        edits.append(Edit("set_attribute", module, {"name": attribute, "value": value}))
    return apply_edits(model, edits, {})


class Masked(fx.Interpreter):
    """The original graph, where removed units are zero in every tensor and in everything that is computed."""

    def __init__(self, channels: Channels, keep: Tensor) -> None:
        super().__init__(channels.program.graph_module)
        self.channels = channels
        self.stays = torch.cat([keep, torch.ones(1, dtype=torch.bool)])

    def masked(self, name: str, value: Tensor) -> Tensor:
        for dim, units in self.channels.values.get(name, {}).items():
            frame = [1] * value.ndim
            frame[dim] = -1
            if value.is_floating_point():  # not multiplied: a weight norm of zeros is not a number
                value = torch.where(self.stays[units].reshape(frame), value, 0.0)
        return value

    def run_node(self, n: fx.Node) -> Any:
        return self.masked(n.name, super().run_node(n)) if n.op != "output" else super().run_node(n)

    def answer(self, inputs: Inputs) -> Tensor:
        program = self.channels.program
        rest = iter([*inputs.args, *inputs.kwargs.values()])
        held = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        return self.run(*(next(rest) if spec.target is None else held[spec.target] for spec in specs))[0]


def agree(model: nn.Module, inputs: Any, attributes: dict[str, int] | None = None, mode: Mode = "heads") -> Channels:
    """Check that the sliced model computes what the masked original does, in float64."""
    given = inputs if isinstance(inputs, Inputs) else as_inputs(inputs)
    model = model.double().eval()

    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    given = Inputs(tuple(map(double, given.args)), {key: double(value) for key, value in given.kwargs.items()})
    channels = read(model, given, attention=mode)
    keep = choose(channels)
    assert not keep.all()
    with torch.no_grad():
        small = call(sliced(model, channels, keep, attributes or {}), given)
        masked = Masked(channels, keep).answer(given)
        whole = call(model, given)
    assert (whole - masked).abs().max() > 1e-6 * whole.abs().max()  # what was removed did something
    assert (small - masked).abs().max() <= 1e-9 * masked.abs().max()
    return channels


WRITTEN: dict[str, dict[str, int]] = {
    "attention_fused_qkv": {"heads": 2},
    "lstm": {"lstm.hidden_size": 4},
}


# In two of them everything stays, one way or another: see below.
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("dict_output", "multihead_attention")])
def test_slicing_a_zoo_model_equals_masking_it(name: str) -> None:
    agree(*ZOO[name](), WRITTEN.get(name))


def flat(model: nn.Module) -> nn.Module:
    return nn.Sequential(conv_norm(3, 8), model, nn.Flatten(1), nn.Linear(8 * 16, 5))


class Attends(nn.Module):
    """Attention with three projections in one of several notations; its residual stream stays."""

    def __init__(self, how: str, heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.how, self.heads, self.width = how, heads, width // heads
        self.query, self.key, self.value = (nn.Linear(6, width) for _ in range(3))
        self.out = nn.Linear(width, 5)

    def parts(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.parts(layer(x)) for layer in (self.query, self.key, self.value))
        if self.how == "einsum":
            scores = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", scores, value)
        elif self.how == "matmul":
            scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * 0.5
            mixed = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)
        elif self.how == "bmm":
            query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
            scores = torch.bmm(query, key.transpose(1, 2)).softmax(-1)
            mixed = torch.bmm(scores, value).view(x.shape[0], self.heads, x.shape[1], self.width).transpose(1, 2)
        else:
            parts = [part.transpose(1, 2) for part in (query, key, value)]
            mixed = F.scaled_dot_product_attention(*parts, scale=0.5).transpose(1, 2)
        return self.out(mixed.reshape(x.shape[0], x.shape[1], self.heads * self.width))


@pytest.mark.parametrize("how", ["einsum", "matmul", "bmm", "sdpa"])
@pytest.mark.parametrize(("heads", "mode"), [(4, "heads"), (4, "head_dim"), (2, "heads"), (8, "head_dim")])
def test_attention_loses_whole_heads_or_the_inside_of_all_heads(how: str, heads: int, mode: Mode) -> None:
    """Whatever the notation, and also where there are fewer heads than indices in each, or more."""
    left = {"heads": heads // 2} if mode == "heads" else {"width": 16 // heads // 2}
    channels = agree(Attends(how, heads), torch.randn(2, 7, 6), left, mode)
    units = heads if mode == "heads" else 16 // heads
    together = {"query", "key", "value"}
    if mode == "heads":
        assert sizes(channels) == {"query": units}
        assert together < set(channels.groups[0].modules)
    else:  # values are summed over positions, not over the inside of a head
        assert sizes(channels) == {"query": units, "value": units}


class Patches(nn.Module):
    """Patches with a class token and a position embedding, then one block with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.scale = nn.Parameter(torch.rand(16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.scale * self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])


def test_multihead_attention_must_stay_as_wide_as_its_input() -> None:
    channels = read(Patches(), image(3, 8))
    assert sizes(channels) == {"embed": 16, "attention": 2, "up": 24}
    assert channels.equal == (("embed", "attention"),)
    assert {(m.tensor, m.dim) for m in channels.groups[0].members} >= {("token", 2), ("place", 2), ("scale", 0)}


def test_multihead_attention_stays_whole_where_its_input_does() -> None:
    channels = read(*ZOO["multihead_attention"]())
    assert not channels.groups
    assert {skip.module: skip.reason for skip in channels.skips}["attention"] == (
        "nn.MultiheadAttention is as wide as its input, which always stays"
    )


def windows(model: nn.Module, x: Tensor) -> Tensor:
    """Swin's windows of 2 x 2, and back."""
    x = model.get_submodule("embed")(x).permute(0, 2, 3, 1)
    n, h, w, c = x.shape
    x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = F.relu(model.get_submodule("mix")(x))
    x = x.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return model.get_submodule("head")(model.get_submodule("merge")(x).mean((1, 2)))


class Standardized(nn.Conv2d):
    """Weights with zero mean in each filter (arXiv:1903.10520), computed in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, int]]] = {
    "depthwise with two filters a channel": (
        lambda: nn.Sequential(conv_norm(3, 8), conv_norm(8, 16, groups=8), head(16)),
        image,
        {"0.0": 8, "1.0": 0},
    ),
    "same index of few groups": (
        lambda: nn.Sequential(conv_norm(3, 12), conv_norm(12, 8, groups=2), head(8)),
        image,
        {"0.0": 6, "1.0": 4},
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), head(12)),
        image,
        {"0": 4},
    ),
    "instance norm, prelu": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.PReLU(12), head(12)),
        image,
        {"0": 12},
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(conv_norm(3, 16), nn.PixelShuffle(2), conv_norm(4, 6), head(6)),
        image,
        {"0.0": 4, "2.0": 6},
    ),
    "channel shuffle operator": (
        lambda: nn.Sequential(conv_norm(3, 12), nn.ChannelShuffle(3), conv_norm(12, 6), head(6)),
        image,
        {"0.0": 4, "2.0": 6},
    ),
    "flatten": (lambda: flat(nn.AvgPool2d(2)), image, {"0.0": 8}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        lambda: torch.randint(0, 11, (2, 5)),
        {"0": 6, "1": 8},
    ),
    "one and three dimensions": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Unflatten(2, (3, 1, 3)),
            nn.Conv3d(6, 4, (1, 1, 3)),
            nn.ConvTranspose3d(4, 6, 2, groups=2),
            nn.Flatten(1),
            nn.Linear(6 * 4 * 2 * 2, 3),
        ),
        lambda: torch.randn(2, 3, 20),
        {"0": 6, "4": 2, "5": 3},
    ),
    "transposed depthwise": (
        lambda: nn.Sequential(conv_norm(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), head(8)),
        image,
        {"0.0": 8},
    ),
    "gated linear unit": (
        lambda: nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 3)),
        lambda: torch.randn(2, 4),
        {"0": 6},
    ),
    "windows and patch merging": (
        lambda: Does(
            windows,
            embed=nn.Conv2d(3, 6, 1),
            mix=nn.Linear(6, 8),
            merge=nn.Linear(32, 10),
            head=nn.Linear(10, 3),
        ),
        image,
        {"embed": 6, "mix": 8, "merge": 10},
    ),
    "unfold and fold": (
        lambda: Does(
            lambda m, x: m.head(F.fold(F.unfold(m.stem(x), 3, padding=1) * 2, x.shape[2:], 3, padding=1)),
            stem=conv_norm(3, 6),
            head=nn.Sequential(nn.ReLU(), head(6)),
        ),
        image,
        {"stem.0": 6},
    ),
    "shortcut that pads channels": (
        lambda: Does(
            lambda m, x: m.head(m.wide(m.stem(x)) + F.pad(m.stem(x), (0, 0, 0, 0, 2, 2))),
            stem=conv_norm(3, 4),
            wide=conv_norm(4, 8),
            head=nn.Sequential(nn.ReLU(), head(8)),
        ),
        image,
        {"stem.0": 4},
    ),
    "weights that are computed": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Standardized(4, 8, 3), nn.ReLU(), head(8)),
        image,
        {"0": 4, "1": 8},
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), head(8)),
        image,
        {"0.parametrizations.weight": 8},
    ),
    "heads that share keys": (
        lambda: Does(shares, query=nn.Linear(6, 16), key=nn.Linear(6, 8), value=nn.Linear(6, 8), out=nn.Linear(16, 3)),
        lambda: torch.randn(2, 5, 6),
        {"query": 2},
    ),
    "product with a bare parameter": (
        lambda: Does(lambda m, x: m.head(F.relu(x @ m.into.weight.t())), into=nn.Linear(6, 8), head=nn.Linear(8, 3)),
        lambda: torch.randn(2, 6),
        {"into": 8},
    ),
    "interpolation and concatenation": (
        lambda: Does(
            lambda m, x: m.head(torch.cat([m.one(x), F.interpolate(m.two(F.max_pool2d(x, 2)), scale_factor=2)], 1)),
            one=conv_norm(3, 4),
            two=conv_norm(3, 6),
            head=nn.Sequential(conv_norm(10, 8), head(8)),
        ),
        image,
        {"one.0": 4, "two.0": 6, "head.0.0": 8},
    ),
    "a convolution of a quarter of the channels": (
        lambda: Does(
            quarter,
            stem=conv_norm(3, 16),
            some=nn.Conv2d(4, 4, 3, padding=1),
            head=head(16),
        ),
        image,
        {"stem.0": 4, "some": 4},
    ),
    "a bias written over in place": (
        lambda: Does(zeroed, into=nn.Linear(6, 8), head=nn.Linear(8, 3)),
        lambda: torch.randn(2, 6),
        {"into": 4},
    ),
}


def shares(model: nn.Module, x: Tensor) -> Tensor:
    """Grouped queries (arXiv:2305.13245): two heads share one of the keys and values."""
    query, key, value = (
        model.get_submodule(name)(x).unflatten(2, (-1, 4)).transpose(1, 2) for name in ("query", "key", "value")
    )
    mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return model.get_submodule("out")(mixed.transpose(1, 2).flatten(2))


def quarter(model: nn.Module, x: Tensor) -> Tensor:
    """A partial convolution (arXiv:2303.03667), which reads the width of its part off a layer."""
    some = model.get_submodule("some")
    x = model.get_submodule("stem")(x)
    first, rest = x[:, : some.in_channels], x[:, some.in_channels :]
    return model.get_submodule("head")(torch.cat([some(first), rest], 1))


def zeroed(model: nn.Module, x: Tensor) -> Tensor:
    """Half of a bias is set to zero, as Swin v2 does with that of its keys."""
    into = model.get_submodule("into")
    bias = into.bias.clone()
    length = bias.numel() // 2
    bias[length : 2 * length].zero_()
    return model.get_submodule("head")(F.relu(F.linear(x, into.weight, bias)))


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_spelled_out_and_can_be_sliced(name: str) -> None:
    make, inputs, expected = MODELS[name]
    channels = agree(make(), inputs())
    assert sizes(channels) == {group: size for group, size in expected.items() if size}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_loses_hidden_units_of_all_gates_layers_and_directions(kind: type[nn.RNNBase]) -> None:
    layer = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True)
    model = Does(
        lambda m, x: m.head(m.layer(m.embed(x))[0].mean(1)), embed=nn.Linear(4, 6), layer=layer, head=nn.Linear(16, 3)
    )
    channels = agree(model, torch.randn(2, 5, 4), {"layer.hidden_size": 4, "layer.input_size": 3})
    assert sizes(channels) == {"embed": 6, "layer": 8}


def test_an_operator_without_rule_pins_what_it_touches_and_is_named() -> None:
    model = Does(
        lambda m, x: m.head(torch.cummax(m.one(x), 1).values + F.relu(m.two(x))),
        one=nn.Linear(4, 6),
        two=nn.Linear(4, 6),
        head=nn.Linear(6, 3),
    )
    channels = read(model, torch.randn(2, 4))
    assert channels.groups == () and channels.units == 0
    assert reasons(channels) == {
        "one": "pared has no rule for the operator aten.cummax",
        "two": "tied to channels that always stay (aten.add in the model itself)",
        "head": "its channels are the model's output",
    }


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.softmax(1), "it runs along its channels (aten.softmax in the model itself)"),
        (lambda x: x[:, 1:], "it takes some of its channels, by number (aten.slice in the model itself)"),
        (lambda x: x[:, [0, 2, 3]], "its indices are looked up by number (aten.index in the model itself)"),
        (lambda x: x.argmax(1, keepdim=True) + x, "it tells its channels apart"),
    ],
)
def test_channels_that_are_told_apart_by_number_stay(function: Callable[[Tensor], Tensor], why: str) -> None:
    model = Does(lambda m, x: function(m.body(x)).sum(1), body=nn.Linear(4, 6))
    assert reasons(read(model, torch.randn(2, 4)))["body"].startswith(why)


def test_layers_that_no_forward_reads_and_pinned_tensors_are_skipped() -> None:
    channels = read(*ZOO["unused_parameter"](), pinned={"used.0.weight": "a trial says no"})
    assert sizes(channels) == {}
    assert reasons(channels)["unused"] == "no forward reads it"
    assert reasons(channels)["used.0"] == "a trial says no"


def test_means_over_channels_are_said_to_be_approximate() -> None:
    model = Does(
        lambda m, x: m.head(m.norm(m.body(x))) + m.body(x).mean(-1, keepdim=True),
        body=nn.Linear(4, 6),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 3),
    )
    assert read(model, torch.randn(2, 4)).approximate == {
        "body": "the mean of a layer norm of norm runs over fewer channels"
    }


def test_groups_are_told_apart_by_where_their_channels_go() -> None:
    """Two halves of one layer that are read by different layers are two groups of one name."""
    model = Does(
        lambda m, x: m.head(torch.cat([m.body(x), m.other(x)], 1)),
        body=conv_norm(3, 6),
        other=conv_norm(3, 6),
        head=nn.Sequential(nn.Conv2d(12, 4, 1, groups=2), head(4)),
    )
    channels = read(model, image())
    assert sizes(channels) == {"body.0": 6, "head.0": 2}
    assert channels.groups[0].modules == ("body.0", "body.1", "other.0", "other.1", "head.0")


def test_reading_is_the_same_twice_and_numbers_units_without_gaps() -> None:
    model, inputs = ZOO["attention_fused_qkv"]()
    first, second = read(model, inputs), read(model, inputs)
    assert first.groups == second.groups and first.skips == second.skips and first.equal == second.equal
    starts = [group.start for group in first.groups]
    assert starts == [0, *(group.start + group.size for group in first.groups[:-1])]
    assert first.groups[-1].start + first.groups[-1].size == first.units
    for (name, dim), units in first.tensors.items():
        assert len(units) == model.get_parameter(name).shape[dim] and units.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "groups", "skipped"),
    [("resnet18", 12, ["fc"]), ("swin_t", 28, ["head"])],
)
def test_a_classifier_has_all_its_layers_in_groups_but_the_last(name: str, groups: int, skipped: list[str]) -> None:
    model = torchvision_model(name)
    channels = read(model, torch.randn(1, 3, 64, 64))
    assert [skip.module for skip in channels.skips] == skipped
    assert len(channels.groups) == groups
