"""The target `torch`: what it compiles runs at every batch size, agrees with PyTorch, calls integer kernels, is
anonymous, and opens only where it is trusted."""

from __future__ import annotations

import functools
import re
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import TargetError, UsageError
from pared.graph.capture import capture, operator
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets import torch as target_module
from pared.targets.sessions import InputSpec, open_session
from pared.targets.torch import TorchPackage
from pared.task import Task
from zoo_models import ZOO

TARGET = TorchPackage()


class Small(nn.Module):
    """A residual block with a ReLU, a pool and a classifier: 0.1 s of arithmetic, seconds of compiling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).relu()
        x = (x + self.inner(x)).relu()
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class Compiled(NamedTuple):
    model: nn.Module
    file: Path
    calls: Counter[str]


def compiled(model: nn.Module, task: Task, file: Path) -> Compiled:
    """A model's package, and how often its code calls each operator of PyTorch."""
    calls: Counter[str] = Counter()
    kept = target_module.rewrite

    def read(made: Path, path: Path) -> None:
        with zipfile.ZipFile(made) as package:
            for name in package.namelist():
                if name.endswith(".wrapper.cpp"):
                    calls.update(re.findall(r"aoti_torch_cpu_+(\w+)\(", package.read(name).decode()))
        kept(made, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_module, "rewrite", read)
        TARGET.export(model, task, file)
    return Compiled(model, file, calls)


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


def small_task() -> Task:
    return Task(example_inputs=(torch.randn(1, 3, 8, 8),), calibration=[torch.randn(64, 3, 8, 8)])


def quantized(model: nn.Module, task: Task) -> nn.Module:
    ctx = Context(task=task, target=TARGET, work=folder(), dense=model)
    step = QuantizeStatic(weights={"cpu": "any"})
    return step.apply(model, step.plan(model, ctx), ctx)


@functools.cache
def small_float() -> Compiled:
    torch.manual_seed(0)
    return compiled(Small().eval(), small_task(), folder() / "float.pt2")


@functools.cache
def small_integer() -> Compiled:
    torch.manual_seed(0)
    model, task = Small().eval(), small_task()
    return compiled(quantized(model, task), task, folder() / "integer.pt2")


def decibels(reference: np.ndarray, found: np.ndarray) -> float:
    assert reference.shape == found.shape
    noise = np.square(reference.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise)) if noise else float("inf")


def check_agreement(made: Compiled, floor: float) -> None:
    session = TARGET.open(made.file, threads=1)
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = made.model(x)
        assert decibels(expected.numpy(), session.run([x.numpy()])[0]) >= floor


@pytest.mark.contract
def test_package_agrees_with_pytorch_when_it_is_float() -> None:
    check_agreement(small_float(), 60)


def test_package_runs_in_integers_when_it_is_quantized() -> None:
    made = small_integer()
    assert TARGET.open(made.file, threads=1).inputs == (InputSpec("image", ("batch", 3, 8, 8), "float32"),)
    # A block of two convolutions: rounding may fall the other way on the border of two quanta, 256 of them a range.
    check_agreement(made, 35)
    calls = {name: count for name, count in made.calls.items() if "conv" in name or "linear" in name}
    assert sum(calls.values()) == 3, calls
    assert all(name.startswith(("qconv", "qlinear")) for name in calls), calls
    assert any("binary" in name for name in calls), calls  # the residual add


def test_package_carries_no_path_and_no_source() -> None:
    made = small_integer()
    with zipfile.ZipFile(made.file) as package:
        assert not [name for name in package.namelist() if name.endswith((".cpp", ".py"))]
    content = made.file.read_bytes()
    places = [str(Path.home()), str(Path.cwd()), tempfile.gettempdir(), str(Path(torch.__file__).parents[1])]
    for trace in ["site-packages", *places]:
        assert (trace + "/").encode() not in content, trace


def test_session_refuses_when_inputs_do_not_fit() -> None:
    before = torch.get_num_threads()
    session = TARGET.open(small_integer().file, threads=1)
    for inputs, message in (
        ([], r"takes 1 inputs \(image\), found 0"),
        ([np.ones((1, 3, 8, 8))], r"image takes float32 of shape \['batch', 3, 8, 8\], found float64"),
        ([np.ones((1, 3, 9, 8), np.float32)], r"found float32 of shape \[1, 3, 9, 8\]"),
    ):
        with pytest.raises(TargetError, match=message):
            session.run(inputs)
    assert torch.get_num_threads() == before


def test_package_opens_only_when_it_is_trusted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"integer\.pt2 carries code .* trust=True"):
        open_session("torch", small_integer().file, threads=1)
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"no package")
    with pytest.raises(TargetError, match=r"torch refuses broken\.pt2"):
        open_session("torch", broken, threads=1, trust=True)


def test_export_says_what_to_install_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(TargetError, match=r"finds no C\+\+ compiler; install one"):
        TARGET.export(nn.Linear(2, 2), Task(example_inputs=(torch.ones(1, 2),)), tmp_path / "m.pt2")


@pytest.mark.contract
@pytest.mark.parametrize("name", ZOO)
def test_export_agrees_with_pytorch_on_every_pattern(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    task = Task(example_inputs=inputs, calibration=[inputs])
    program = quantized(model, task)
    for module, file in ((model, tmp_path / "float.pt2"), (program, tmp_path / "integer.pt2")):
        TARGET.export(module, task, file)
        session = TARGET.open(file, threads=1)
        found = session.run(inputs.arrays([spec.name for spec in session.inputs]))
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(module(*inputs.args, **inputs.kwargs))
        for one, other in zip(expected, found, strict=True):
            assert decibels(one.numpy(), other) >= (60 if module is model else 20)


@pytest.mark.contract
def test_package_runs_attention_in_integers_when_its_input_is_transposed() -> None:
    model, inputs = ZOO["multihead_attention"]()
    task = Task(example_inputs=inputs, calibration=[inputs])
    calls = compiled(quantized(model, task), task, folder() / "attention.pt2").calls
    layers = {name: count for name, count in calls.items() if any(kind in name for kind in ("linear", "addmm"))}
    assert sum(layers.values()) == 3, calls
    assert all(name.startswith("qlinear") for name in layers), calls


def test_lay_out_orders_what_a_linear_layer_reads_and_changes_no_value() -> None:
    model, inputs = ZOO["multihead_attention"]()
    task = Task(example_inputs=inputs, calibration=[inputs])
    program = capture(quantized(model, task), task)
    before = program.module()(*inputs.args)
    target_module.lay_out(program.graph_module)
    read = [node.args[0].args[0] for node in program.graph.nodes if operator(node) == "aten.linear"]
    assert len(read) == 3
    assert [node.args[0].args[0].meta["val"].is_contiguous() for node in read] == [False, True, True]
    assert all(node.args[0].meta["val"].is_contiguous() for node in read)
    assert torch.equal(program.module()(*inputs.args), before)


@pytest.mark.contract
def test_artifact_asks_for_trust_when_it_is_opened_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = pared.compress(
        Small().eval(),
        [QuantizeStatic()],
        small_task(),
        target="torch",
        out=tmp_path / "a",
        budget=pared.Budget(allow_slower=True, allow_larger=True),
        timing=pared.TimingSettings(threads=1, rounds=2),
    )
    x = torch.randn(3, 3, 8, 8)
    expected = artifact.predict(x)
    with pytest.raises(UsageError, match="trust=True"):
        pared.open_artifact(artifact.path).predict(x)
    assert torch.equal(pared.open_artifact(artifact.path, trust=True).predict(x), expected)


def one_channel() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    return model, Task(example_inputs=(torch.rand(1, 1, 8, 8),), calibration=[torch.rand(64, 1, 8, 8)])


def test_convolution_of_one_input_channel_stays_in_float() -> None:
    model, task = one_channel()
    plan = QuantizeStatic().plan(model, Context(task=task, target=TARGET, work=folder(), dense=model))
    assert [edit.module for edit in plan.edits] == ["2"]
    assert [skip.module for skip in plan.skips if "fewer than 2 input channels" in skip.reason] == ["0"]


@pytest.mark.contract
def test_package_agrees_with_pytorch_when_the_input_has_one_channel() -> None:
    model, task = one_channel()
    made = compiled(quantized(model, task), task, folder() / "one.pt2")
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = made.model(x)
    assert decibels(expected.numpy(), TARGET.open(made.file, threads=1).run([x.numpy()])[0]) >= 60
