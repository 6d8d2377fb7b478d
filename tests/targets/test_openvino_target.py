"""The target `openvino`: what it writes runs, agrees with PyTorch, is anonymous, and is in integers where the plan says
so."""

from __future__ import annotations

import functools
import json
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pared
from pared.errors import TargetError
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.bench import bench
from pared.targets.openvino import OpenVino
from pared.targets.openvino_session import core
from pared.targets.sessions import InputSpec, files_of, open_session, size_of
from pared.task import Inputs, Task, call
from zoo_models import ZOO

COVERING = ["attention_fused_qkv", "residual_add"]
TARGET = OpenVino()
WEIGHTED = {"Convolution", "FullyConnected", "MatMul", "Deconvolution"}


class Exported(NamedTuple):
    """A model, its quantized program, their files, and the operators that OpenVINO runs for the quantized one."""

    model: nn.Module
    program: nn.Module
    plan: Plan
    inputs: Inputs
    float_file: Path
    file: Path
    ran: Counter[str]


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


def like(inputs: Inputs, size: int) -> Inputs:
    def fresh(x: Tensor) -> Tensor:
        return torch.randn(size, *x.shape[1:])

    return Inputs(tuple(fresh(x) for x in inputs.args), {name: fresh(x) for name, x in inputs.kwargs.items()})


def operators(file: Path) -> Counter[str]:
    """How often OpenVINO runs each kind of operator, with the type that it computes on."""
    model = core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    notes = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    return Counter(f"{note['layerType'].astype(str)} {note['runtimePrecision'].astype(str)}" for note in notes)


def export(model: nn.Module, inputs: Inputs, name: str, step: QuantizeStatic | None = None) -> Exported:
    torch.manual_seed(0)
    step = step or QuantizeStatic(weights={"cpu": "any"})  # it must run right on any processor that tests run on
    task = Task(example_inputs=inputs, calibration=[like(inputs, 64)])
    context = Context(task=task, target=TARGET, work=folder(), dense=model)
    plan = step.plan(model, context)
    program = step.apply(model, plan, context)
    float_file, file = folder() / f"{name}.float.xml", folder() / f"{name}.xml"
    TARGET.export(model, task, float_file)
    TARGET.export(program, task, file)
    return Exported(model, program, plan, inputs, float_file, file, operators(file))


@functools.cache
def zoo(name: str) -> Exported:
    return export(*ZOO[name](), name)


def run(file: Path, inputs: Inputs) -> list[np.ndarray]:
    session = TARGET.open(file, threads=1)
    return session.run(inputs.arrays([spec.name for spec in session.inputs]))


def outputs(model: nn.Module, inputs: Inputs) -> list[np.ndarray]:
    with torch.no_grad():
        return [leaf.numpy() for leaf in tree_leaves(call(model, inputs))]


def decibels(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    assert [x.shape for x in reference] == [x.shape for x in found]
    one, other = (np.concatenate([x.ravel() for x in arrays]).astype(np.float64) for arrays in (reference, found))
    noise = np.square(one - other).sum()
    return float(10 * np.log10(np.square(one).sum() / noise)) if noise else float("inf")


def check_agreement(made: Exported) -> None:
    for batch in (1, 3, 5):
        inputs = like(made.inputs, batch)
        dense, program = outputs(made.model, inputs), outputs(made.program, inputs)
        assert decibels(dense, run(made.float_file, inputs)) >= 60
        # As the parity gate has it: no further from its PyTorch program than that is from its float original.
        cost = decibels(dense, program)
        assert decibels(program, run(made.file, inputs)) >= min(cost, 60)
        assert cost > 10


def integer_layers(made: Exported) -> int:
    return sum(made.ran[f"{kind} {dtype}"] for kind in WEIGHTED for dtype in ("u8", "i8"))


def zoo_names() -> list[Any]:
    return [name if name in COVERING else pytest.param(name, marks=pytest.mark.contract) for name in ZOO]


@pytest.mark.parametrize("name", zoo_names())
def test_export_agrees_with_pytorch_at_every_batch_size(name: str) -> None:
    check_agreement(zoo(name))


@pytest.mark.parametrize("name", zoo_names())
def test_runtime_runs_every_planned_layer_in_integers(name: str) -> None:
    made = zoo(name)
    assert integer_layers(made) == len(made.plan.edits), made.ran


def conv(inside: int = 3, outside: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


class Forward(nn.Module):
    """Modules and the function that joins them."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def between(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(conv(), *middle, conv())


IMAGE, VECTOR, SEQUENCE = (2, 3, 8, 8), (2, 8), (2, 5, 8)
# Name -> (model, input shape, what does not run as an operator of its own, or not on that type).
FUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "silu": (lambda: between(nn.SiLU()), IMAGE, {"Eltwise f32", "Convert u8", "FakeQuantize u8"}),
    "hardswish": (lambda: between(nn.Hardswish()), IMAGE, {"Eltwise f32", "Convert u8"}),
    "sigmoid": (lambda: between(nn.Sigmoid()), IMAGE, {"Eltwise f32", "Convert u8"}),
    "leaky": (lambda: between(nn.LeakyReLU()), IMAGE, {"Eltwise f32", "Convert u8"}),
    "tanh": (lambda: between(nn.Tanh()), IMAGE, {"Eltwise f32", "Convert u8"}),
    "elu": (lambda: between(nn.ELU()), IMAGE, {"Eltwise f32", "Convert u8"}),
    "hardsigmoid": (lambda: between(nn.Hardsigmoid()), IMAGE, {"Eltwise f32", "Convert u8"}),
    "max_pool": (lambda: between(nn.ReLU(), nn.MaxPool2d(2)), IMAGE, {"Pooling f32", "Convert u8"}),
    "average_pool": (lambda: between(nn.ReLU(), nn.AvgPool2d(2)), IMAGE, {"Pooling f32", "Convert u8"}),
    "concat": (
        lambda: Forward(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(), b=conv(), c=conv(6)),
        IMAGE,
        {"Concatenation f32"},
    ),
    "residual": (
        lambda: Forward(lambda s, x: s.c(F.relu(s.a(x) + s.b(x))), a=conv(), b=conv(), c=conv()),
        IMAGE,
        {"Eltwise f32", "Eltwise u8"},
    ),
    "gate": (
        lambda: Forward(lambda s, x: s.c(s.a(x).relu() * s.b(x).sigmoid()), a=conv(), b=conv(), c=conv()),
        IMAGE,
        {"Eltwise f32", "Convert u8"},
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), VECTOR, {"Eltwise f32"}),
    "linear_3d": (lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)), SEQUENCE, {"MVN u8"}),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3)), SEQUENCE, {"Convert u8"}),
}
QUICK = ["silu"]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.contract) for n in FUSED])
def test_runtime_fuses_what_the_scheme_says(name: str) -> None:
    make, shape, absent = FUSED[name]
    torch.manual_seed(0)
    model = make().eval()
    made = export(model, Inputs((torch.randn(shape),), {}), f"fused_{name}")
    weighted = sum(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) for module in model.modules())
    assert integer_layers(made) == len(made.plan.edits) == weighted, made.ran
    assert not absent & made.ran.keys(), made.ran
    check_agreement(made)


def test_runtime_leaves_a_skipped_layer_in_float() -> None:
    model = between(nn.ReLU(), conv(), nn.ReLU()).eval()
    made = export(
        model, Inputs((torch.randn(IMAGE),), {}), "kept", QuantizeStatic(exclude=["2"], weights={"cpu": "any"})
    )
    assert len(made.plan.skips) == 1
    assert (made.ran["Convolution f32"], integer_layers(made)) == (1, 2)
    check_agreement(made)


def test_export_keeps_integer_weights_and_float_weights_as_they_are() -> None:
    made = zoo("residual_add")
    weights = sum(p.numel() for p in made.model.parameters() if p.ndim > 1)
    assert 4 * weights < made.float_file.with_suffix(".bin").stat().st_size  # not rounded to float16
    types = re.findall(r'element_type="i8" shape="[\d, ]+" offset="\d+" size="(\d+)"', made.file.read_text())
    assert sum(map(int, types)) == weights
    assert made.file.with_suffix(".bin").stat().st_size < 2 * weights


TRACES = ["site-packages", "stack_trace", 'File "', r"\.py\b", "/home/", "pkg.torch"]


@pytest.mark.parametrize("settings", [{}, {"bits": 8, "group_size": None}, {"bits": 3, "symmetric": True}], ids=str)
def test_weights_alone_stay_integers_in_the_file(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    task = Task(example_inputs=(torch.randn(2, 128),))
    context = Context(task=task, target=TARGET, work=tmp_path, dense=model)
    step = pared.QuantizeWeights(method="nearest", **settings)
    program = step.apply(model, step.plan(model, context), context)
    sizes = {}
    for name, made in (("float", model), ("integers", program)):
        (tmp_path / name).mkdir()
        TARGET.export(made, task, tmp_path / name / "model.xml")
        sizes[name] = (tmp_path / name / "model.bin").stat().st_size
    # A nibble or a byte a weight, a scale of 32 bits and a zero point a group or a channel; biases stay as they are.
    assert sizes["integers"] < sizes["float"] * (0.28 if settings.get("bits") == 8 else 0.17)
    x = torch.randn(7, 128)
    with torch.no_grad():
        expected = program(x).numpy()
    (found,) = TARGET.open(tmp_path / "integers" / "model.xml", threads=1).run([x.numpy()])
    assert decibels([expected], [found]) > 100


def test_export_carries_no_path_and_no_source() -> None:
    made = zoo("residual_add")
    for file in [*files_of("openvino", made.file), *files_of("openvino", made.float_file)]:
        content = file.read_bytes()
        places = ["zoo_models", str(Path.home()), str(Path.cwd()), tempfile.gettempdir()]
        for trace in [*TRACES, *map(re.escape, places)]:
            assert not re.search(trace.encode(), content), trace


def test_export_gives_the_same_bytes_and_asks_no_network_when_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    made = zoo("residual_add")
    again = folder() / "again.xml"
    TARGET.export(made.program, Task(example_inputs=made.inputs), again)
    for one, other in zip(files_of("openvino", made.file), files_of("openvino", again), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_session_tells_its_inputs_and_settings(tmp_path: Path) -> None:
    model = Forward(lambda s, x: s.a(x) + 1, a=nn.Linear(4, 3)).eval()
    task = Task(example_inputs={"x": torch.randn(2, 6, 4)}, dynamic={"x": {1: "length"}})
    TARGET.export(model, task, tmp_path / "m.xml")
    session = TARGET.open(tmp_path / "m.xml", threads=1)
    assert session.inputs == (InputSpec("x", ("batch", "length", 4), "float32"),)
    told = {"inference_precision_hint": "f32", "num_streams": "1", "inference_num_threads": "1"}
    assert told.items() <= session.options.items()
    compiled = session.model  # type: ignore[attr-defined]
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    other = Inputs((), {"x": torch.randn(5, 9, 4)})
    assert decibels(outputs(model, other), run(tmp_path / "m.xml", other)) >= 60
    for inputs, message in (
        ([], r"takes 1 inputs \(x\), found 0"),
        ([np.ones((1, 9, 4))], "x takes float32, found float64"),
        ([np.ones((1, 9, 5), np.float32)], "cannot run the file on these inputs"),
    ):
        with pytest.raises(TargetError, match=message):
            session.run(inputs)


def test_session_gives_arrays_of_its_own_when_run_twice() -> None:
    made = zoo("residual_add")
    session = TARGET.open(made.file, threads=1)
    (first,) = session.run([np.zeros((2, 3, 8, 8), np.float32)])
    kept = first.copy()
    session.run([np.ones((2, 3, 8, 8), np.float32)])
    np.testing.assert_array_equal(first, kept)


def test_open_says_what_is_wrong_when_the_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "broken.xml").write_text("not a model")
    with pytest.raises(TargetError, match=r"openvino refuses broken\.xml"):
        open_session("openvino", tmp_path / "broken.xml", threads=1)


INTERRUPTED = """
import gc, signal, sys
from pathlib import Path
from pared.targets.sessions import open_session
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background runs ignore Ctrl-C
file = Path(sys.argv[1])
first, second = (open_session("openvino", file, threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_is_heard_when_two_sessions_have_come_and_gone(tmp_path: Path) -> None:
    file = tmp_path / "m.xml"
    TARGET.export(nn.Linear(2, 2).eval(), Task(example_inputs=(torch.ones(1, 2),)), file)
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_target_says_what_to_install_when_the_runtime_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.xml").write_text("")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TargetError, match=r"pip install 'pared\[openvino\]'"):
        open_session("openvino", tmp_path / "m.xml", threads=1)
    with pytest.raises(TargetError, match=r"pip install 'pared\[openvino\]'"):
        TARGET.export(nn.Linear(2, 2), Task(example_inputs=(torch.ones(1, 2),)), tmp_path / "m.xml")


def test_compress_ships_both_files_when_the_target_is_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.measure.latency.SITTINGS", 2)  # how files are timed is not the subject here
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 64)).eval()
    task = Task(example_inputs=(torch.randn(1, 3, 8, 8),), calibration=[torch.randn(32, 3, 8, 8)])
    artifact = pared.compress(
        model,
        [QuantizeStatic()],
        task,
        target="openvino",
        out=tmp_path / "a",
        budget=pared.Budget(allow_slower=True),
        timing=pared.TimingSettings(threads=1, rounds=2),
    )
    final = artifact.report.final
    assert final.stage == "1 QuantizeStatic"
    assert [file.name for file in files_of("openvino", artifact.file)] == ["model.xml", "model.bin"]
    assert final.size_bytes == size_of("openvino", artifact.file) < artifact.report.stages[0].size_bytes / 2
    assert {"model.xml", "model.bin"} <= json.loads((artifact.path / "artifact.json").read_text())["files"].keys()
    x = torch.randn(3, 3, 8, 8)
    opened = pared.open_artifact(artifact.path)
    assert torch.equal(opened.predict(x), artifact.predict(x))
    (row,) = bench([artifact.path], target="openvino", threads=1, rounds=1)
    assert row.size_bytes == final.size_bytes
    (artifact.path / "model.bin").write_bytes(b"")
    with pytest.raises(pared.ParedError, match=r"model\.bin is not the file that was written"):
        pared.open_artifact(artifact.path)
