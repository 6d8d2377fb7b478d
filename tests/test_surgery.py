from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.errors import ModelError, PlanError
from pared.step import Edit, Plan
from pared.surgery import apply_edits
from pared.task import call
from zoo_models import ZOO


class LowRank(nn.Module):
    """A linear layer as the product of two, as a factorizing technique would make it."""

    def __init__(self, inside: int, outside: int, rank: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inside, rank, bias=False), nn.Linear(rank, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class ChannelsFirstNorm(nn.LayerNorm):
    """A layer norm over the channels of images, as libraries of models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ActiveBatchNorm(nn.BatchNorm2d):
    """A batch norm with its activation, as libraries of models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class RootMeanSquare(nn.Module):
    """A norm of its own kind that has the names of torch's."""

    normalized_shape: tuple[int, ...]

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normalized_shape, self.weight = (channels,), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight)


class FrozenNorm(nn.Module):
    """A batch norm of constants."""

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features = channels
        self.register_buffer("weight", torch.randn(channels))


class Features(nn.Module):
    """A model that says how many features it gives, and has a weight of its own besides."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features, self.weight = features, nn.Parameter(torch.randn(features, 3))


class Held(nn.Module):
    """Parameters in a list and in a dictionary, and a layer norm without any."""

    shape: list[int]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.listed = nn.ParameterList([torch.randn(4), torch.randn(4, 4)])
        self.named = nn.ParameterDict({"shift": torch.randn(4), "tied": self.listed[0]})
        self.norm, self.shape = nn.LayerNorm(4, elementwise_affine=False), [1, 4]

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x * self.listed[0] + self.named["shift"]) @ self.listed[1] * self.named["tied"]
        result: Tensor = self.norm(scaled).view(-1, *self.shape)
        return result


def low_rank(module: nn.Module, rank: int) -> nn.Module:
    assert isinstance(module, nn.Linear)
    return LowRank(module.in_features, module.out_features, rank)


FACTORIES: dict[str, Callable[..., Any]] = {
    "low_rank": low_rank,
    "identity": lambda module: nn.Identity(),
    "nothing": lambda module: None,
    "wrap": lambda module: nn.Sequential(module, nn.Dropout()),
}


def cut(module: str, tensor: str, dim: int, keep: list[int]) -> Edit:
    return Edit("slice", module, {"tensor": tensor, "dim": dim, "keep": keep})


def put(module: str, name: str, value: int | list[int]) -> Edit:
    return Edit("set_attribute", module, {"name": name, "value": value})


def cut_norm(module: str, keep: list[int]) -> list[Edit]:
    return [cut(module, tensor, 0, keep) for tensor in ("weight", "bias", "running_mean", "running_var")]


def gates(keep: list[int], width: int) -> list[int]:
    """Rows of an LSTM's weights that belong to some of its units: the four gates stand one below the other."""
    return [gate * width + unit for gate in range(4) for unit in keep]


KEEP = [0, 2, 3, 7]
UNIT_ROWS = gates(KEEP, 8)
HEADS = [h * 4 + i for h in (0, 1, 3) for i in range(4)]
EDITS: dict[str, list[Edit]] = {
    "mlp": [cut("0", "weight", 0, KEEP), cut("0", "bias", 0, KEEP), cut("2", "weight", 1, KEEP)],
    "conv_bn_relu": [cut("0.0", "weight", 0, KEEP), *cut_norm("0.1", KEEP), cut("1.0", "weight", 1, KEEP)],
    "depthwise": [
        cut("1.0", "weight", 0, KEEP),
        *cut_norm("1.1", KEEP),
        cut("2.0", "weight", 0, KEEP),
        *cut_norm("2.1", KEEP),
        cut("3.0", "weight", 1, KEEP),
    ],
    # Groups 1 and 3 of four go: three filters each, and two inputs each.
    "grouped": [
        cut("0.0", "weight", 0, [0, 1, 4, 5]),
        *cut_norm("0.1", [0, 1, 4, 5]),
        cut("1.0", "weight", 0, [0, 1, 2, 6, 7, 8]),
        put("1.0", "groups", 2),
        *cut_norm("1.1", [0, 1, 2, 6, 7, 8]),
        cut("2.0", "weight", 1, [0, 1, 2, 6, 7, 8]),
    ],
    "transposed_conv": [
        cut("0.0", "weight", 0, KEEP),
        *cut_norm("0.1", KEEP),
        cut("1", "weight", 0, KEEP),
        cut("1", "weight", 1, [0, 1, 3, 4]),
        *cut_norm("2", [0, 1, 3, 4]),
        cut("4", "weight", 0, [0, 1, 3, 4]),
    ],
    "attention_fused_qkv": [
        cut("qkv", "weight", 0, [part * 16 + i for part in range(3) for i in HEADS]),
        cut("qkv", "bias", 0, [part * 16 + i for part in range(3) for i in HEADS]),
        cut("proj", "weight", 1, HEADS),
        put("", "heads", 3),
    ],
    "lstm": [
        *(cut("lstm", name, 0, UNIT_ROWS) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")),
        *(cut("lstm", name, 0, UNIT_ROWS) for name in ("weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1")),
        *(cut("lstm", name, 1, KEEP) for name in ("weight_hh_l0", "weight_ih_l1", "weight_hh_l1")),
        cut("head", "weight", 1, KEEP),
    ],
    "tied_weights": [
        cut("into", "weight", 0, KEEP),
        cut("into", "bias", 0, KEEP),
        cut("second", "weight", 0, KEEP),
        cut("first", "weight", 1, KEEP),
        cut("first", "bias", 0, KEEP),
        cut("second", "bias", 0, KEEP),
        cut("head", "weight", 1, KEEP),
    ],
    "module_with_two_names": [Edit("cast", "second", {"dtype": "float64"})],
    "frozen_parameters": [Edit("replace", "2.2", {"factory": "low_rank", "arguments": {"rank": 2}})],
    "unused_parameter": [cut("", "scale", 0, KEEP), cut("unused", "weight", 0, [1]), cut("unused", "bias", 0, [1])],
    "concat": [Edit("mask", "mix.0", {"tensor": "weight"}), Edit("cast", "", {"dtype": "float16"})],
}


def spec(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def through_json(edits: list[Edit]) -> list[Edit]:
    return list(Plan.from_json(json.loads(json.dumps(Plan("Test", edits=tuple(edits)).to_json()))).edits)


@pytest.mark.parametrize("name", EDITS)
def test_state_dict_equals_that_of_replaying_the_json_on_a_fresh_model_when_edited(name: str) -> None:
    model, _ = ZOO[name]()
    edited = apply_edits(model, EDITS[name], FACTORIES)
    fresh = apply_edits(ZOO[name]()[0], through_json(EDITS[name]), FACTORIES)
    assert spec(fresh) == spec(edited)
    assert repr(fresh) == repr(edited)
    assert spec(edited) != spec(model) or name == "concat"


@pytest.mark.parametrize("name", [name for name in EDITS if name not in ("concat", "module_with_two_names")])
def test_outputs_are_bitwise_equal_when_tensors_are_loaded_into_a_replayed_model(name: str) -> None:
    model, inputs = ZOO[name]()
    edited = apply_edits(model, EDITS[name], FACTORIES)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.mul_(1.5)
    fresh = apply_edits(ZOO[name]()[0], EDITS[name], FACTORIES)
    fresh.load_state_dict(edited.state_dict())
    with torch.no_grad():
        assert torch.equal(call(fresh, inputs), call(edited, inputs))


@pytest.mark.parametrize("name", EDITS)
def test_the_callers_model_stays_bit_for_bit_when_edited(name: str) -> None:
    model, _ = ZOO[name]()
    before, identities = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    edited = apply_edits(model, EDITS[name], FACTORIES)
    with torch.no_grad():
        for value in edited.state_dict().values():
            value.zero_()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert identities == [id(p) for p in model.parameters()]
    assert repr(model) == repr(ZOO[name]()[0])


def silenced(model: nn.Module, tensors: dict[str, list[int]], dim: int) -> None:
    """Zero some indices of the named tensors: what structured pruning must equal."""
    with torch.no_grad():
        for name, gone in tensors.items():
            tensor = model.get_parameter(name)
            tensor.index_fill_(dim, torch.tensor(gone), 0.0)


GONE = [1, 4, 5, 6]
# The masked original: a channel is gone when what follows cannot see it, or when it is constantly zero.
MASKED: dict[str, tuple[dict[str, list[int]], int]] = {
    "mlp": ({"2.weight": [i for i in range(16) if i not in KEEP]}, 1),
    "conv_bn_relu": ({"1.0.weight": GONE}, 1),
    "depthwise": ({"3.0.weight": [i for i in range(16) if i not in KEEP]}, 1),
    "grouped": ({"2.0.weight": [3, 4, 5, 9, 10, 11]}, 1),
    "attention_fused_qkv": ({"proj.weight": [8, 9, 10, 11]}, 1),
    "lstm": (dict.fromkeys(("lstm.weight_hh_l0", "lstm.weight_ih_l1", "lstm.weight_hh_l1", "head.weight"), GONE), 1),
    "tied_weights": (dict.fromkeys(("first.weight", "head.weight"), GONE), 1),
}


@pytest.mark.parametrize("name", MASKED)
def test_slices_equal_the_masked_original_when_channels_are_removed(name: str) -> None:
    model, inputs = ZOO[name]()
    silenced(model, *MASKED[name])
    with torch.no_grad():
        expected = call(model, inputs)
        found = call(apply_edits(ZOO[name]()[0], EDITS[name], FACTORIES), inputs)
    # The same sums in another order: a few units in the last place of numbers near 1.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_attributes_follow_the_shapes_when_channels_are_removed() -> None:
    depthwise = apply_edits(ZOO["depthwise"]()[0], EDITS["depthwise"], {})
    assert repr(depthwise[2]) == repr(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    )
    grouped = apply_edits(ZOO["grouped"]()[0], EDITS["grouped"], {})
    assert repr(grouped[1][0]) == repr(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False))
    transposed = apply_edits(ZOO["transposed_conv"]()[0], EDITS["transposed_conv"], {})
    assert repr(transposed[1]) == repr(nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, bias=False))
    # Groups of a transposed convolution take two inputs each here.
    assert (transposed[4].in_channels, transposed[4].out_channels) == (4, 4)


@pytest.mark.parametrize(
    ("module", "tensor", "dim", "expected"),
    [
        (nn.LayerNorm(4), "weight", 0, {"normalized_shape": (2,)}),
        (nn.RMSNorm(4), "weight", 0, {"normalized_shape": (2,)}),
        (nn.GroupNorm(2, 4), "weight", 0, {"num_channels": 2}),
        (nn.Embedding(4, 3), "weight", 0, {"num_embeddings": 2, "embedding_dim": 3}),
        (nn.PReLU(4), "weight", 0, {"num_parameters": 2}),
        (nn.BatchNorm1d(4, affine=False), "running_mean", 0, {"num_features": 2}),
        (nn.InstanceNorm2d(4, affine=True), "weight", 0, {"num_features": 2}),
        (nn.Conv1d(4, 6, 3), "weight", 1, {"in_channels": 2, "out_channels": 6}),
        (nn.ConvTranspose1d(4, 4, 3, groups=2), "weight", 0, {"in_channels": 2, "out_channels": 4}),
        (nn.ConvTranspose2d(4, 8, 3, groups=4), "weight", 0, {"in_channels": 2, "out_channels": 4, "groups": 2}),
        (nn.Conv1d(4, 4, 3, groups=4), "weight", 0, {"in_channels": 2, "out_channels": 2, "groups": 2}),
        (nn.EmbeddingBag(4, 3), "weight", 0, {"num_embeddings": 2, "embedding_dim": 3}),
        (nn.LayerNorm((2, 4)), "weight", 1, {"normalized_shape": (2, 2)}),
        (ChannelsFirstNorm(4), "weight", 0, {"normalized_shape": (2,)}),
        (ActiveBatchNorm(4), "weight", 0, {"num_features": 2}),
        (RootMeanSquare(4), "weight", 0, {"normalized_shape": (2,)}),
        (FrozenNorm(4), "weight", 0, {"num_features": 2}),
        (Features(4), "weight", 0, {"num_features": 4}),
        (nn.GRU(4, 3), "weight_ih_l0", 1, {"input_size": 2, "hidden_size": 3}),
        (nn.RNN(3, 4), "weight_hh_l0", 1, {"input_size": 3, "hidden_size": 2}),
        (nn.LSTM(3, 6, proj_size=4), "weight_hr_l0", 0, {"input_size": 3, "hidden_size": 6, "proj_size": 2}),
        (nn.LSTM(3, 6, proj_size=4), "weight_hr_l0", 1, {"input_size": 3, "hidden_size": 2, "proj_size": 4}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_attributes_follow_the_shape_when_a_layer_is_sliced(
    module: nn.Module, tensor: str, dim: int, expected: dict[str, Any]
) -> None:
    edited = apply_edits(module, [cut("", tensor, dim, [1, 3])], {})
    assert {name: getattr(edited, name) for name in expected} == expected


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), columns=st.integers(1, 6), dim=st.integers(0, 1))
def test_slice_equals_numpy_take_when_any_indices_are_kept(data: Any, rows: int, columns: int, dim: int) -> None:
    keep = sorted(data.draw(st.sets(st.integers(0, (rows, columns)[dim] - 1), min_size=1)))
    layer = nn.Linear(columns, rows)
    edited = apply_edits(layer, [cut("", "weight", dim, keep)], {})
    assert (edited.weight.detach().numpy() == layer.weight.detach().numpy().take(keep, axis=dim)).all()
    assert (edited.out_features, edited.in_features) == tuple(edited.weight.shape)


def test_tied_weights_stay_tied_when_either_alias_is_sliced() -> None:
    edited = apply_edits(ZOO["tied_weights"]()[0], EDITS["tied_weights"], {})
    assert edited.first.weight is edited.second.weight
    assert {(layer.in_features, layer.out_features) for layer in (edited.first, edited.second)} == {(4, 4)}
    assert edited.first.bias is not edited.second.bias


def test_tied_weights_stay_tied_when_one_holder_is_cast() -> None:
    edited = apply_edits(ZOO["tied_weights"]()[0], [Edit("cast", "first", {"dtype": "float16"})], {})
    assert edited.first.weight is edited.second.weight
    assert edited.second.weight.dtype == torch.float16
    assert edited.second.bias.dtype == torch.float32


@pytest.mark.parametrize("alias", ["first.0", "second.0"])
def test_a_shared_module_stays_shared_when_edited_under_either_name(alias: str) -> None:
    model, inputs = ZOO["module_with_two_names"]()
    edited = apply_edits(model, [Edit("replace", alias, {"factory": "identity", "arguments": {}})], FACTORIES)
    assert edited.first is edited.second
    assert isinstance(edited.first[0], nn.Identity)
    assert call(edited, inputs).shape == (2, 5)
    whole = apply_edits(model, [Edit("replace", alias[:-2], {"factory": "identity", "arguments": {}})], FACTORIES)
    assert whole.first is whole.second
    assert isinstance(whole.second, nn.Identity)


def test_lstm_computes_with_the_new_weights_when_sliced() -> None:
    edited = apply_edits(ZOO["lstm"]()[0], EDITS["lstm"], {})
    assert all(a is b for a, b in zip(edited.lstm._flat_weights, edited.lstm.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch, of its own speed
@pytest.mark.parametrize("proj_size", [0, 6])
def test_a_whole_lstm_equals_a_new_one_of_that_size_when_its_units_and_inputs_are_removed(proj_size: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    model = nn.LSTM(5, 8, proj_size=proj_size, **options).eval()
    outputs = proj_size or 8
    kept = [0, 2, 3] if proj_size else KEEP
    twice = [*kept, *(outputs + index for index in kept)]
    edits = [cut("", f"weight_ih_l0{end}", 1, [1, 2, 4]) for end in ("", "_reverse")]
    for layer, end in ((0, ""), (0, "_reverse"), (1, ""), (1, "_reverse")):
        edits += [cut("", f"{name}_l{layer}{end}", 0, UNIT_ROWS) for name in ("weight_ih", "weight_hh", "bias_ih")]
        edits += [cut("", f"bias_hh_l{layer}{end}", 0, UNIT_ROWS), cut("", f"weight_hh_l{layer}{end}", 1, kept)]
        edits += [cut("", f"weight_ih_l1{end}", 1, twice)] if layer else []
        if proj_size:
            edits += [cut("", f"weight_hr_l{layer}{end}", 0, kept), cut("", f"weight_hr_l{layer}{end}", 1, KEEP)]
    edited = apply_edits(model, edits, {})
    fresh = nn.LSTM(3, 4, proj_size=len(kept) if proj_size else 0, **options).eval()
    fresh.load_state_dict(edited.state_dict())
    assert repr(edited) == repr(fresh)
    x = torch.randn(2, 7, 3)
    assert torch.equal(edited(x)[0], fresh(x)[0])


def test_groups_set_after_the_slices_equal_a_convolution_and_a_norm_of_that_size() -> None:
    # Two of four groups go: of a convolution with two filters and one input each, of its transpose, and of a norm.
    pairs = [0, 1, 4, 5]
    plain = apply_edits(
        nn.Conv2d(4, 8, 3, groups=4),
        [cut("", name, 0, pairs) for name in ("weight", "bias")] + [put("", "groups", 2)],
        {},
    )
    assert repr(plain) == repr(nn.Conv2d(2, 4, 3, groups=2))
    transposed = apply_edits(
        nn.ConvTranspose2d(8, 4, 3, groups=4),
        [cut("", "weight", 0, pairs), cut("", "bias", 0, [0, 2]), put("", "groups", 2)],
        {},
    )
    assert repr(transposed) == repr(nn.ConvTranspose2d(4, 2, 3, groups=2))
    norm = apply_edits(
        nn.GroupNorm(4, 8), [cut("", name, 0, pairs) for name in ("weight", "bias")] + [put("", "num_groups", 2)], {}
    )
    assert repr(norm) == repr(nn.GroupNorm(2, 4))
    x = torch.randn(2, 2, 5, 5)
    assert norm(transposed(plain(x))[:, [0, 1, 0, 1]]).shape == (2, 4, 5, 5)


def test_a_removed_group_equals_its_own_outputs_when_a_transposed_depthwise_convolution_is_sliced() -> None:
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 8, 3, stride=2, groups=4)
    x = torch.randn(2, 4, 5, 5)
    edited = apply_edits(model, [cut("", "weight", 0, [1, 3]), cut("", "bias", 0, [2, 3, 6, 7])], {})
    torch.testing.assert_close(edited(x[:, [1, 3]]), model(x)[:, [2, 3, 6, 7]])


def test_tensors_in_lists_and_dictionaries_and_lists_of_integers_follow_when_edited() -> None:
    model, keep = Held(), [0, 2, 3]
    edits = [
        *(cut("listed", name, dim, keep) for name, dim in (("0", 0), ("1", 0), ("1", 1))),
        cut("named", "shift", 0, keep),
        put("norm", "normalized_shape", [3]),
        put("", "shape", [1, 3]),
    ]
    edited = apply_edits(model, through_json(edits), {})
    assert edited.named["tied"] is edited.listed[0]
    assert (edited.norm.normalized_shape, edited.shape) == ((3,), [1, 3])
    assert (model.norm.normalized_shape, model.shape) == ((4,), [1, 4])
    x = torch.randn(2, 4)
    first, second = (value.detach() for value in model.listed)
    shift = model.named["shift"].detach()
    scaled = (x * first + shift)[:, keep] @ second[keep][:, keep] * first[keep]
    torch.testing.assert_close(edited(x[:, keep]), nn.functional.layer_norm(scaled, (3,)).view(2, 1, 3))
    half = apply_edits(model, [Edit("cast", "listed", {"dtype": "float16"})], {})
    assert half.named["tied"] is half.listed[0]


def test_an_attribute_of_attention_is_set_when_a_model_narrows() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    keep = [0, 1, 2, 3, 6, 7]
    edits = [
        *(
            cut("", name, 0, [part * 8 + i for part in range(3) for i in keep])
            for name in ("in_proj_weight", "in_proj_bias")
        ),
        cut("", "in_proj_weight", 1, keep),
        *(cut("out_proj", "weight", dim, keep) for dim in (0, 1)),
        cut("out_proj", "bias", 0, keep),
        *(put("", name, 6) for name in ("embed_dim", "kdim", "vdim")),
        put("", "num_heads", 3),
    ]
    edited = apply_edits(model, edits, {})
    fresh = nn.MultiheadAttention(6, 3, batch_first=True).eval()
    fresh.load_state_dict(edited.state_dict())
    x = torch.randn(2, 5, 6)
    assert torch.equal(edited(x, x, x)[0], fresh(x, x, x)[0])


def test_an_attribute_that_follows_may_be_set_to_what_it_is_already() -> None:
    edits = EDITS["lstm"]
    assert repr(apply_edits(ZOO["lstm"]()[0], [*edits, put("lstm", "hidden_size", 4)], {})) == repr(
        apply_edits(ZOO["lstm"]()[0], edits, {})
    )


def test_flags_are_kept_when_tensors_and_modules_change() -> None:
    model, _ = ZOO["frozen_parameters"]()
    model[0].train()
    edits = [*EDITS["frozen_parameters"], cut("0.0", "weight", 1, [0, 2]), Edit("cast", "1", {"dtype": "float64"})]
    edited = apply_edits(model, edits, FACTORIES)
    assert not any(parameter.requires_grad for parameter in edited.parameters())
    assert edited[0][0].training
    assert not edited[1].training
    assert not edited[2][2].training
    trainable = apply_edits(ZOO["mlp"]()[0], EDITS["mlp"], {})
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in trainable.parameters())


def test_kept_parts_keep_their_modes_when_a_factory_wraps_the_old_module() -> None:
    model, _ = ZOO["conv_bn_relu"]()
    model.train()
    model[0][1].eval()
    edited = apply_edits(model, [Edit("replace", "0", {"factory": "wrap", "arguments": {}})], FACTORIES)
    assert not edited[0][0][1].training
    assert edited[0][1].training


def test_the_model_itself_can_be_replaced_when_the_name_is_empty() -> None:
    edited = apply_edits(
        nn.Linear(6, 4), [Edit("replace", "", {"factory": "low_rank", "arguments": {"rank": 2}})], FACTORIES
    )
    assert isinstance(edited, LowRank)
    assert edited.first.weight.shape == (2, 6)


def test_the_callers_random_numbers_stay_when_a_factory_draws_some() -> None:
    model = nn.Linear(6, 4)
    before = torch.get_rng_state()
    apply_edits(model, [Edit("replace", "", {"factory": "low_rank", "arguments": {"rank": 2}})], FACTORIES)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_floating_point_changes_when_a_model_is_cast() -> None:
    model, inputs = ZOO["conv_bn_relu"]()
    edited = apply_edits(model, [Edit("cast", "", {"dtype": "float64"})], {})
    dtypes = {name: value.dtype for name, value in edited.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "num_batches" not in name} == {torch.float64}
    assert dtypes["0.1.num_batches_tracked"] == torch.int64
    with torch.no_grad():
        expected = call(model, inputs)
        found = call(edited, inputs.to("cpu")._replace(args=(inputs.args[0].double(),)))
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_nothing_changes_when_a_tensor_is_masked() -> None:
    model, _ = ZOO["mlp"]()
    edited = apply_edits(model, [Edit("mask", "0", {"tensor": "weight"})], {})
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), edited.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (cut("0", "wieght", 0, [0]), ModelError, r"slice of 0: .*'wieght'.*did you mean 'weight'"),
        (cut("2.deep", "weight", 0, [0]), ModelError, r"slice of 2\.deep: the model has no such module"),
        (cut("0", "weight", 2, [0]), ModelError, r"weight has shape \(16, 12\), so no dimension 2"),
        (cut("0", "weight", 0, [3, 99]), ModelError, "weight has 16 indices along dimension 0, the edit keeps 99"),
        (cut("0", "weight", 0, []), PlanError, "keep one index or more"),
        (cut("0", "weight", 0, [2, 1]), PlanError, r"rising.*found \[2, 1\]"),
        (cut("0", "weight", 0, [1, 1]), PlanError, "none twice"),
        (cut("0", "weight", 0, [-1, 1]), PlanError, r"found \[-1, 1\]"),
        (
            Edit("slice", "0", {"tensor": "weight", "dim": 0}),
            PlanError,
            "must have tensor, dim, keep; found tensor, dim",
        ),
        (Edit("slice", "0", {"tensor": "weight", "dim": True, "keep": [0]}), PlanError, "dim is the bool True"),
        (put("0", "in_featuers", 3), ModelError, r"Linear\.in_featuers: no such attribute; did you mean 'in_features'"),
        (put("0", "in_features", 3), PlanError, "in_features follows the shape of the weight"),
        (put("0", "training", 1), ModelError, "it is a bool"),
        (put("1", "inplace", 1), ModelError, "it is a bool"),
        (Edit("set_attribute", "0", {"name": "in_features", "value": 1.5}), PlanError, "value is the float 1.5"),
        (put("0", "in_features", [3]), ModelError, r"in_features is 12, which cannot become \[3\]"),
        (Edit("set_attribute", "0", {"name": "in_features", "value": [1.5]}), PlanError, r"integers, found \[1\.5\]"),
        (Edit("cast", "0", {"dtype": "flaot16"}), PlanError, "'flaot16'.*did you mean 'float16'"),
        (Edit("mask", "1", {"tensor": "weight"}), ModelError, "no parameter or buffer 'weight'"),
        (Edit("replace", "0", {"factory": "lowrank", "arguments": {}}), PlanError, "did you mean 'low_rank'"),
        (Edit("replace", "0", {"factory": "low_rank", "arguments": {}}), PlanError, "does not take.*'rank'"),
        (Edit("replace", "0", {"factory": "nothing", "arguments": {}}), PlanError, "made a NoneType, not a module"),
        (Edit("quantize", "0", {}), PlanError, "quantize of 0: .*exported program"),
        (Edit("slise", "0", {}), PlanError, "did you mean 'slice'"),  # type: ignore[arg-type]
    ],
)
def test_edit_is_refused_with_its_module_and_tensor_named_when_it_does_not_fit(
    edit: Edit, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        apply_edits(ZOO["mlp"]()[0], [edit], FACTORIES)


def test_model_is_refused_when_it_cannot_be_copied() -> None:
    model = nn.Linear(2, 2)
    model.cached = model.weight * 2  # type: ignore[assignment]
    with pytest.raises(ModelError, match="Linear cannot be copied"):
        apply_edits(model, [], {})
