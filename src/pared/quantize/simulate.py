"""Simulation: a placed float graph run as its integers would run, without rewriting it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from pared.quantize.affine import Grid, QParams, fake_quantize
from pared.quantize.coding import Code
from pared.quantize.placement import Placement, behind
from pared.sensitivity import Override


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Everything that decides what a placed graph computes in integers.

    Attributes:
        placement: What becomes integers.
        qparams: Of every quantized activation, by node.
        grid: The integers of activations.
        codes: Of every layer, by node.
    """

    placement: Placement
    qparams: Mapping[str, QParams]
    grid: Grid
    codes: Mapping[str, Code]

    def layer(self, node: fx.Node, args: tuple[Any, ...], code: Code) -> Tensor:
        """What a layer computes with coded weights, before its output is quantized."""
        target: Any = node.target
        found: Tensor = target(args[0], code.weight, code.bias, *args[3:], **node.kwargs)
        return found

    def activation(self, name: str, value: Tensor) -> Tensor:
        """A node's value after its quantization, if it has one."""
        qparams = self.qparams.get(name)
        return value if qparams is None else fake_quantize(value, qparams, self.grid)

    def alone(self, node: fx.Node) -> Override:
        """One layer quantized, its input and its weight, and all else float: an override of the layer's node.

        Its output counts with the layers that read it.
        """
        source: Any = node.args[0]
        name, code = behind(source).name, self.codes[node.name]

        def override(_: Any, args: tuple[Any, ...]) -> Tensor:
            return self.layer(node, (self.activation(name, args[0]), *args[1:]), code)

        return override


class Simulation(fx.Interpreter):
    """Runs the graph in simulated integers."""

    def __init__(self, graph: fx.GraphModule, numbers: Numbers) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.numbers = numbers

    def raw(self, node: fx.Node) -> Any:
        """A node's value before it is quantized itself."""
        code = self.numbers.codes.get(node.name)
        if code is None:
            return super().run_node(node)
        return self.numbers.layer(node, self.fetch_args_kwargs_from_env(node)[0], code)

    def run_node(self, n: fx.Node) -> Any:
        value = self.raw(n)
        return self.numbers.activation(n.name, value) if isinstance(value, Tensor) else value
