"""Channel groups of a captured model: walks its graph with one rule an operator. Reads only, runs nothing.

An operator without a rule pins all that it touches: its channels are then skipped, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from pared.graph import (
    rules_attention,
    rules_contraction,
    rules_norm,
    rules_parts,
    rules_pointwise,
    rules_recurrent,
    rules_shape,
)
from pared.graph.capture import operator
from pared.graph.channels import Channels
from pared.graph.macs import shape_of
from pared.graph.reading import Heads, Labels, Mode, Reading, Rule, Tensor, Value, is_tensor, tensors_of
from pared.graph.units import Modules, collect

RULES: Mapping[str, Rule] = {
    **rules_pointwise.RULES,
    **rules_norm.RULES,
    **rules_contraction.RULES,
    **rules_shape.RULES,
    **rules_parts.RULES,
    **rules_attention.RULES,
    **rules_recurrent.RULES,
}
HELD = (InputKind.PARAMETER, InputKind.BUFFER)
OUTPUT = "its channels are the model's output"


def find_channels(
    program: ExportedProgram,
    model: nn.Module,
    *,
    attention: Mode = "heads",
    pinned: Mapping[str, str] | None = None,
) -> Channels:
    """Which channels of a model can only leave together.

    Args:
        program: The model as `capture` gives it.
        model: The model itself, for the names of its modules and tensors.
        attention: Whether whole heads leave an attention, which is exact, or the same indices of every head.
        pinned: Tensors whose channels shall stay, with the reason.
    """
    free: Heads = {}
    if rules_attention.any_product({operator(node) for node in program.graph.nodes}):
        scouted = read(program, model, Reading(scouting=True), {})
        free = rules_attention.heads_of(scouted, attention)
    reading = read(program, model, Reading(free=free), pinned or {})
    rules_attention.pin_fixed_widths(reading, model)
    return collect(reading, program, model, rules_attention.equal_widths(reading))


def read(program: ExportedProgram, model: nn.Module, reading: Reading, pinned: Mapping[str, str]) -> Reading:
    """Walk the graph once."""
    label_tensors(program, model, reading)
    for tensor in reading.tensors:
        if tensor.name in pinned:
            reading.pin(tensor.atoms, pinned[tensor.name], exact=True)
    live = used_nodes(program)
    for node in program.graph.nodes:
        reading.node = node
        if node.op == "call_function" and node in live and is_tensor(node.meta.get("val")):
            reading.values[node] = one(reading, node)
        elif node.op == "output":
            for arg in node.all_input_nodes:
                for label in reading.labels(arg).values():
                    reading.pin(label, OUTPUT, exact=True)
    return reading


def used_nodes(program: ExportedProgram) -> set[fx.Node]:
    """Nodes that the outputs depend on; the rest, as attention weights that nobody asked for, ties nothing."""
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return live


def one(reading: Reading, node: fx.Node) -> Value:
    """Labels of what an operator makes."""
    args = tensors_of(node)
    if args and all(arg in reading.weights for arg in args):
        reading.weights.add(node)
    rule = RULES.get(operator(node))
    if rule is not None:
        return rule(reading, node)
    for arg in args:
        held = reading.values.get(arg, {})
        for labels in held if isinstance(held, list) else [held]:
            for label in labels.values():
                reading.pin(label, f"pared has no rule for the operator {operator(node)}", exact=True)
    values = node.meta["val"]
    return [{} for _ in values] if isinstance(values, (list, tuple)) else {}


def label_tensors(program: ExportedProgram, model: nn.Module, reading: Reading) -> None:
    """Give every index of every parameter and buffer an atom, once for each tensor, in the order of their first use."""
    modules = Modules(model)
    names = modules.tensors
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind in HELD}
    live = used_nodes(program)
    used = dict.fromkeys(arg for node in program.graph.nodes if node in live for arg in arguments_in_order(node))
    seen: dict[str, Labels] = {}
    for node in used:
        if node.op != "placeholder" or targets.get(node.name) not in names:
            continue
        name = names[str(targets[node.name])]
        if name not in seen:
            shape = shape_of(node)
            if any(isinstance(modules.named[holder], _ConvNd) for holder in modules.holders[name]):
                shape = shape[:2]  # positions in a kernel are no channels
            seen[name] = {dim: reading.fresh(size) for dim, size in enumerate(shape) if size > 1}
            reading.tensors += [Tensor(name, dim, atoms) for dim, atoms in seen[name].items()]
        reading.values[node] = seen[name]
        reading.weights.add(node)


def arguments_in_order(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments of a node, as they stand there."""
    return [arg for arg in tree_leaves((node.args, node.kwargs)) if isinstance(arg, fx.Node)]
