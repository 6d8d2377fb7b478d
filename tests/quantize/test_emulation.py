"""Whole programs, against the files that they become, in ONNX Runtime with and without saturation."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.quantize import static
from pared.quantize.emulation import Emulation, layers_at_risk, padding_of
from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Inputs, Task
from saturating import QEMU, on_avx2, on_haswell, run_file


class Net(nn.Module):
    """Convolutions (strided, odd channels, grouped, depthwise), a residual addition, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding="same")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 24, 3, groups=2, dilation=2)
        self.last = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.depthwise(self.inner(x)) + x)
        x = F.max_pool2d(F.relu(self.grouped(x)), 2)
        return self.last(x.mean((2, 3)))


def uniform(model: nn.Module) -> nn.Module:
    """Weights spread evenly, so that many are large and pairs saturate."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            bound = 2.0 / parameter[0].numel() ** 0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return model.eval()


@functools.cache
def emitted(cpu: Literal["here", "any"]) -> tuple[nn.Module, fx.GraphModule, bytes]:
    """A model, its program as a processor with VNNI gets it, and the file of that."""
    generator = torch.Generator().manual_seed(0)
    model, data = uniform(Net()), torch.rand(6, 3, 24, 24, generator=generator)
    step, target = QuantizeStatic(weights={"cpu": cpu}), OnnxRuntime()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        patched.setattr(static, "saturates_here", lambda: False)
        task = Task(example_inputs=data[:1], calibration=[data])
        ctx = Context(task=task, target=target, work=Path(name), dense=model)
        program = step.apply(model, step.plan(model, ctx), ctx)
        assert isinstance(program, fx.GraphModule)
        target.export(program, task, Path(name) / "model.onnx")
        return model, program, (Path(name) / "model.onnx").read_bytes()


@pytest.fixture
def data() -> Tensor:
    """What the programs are run on: as they were calibrated on, and a little beyond."""
    return torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 1.1


def written(folder: Path, content: bytes) -> str:
    (folder / "model.onnx").write_bytes(content)
    return str(folder / "model.onnx")


def test_emulation_equals_the_file_when_there_is_no_vnni(tmp_path: Path, data: Tensor) -> None:
    _, program, content = emitted("here")
    file = written(tmp_path, content)
    found = Emulation(program, saturate=True)(Inputs((data,), {})).numpy()
    exact = Emulation(program, saturate=False)(Inputs((data,), {})).numpy()
    real = on_avx2("run_file", data.numpy(), folder=tmp_path, path=file)
    # Both end in one float32 multiplication of equal integers; only the mean before the last layer rounds differently.
    assert np.abs(found - real).max() <= 2e-6 * np.abs(real).max()
    assert np.abs(exact - real).max() > 0.01 * np.abs(real).max()
    # With ONNX Runtime's own exact kernels, or VNNI, the same file gives what the program without saturation gives.
    precise = run_file(data.numpy(), path=file, exact=True)
    assert np.abs(exact - precise).max() <= 2e-6 * np.abs(precise).max()


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
def test_emulation_equals_the_file_on_an_emulated_haswell(tmp_path: Path, data: Tensor) -> None:
    _, program, content = emitted("here")
    found = Emulation(program, saturate=True)(Inputs((data[:1],), {})).numpy()
    real = on_haswell("run_file", data[:1].numpy(), folder=tmp_path, path=written(tmp_path, content))
    assert np.abs(found - real).max() <= 2e-6 * np.abs(real).max()


def test_file_is_the_same_everywhere_when_weights_are_safe(tmp_path: Path, data: Tensor) -> None:
    model, program, content = emitted("any")
    file = written(tmp_path, content)
    assert layers_at_risk(program) == []
    real = on_avx2("run_file", data.numpy(), folder=tmp_path, path=file)
    assert np.array_equal(real, run_file(data.numpy(), path=file, exact=True))
    expected = model(data).detach().numpy()
    # 20 dB: what is left is quantization, and not a layer gone wrong.
    assert np.square(expected - real).sum() < 0.01 * np.square(expected).sum()


def test_layers_at_risk_leave_out_what_sums_in_32_bits() -> None:
    _, program, _ = emitted("here")
    assert len(layers_at_risk(program)) == 4  # all but the depthwise one


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 4), (1, 1)), ((3, 2), (2, 1)), ((2, 5), (1, 2))])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_is_that_of_pytorch_when_given_by_name(
    kernel: tuple[int, int], dilation: tuple[int, int], padding: str
) -> None:
    x, w = torch.randn(1, 1, 9, 9), torch.randn(1, 1, *kernel)
    expected = F.conv2d(x, w, padding=padding, dilation=dilation)
    torch.testing.assert_close(
        F.conv2d(F.pad(x, padding_of(kernel, padding, dilation)), w, dilation=dilation), expected
    )
