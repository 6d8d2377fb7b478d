"""Folding of what does not depend on the input, where it stands between a layer and its integers.

A weight or bias that a forward computes from stored tensors (a slice of a packed projection, a bias with a part set to
zero, a weight normalization) is the same at every call, and so is what a layer makes of a constant (the perceptron of a
relative position bias). Both are computed once and stored. Other constants stay computed: their results may be larger.
"""

from __future__ import annotations

import operator as python_operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from pared.graph.capture import operator
from pared.quantize.folding import CONVOLUTIONS, LINEAR, TRANSPOSED, store, tensor_of
from pared.quantize.placement import layer

WEIGHTED = CONVOLUTIONS | TRANSPOSED | {LINEAR}  # their second and third argument are a weight and a bias


def fold_constants(graph: fx.GraphModule) -> list[str]:
    """Store computed weights and biases, and the results of layers that do not depend on the input, in place.

    Args:
        graph: A captured graph that owns its tensors.

    Returns:
        Names of the layers whose result is stored instead; they are in the graph no more.
    """
    constant = constants(graph)
    layers = [node for node in graph.graph.nodes if operator(node) in WEIGHTED]
    fixed = [node for node in layers if node in constant]
    # Of layers on top of one another the last is all that is needed.
    results = [node for node in fixed if not all(leads_to_fixed(user, set(fixed), constant) for user in node.users)]
    inputs = [arg for node in layers if node not in constant for arg in node.args[1:3]]
    computed = [arg for arg in inputs if isinstance(arg, fx.Node) and arg in constant and arg.op != "get_attr"]
    values: dict[fx.Node, Any] = {}
    for node in dict.fromkeys([*computed, *results]):
        value = value_of(graph, node, values)
        if isinstance(value, Tensor):
            sources = {str(source.target) for source in ancestors(node) if source.op == "get_attr"}
            with graph.graph.inserting_before(node):
                stored = store(
                    graph, f"{node.name}_stored", value.clone(), like=sources.pop() if len(sources) == 1 else ""
                )
            node.replace_all_uses_with(stored)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return [layer(node) for node in fixed]


def constants(graph: fx.GraphModule) -> set[fx.Node]:
    """Stored tensors, and what is computed from them and from numbers alone, without chance."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(source in found for source in node.all_input_nodes) and settled(node)
        ):
            found.add(node)
    return found


def settled(node: fx.Node) -> bool:
    """True for operators that give the same result every time, and change nothing else."""
    if node.target is python_operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def leads_to_fixed(node: fx.Node, fixed: set[fx.Node], constant: set[fx.Node]) -> bool:
    """True where all that comes of a constant goes into one of the layers that are stored."""
    if node in fixed:
        return True
    return node in constant and bool(node.users) and all(leads_to_fixed(user, fixed, constant) for user in node.users)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from."""
    found: set[fx.Node] = set()
    left = [node]
    while left:
        for source in left.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                left.append(source)
    return found


def value_of(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a constant node computes, by running it; `values` remembers."""
    if node not in values:
        if node.op == "get_attr":
            values[node] = tensor_of(graph, node)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: value_of(graph, source, values))
            function: Any = node.target
            with torch.no_grad():
                values[node] = function(*args, **kwargs)
    return values[node]
