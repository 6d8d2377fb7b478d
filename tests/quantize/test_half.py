"""The step `CastHalf`: what is cast, what ranges keep in float32, and the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from pared.errors import PlanError, QuantizeError, SettingError
from pared.quantize.half import CastHalf
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task

BOTH = CastHalf(activations=True)


class Other(OnnxRuntime):
    """A runtime whose files hold float32 alone."""

    scheme = dataclasses.replace(OnnxRuntime.scheme, halves=frozenset())


def context(model: nn.Module, x: Tensor) -> Context:
    return Context(task=Task(example_inputs=(x,), calibration=[x]), target=OnnxRuntime(), work=Path(), dense=model)


def cast(model: nn.Module, x: Tensor, step: CastHalf) -> tuple[fx.GraphModule, Plan, Context]:
    ctx = context(model.eval(), x)
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    assert isinstance(program, fx.GraphModule)
    return program, plan, ctx


class Block(nn.Module):
    """Two layers, a sum and a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x + self.b(torch.relu(self.a(x)))))
        return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_alone_are_rounded_and_everything_is_computed_in_float32(dtype: torch.dtype) -> None:
    model, x = Block(), torch.randn(8, 32)
    program, plan, _ = cast(model, x, CastHalf(dtype=str(dtype).split(".")[1]))  # type: ignore[arg-type]
    found = program(x)
    with torch.no_grad():
        for layer in (model.a, model.b, model.head):
            layer.weight.copy_(layer.weight.to(dtype).float())
    assert torch.equal(found, model(x))
    assert [(edit.module, edit.detail["dtype"]) for edit in plan.edits] == [
        (name, str(dtype).split(".")[1]) for name in ("a", "b", "head")
    ]
    assert {skip.module for skip in plan.skips} == {"norm"} or {skip.module.split(":")[0] for skip in plan.skips} == {
        "norm"
    }
    assert "becomes smaller" in plan.facts["warnings"][0]


def test_activations_are_cast_and_normalizations_stay_in_float32() -> None:
    model, x = Block(), torch.randn(8, 32)
    program, *_ = cast(model, x, BOTH)
    found = program(x)
    h = x.half()
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    inner = torch.relu(nn.functional.linear(h, weights["a.weight"], weights["a.bias"]))
    total = h + nn.functional.linear(inner, weights["b.weight"], weights["b.bias"])
    normed = model.norm(total.float()).half()
    expected = nn.functional.linear(normed, weights["head.weight"], weights["head.bias"]).float()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("where", ["output", "input", "weight"])
def test_layer_stays_in_float32_when_its_numbers_leave_float16(where: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8)), torch.rand(16, 8) + 0.5
    with torch.no_grad():
        if where == "output":
            model[2].bias.fill_(5e4)
            model[3].weight.mul_(1e-4)
        elif where == "input":
            x[3, 2] = 7e4
        else:
            model[2].weight[0, 0] = 1e5
            model[3].weight.mul_(1e-4)
    program, plan, _ = cast(model, x, BOTH)
    kept = {"output": ["2", "3"], "input": ["0"], "weight": ["2"]}[where]
    reasons = {skip.module: skip.reason for skip in plan.skips}
    assert set(kept) <= set(reasons)
    assert "float16 is used up to 3.28e+04" in reasons[kept[0]]
    assert where in reasons[kept[0]] or where == "weight"
    # Without them, the result would be infinity or NaN.
    found, expected = program(x).detach(), model(x).detach()
    assert bool(torch.isfinite(found).all())
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3  # float16 has 11 bits; sums of 8, three layers
    assert bool(torch.isfinite(cast(model, x, CastHalf(dtype="float16"))[0](x)).all())


def test_weights_that_become_zero_are_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([1e-9, -1e-9, 1e-7, 0.0])
    _, plan, _ = cast(model, torch.randn(4, 4), CastHalf())
    assert plan.facts["underflow"] == {"0.weight": 2}
    _, plan, _ = cast(model, torch.randn(4, 4), CastHalf(dtype="bfloat16"))
    assert plan.facts["underflow"] == {}


@pytest.mark.parametrize(("dtype", "activations"), [("float16", True), ("float16", False), ("bfloat16", False)])
def test_file_is_half_as_large_and_computes_what_the_program_does(
    dtype: Any, activations: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(8, 256)
    program, _, ctx = cast(model, x, CastHalf(dtype=dtype, activations=activations))
    OnnxRuntime().export(model, ctx.task, tmp_path / "float.onnx")
    OnnxRuntime().export(program, ctx.task, tmp_path / "half.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("half.onnx", "float.onnx")]
    assert sizes[0] < 0.51 * sizes[1]
    file = onnx.load(tmp_path / "half.onnx")
    ends = (*file.graph.input, *file.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}
    (found,) = OnnxRuntime().open(tmp_path / "half.onnx", threads=1).run([x.numpy()])
    expected = program(x).detach().numpy()
    # In float32, sums of 512 products in another order. In float16, ONNX Runtime keeps float32 between the operators,
    # where PyTorch rounds to 11 bits after each of them.
    tolerance = 4 * 2.0**-11 if activations else 512 * 2.0**-24
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(ids))
            return out

    model, ids = Tied(), torch.randint(0, 10, (4, 3))
    for step in (BOTH, CastHalf()):
        program, plan, _ = cast(model, ids, step)
        tensors = {id(t): t for t in program.parameters()}
        assert [t.dtype for t in tensors.values()] == [torch.float16]
        assert set(plan.changed) == {"table", "head"}
    # A layer that is kept reads the weight as it was.
    program, *_ = cast(model, ids, CastHalf(exclude=("head",)))
    expected = nn.functional.linear(model.table(ids).half().float(), model.head.weight)
    assert torch.equal(program(ids), expected)


def test_misuse_is_told_in_the_callers_terms() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(SettingError, match="CastHalf"):
        CastHalf(dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no operators in bfloat16"):
        CastHalf(dtype="bfloat16", activations=True).plan(model, context(model, x))
    ctx = dataclasses.replace(context(model, x), target=Other())
    with pytest.raises(PlanError, match="become no smaller with float16; use the target onnxruntime"):
        CastHalf().plan(model, ctx)
    with pytest.raises(PlanError, match="matches no layer"):
        CastHalf(exclude=("7",)).plan(model, context(model, x))
    with pytest.raises(PlanError, match="would quantize no layer"):
        CastHalf(exclude=("0",)).plan(model, context(model, x))
    plan = CastHalf().plan(model, context(model, x))
    other = nn.Sequential(nn.Conv1d(4, 4, 1))
    with pytest.raises(QuantizeError, match="plan again"):
        CastHalf().apply(other, plan, context(other, torch.randn(2, 4, 3)))
