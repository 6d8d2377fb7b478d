"""A whole quantized program, run as ONNX Runtime's integer kernels run it on x86.

PyTorch runs an emitted program in float32 between its quantize operators. A runtime adds integers, and rounds once at
the end. `Emulation` does as the runtime does, to the bit where the tests say so, with products that saturate in 16 bits
or without: so a machine with VNNI can tell what a file will score on one without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pared.graph.capture import operator
from pared.measure.saturation import can_saturate
from pared.quantize.folding import CONVOLUTIONS, LINEAR, tensor_of
from pared.quantize.placement import behind
from pared.quantize.saturation import convolution_sums, linear_sums
from pared.sensitivity import flat
from pared.task import Inputs

QUANTIZE = "quantized_decomposed.quantize_per_tensor"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor"
DEQUANTIZE_CHANNELS = "quantized_decomposed.dequantize_per_channel"


@dataclasses.dataclass(frozen=True)
class Affine:
    """Scale, zero point and range of an unsigned tensor."""

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, node: Any) -> Affine | None:
        """What a quantize or dequantize operator of unsigned integers says, or None for another node."""
        if not isinstance(node, fx.Node) or operator(node) not in {QUANTIZE, DEQUANTIZE}:
            return None
        scale, zero_point, low, high, dtype = node.args[1:6]
        if isinstance(scale, fx.Node):
            return None  # chosen at every call
        return cls(scale, zero_point, low, high) if dtype == torch.uint8 else None  # type: ignore[arg-type]

    def round(self, steps: Tensor) -> Tensor:
        """Integers of what is in units of the scale, zero point not added yet: half to even, then cut off."""
        return (
            torch.round(steps).clamp_(self.low - self.zero_point, self.high - self.zero_point) + self.zero_point
        ).to(torch.uint8)

    def quantize(self, x: Tensor) -> Tensor:
        """Integers of real numbers. The runtime divides, where PyTorch multiplies by the reciprocal."""
        return self.round(x / self.scale)


@dataclasses.dataclass(frozen=True)
class IntegerLayer:
    """A convolution or linear layer with integers on both sides.

    Attributes:
        weight: int8.
        weight_scale: One a channel.
        bias: int32, in units of the sum.
        source: Of its input.
        options: Stride, padding, dilation, groups of a convolution; None for a linear layer.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    source: Affine
    options: tuple[Sequence[int], Sequence[int] | str, Sequence[int], int] | None

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return self.options[3] if self.options else 1

    @property
    def unit(self) -> Tensor:
        """What 1 in the sum stands for, for each channel: in float32, as the runtime multiplies it out."""
        return torch.tensor(self.source.scale) * self.weight_scale

    def sums(self, x: Tensor, *, saturate: bool) -> Tensor:
        """The int32 sums of a real input, with zero point and bias, channels where the layer has them."""
        integers = self.source.quantize(x)
        start = self.bias - self.source.zero_point * self.weight.flatten(1).sum(1, dtype=torch.int32)
        if self.options is None:
            return linear_sums(integers, self.weight, saturate=saturate) + start
        stride, padding, dilation, groups = self.options
        ends = padding_of(self.weight.shape[2:], padding, dilation)
        padded = F.pad(integers, ends, value=self.source.zero_point)
        found = convolution_sums(
            padded, self.weight, stride=stride, dilation=dilation, groups=groups, saturate=saturate
        )
        return found + self.along(start)

    def along(self, by_channel: Tensor) -> Tensor:
        """One number a channel, broadcastable against the sums."""
        return by_channel if self.options is None else by_channel.reshape(-1, *[1] * (self.weight.ndim - 2))


def padding_of(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """Elements to add before and after each dimension, the last dimension first, as `F.pad` takes them."""
    if isinstance(padding, str):
        totals = [(width - 1) * gap if padding == "same" else 0 for width, gap in zip(kernel, dilation, strict=True)]
        return [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
    return [end for size in reversed(padding) for end in (size, size)]


def integer_layers(graph: fx.GraphModule) -> dict[fx.Node, IntegerLayer]:
    """The layers that ONNX Runtime runs with unsigned activations and signed weights.

    A convolution must give integers too; else it runs in float.
    """
    found = {}
    for node in graph.graph.nodes:
        name = operator(node)
        if name in CONVOLUTIONS and only_target(node) is None:
            continue
        if (name in CONVOLUTIONS or name == LINEAR) and (layer := read_layer(graph, node)) is not None:
            found[node] = layer
    return found


def read_layer(graph: fx.GraphModule, node: fx.Node) -> IntegerLayer | None:
    """A layer with its tensors, or None where its input or weight are not integers."""
    x, weight, bias = (*node.args[:3], None)[:3]
    source = Affine.of(behind(x)) if isinstance(x, fx.Node) else None
    if source is None or not isinstance(weight, fx.Node) or operator(weight) != DEQUANTIZE_CHANNELS:
        return None
    values, scale = tensor_of(graph, weight.args[0]), tensor_of(graph, weight.args[1])
    if values.dtype != torch.int8:
        return None
    whole = torch.zeros(len(values), dtype=torch.int32)
    if isinstance(bias, fx.Node):
        if operator(bias) != DEQUANTIZE_CHANNELS:
            return None
        whole = tensor_of(graph, bias.args[0])
    if operator(node) == LINEAR:
        return IntegerLayer(values, scale, whole, source, None)
    rank = values.ndim - 2
    given: list[Any] = [*node.args[3:7], *[None] * 4][:4]
    stride, padding, dilation, groups = (
        default if value is None else value for value, default in zip(given, (1, 0, 1, 1), strict=True)
    )
    options = (wide(stride, rank), padding if isinstance(padding, str) else wide(padding, rank), wide(dilation, rank))
    return IntegerLayer(values, scale, whole, source, (*options, groups))


def wide(value: int | Sequence[int], rank: int) -> list[int]:
    """One number a dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * rank if len(numbers) == 1 else numbers


def layers_at_risk(graph: fx.GraphModule) -> list[str]:
    """Nodes of the layers in which some input would make products saturate; empty: the program is right everywhere."""
    layers = integer_layers(graph).items()
    return [node.name for node, layer in layers if can_saturate(layer.weight.numpy(), layer.groups)]


class Emulation(fx.Interpreter):
    """Runs an emitted program with the arithmetic of ONNX Runtime's x86 kernels.

    Args:
        graph: The program, as `emission.emit` left it.
        saturate: True for a processor without VNNI.

    Attributes:
        macs: Integer multiplications done so far.
    """

    def __init__(self, graph: fx.GraphModule, *, saturate: bool) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # of PyTorch's, in the text of our errors
        self.saturate = saturate
        self.macs = 0
        self.layers = integer_layers(graph)
        targets = {node: only_target(node) for node in self.layers}
        self.targets = {node: target for node, target in targets.items() if target is not None}
        self.sums = {node: pair for node in graph.graph.nodes if (pair := addends(node)) is not None}
        self.graph_module = graph

    def __call__(self, inputs: Inputs) -> Any:
        """The program's output for the inputs of one call."""
        with torch.no_grad():
            return self.run(*flat(self.graph_module, inputs))

    def run_node(self, n: fx.Node) -> Any:
        """One operator: integer layers, additions and roundings in the runtime's way, the others in PyTorch's."""
        own = self.way(n)
        if own is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return own(*args)

    def way(self, n: fx.Node) -> Callable[..., Any] | None:
        """How the runtime computes a node, or None where PyTorch's own operator will do."""
        if n in self.layers:
            return lambda x, *_: self.layer(n, x)
        if n in self.sums:
            return lambda left, right: add(left, right, *self.sums[n])
        if operator(n) == DEQUANTIZE_CHANNELS and all(user in self.layers for user in n.users):
            return lambda *_: None  # the layer has read its weights already
        target = Affine.of(n)
        if operator(n) != QUANTIZE or target is None:
            return None
        in_steps = n.args[0] in self.sums or n.args[0] in self.targets
        return lambda x, *_: target.round(x) if in_steps else target.quantize(x)

    def layer(self, n: fx.Node, x: Tensor) -> Tensor:
        """A layer's result: in real numbers, or in steps of the output's scale where it is rounded next."""
        layer, target = self.layers[n], self.targets.get(n)
        scale = layer.unit if target is None else layer.unit / target.scale
        sums = layer.sums(x, saturate=self.saturate)
        self.macs += sums.numel() * layer.weight[0].numel()
        return sums.float() * layer.along(scale)


def only_target(node: fx.Node) -> Affine | None:
    """How a node's result is quantized, where every user does so, and alike."""
    targets = {Affine.of(user) if operator(user) == QUANTIZE else None for user in node.users}
    return next(iter(targets)) if len(targets) == 1 else None


def addends(node: fx.Node) -> tuple[Affine, Affine, Affine] | None:
    """The two inputs and the output of an addition that runs in integers, or None for another node."""
    if operator(node) != "aten.add" or len(node.args) != 2 or node.kwargs:
        return None
    left, right, target = Affine.of(node.args[0]), Affine.of(node.args[1]), only_target(node)
    return (left, right, target) if left and right and target else None


def add(left: Tensor, right: Tensor, a: Affine, b: Affine, c: Affine) -> Tensor:
    """The sum of two quantized tensors in steps of the output's scale, zero point not added.

    In float32 with fused multiplications and additions, in the runtime's order; float64 holds these before they round.
    """
    by_a, by_b = (torch.tensor(side.scale) / torch.tensor(c.scale) for side in (a, b))
    fixed = (torch.tensor(float(c.zero_point)) - by_a * a.zero_point) - by_b * b.zero_point
    inner = (b.quantize(right).double() * by_b.double() + fixed.double()).float()
    steps = (a.quantize(left).double() * by_a.double() + inner.double()).float()
    return steps.double() - c.zero_point
