"""Integer weights in ONNX: the packed layout, and ONNX Runtime against the PyTorch program."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.quantize.weights import QuantizeWeights
from pared.step import Context
from pared.targets.onnx_weights import packed, unpacked, with_weight_operators
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Task


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 19), st.integers(0, 2**32))
def test_unpacking_is_the_inverse_of_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    small = packed(values, bits)
    assert small.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpacked(small, bits, columns), values)
    # The first of two neighbours lies in the lower bits.
    assert int(small[0, 0]) % 2**bits == int(values[0, 0])


NEAREST = QuantizeWeights(method="nearest")
OPERATORS = ["GatherBlockQuantized", "MatMulNBits", "Conv", "MatMulNBits"]


class Reader(nn.Module):
    """An embedding of a width that is no whole number of blocks, a layer, and a convolution over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 40)
        self.linear = nn.Linear(40, 24)
        self.conv = nn.Conv1d(24, 12, 3, groups=2)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.linear(self.table(ids)))
        logits: Tensor = self.head(self.conv(x.transpose(1, 2)).mean(2))
        return logits


NEAREST = QuantizeWeights(method="nearest")


@functools.cache
def exported(step: QuantizeWeights = NEAREST) -> tuple[Any, nn.Module, nn.Module, Tensor]:
    """The file, the model, its program and its inputs."""
    with tempfile.TemporaryDirectory() as folder:
        return export_to(Path(folder) / "model.onnx", step)


def export_to(path: Path, step: QuantizeWeights) -> tuple[Any, nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, ids = Reader().eval(), torch.randint(0, 9, (4, 7))
    task = Task(example_inputs=(ids,))
    ctx = Context(task=task, target=OnnxRuntime(), work=path.parent, dense=model)
    program = step.apply(model, step.plan(model, ctx), ctx)
    OnnxRuntime().export(program, task, path)
    return onnx.load(path), model, program, ids


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "kinds"),
    [
        (4, 32, False, OPERATORS),
        (8, None, True, OPERATORS),
        pytest.param(4, None, True, OPERATORS, marks=pytest.mark.contract),
        pytest.param(2, 16, False, OPERATORS, marks=pytest.mark.contract),
        (3, 8, True, ["Gather", "MatMul", "Conv", "Gemm"]),  # no operator takes groups of 8
    ],
)
def test_file_computes_what_the_program_does(
    bits: int, group_size: int | None, symmetric: bool, kinds: list[str], tmp_path: Path
) -> None:
    step = QuantizeWeights(bits=bits, group_size=group_size, symmetric=symmetric, method="nearest")
    file, model, program, ids = exported(step)
    onnx.save(file, tmp_path / "model.onnx")
    found = [node.op_type for node in file.graph.node]
    assert [kind for kind in found if kind in {*kinds, "MatMul", "Gather", "Gemm"}] == kinds
    (out,) = OnnxRuntime().open(tmp_path / "model.onnx", threads=1).run([ids.numpy()])
    expected = program(ids).detach().numpy()
    # Both multiply the same dequantized weights in float32; sums of up to 40 products differ in their order alone,
    # through four layers.
    assert np.abs(out - expected).max() <= 4 * 40 * 2.0**-24 * np.abs(expected).max() * 8
    # Nor is that because rounding changed nothing.
    assert np.abs(expected - model(ids).detach().numpy()).max() > 1e-3 * np.abs(expected).max()
    assert not any(t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 12 * 24 for t in file.graph.initializer)


def test_weights_take_the_bytes_that_their_bits_say() -> None:
    file, *_ = exported()
    sizes = {tensor.name: len(tensor.raw_data) for tensor in file.graph.initializer}
    (first,) = [node for node in file.graph.node if node.op_type == "MatMulNBits" and len(node.input) == 6]
    # 24 rows of 2 blocks of 32: half a byte a weight, 4 bytes a scale, half a byte a zero point.
    assert [sizes[name] for name in first.input[1:4]] == [24 * 2 * 16, 24 * 2 * 4, 24]


def test_rewriting_leaves_the_program_alone_and_computes_the_same() -> None:
    _, _, program, ids = exported()
    before = program(ids)
    rewritten = with_weight_operators(program)
    assert rewritten is not program
    assert torch.allclose(rewritten(ids), before, rtol=1e-6, atol=1e-7)
    assert torch.equal(program(ids), before)
    assert not any(node.target is torch.ops.pared.matmul_nbits.default for node in program.graph.nodes)
    plain = nn.Linear(2, 2)
    assert with_weight_operators(plain) is plain


def test_restored_weights_are_computed_once_when_the_file_is_loaded(tmp_path: Path) -> None:
    import onnxruntime

    onnx.save(exported()[0], tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # of a warning that an optimized file fits this machine alone
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" in kinds
    assert not {"BitShift", "BitwiseAnd", "Sub", "Mul"} & set(kinds)
