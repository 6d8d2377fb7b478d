"""The target `onnxruntime`: what it writes is valid, runs, agrees with PyTorch, is anonymous, and is in integers where
the plan says so."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import TargetError
from pared.quantize.static import QuantizeStatic
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime, protect, strip
from pared.task import Inputs, Task, call
from torchvision_models import torchvision_model
from zoo_models import ZOO

# One pattern of each kind; `make contract` runs all.
COVERING = ["attention_fused_qkv", "dict_output", "lstm", "residual_add", "squeeze_excite", "tied_weights"]
INTEGER = {"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul"}
TARGET = OnnxRuntime()


class Forward(nn.Module):
    """Modules and the function that joins them."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Exported(NamedTuple):
    """A model, its quantized program, their files, and the file as ONNX Runtime rewrites it before it runs."""

    model: nn.Module
    program: nn.Module
    plan: Plan
    inputs: Inputs
    float_file: Path
    file: Path
    optimized: onnx.ModelProto


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


def like(inputs: Inputs, size: int) -> Inputs:
    """Random inputs of another batch size."""

    def fresh(x: Tensor) -> Tensor:
        return torch.randn(size, *x.shape[1:])

    return Inputs(tuple(fresh(x) for x in inputs.args), {name: fresh(x) for name, x in inputs.kwargs.items()})


def optimized(file: Path) -> onnx.ModelProto:
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(file.with_suffix(".optimized"))
    settings.log_severity_level = 4  # it warns that the rewritten file fits this machine alone
    onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    return onnx.load(settings.optimized_model_filepath)


def export(model: nn.Module, inputs: Inputs, name: str, step: QuantizeStatic | None = None) -> Exported:
    torch.manual_seed(0)
    step = step or QuantizeStatic()
    task = Task(example_inputs=inputs, calibration=[like(inputs, 64)])
    context = Context(task=task, target=TARGET, work=folder(), dense=model)
    plan = step.plan(model, context)
    program = step.apply(model, plan, context)
    float_file, file = folder() / f"{name}.float.onnx", folder() / f"{name}.onnx"
    TARGET.export(model, task, float_file)
    TARGET.export(program, task, file)
    return Exported(model, program, plan, inputs, float_file, file, optimized(file))


@functools.cache
def zoo(name: str) -> Exported:
    return export(*ZOO[name](), name)


def run(file: Path, inputs: Inputs) -> list[np.ndarray]:
    session = TARGET.open(file, threads=1)
    named = [inputs.kwargs.get(spec.name) for spec in session.inputs] if inputs.kwargs else [*inputs.args]
    return session.run([x.numpy() for x in named if x is not None])


def decibels(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    assert [x.shape for x in reference] == [x.shape for x in found]
    one, other = (np.concatenate([x.ravel() for x in arrays]).astype(np.float64) for arrays in (reference, found))
    noise = np.square(one - other).sum()
    return float(10 * np.log10(np.square(one).sum() / noise)) if noise else float("inf")


def outputs(model: nn.Module, inputs: Inputs) -> list[np.ndarray]:
    with torch.no_grad():
        return [leaf.numpy() for leaf in tree_leaves(call(model, inputs))]


def check_agreement(made: Exported) -> None:
    for batch in (1, 3, 5):
        inputs = like(made.inputs, batch)
        dense, program = outputs(made.model, inputs), outputs(made.program, inputs)
        assert decibels(dense, run(made.float_file, inputs)) >= 60
        # No further from its PyTorch program than that is from its float original: a difference in the last bit can
        # become a whole quantum, and spread.
        cost = decibels(dense, program)
        assert decibels(program, run(made.file, inputs)) >= min(cost, 60)
        assert cost > 10


def integer_layers(made: Exported) -> int:
    return sum(node.op_type in INTEGER for node in made.optimized.graph.node)


def operators(made: Exported) -> Counter[str]:
    return Counter(node.op_type for node in made.optimized.graph.node)


def zoo_names(covering: list[str]) -> list[Any]:
    return [name if name in covering else pytest.param(name, marks=pytest.mark.contract) for name in ZOO]


@pytest.mark.parametrize("name", zoo_names(COVERING))
def test_export_agrees_with_pytorch_at_every_batch_size(name: str) -> None:
    made = zoo(name)
    for file in (made.float_file, made.file):
        onnx.checker.check_model(onnx.load(file), full_check=True)
    check_agreement(made)


@pytest.mark.parametrize("name", zoo_names(COVERING))
def test_runtime_runs_every_planned_layer_in_integers(name: str) -> None:
    made = zoo(name)
    assert integer_layers(made) == len(made.plan.edits)
    # Nor is anything with a weight in integers that the plan keeps in float.
    kept = Counter(node.op_type for node in onnx.load(made.float_file).graph.node)
    for kind in ("ConvTranspose", "LSTM"):
        assert operators(made)[kind] == kept[kind]


def conv(inside: int = 3, outside: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, **settings)


def between(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(conv(), *middle, conv())


IMAGE, VECTOR, SEQUENCE = (2, 3, 8, 8), (2, 8), (2, 5, 8)
# Name -> (model, input shape). Every weighted layer of each is planned, and must run, in integers.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=2, bias=False)),
        SEQUENCE,
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 1, bias=False)), (2, 3, 5, 5, 5)),
    "padding": (
        lambda: nn.Sequential(conv(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2, padding="valid")),
        IMAGE,
    ),
    "reflected": (lambda: between(nn.ReLU(), conv(padding_mode="reflect")), IMAGE),
    "dilated": (lambda: between(nn.Conv2d(3, 3, 3, dilation=2, padding="same")), IMAGE),
    "hardswish": (lambda: between(nn.Hardswish()), IMAGE),
    "silu": (lambda: between(nn.SiLU()), IMAGE),
    "sigmoid": (lambda: between(nn.Sigmoid()), IMAGE),
    "leaky": (lambda: between(nn.LeakyReLU()), IMAGE),
    "relu6": (lambda: between(nn.ReLU6(), conv(), nn.Hardtanh()), IMAGE),
    "clamp": (lambda: Forward(lambda s, x: s.b(s.a(x).clamp(0.25, 0.5)), a=conv(), b=conv()), IMAGE),
    "max_pool": (lambda: between(nn.ReLU(), nn.MaxPool2d(2)), IMAGE),
    "max_pool_relu": (lambda: between(nn.MaxPool2d(2), nn.ReLU()), IMAGE),
    "average_pool": (lambda: between(nn.ReLU(), nn.AvgPool2d(2)), IMAGE),
    "upsample": (lambda: between(nn.Upsample(scale_factor=2)), IMAGE),
    "pixel_shuffle": (lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 3)), IMAGE),
    "norm_behind_a_concat": (
        lambda: Forward(
            lambda s, x: s.c(s.n(torch.cat([y := s.a(x), s.b(y)], 1)).relu()),
            a=conv(),
            b=conv(),
            n=nn.BatchNorm2d(6),
            c=conv(6, 4),
        ),
        IMAGE,
    ),
    "bias_with_zeros": (
        lambda: Forward(
            lambda s, x: F.linear(x, s.a.weight, s.a.bias * torch.tensor([1.0, 0.0] * 4)), a=nn.Linear(8, 8)
        ),
        SEQUENCE,
    ),
    "norm_first": (lambda: nn.Sequential(nn.BatchNorm2d(3), conv(), nn.ReLU(), nn.BatchNorm2d(3), conv()), IMAGE),
    "flatten": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)), IMAGE),
    "mean": (lambda: Forward(lambda s, x: s.b(s.a(x).mean((2, 3))), a=conv(), b=nn.Linear(3, 4)), IMAGE),
    "in_place": (lambda: between(nn.ReLU(inplace=True), conv(), nn.SiLU(inplace=True)), IMAGE),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)), VECTOR),
    "linear_relu_norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4)), VECTOR),
    "linear_relu": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), VECTOR),
    "linear_one_wide": (lambda: nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 4)), VECTOR),
    "linear_norm": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)), VECTOR),
    "linear_3d": (
        lambda: nn.Sequential(
            nn.Linear(8, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        ),
        SEQUENCE,
    ),
    "linear_view": (
        lambda: Forward(lambda s, x: s.b(s.a(x).relu().flatten(1)), a=nn.Linear(8, 4), b=nn.Linear(20, 3)),
        SEQUENCE,
    ),
    "linear_gate": (
        lambda: Forward(lambda s, x: s.b(torch.sigmoid(s.a(x)) * x), a=nn.Linear(8, 8), b=nn.Linear(8, 4)),
        VECTOR,
    ),
    "linear_add": (
        lambda: Forward(lambda s, x: s.b(F.relu(s.a(x) + x)), a=nn.Linear(8, 8), b=nn.Linear(8, 4)),
        VECTOR,
    ),
    "add_scaled": (
        lambda: Forward(lambda s, x: s.c(torch.add(s.a(x), s.b(x), alpha=0.5)), a=conv(), b=conv(), c=conv()),
        IMAGE,
    ),
    "subtract": (lambda: Forward(lambda s, x: s.c(s.a(x) - s.b(x)), a=conv(), b=conv(), c=conv()), IMAGE),
    "split": (
        lambda: Forward(
            lambda s, x: s.b(torch.cat([p.relu() for p in s.a(x).split([1, 2], 1)], 1)), a=conv(), b=conv()
        ),
        IMAGE,
    ),
    "two_outputs": (lambda: Forward(lambda s, x: (lambda h: (h, s.b(h)))(s.a(x).relu()), a=conv(), b=conv()), IMAGE),
    "relu_of_one_use": (
        lambda: Forward(lambda s, x: (lambda h: s.b(h.relu()) + s.c(h))(s.a(x)), a=conv(), b=conv(), c=conv()),
        IMAGE,
    ),
    "function": (lambda: Forward(lambda s, x: F.conv2d(input=x, weight=s.a.weight, padding=1), a=conv()), IMAGE),
}
QUICK = [
    "norm_behind_a_concat",
    "bias_with_zeros",
    "padding",
    "silu",
    "clamp",
    "max_pool",
    "flatten",
    "linear_relu_norm",
    "linear_3d",
    "linear_add",
    "split",
]


# Batch norms that become integer layers of their own.
NORMS = {"norm_behind_a_concat": 1, "norm_first": 1}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.contract) for n in LAYERS])
def test_runtime_runs_each_kind_of_layer_in_integers(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = make().eval()
    made = export(model, Inputs((torch.randn(shape),), {}), name)
    weighted = sum(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) for module in model.modules())
    weighted += NORMS.get(name, 0)
    assert len(made.plan.edits) == weighted
    assert integer_layers(made) == weighted, operators(made)
    check_agreement(made)


def test_plan_counts_the_conversions_that_the_runtime_does_behind_a_concat() -> None:
    make, shape = LAYERS["norm_behind_a_concat"]
    torch.manual_seed(0)
    made = export(make().eval(), Inputs((torch.randn(shape),), {}), "conversions")
    counted = operators(made)
    assert counted["QuantizeLinear"] + counted["DequantizeLinear"] == made.plan.facts["conversions"] == 2
    assert counted["BatchNormalization"] == counted["Concat"] == 0


@pytest.mark.contract
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
)
def test_runtime_runs_whole_networks_in_integers(name: str) -> None:
    made = export(torchvision_model(name), Inputs((torch.randn(2, 3, 64, 64),), {}), name)
    assert integer_layers(made) == len(made.plan.edits)
    check_agreement(made)


KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "conv": (lambda: between(nn.ReLU(), conv(), nn.ReLU()), IMAGE, "2", "Conv"),
    "conv_and_pools": (lambda: between(nn.MaxPool2d(2), conv(), nn.MaxPool2d(2), nn.ReLU()), IMAGE, "2", "Conv"),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)), VECTOR, "1", "Gemm"),
    "transposed": (lambda: between(nn.ReLU(), nn.ConvTranspose2d(3, 3, 2), nn.ReLU()), IMAGE, "", "ConvTranspose"),
}


@pytest.mark.parametrize("name", KEPT)
def test_runtime_leaves_the_weights_of_a_skipped_layer_in_float(name: str) -> None:
    """ONNX Runtime rounds float weights between integer tensors by itself, one scale for all, where it may."""
    make, shape, excluded, kind = KEPT[name]
    step = QuantizeStatic(exclude=[excluded] if excluded else [])
    made = export(make().eval(), Inputs((torch.randn(shape),), {}), f"kept_{name}", step)
    assert len(made.plan.skips) == 1
    assert operators(made)[kind] == 1
    assert integer_layers(made) == len(made.plan.edits) == 2
    constants = {tensor.name: tensor for tensor in made.optimized.graph.initializer}
    [layer] = [node for node in made.optimized.graph.node if node.op_type == kind]
    assert constants[layer.input[1]].data_type == TensorProto.FLOAT
    found = np.sort(np.abs(numpy_helper.to_array(constants[layer.input[1]]).ravel()))
    weight = dict(made.model.named_parameters())[f"{excluded or '2'}.weight"]
    # The runtime may pad the weight with zeros for its own layout.
    np.testing.assert_array_equal(found[-weight.numel() :], np.sort(weight.detach().abs().numpy().ravel()))
    check_agreement(made)


def test_protect_changes_nothing_when_all_layers_are_in_integers_or_all_in_float() -> None:
    made = zoo("residual_add")
    for file in (made.float_file, made.file):
        graph = onnx.load(file).graph
        before = graph.SerializeToString(deterministic=True)
        protect(graph)
        assert graph.SerializeToString(deterministic=True) == before
        assert not any(node.op_type == "Max" for node in graph.node)


TRACES = [rb"site-packages", rb"stack_trace", rb'File "', rb"\.py", rb"/home/", rb"pkg\.torch"]


@pytest.mark.parametrize("name", zoo_names(COVERING))
def test_export_carries_no_path_and_no_source(name: str) -> None:
    made = zoo(name)
    for file in (made.float_file, made.file):
        content = file.read_bytes()
        places = [Path(__file__).stem, "zoo_models", str(Path.home()), str(Path.cwd()), tempfile.gettempdir()]
        for trace in [*TRACES, *(re.escape(place).encode() for place in places)]:
            assert not re.search(trace, content), trace
        proto = onnx.load(file)
        assert (proto.producer_name, proto.doc_string, len(proto.metadata_props)) == ("pared", "", 0)


SCRIPT = """
import sys
from pathlib import Path
import torch
from zoo_models import ZOO
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task
torch.set_num_threads(1)
model, inputs = ZOO["residual_add"]()
target, file = OnnxRuntime(), Path(sys.argv[1])
data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
task = Task(example_inputs=inputs, calibration=data)
context = Context(task=task, target=target, work=file.parent, dense=model)
step = QuantizeStatic()
target.export(step.apply(model, step.plan(model, context), context), task, file)
"""


@pytest.mark.slow
def test_export_gives_the_same_bytes_when_repeated_in_a_fresh_process(tmp_path: Path) -> None:
    running = []
    for index, seed in enumerate(("1", "2")):
        file = tmp_path / f"{index}.onnx"
        paths = [str(Path(__file__).parents[1]), *sys.path]
        environment = {
            "PYTHONPATH": ":".join(filter(None, paths)),
            "PYTHONHASHSEED": seed,
            "PATH": "",
            "HOME": str(tmp_path),
        }
        running.append((subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)], env=environment), file))
    assert [process.wait(timeout=300) for process, _ in running] == [0, 0]
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for _, file in running}) == 1


def test_export_leaves_the_program_as_it_was() -> None:
    made = zoo("residual_add")
    inputs = like(made.inputs, 3)
    before, code = outputs(made.program, inputs), made.program.code
    TARGET.export(made.program, Task(example_inputs=made.inputs), folder() / "again.onnx")
    assert made.program.code == code
    assert all(np.array_equal(x, y) for x, y in zip(before, outputs(made.program, inputs), strict=True))
    assert (folder() / "again.onnx").read_bytes() == made.file.read_bytes()


class Clamped(nn.Module):
    """One tensor clamped twice, by bounds that the module holds."""

    def __init__(self, low: Tensor | None, high: Tensor | None) -> None:
        super().__init__()
        self.low = None if low is None else nn.Buffer(low)
        self.high = None if high is None else nn.Buffer(high)
        self.high_again = None if high is None else nn.Buffer(high / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.low, self.high) + 10 * torch.clamp(x, self.low, self.high_again)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(torch.tensor(-0.3), torch.tensor(0.5), id="scalars"),
        pytest.param(torch.tensor(-torch.inf), torch.tensor(torch.inf), id="infinite"),
        pytest.param(torch.tensor(0.7), torch.tensor(0.2), id="lower bound above the upper"),
        pytest.param(torch.tensor([-0.3, -0.1, 0.0, 0.1]), torch.tensor(0.5), id="a vector and a scalar"),
        pytest.param(None, torch.tensor(0.5), id="upper alone"),
        pytest.param(torch.tensor(-0.3), None, id="lower alone"),
    ],
)
def test_two_clamps_of_one_tensor_keep_their_bounds(low: Tensor | None, high: Tensor | None, tmp_path: Path) -> None:
    inputs = Inputs((torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),), {})
    model = Clamped(low, high).eval()
    TARGET.export(model, Task(example_inputs=inputs), tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", inputs)[0], outputs(model, inputs)[0], rtol=1e-6)


def test_export_keeps_names_and_dynamic_dimensions_of_the_inputs(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, t1: Tensor, t0: Tensor) -> dict[str, Tensor]:
            return {"t2": self.layer(t1) * 2 - t0, "first": t0 + 1}

    model = Named().eval()
    inputs = {"t0": torch.randn(2, 6, 3), "t1": torch.randn(2, 6, 4)}
    dynamic = {"t0": {1: "length"}, "t1": {1: "length"}}
    task = Task(example_inputs=inputs, dynamic=dynamic)
    TARGET.export(model, task, tmp_path / "m.onnx")
    session = TARGET.open(tmp_path / "m.onnx", threads=1)
    assert {spec.name: spec.shape for spec in session.inputs} == {
        "t0": ("batch", "length", 3),
        "t1": ("batch", "length", 4),
    }
    sizes = {
        tuple(d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim)
        for o in onnx.load(tmp_path / "m.onnx").graph.output
    }
    assert sizes == {("batch", "length", 3)}
    other = Inputs((), {"t0": torch.randn(5, 9, 3), "t1": torch.randn(5, 9, 4)})
    assert decibels(outputs(model, other), run(tmp_path / "m.onnx", other)) >= 60


def test_strip_renames_in_inner_graphs_too() -> None:
    def branch(name: str, add: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("Add", ["x", add], [f"{name}_sum"], doc_string="secret", name="secret"),
            helper.make_node("Relu", [f"{name}_sum"], [f"{name}_out"]),
        ]
        return helper.make_graph(nodes, name, [], [value], doc_string="secret")

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["n"])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "one"], ["condition"]),
        helper.make_node("If", ["condition"], ["t0"], then_branch=branch("a", "one"), else_branch=branch("b", "two")),
    ]
    constants = [numpy_helper.from_array(np.float32(v), n) for n, v in (("one", 1.0), ("two", 2.0))]
    graph = helper.make_graph(nodes, "g", [x], [y], constants, doc_string="secret")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, doc_string="secret")
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    assert b"secret" not in content
    assert b"_sum" not in content
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for values in ([2.0, 3.0], [-4.0, 1.5]):
        given = np.array(values, np.float32)
        [found] = session.run(None, {"x": given})
        np.testing.assert_array_equal(found, np.maximum(given + (1 if given.sum() > 1 else 2), 0))


def test_export_says_so_when_an_operator_has_no_onnx_form(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).abs()

    with pytest.raises(TargetError, match="onnxruntime: the model cannot be written as ONNX"):
        TARGET.export(Odd(), Task(example_inputs=torch.randn(2, 3, 3)), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
