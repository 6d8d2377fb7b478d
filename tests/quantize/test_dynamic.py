"""The step `QuantizeDynamic`: its plan, its settings, the program that it emits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from pared.errors import PlanError, QuantizeError, SettingError
from pared.graph.capture import operator
from pared.measure.saturation import can_saturate
from pared.quantize import dynamic
from pared.quantize.dynamic import SMALLEST_TABLE, QuantizeDynamic
from pared.quantize.emulation import layers_at_risk
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task
from zoo_models import make

ROWS, WIDTH = SMALLEST_TABLE // 32, 32


class Words(nn.Module):
    """Two layers that read one embedding, and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(ROWS, WIDTH), nn.Embedding(2, WIDTH)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.kinds(ids % 2)
        return self.head(self.left(x) * self.right(x))


def context(model: nn.Module, example: Any, target: Any = None) -> Context:
    task = Task(example_inputs=example, calibration=[example])
    return Context(task=task, target=target or OnnxRuntime(), work=Path(), dense=model)


def quantized(model: nn.Module, example: Any, **settings: Any) -> tuple[fx.GraphModule, Plan]:
    step, ctx = QuantizeDynamic(**settings), context(model.eval(), example)
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    assert isinstance(program, fx.GraphModule)
    return program, plan


def count(program: fx.GraphModule, name: str) -> int:
    return sum(operator(node) == name for node in program.graph.nodes)


def written_out(x: np.ndarray, layer: nn.Linear, *, bits: int, per_channel: bool, per_row: bool) -> np.ndarray:
    """A linear layer on integers that are chosen at run time, with numpy."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    top = 2 ** (bits - 1) - 1
    largest = np.abs(weight).max(1, keepdims=True) if per_channel else np.abs(weight).max(keepdims=True)
    w_scale = (largest / top).astype(np.float32)
    qw = np.rint(weight.astype(np.float64) / w_scale).astype(np.int64)
    factor = np.abs(x).max(-1, keepdims=True) if per_row else np.ones((len(x), 1), np.float32)
    x = x / factor
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = np.float32((high - low) / 255)
    zero = int(np.rint(-low / scale))
    qx = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    return ((qx - zero) @ qw.T) * (scale * w_scale.T) * factor + bias


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 5])
def test_program_equals_integer_arithmetic_written_out(per_row: bool, per_channel: bool, bits: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 6)
    with torch.no_grad():
        layer.weight[0] *= 9
    program, _ = quantized(
        nn.Sequential(layer),
        torch.randn(4, 24),
        bits=bits,
        cpu="vnni",
        weights="per_channel" if per_channel else "per_tensor",
        activations="per_row" if per_row else "per_tensor",
    )
    # Data that no plan has seen, of two sizes, with a large row, all positive, all zero.
    wide = torch.randn(7, 24)
    wide[3] *= 50
    for x in (torch.randn(2, 24), wide, torch.rand(3, 24)):
        expected = written_out(x.numpy(), layer, bits=bits, per_channel=per_channel, per_row=per_row)
        found = program(x).detach().numpy()
        # float32 sums of 24 products of dequantized numbers
        assert np.abs(found - expected).max() <= 24 * 2.0**-23 * np.abs(expected).max() * 4
    assert torch.allclose(program(torch.zeros(3, 24)), layer.bias.detach().expand(3, -1))


def test_a_large_channel_behind_a_norm_costs_the_others_little_and_no_row_is_divided() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight[3] *= 50
        model[1].weight[:, 3] /= 50
    x = torch.randn(8, 64)
    errors, divided = {}, {}
    for kind in ("per_row", "per_tensor"):
        program = quantized(model, x, activations=kind)[0]
        errors[kind] = (program(x) - model(x)).norm()
        divided[kind] = count(program, "aten.amax")
    assert errors["per_row"] < errors["per_tensor"] / 4
    assert divided == {"per_row": 1, "per_tensor": 0}  # the input of the second layer is behind no norm


def test_rows_are_divided_behind_a_norm_over_several_dimensions_which_leaves_them_of_any_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm((5, 64)), nn.Linear(64, 32))
    x = torch.randn(8, 5, 64) * torch.tensor([100.0, 1, 1, 1, 1])[:, None]
    program, _ = quantized(model, x)
    assert count(program, "aten.amax") == 1
    with torch.no_grad():
        expected = model(x)
    # Of the small rows: the large one would leave them a quantum or two.
    assert (program(x) - expected)[:, 1:].norm() < 0.02 * expected[:, 1:].norm()


def test_a_large_row_costs_the_others_nothing_when_quantized_per_row() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    x = torch.randn(8, 64)
    x[0] *= 100
    with torch.no_grad():
        expected = layer(x)[1:]
        errors = {
            kind: (quantized(nn.Sequential(layer), x, activations=kind)[0](x)[1:] - expected).norm()
            for kind in ("per_row", "per_tensor")
        }
    # The scale of one tensor grows a hundredfold with its largest value.
    assert errors["per_row"] < errors["per_tensor"] / 20


def test_layers_share_what_they_read_and_ties_stay_tied() -> None:
    torch.manual_seed(0)
    model, ids = Words(), torch.randint(0, ROWS, (2, 7))
    program, plan = quantized(model, ids)
    assert plan.changed == ("words", "left", "right", "head")
    assert {skip.module for skip in plan.skips} == {"kinds"}
    assert "fewer than" in plan.skips[0].reason
    # One for the two layers that read the embedding, one for the head.
    assert count(program, "quantized_decomposed.choose_qparams") == 2
    integers = [tensor for tensor in program.state_dict().values() if tensor.dtype == torch.int8]
    assert sorted(tuple(tensor.shape) for tensor in integers) == [(WIDTH, WIDTH), (WIDTH, WIDTH), (ROWS, WIDTH)]
    with torch.no_grad():
        expected, found = model(ids), program(ids)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_embedding_rows_are_within_half_a_quantum() -> None:
    torch.manual_seed(0)
    model = Words()
    program, _ = quantized(nn.Sequential(model.words), torch.randint(0, ROWS, (2, 8)), include=["0"])
    ids = torch.arange(ROWS).reshape(-1, 8)
    table = model.words.weight.detach()
    half = table.abs().amax(1, keepdim=True) / 127 / 2
    assert ((program(ids).reshape(table.shape) - table).abs() <= half * 1.0001).all()


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_weights_saturate_nowhere_when_asked(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([[1.0, 1.0, 0, 0], [1.0, -1.0, 1.0, 0.25], [0, 0.25, -0.5, 0]])
    model, x = nn.Sequential(layer), torch.randn(2, 4)
    found = {}
    for cpu, here, safe in (
        ("any", False, True),
        ("vnni", True, False),
        ("here", True, True),
        ("here", None, True),
        ("here", False, False),
    ):
        monkeypatch.setattr(dynamic, "saturates_here", lambda here=here: here)
        program, plan = quantized(model, x, weights=weights, cpu=cpu)
        assert plan.facts["any_cpu"] is safe
        assert layers_at_risk(program) == []  # of ranges chosen at run time the emulation claims nothing
        (values,) = [value for value in program.state_dict().values() if value.dtype == torch.int8]
        assert can_saturate(values.numpy()) is not safe
        # By hand: neighbours of one sign sum to 126 steps, 63 and 63 in the first channel, 101 and 25 in the second.
        found[cpu, here] = values.tolist()
    monkeypatch.setattr(dynamic, "saturates_here", lambda: False)
    one_scale = weights == "per_tensor"
    assert found["any", False][:2] == [[63, 63, 0, 0], [63, -63, 63, 16] if one_scale else [101, -101, 101, 25]]
    assert found["vnni", True][:2] == [[127, 127, 0, 0], [127, -127, 127, 32]]
    # A plan made where products saturate makes the same file elsewhere.
    step, ctx = QuantizeDynamic(weights=weights), context(model, x)
    monkeypatch.setattr(dynamic, "saturates_here", lambda: True)
    plan = step.plan(model, ctx)
    monkeypatch.setattr(dynamic, "saturates_here", lambda: False)
    program = step.apply(model, plan, ctx)
    assert found["here", True] in [v.tolist() for v in program.state_dict().values() if v.dtype == torch.int8]


def test_tables_keep_their_precision_where_no_layer_multiplies_them() -> None:
    torch.manual_seed(0)
    alone, tied = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 4)), Words()
    for model, largest in ((alone, 127), (tied, 126)):
        program, _ = quantized(model, torch.randint(0, ROWS, (2, 7)), cpu="any")
        (table,) = [value for value in program.state_dict().values() if value.shape == (ROWS, WIDTH)]
        assert (table.abs().amax(1) == 127).all() if largest == 127 else not can_saturate(table.numpy())


def test_plan_lists_every_candidate_with_the_reason() -> None:
    model, example = make("conv_bn_relu")
    plan = QuantizeDynamic().plan(model, context(model, example))
    assert plan.changed == ("2.2",)
    assert [skip.module for skip in plan.skips] == ["0.0", "1.0"]
    assert {skip.reason for skip in plan.skips} == {
        "onnxruntime has no dynamic integer convolution that is faster than float"
    }
    assert plan.facts["folded"] == ["0.1", "1.1"]
    model, example = make("lstm")
    plan = QuantizeDynamic().plan(model, context(model, example))
    assert plan.changed == ("head",)
    assert [(skip.module, skip.reason) for skip in plan.skips] == [
        ("lstm", "aten.lstm is not written in dynamic integers on onnxruntime")
    ]


def test_plan_refuses_when_nothing_would_be_quantized() -> None:
    with pytest.raises(PlanError, match=r"QuantizeDynamic would quantize no layer \(0: onnxruntime has no dynamic"):
        quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8))
    with pytest.raises(PlanError, match=r"exclude='layer' matches no layer"):
        quantized(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3), exclude=["layer"])


def test_plan_refuses_when_the_target_has_no_such_operators() -> None:
    class Plain(OnnxRuntime):
        name = "plain"
        scheme = dataclasses.replace(OnnxRuntime.scheme, dynamic=frozenset())

    model, example = make("mlp")
    with pytest.raises(PlanError, match="target plain has no operators that quantize at run time; use QuantizeStatic"):
        QuantizeDynamic().plan(model, context(model, example, Plain()))


def test_a_quantized_program_is_refused_by_either_step() -> None:
    model, example = make("mlp")
    program, _ = quantized(model, *example.args)
    static, ctx = QuantizeStatic(), context(model, torch.randn(8, 12))
    other = static.apply(model, static.plan(model, ctx), ctx)
    for wrong, step in ((program, static), (program, QuantizeDynamic()), (other, QuantizeDynamic())):
        with pytest.raises(PlanError, match=f"{type(step).__name__}: the model is quantized already"):
            step.plan(wrong, ctx)


def test_apply_refuses_when_the_plan_belongs_to_another_model() -> None:
    model, example = make("mlp")
    other, ctx = nn.Sequential(nn.Linear(12, 5)), context(model, *example.args)
    plan = QuantizeDynamic().plan(model, ctx)
    with pytest.raises(QuantizeError, match=r"no node linear_1; .* plan again"):
        QuantizeDynamic().apply(other, plan, ctx)


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"weights": "per_group"}, {"activations": "static"}, {"sample": 3}])
def test_step_refuses_when_a_setting_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="QuantizeDynamic"):
        QuantizeDynamic(**wrong)
