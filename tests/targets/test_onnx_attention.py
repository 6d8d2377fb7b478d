"""Attention in ONNX files: one operator where the heads are split and joined as usual, the same values everywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.quantize.static import QuantizeStatic
from pared.step import Context
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Inputs, Task

HEADS, WIDTH = 2, 8


class Attention(nn.Module):
    """Heads split and joined as transformers does it, in a post-norm block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (part(x).view(n, length, HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        mask = seen.bool()[:, None, None, :].expand(n, 1, length, length)
        if self.kind == "masked":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.kind == "scaled":
            mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        elif self.kind == "causal":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            bias = torch.zeros(n, 1, length, length).masked_fill(~mask, -1e4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.norm(x + self.out(mixed.transpose(1, 2).reshape(n, length, -1)) + 0 * seen[..., None])


def operators(path: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(("kind", "fused"), [("masked", 1), ("scaled", 1), ("causal", 0), ("biased", 0)])
def test_file_agrees_with_the_model_whatever_the_mask(kind: str, fused: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention(kind).eval()
    example = (torch.randn(2, 5, WIDTH), torch.ones(2, 5))
    task = Task(example_inputs=example, dynamic={0: {1: "length"}, 1: {1: "length"}})
    path = tmp_path / "model.onnx"
    OnnxRuntime().export(model, task, path)
    kinds = operators(path)
    assert kinds["MultiHeadAttention"] == fused
    x, seen = torch.randn(3, 9, WIDTH), (torch.rand(3, 9) > 0.4).float()
    seen[1] = 0 if kind == "masked" else seen[1]  # a sample that may look at nothing
    seen[0, 0] = 1
    with torch.no_grad():
        expected = model(x, seen).numpy()
    (found,) = OnnxRuntime().open(path, threads=1).run([x.numpy(), seen.numpy()])
    # float32 sums of some dozen products of numbers about 1
    assert abs(found - expected).max() < 1e-5


class Windows(nn.Module):
    """Attention whose batch and heads are any number of dimensions, as between the tokens of windows."""

    def __init__(self, sizes: tuple[int, ...], *, biased: bool = False) -> None:
        super().__init__()
        self.sizes, self.qkv = sizes, nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = nn.Parameter(torch.randn(sizes[-1] if sizes else 1, 1, 1)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(x).chunk(3, dim=-1)
        if self.sizes:
            shape = (n, length, *self.sizes, -1)
            parts = [part.view(shape).movedim(1, -2) for part in parts]
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=self.bias)
        return (mixed.movedim(-2, 1) if self.sizes else mixed).reshape(n, length, width)


@pytest.mark.parametrize(
    ("sizes", "biased"), [((), False), ((), True), ((2,), True), ((2, 2), False), ((2, 2), True), ((2, 1, 2), False)]
)
def test_file_agrees_with_the_model_when_heads_are_not_one_of_four_dimensions(
    sizes: tuple[int, ...], biased: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, path = Windows(sizes, biased=biased).eval(), tmp_path / "model.onnx"
    task = Task(example_inputs=torch.randn(2, 5, WIDTH), dynamic={0: {1: "length"}})
    OnnxRuntime().export(model, task, path)
    x = torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        expected = model(x).numpy()
    (found,) = OnnxRuntime().open(path, threads=1).run([x.numpy()])
    # float32 sums of some dozen products of numbers about 1
    assert abs(found - expected).max() < 1e-5


def test_attention_without_a_dimension_of_heads_can_have_a_mask_for_each_sample(tmp_path: Path) -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.transpose(1, 2))

    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(3, 5, WIDTH)
    OnnxRuntime().export(Own(), Task(example_inputs=x[:2]), path)
    (found,) = OnnxRuntime().open(path, threads=1).run([x.numpy()])
    # float32 sums of some dozen products of numbers about 1
    assert abs(found - Own()(x).numpy()).max() < 1e-5


def test_attention_of_matrices_can_be_written(tmp_path: Path) -> None:
    class Matrices(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(5, WIDTH)
    OnnxRuntime().export(Matrices(), Task(example_inputs=x), path)
    (found,) = OnnxRuntime().open(path, threads=1).run([x.numpy()])
    # float32 sums of some dozen products of numbers about 1
    assert abs(found - Matrices()(x).numpy()).max() < 1e-5


def test_attention_with_a_mask_for_all_samples_can_be_written_when_its_heads_are_joined(tmp_path: Path) -> None:
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(HEADS, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            n, length, width = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
            return mixed.transpose(1, 2).reshape(n, length, width)

    torch.manual_seed(0)
    model, path, x = Relative().eval(), tmp_path / "model.onnx", torch.randn(3, 5, WIDTH)
    OnnxRuntime().export(model, Task(example_inputs=x[:1]), path)
    with torch.no_grad():
        expected = model(x).numpy()
    (found,) = OnnxRuntime().open(path, threads=1).run([x.numpy()])
    # float32 sums of some dozen products of numbers about 1
    assert abs(found - expected).max() < 1e-5


def test_attention_is_fused_when_what_it_makes_is_rounded_on_its_way_to_the_next_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention("masked").eval()
    example = (torch.randn(2, 5, WIDTH), torch.ones(2, 5))
    task = Task(
        example_inputs=example,
        calibration=[Inputs(example, {})],
        dynamic={0: {1: "length"}, 1: {1: "length"}},
    )
    ctx = Context(task=task, target=OnnxRuntime(), work=tmp_path, dense=model)
    step = QuantizeStatic()
    program = step.apply(model, step.plan(model, ctx), ctx)
    path = tmp_path / "model.onnx"
    OnnxRuntime().export(program, task, path)
    kinds = operators(path)
    assert kinds["MultiHeadAttention"] == 1
    assert kinds["MatMulIntegerToFloat"] == 4
    # Biases that no integer layer takes in are written as they are added: one conversion less at each call.
    assert not [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT32]
    x, seen = torch.randn(3, 9, WIDTH), (torch.rand(3, 9) > 0.4).float()
    seen[:, 0] = 1
    (found,) = OnnxRuntime().open(path, threads=1).run([x.numpy(), seen.numpy()])
    with torch.no_grad():
        expected = program(x, seen).numpy()
    # Both round what attention makes by one grid: a last bit may flip a whole quantum here and there, no more.
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()


def test_residual_adds_are_fused_into_layer_norms(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            n, length, _ = x.shape
            return self.norm(x + self.layer(x).view(n, length, 2, -1).transpose(1, 2).reshape(n, length, -1))

    path = tmp_path / "model.onnx"
    task = Task(example_inputs=torch.randn(2, 5, WIDTH), dynamic={0: {1: "length"}})
    OnnxRuntime().export(Block().eval(), task, path)
    assert operators(path)["SkipLayerNormalization"] == 1
    values = onnx.load(path).graph.value_info
    assert [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values] == [
        ["batch", "length", WIDTH]
    ]
