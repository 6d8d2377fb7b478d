"""Where an exported file and its PyTorch model part: the layer that a parity error names.

A file tells its outputs alone. So the model is cut off behind a layer, exported and run as the whole one was, and the
first layer behind which the two disagree is found by halving: a dozen exports for a network of hundreds.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure

from pared.errors import MeasureError, ParedError
from pared.graph.capture import capture, operator, owner, quiet
from pared.measure.fidelity import Comparison
from pared.step import Target
from pared.task import Inputs, Task, call

CONVERSIONS = ("quantized_decomposed.quantize", "quantized_decomposed.dequantize")


def where_they_part(model: nn.Module, task: Task, target: Target, inputs: Inputs, floor_db: float) -> str:
    """A clause that names the first layer behind which a file of `model` is further from it than `floor_db`, or "".

    Args:
        model: Float, or a quantized program.
        task: Gives the example inputs and the dynamic dimensions.
        target: What exports and runs the model as far as each layer.
        inputs: What to run them on.
        floor_db: The floor that the whole file has missed.
    """
    plain = Task(example_inputs=task.example_inputs, dynamic=task.dynamic)
    try:
        graph: Any = model if isinstance(model, fx.GraphModule) else capture(model, plain).module()
    except ParedError:
        return ""
    cuts = [node.name for node in graph.graph.nodes if is_cut(node)]
    found: dict[str, float] = {}

    def parted(name: str) -> bool | None:
        """Whether the two have parted behind a node; None where the runtime cannot say."""
        if name not in found:
            try:
                found[name] = agreement(cut_off(graph, name), plain, target, inputs)
            except MeasureError:  # of a file whose outputs are not even finite
                found[name] = -math.inf
            except ParedError:
                return None
        return found[name] < floor_db

    first = first_true(cuts, parted)
    if first is None:
        return ""
    nodes = {node.name: node for node in graph.graph.nodes}
    before = [found[name] for name in cuts[: cuts.index(first)] if name in found]  # the last of them is the nearest
    layer = computed(nodes[first])
    until = f", {before[-1]:.1f} dB before" if before else ""
    return (
        f"they part at layer {owner(layer) or layer.name} ({operator(layer)}): {found[first]:.1f} dB behind it{until}"
    )


def first_true(names: list[str], test: Callable[[str], bool | None]) -> str | None:
    """By halving, the first name that a test holds for, if it does for all behind it; those it cannot judge are out."""
    names = list(names)
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) // 2
        holds = test(names[middle])
        if holds is None:
            del names[middle]
            high -= 1
        elif holds:
            high = middle
        else:
            low = middle + 1
    return names[low] if low < len(names) else None


def is_cut(node: fx.Node) -> bool:
    """True for a node whose value can be an output: computed, in float, and behind its rounding where it has one."""
    if any(operator(user).startswith(CONVERSIONS) for user in node.users):
        return False  # cut behind its rounding, so that its layer is in integers as in the whole
    source = computed(node)
    value = source.meta.get("val")
    return (
        source.op == "call_function" and isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 0
    )


def computed(node: fx.Node) -> fx.Node:
    """The operator whose value a conversion rounds; the node itself where it is none."""
    while operator(node).startswith(CONVERSIONS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def cut_off(graph: fx.GraphModule, name: str) -> fx.GraphModule:
    """A copy whose only output is one node's value."""
    with quiet():
        short = copy.deepcopy(graph)
    short.graph.output_node().args = ((next(node for node in short.graph.nodes if node.name == name),),)
    codegen: Any = short.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=tree_structure(0))
    short.graph.eliminate_dead_code()
    short.delete_all_unused_submodules()
    short.recompile()
    return short


def agreement(model: nn.Module, task: Task, target: Target, inputs: Inputs) -> float:
    """SQNR in dB of the file that a target makes of a model of one output, on some inputs."""
    comparison = Comparison()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / target.filename
        target.export(model, task, file)
        session = target.open(file, threads=1)
        (found,) = session.run(inputs.arrays([spec.name for spec in session.inputs]))
    with torch.no_grad():
        comparison.update(call(model, inputs).numpy(), found)
    sqnr_db = comparison.result().sqnr_db
    return math.inf if sqnr_db is None else sqnr_db
