"""The step `QuantizeWeights` as a whole: what it chooses, what it leaves, the program, and what GPTQ is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.errors import PlanError, QuantizeError, SettingError, UsageError
from pared.quantize.affine import grid
from pared.quantize.gptq import gptq
from pared.quantize.grouping import nearest, restored
from pared.quantize.weights import Gptq, QuantizeWeights
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task

NEAREST = QuantizeWeights(method="nearest", group_size=8)


def context(model: nn.Module, data: list[Any]) -> Context:
    return Context(task=Task(example_inputs=data[0], calibration=data), target=OnnxRuntime(), work=Path(), dense=model)


def quantized(model: nn.Module, data: list[Any], step: QuantizeWeights = NEAREST) -> tuple[fx.GraphModule, Plan]:
    ctx = context(model.eval(), data)
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    assert isinstance(program, fx.GraphModule)
    return program, plan


class Words(nn.Module):
    """An embedding, two layers on one input, and the embedding's weight again as the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 20)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        hidden: Tensor = self.head(torch.relu(self.a(x) + self.b(x)))
        return hidden


def words() -> list[tuple[Tensor]]:
    return [(torch.randint(0, 20, (6, 5)),) for _ in range(3)]


def rounded(weight: Tensor, size: int, bits: int = 4) -> Tensor:
    matrix = weight.detach().flatten(1)
    found = nearest(matrix, grid(bits=bits, signed=True, symmetric=False), size, symmetric=False)
    return restored(found, matrix.shape[1]).reshape(weight.shape)


def test_program_is_the_model_with_each_weight_rounded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    data = [(torch.randn(4, 4, 5, 5),), (torch.randn(4, 4, 5, 5),)]
    program, plan = quantized(model, data)
    assert [(edit.module, edit.detail["bits"]) for edit in plan.edits] == [("0", 4), ("3", 4)]
    hidden = F.conv2d(data[0][0], rounded(model[0].weight, 8), model[0].bias, groups=2)
    expected = F.linear(torch.relu(hidden).flatten(1), rounded(model[3].weight, 8), model[3].bias)
    assert torch.equal(program(*data[0]), expected)
    assert any("smaller, not faster" in warning for warning in plan.facts["warnings"])
    assert not any(tensor.is_floating_point() and tensor.numel() > 54 for tensor in program.state_dict().values())


def test_embedding_and_layer_that_share_a_weight_go_on_sharing_it() -> None:
    model, data = Words(), words()
    program, plan = quantized(model, data)
    assert set(plan.changed) == {"table", "a", "b", "head"}
    assert len({edit.detail["weight"] for edit in plan.edits}) == 3
    assert sum(tensor.dtype == torch.int8 for tensor in program.state_dict().values()) == 3
    table = rounded(model.table.weight, 8)
    x = F.embedding(data[0][0], table)
    hidden = F.linear(x, rounded(model.a.weight, 8), model.a.bias) + F.linear(x, rounded(model.b.weight, 8))
    assert torch.equal(program(*data[0]), F.linear(torch.relu(hidden), table, model.head.bias))


def test_layers_that_share_a_weight_stay_in_float_together() -> None:
    model, data = Words(), words()
    _, plan = quantized(model, data, QuantizeWeights(method="nearest", include=("a", "b")))
    assert plan.changed == ("a", "b")
    assert {skip.reason for skip in plan.skips} == {"not in include"}


@pytest.mark.parametrize("order", ["activation", "columns"])
def test_gptq_gets_the_second_moments_of_each_layers_inputs(order: Any) -> None:
    """Against the same rounding, given moments that are computed here from the float model's own activations."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    data = [(torch.randn(8, 2, 4, 4),) for _ in range(4)]
    step = QuantizeWeights(group_size=16, method=Gptq(order=order, damping=0.02))
    program, _ = quantized(model, data, step)
    x = torch.cat([batch[0] for batch in data])
    numbers = grid(bits=4, signed=True, symmetric=False)
    settings = {"symmetric": False, "damping": 0.02, "by_activation": order == "activation"}
    kernels = []
    for group in range(2):
        patches = F.unfold(x[:, group : group + 1], 3, padding=1).movedim(1, 2).reshape(-1, 9).double()
        weight = model[0].weight[2 * group : 2 * group + 2].flatten(1)
        found = gptq(weight, patches.mT @ patches, numbers, 9, **settings)
        kernels.append(restored(found, 9).reshape(2, 1, 3, 3))
    rows = model[:3](x).double()
    found = gptq(model[3].weight, rows.mT @ rows, numbers, 16, **settings)
    hidden = F.conv2d(data[0][0], torch.cat(kernels), model[0].bias, padding=1, groups=2)
    expected = F.linear(torch.relu(hidden).flatten(1), restored(found, 64), model[3].bias)
    assert torch.allclose(program(*data[0]), expected, rtol=1e-6, atol=1e-6)  # float32 sums; integers are the same


def test_gptq_is_nearer_to_the_model_than_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    mixing = torch.randn(6, 48)
    data = [(torch.randn(64, 6) @ mixing + 0.1 * torch.randn(64, 48),) for _ in range(5)]
    errors = []
    for method in ("nearest", "gptq"):
        program, _ = quantized(model, data[:4], QuantizeWeights(bits=3, group_size=16, method=method))
        errors.append((program(*data[4]) - model(*data[4])).norm().item())
    assert errors[1] < 0.7 * errors[0]


def test_pruned_weights_stay_zero() -> None:
    model, data = nn.Sequential(nn.Linear(32, 8)), [(torch.randn(16, 32),), (torch.randn(16, 32),)]
    with torch.no_grad():
        model[0].weight[torch.rand(8, 32) < 0.5] = 0.0
    program, _ = quantized(model, data, QuantizeWeights(group_size=16))
    columns = program(torch.eye(32)) - model[0].bias  # the weight, transposed
    assert bool((columns.T[model[0].weight == 0] == 0).all())


def test_plan_survives_json_and_applies_to_a_fresh_model() -> None:
    model, data = Words(), words()
    step = QuantizeWeights(group_size=4)
    program, plan = quantized(model, data, step)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    replayed = step.apply(model, again, context(model, data))
    assert torch.equal(replayed(*data[0]), program(*data[0]))
    with pytest.raises(QuantizeError, match="plan again"):
        step.apply(nn.Sequential(nn.Linear(5, 5)), again, context(nn.Linear(5, 5), [(torch.randn(2, 5),)]))


def test_every_layer_left_in_float_is_listed_with_its_reason() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten(), nn.Linear(3 * 25, 4))
    _, plan = quantized(model, [(torch.randn(3, 2, 4, 4),)], QuantizeWeights(method="nearest"))
    assert plan.changed == ("2",)
    assert [(skip.module, skip.reason) for skip in plan.skips] == [
        ("0", "aten.conv_transpose2d keeps its weights in float here")
    ]


def test_only_gptq_needs_data() -> None:
    assert QuantizeWeights().needs == {"calibration"}
    assert QuantizeWeights(method="nearest").needs == frozenset()
    model, x = nn.Sequential(nn.Linear(5, 5)), torch.randn(2, 5)
    ctx = Context(task=Task(example_inputs=(x,)), target=OnnxRuntime(), work=Path(), dense=model)
    step = QuantizeWeights(method="nearest")
    step.apply(model, step.plan(model, ctx), ctx)
    with pytest.raises(UsageError, match="needs calibration data"):
        QuantizeWeights().apply(model, QuantizeWeights().plan(model, ctx), ctx)


def test_misuse_is_told_in_the_callers_terms() -> None:
    for settings in ({"bits": 1}, {"bits": 9}, {"group_size": 1}, {"method": "obq"}, {"method": Gptq(), "bitss": 4}):
        with pytest.raises(SettingError, match="QuantizeWeights"):
            QuantizeWeights(**settings)  # type: ignore[arg-type]
    model, data = nn.Sequential(nn.Linear(5, 5)), [(torch.randn(4, 5),)]
    with pytest.raises(PlanError, match="matches no layer"):
        quantized(model, data, QuantizeWeights(include=("1",)))
    with pytest.raises(PlanError, match="would quantize no layer"):
        quantized(nn.Sequential(nn.ReLU()), data, NEAREST)
    program, _ = quantized(model, data, NEAREST)
    with pytest.raises(PlanError, match="quantized already"):
        NEAREST.plan(program, context(program, data))
    with pytest.raises(QuantizeError, match="not finite"):
        wide = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        nn.init.constant_(wide[0].weight, 2.0)
        quantized(wide, [(torch.rand(4, 5) * 1e38 + 1e38,)], QuantizeWeights())  # twice their sum is infinity


def test_target_without_such_operators_is_refused_with_the_next_step() -> None:
    class Other(OnnxRuntime):
        name = "other"
        scheme = type(OnnxRuntime.scheme)(**{**vars(OnnxRuntime.scheme), "weight_only": frozenset()})

    model, x = nn.Sequential(nn.Linear(5, 5)), torch.randn(2, 5)
    ctx = Context(task=Task(example_inputs=(x,)), target=Other(), work=Path(), dense=model)
    with pytest.raises(PlanError, match=r"target other has no operators.*use the target onnxruntime or openvino"):
        NEAREST.plan(model, ctx)
