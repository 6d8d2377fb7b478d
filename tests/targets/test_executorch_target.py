"""The target `executorch`: what it writes runs in ExecuTorch, agrees with PyTorch for any batch, and XNNPACK runs it in
integers where the plan says so."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import pared
from contract_cases import batch_of, model_and_task
from pared.errors import PlanError, RefusedError, TargetError
from pared.quantize.placement import REFUSED
from pared.quantize.static import QuantizeStatic
from pared.recipe import Budget, TimingSettings
from pared.step import Context, Skip
from pared.targets.executorch import ExecuTorch
from pared.task import Task
from user_traces import traces_in

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="executorch is not installed: pip install 'pared[executorch]'",
)
# A pattern of each kind whose lowering takes a second or two; `make contract` runs more.
QUICK = [("conv_bn_relu", False), ("squeeze_excite", True)]
MORE = ["mlp", "residual_add", "concat", "chunk_shuffle_concat", "depthwise", "attention_fused_qkv", "dict_output"]


class Exported(NamedTuple):
    """A model, its task, the file written for it and the notes beside it."""

    model: nn.Module
    task: Task
    file: Path
    notes: dict[str, Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Export a pattern, quantized or not; each once."""
    made: dict[tuple[str, bool], Exported] = {}

    def export(pattern: str, *, quantized: bool) -> Exported:
        if (pattern, quantized) not in made:
            folder = tmp_path_factory.mktemp(pattern)
            model, task = model_and_task(pattern)
            if quantized:
                ctx = Context(task=task, target=ExecuTorch(), work=folder, dense=model)
                step = QuantizeStatic()
                model = step.apply(model, step.plan(model, ctx), ctx)
            file = folder / "model.pte"
            ExecuTorch().export(model, task, file)
            notes = json.loads(file.with_suffix(".json").read_text(encoding="utf8"))
            made[pattern, quantized] = Exported(model, task, file, notes)
        return made[pattern, quantized]

    return export


def differences(exported: Exported, size: int, seed: int = 3) -> tuple[float, float]:
    """RMS of PyTorch's outputs, and of what the file's differ from them by, for a batch of some size."""
    x = batch_of(exported.task.example_inputs, size, seed)
    with torch.no_grad():
        expected = [leaf.numpy() for leaf in tree_leaves(exported.model(*x.args, **x.kwargs))]
    session = ExecuTorch().open(exported.file, threads=1)
    found = session.run(x.arrays([spec.name for spec in session.inputs]))
    assert [array.shape for array in found] == [array.shape for array in expected]
    square = sum(float((a.astype(float) ** 2).sum()) for a in expected)
    error = sum(float(((a.astype(float) - b) ** 2).sum()) for a, b in zip(expected, found, strict=True))
    return square**0.5, error**0.5


def check_parity(made: Exported, *, quantized: bool) -> None:
    """Float: rounding of float32 alone. Integers: a quantum may flip here and there, 1/255 of a range each."""
    for size in (1, 2, 40):  # one sample, the example's, and more than memory is planned for
        signal, error = differences(made, size)
        assert error <= (0.03 if quantized else 1e-5) * signal


@needs_executorch
@pytest.mark.parametrize(("pattern", "quantized"), QUICK)
def test_file_agrees_with_pytorch_and_is_delegated_when_run_on_any_batch(
    exported: Callable[..., Exported], pattern: str, quantized: bool
) -> None:
    made = exported(pattern, quantized=quantized)
    check_parity(made, quantized=quantized)
    assert made.notes["not_delegated"] == {}


@needs_executorch
@pytest.mark.contract
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("pattern", MORE)
def test_file_agrees_with_pytorch_when_of_any_pattern(
    exported: Callable[..., Exported], pattern: str, quantized: bool
) -> None:
    check_parity(exported(pattern, quantized=quantized), quantized=quantized)


@needs_executorch
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], r"takes 1 inputs \(0\), found 0"),
        ([np.ones((2, 3, 9, 8), np.float32)], r"input '0' takes \['batch up to \d+', '3', '8', '8'\], found"),
        ([np.ones((2, 3, 8), np.float32)], "found"),
        ([np.ones((2, 3, 8, 8), np.float64)], "takes float32, found float64"),
    ],
)
def test_session_refuses_when_inputs_do_not_fit(
    exported: Callable[..., Exported], inputs: list[np.ndarray], message: str
) -> None:
    session = ExecuTorch().open(exported("conv_bn_relu", quantized=False).file, threads=1)
    with pytest.raises(TargetError, match=message):
        session.run(inputs)


@needs_executorch
def test_sessions_go_on_when_another_one_changes_the_number_of_threads(exported: Callable[..., Exported]) -> None:
    made = exported("conv_bn_relu", quantized=False)
    x = made.task.example_inputs.arrays()
    one, two = (ExecuTorch().open(made.file, threads=threads) for threads in (1, 2))
    assert np.array_equal(one.run(x)[0], two.run(x)[0])
    assert np.array_equal(one.run(x)[0], two.run(x)[0])
    assert (one.options["threads"], two.options["threads"]) == ("1", "2")
    assert "PyTorch" in one.options["memory"]


@needs_executorch
@pytest.mark.parametrize(("pattern", "quantized"), QUICK)
def test_export_carries_no_path_and_no_source(exported: Callable[..., Exported], pattern: str, quantized: bool) -> None:
    assert traces_in(exported(pattern, quantized=quantized).file.parent.iterdir()) == []


def test_session_refuses_when_the_file_is_damaged_or_alone(exported: Callable[..., Exported], tmp_path: Path) -> None:
    made = exported("conv_bn_relu", quantized=False)
    alone = tmp_path / "model.pte"
    alone.write_bytes(made.file.read_bytes())
    with pytest.raises(TargetError, match=r"model\.json is missing or damaged; keep the two files"):
        ExecuTorch().open(alone, threads=1)
    alone.write_bytes(made.file.read_bytes()[:100])
    with pytest.raises(TargetError, match=r"executorch refuses model\.pte"):
        ExecuTorch().open(alone, threads=1)


def test_export_says_what_to_install_when_executorch_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = model_and_task("mlp")
    for name in [*sys.modules, "executorch"]:
        if name.partition(".")[0] == "executorch":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "executorch.backends.xnnpack.partition.xnnpack_partitioner", None)
    with pytest.raises(TargetError, match=r"pip install 'pared\[executorch\]'"):
        ExecuTorch().export(model, task, tmp_path / "model.pte")


@needs_executorch
def test_layers_quantize_their_input_at_run_time_each_row_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    task = Task(example_inputs=(torch.randn(2, 5, 64),))
    ctx = Context(task=task, target=ExecuTorch(), work=tmp_path, dense=model)
    step = pared.QuantizeDynamic()
    program = step.apply(model, step.plan(model, ctx), ctx)
    files = {}
    for name, made in (("float", model), ("dynamic", program)):
        files[name] = tmp_path / f"{name}.pte"
        ExecuTorch().export(made, task, files[name])
        assert json.loads(files[name].with_suffix(".json").read_text(encoding="utf8"))["not_delegated"] == {}
    # The weights are nearly all of the file: a quarter of their size, and some kilobytes of program.
    assert files["dynamic"].stat().st_size < files["float"].stat().st_size / 4 + 8192
    x = torch.randn(7, 5, 64) * torch.logspace(-3, 3, 5)[:, None]  # rows of very different size
    (found,) = ExecuTorch().open(files["dynamic"], threads=1).run([x.numpy()])
    with torch.no_grad():
        exact, expected = model(x).numpy(), program(x).numpy()
    size = np.square(exact).sum(-1)
    # Each row for itself: 8 bits leave 0.5 % of it or so, were it a thousandth of its neighbours.
    assert np.all(np.square(found - exact).sum(-1) < 2e-4 * size)
    assert np.square(found - expected).sum() < 2e-5 * size.sum()
    with pytest.raises(PlanError, match=r"activations='per_tensor'.*executorch gives each row"):
        pared.QuantizeDynamic(activations="per_tensor").plan(model, ctx)


@needs_executorch
def test_layers_are_named_and_stay_in_float_when_xnnpack_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch.backends.xnnpack.partition import config as configs
    from executorch.backends.xnnpack.partition import xnnpack_partitioner

    products = {configs.LinearConfig, configs.AddmmConfig, configs.MMConfig}
    others = [kind for kind in configs.ALL_PARTITIONER_CONFIGS if kind not in products]
    monkeypatch.setattr(xnnpack_partitioner, "ALL_PARTITIONER_CONFIGS", others)
    model, task = model_and_task("conv_bn_relu")
    ctx = Context(task=task, target=ExecuTorch(), work=tmp_path, dense=model)
    step = QuantizeStatic()
    program = step.apply(model, step.plan(model, ctx), ctx)
    with pytest.raises(RefusedError, match=r"does not take the integer layers 2\.2, .*exclude=\['2\.2'\]") as caught:
        ExecuTorch().export(program, task, tmp_path / "model.pte")
    assert caught.value.layers == ("2.2",)

    ctx = dataclasses.replace(ctx, refused=caught.value.layers)
    with pytest.raises(PlanError, match=r"no layer .*2\.2: the runtime does not take it"):
        pared.QuantizeDynamic().plan(model, ctx)  # the only linear layer
    plan = step.plan(model, ctx)
    assert Skip("2.2", REFUSED) in plan.skips
    assert [edit.module for edit in plan.edits] == ["0.0", "1.0"]
    program = step.apply(model, plan, ctx)
    ExecuTorch().export(program, task, tmp_path / "model.pte")
    # Replayed from the plan alone, it leaves the same layer alone.
    replayed = step.apply(model, plan, dataclasses.replace(ctx, refused=(), memo={}))
    x = task.example_inputs.args
    assert torch.equal(replayed(*x), program(*x))


@needs_executorch
@pytest.mark.contract
def test_compress_measures_the_file_when_the_target_is_executorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared.measure.latency.SITTINGS", 2)  # each starts two workers that load PyTorch
    model, task = model_and_task("conv_bn_relu")
    budget = Budget(allow_slower=True, allow_larger=True)
    timing = TimingSettings(rounds=2, threads=1)
    artifact = pared.compress(
        model, [QuantizeStatic()], task, target="executorch", out=tmp_path / "a", budget=budget, timing=timing
    )
    last = artifact.report.stages[-1]
    assert last.kept and last.measured and last.parity is not None and last.latency_ms is not None
    assert artifact.report.environment["session"]["delegate"] == "XNNPACK"
    assert artifact.predict(*task.example_inputs.args).shape == (2, 5)
