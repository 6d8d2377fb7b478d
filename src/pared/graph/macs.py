"""Multiply-accumulates of single operators, read off the shapes in a captured graph; nothing is run.

`counts` books the same work on modules, by running the graph without data; here it is wanted for each operator, of
graphs that have been rewritten since.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from pared.graph.capture import operator

Shape = tuple[int, ...]


def macs_of(node: fx.Node) -> int:
    """One multiply-accumulate for each product that an operator sums up, for the example batch; 0 for all others.

    A free dimension counts as large as in the example inputs that the graph was captured with.
    """
    formula = FORMULAS.get(operator(node))
    return formula(node) if formula is not None else 0


def shape_of(value: Any) -> Shape:
    """Shape of the tensor that an argument stands for, free dimensions as in the example; () for everything else."""
    held = value.meta.get("val") if isinstance(value, fx.Node) else value
    return tuple(map(concrete, held.shape)) if isinstance(held, torch.Tensor) else ()


def concrete(size: int | torch.SymInt) -> int:
    """A size as in the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


def convolution(node: fx.Node) -> int:
    weight = shape_of(node.args[1])
    return math.prod(shape_of(node)) * math.prod(weight[1:])


def transposed_convolution(node: fx.Node) -> int:
    return math.prod(shape_of(node.args[0])) * math.prod(shape_of(node.args[1])[1:])


def product(node: fx.Node) -> int:
    """A matrix product: each result sums over the last dimension of the first operand."""
    return math.prod(shape_of(node)) * shape_of(node.args[0])[-1]


def product_and_sum(node: fx.Node) -> int:
    return math.prod(shape_of(node)) * shape_of(node.args[1])[-1]


def contraction(node: fx.Node) -> int:
    """Einstein sum of two operands or more, as one pass over all its indices; 0 with an ellipsis in it."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or not isinstance(operands, (list, tuple)):
        return 0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.partition("->")[0].split(","), operands, strict=True):
        sizes |= zip(letters, shape_of(operand), strict=True)
    return math.prod(sizes.values()) if len(operands) > 1 else 0


def attention(node: fx.Node) -> int:
    """Scores and their product with the values."""
    query, key, value = map(shape_of, node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def recurrence(node: fx.Node) -> int:
    """Every weight matrix once for each step of each sequence."""
    weights: Any = node.args[2]
    shapes = [shape_of(weight) for weight in weights]
    return math.prod(shape_of(node.args[0])[:-1]) * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


FORMULAS: Mapping[str, Callable[[fx.Node], int]] = {
    **dict.fromkeys(["aten.conv1d", "aten.conv2d", "aten.conv3d"], convolution),
    **dict.fromkeys(
        ["aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"], transposed_convolution
    ),
    **dict.fromkeys(["aten.linear", "aten.matmul", "aten.mm", "aten.bmm"], product),
    **dict.fromkeys(["aten.addmm", "aten.baddbmm"], product_and_sum),
    **dict.fromkeys(["aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"], recurrence),
    "aten.einsum": contraction,
    "aten.scaled_dot_product_attention": attention,
}
