"""Placement: which tensors of a captured graph become integers, by the rules of the runtime's `Scheme`.

A layer runs in integers where the runtime finds quantized tensors on every side of it. So quantization starts at the
layers with weights (anchors), joins the operators between them (residual adds, concats) where these lead to an anchor,
and follows operators that only move values, with one range for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from pared.errors import PlanError, nearest
from pared.graph.capture import operator, owner
from pared.step import Scheme, Skip

# Moves values, or does nothing in eval mode, without a quantization of its own around it.
TRANSPARENT = frozenset({"aten.dropout", "aten.alias", "aten.detach", "aten.clone", "aten.contiguous", "aten.pad"})
# Has parameters that the schemes could quantize, on some runtime or in a later version: a candidate, so never silent.
CANDIDATES = frozenset(
    {
        "aten.embedding",
        "aten.conv_transpose1d",
        "aten.conv_transpose2d",
        "aten.conv_transpose3d",
        "aten.lstm",
        "aten.gru",
        "aten.rnn_tanh",
        "aten.rnn_relu",
        "aten.bilinear",
        "aten.bmm",
        "aten.matmul",
        "aten.mm",
        "aten.addmm",
        "aten.baddbmm",
        "aten.einsum",
        "aten.scaled_dot_product_attention",
    }
)
REFUSED = "the runtime does not take it in integers: kept in float"  # of `Context.refused`
NAMED_BY_LAYER = frozenset({"aten.linear", "aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu", "aten.embedding"})


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A layer that will run in integers."""

    node: str
    module: str
    weight: str
    operator: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """What becomes integers.

    Attributes:
        anchors: Layers with weights, in graph order.
        joins: Nodes of joining operators that run in integers.
        tensors: Node of each activation that is quantized -> node whose range it uses.
        skips: Candidates left in float, with the reason.
    """

    anchors: tuple[Anchor, ...]
    joins: tuple[str, ...]
    tensors: dict[str, str]
    skips: tuple[Skip, ...]


def place(graph: fx.GraphModule, scheme: Scheme, *, include: tuple[str, ...], exclude: tuple[str, ...]) -> Placement:
    """Decide which layers and activations of a graph with folded batch norms become integers.

    Args:
        graph: Not changed.
        scheme: The runtime's rules.
        include: Glob patterns of module names; a layer must match one.
        exclude: Glob patterns of module names; a layer must match none.

    Raises:
        PlanError: A pattern matches no layer.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    candidates = [node for node in nodes.values() if operator(node) in scheme.weighted | CANDIDATES]
    check_patterns([layer(node) for node in candidates], include=include, exclude=exclude)
    anchors, skips = anchors_of(nodes, scheme, include, exclude)
    joins = active_joins(nodes, {anchor.node for anchor in anchors}, scheme)
    for node in nodes.values():
        if operator(node) in scheme.joining and node.name not in joins:
            skips.append(Skip(label(node), "no integer layer on both sides: it would only add conversions"))
    roots = quantized_tensors(nodes, [anchor.node for anchor in anchors], joins, scheme)
    return Placement(tuple(anchors), tuple(joins), roots, tuple(skips))


def anchors_of(
    nodes: dict[str, fx.Node], scheme: Scheme, include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[list[Anchor], list[Skip]]:
    """The candidates that become integers, and those that do not, with the reason."""
    anchors, skips = [], []
    for node in nodes.values():
        if operator(node) not in scheme.weighted | CANDIDATES:
            continue
        reason = why_not(node, scheme, include, exclude)
        if reason is None:
            weight: Any = node.args[1]
            name = str(weight.meta.get("stands_for") or weight.target)
            anchors.append(Anchor(node.name, layer(node), name, operator(node)))
        else:
            skips.append(Skip(label(node), reason))
    return anchors, skips


def label(node: fx.Node) -> str:
    """What a skipped operator is called: its layer, and for operators that are no layers their name too."""
    named = operator(node) in NAMED_BY_LAYER or is_convolution(node)
    return layer(node) if named and layer(node) else f"{owner(node) or '(root)'}:{node.name}"


def layer(node: fx.Node) -> str:
    """Dotted name of the module that a weighted operator stands for: the holder of its weight, or the one that ran it.

    A forward may use the weight of a module inside its own; tied weights are held by a module elsewhere.
    """
    ran = owner(node)
    weight = node.args[1] if len(node.args) > 1 else None
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        holder = str(weight.meta.get("stands_for") or weight.target).rpartition(".")[0]
        if holder.startswith(f"{ran}." if ran else ""):
            return holder
    return ran


def is_convolution(node: fx.Node) -> bool:
    return operator(node).startswith("aten.conv")


def check_patterns(names: list[str], **settings: Iterable[str]) -> None:
    """Raise `PlanError` for a pattern of a setting that matches nothing: a misspelt name must not be silent."""
    for setting, patterns in settings.items():
        for pattern in patterns:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
                raise PlanError(f"{setting}={pattern!r} matches no layer; {nearest(pattern, names)}")


def left_out(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """Why the caller's patterns leave a layer out, or None."""
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not in include"
    excluded = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
    return None if excluded is None else f"excluded by {excluded!r}"


def why_not(node: fx.Node, scheme: Scheme, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """The reason for leaving a candidate in float, or None."""
    out = left_out(layer(node), include, exclude)
    if out is not None:
        return out
    if operator(node) not in scheme.weighted:
        return f"{operator(node)} does not run in integers here"
    weight, x = node.args[1], node.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is computed, not stored"
    if len(node.args) > 2 and isinstance(node.args[2], fx.Node) and node.args[2].op != "get_attr":
        return "its bias is computed, not stored"
    if not isinstance(x, fx.Node) or x.op == "get_attr":
        return "its input is a constant"
    value = x.meta.get("val")
    if value is not None and value.dtype != torch.float32:
        return f"its input is {value.dtype}; only float32 is quantized"
    if value is not None and is_convolution(node) and value.ndim > 2 and value.shape[1] < scheme.least_inputs:
        return f"the runtime computes integer convolutions of fewer than {scheme.least_inputs} input channels wrongly"
    others = {operator(user) for user in weight.users} - scheme.weighted
    if others:
        return f"its weight is shared with {', '.join(sorted(others))}, which stays in float"
    return None


def activations(node: fx.Node) -> list[fx.Node]:
    """Inputs of an operator that are computed values, lists flattened."""
    if is_convolution(node) or operator(node) == "aten.linear":
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    return [arg for arg in node.all_input_nodes if arg.op != "get_attr"]


def tensor_after(node: fx.Node, scheme: Scheme) -> fx.Node:
    """The tensor that leaves an integer operator: its own, or that of the activation fused into it."""
    users = list(node.users)
    if len(users) != 1 or operator(users[0]) not in scheme.absorbed or users[0].args[0] is not node:
        return node
    bounds = clip_of(users[0])
    # A range always holds 0, so the quantization can only do the work of a clip that lets 0 pass.
    return users[0] if bounds is not None and bounds[0] <= 0 <= bounds[1] else node


def clip_of(node: fx.Node) -> tuple[float, float] | None:
    """Bounds of an activation that only clips, by numbers; None for every other operator."""
    name = operator(node)
    if name == "aten.relu":
        return 0.0, math.inf
    if name == "aten.relu6":
        return 0.0, 6.0
    if name not in {"aten.hardtanh", "aten.clamp"}:
        return None
    given = [*node.args[1:3], None, None][:2]
    default = (-1.0, 1.0) if name == "aten.hardtanh" else (-math.inf, math.inf)
    low, high = (end if bound is None else bound for bound, end in zip(given, default, strict=True))
    return (float(low), float(high)) if isinstance(low, (int, float)) and isinstance(high, (int, float)) else None


def behind(node: fx.Node) -> fx.Node:
    """The tensor that an operator's input stands for, through operators that need no quantization of their own."""
    while operator(node) in TRANSPARENT and isinstance(node.args[0], fx.Node) and harmless(node):
        node = node.args[0]
    return node


def harmless(node: fx.Node) -> bool:
    """False for a padding with something else than zeros, and for one that no convolution can take in."""
    if operator(node) != "aten.pad":
        return True
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else None
    return mode == "constant" and value in (None, 0, 0.0) and all(is_convolution(user) for user in node.users)


def active_joins(nodes: dict[str, fx.Node], anchors: set[str], scheme: Scheme) -> list[str]:
    """Joining operators with an anchor somewhere behind every input, and one ahead, through integer operators only."""

    def comes_from_integers(node: fx.Node, memo: dict[str, bool]) -> bool:
        node = behind(node)
        if node.name not in memo:
            name = operator(node)
            inputs = activations(node)
            if node.name in anchors:
                memo[node.name] = True
            elif name == "aten.add":
                # An addend that a float operator made would be rounded for the sum alone, and a residual stream loses
                # more by that than the sum gains. One that also goes into an integer layer is rounded anyhow.
                memo[node.name] = suits(node) and all(
                    comes_from_integers(arg, memo) or feeds_an_anchor(arg) for arg in inputs
                )
            elif name in scheme.joining:
                memo[node.name] = suits(node) and any(comes_from_integers(arg, memo) for arg in inputs)
            elif name in scheme.following | scheme.absorbed:
                memo[node.name] = bool(inputs) and comes_from_integers(inputs[0], memo)
            else:
                memo[node.name] = False
        return memo[node.name]

    def feeds_an_anchor(node: fx.Node) -> bool:
        return any(
            user.name in anchors or (operator(user) in TRANSPARENT and feeds_an_anchor(user)) for user in node.users
        )

    def leads_to_integers(node: fx.Node, memo: dict[str, bool]) -> bool:
        if node.name not in memo:
            memo[node.name] = any(
                user.name in anchors
                or (
                    (operator(user) in scheme.following | scheme.absorbed | TRANSPARENT or user.name in joining)
                    and leads_to_integers(user, memo)
                )
                for user in node.users
            )
        return memo[node.name]

    backward: dict[str, bool] = {}
    # Graph order keeps the recursion shallow: what comes before is in the memo already.
    joining = {
        name
        for name, node in nodes.items()
        if operator(node) in scheme.joining and suits(node) and comes_from_integers(node, backward)
    }
    forward: dict[str, bool] = {}
    for node in reversed(list(nodes.values())):
        leads_to_integers(node, forward)
    return [name for name in nodes if name in joining and forward[name]]


def suits(node: fx.Node) -> bool:
    """True where every operand is a computed float32 tensor: constants and scalars have no range to calibrate."""
    operands = [a for arg in node.args[:2] for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
    if operator(node) not in {"aten.add", "aten.mul", "aten.cat"}:
        operands = operands[:1]
    elif operator(node) == "aten.cat":
        operands = list(node.args[0])  # type: ignore[arg-type]
    if not all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in operands):
        return False
    values = [arg.meta.get("val") for arg in operands if isinstance(arg, fx.Node)]
    return all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)


def accumulated(node: fx.Node, inputs: list[fx.Node], anchors: list[str]) -> fx.Node | None:
    """The last operand that is a convolution for this operator alone: its accumulator takes the other operand in."""
    if len(set(inputs)) < 2 or not set(inputs) <= set(node.all_input_nodes):
        return None
    own = [arg for arg in inputs if arg.name in anchors and is_convolution(arg) and len(arg.users) == 1]
    return max(own, default=None)


def quantized_tensors(
    nodes: dict[str, fx.Node], anchors: list[str], joins: list[str], scheme: Scheme
) -> dict[str, str]:
    """Activations to quantize, each with the node whose range it uses."""
    wanted: dict[str, None] = {}
    for name in [*anchors, *joins]:
        node = nodes[name]
        inputs = [behind(arg) for arg in activations(node)]
        inside = accumulated(node, inputs, anchors) if operator(node) in scheme.summed else None
        wanted |= dict.fromkeys(arg.name for arg in inputs if arg is not inside)
        after = tensor_after(node, scheme)
        # Some runtimes fuse a float clip behind an integer layer into the layer, which draws it into float.
        drawn = after is not node and not scheme.float_activations
        if operator(node) in scheme.whole or name in joins or drawn:
            wanted[after.name] = None
    roots: dict[str, str] = {}
    for name in list(wanted):
        chain = [nodes[name]]
        # A tensor that an operator only moved shares the range of where it came from, which is quantized too.
        while operator(chain[-1]) in scheme.following and isinstance(chain[-1].args[0], fx.Node):
            source = behind(chain[-1].args[0])
            value = source.meta.get("val")
            if source.op == "get_attr" or (isinstance(value, torch.Tensor) and value.dtype != torch.float32):
                break
            chain.append(source)
        tensors = [node.name for node in chain if isinstance(node.meta.get("val"), torch.Tensor)]
        roots |= dict.fromkeys(tensors, tensors[-1])
    return {name: roots[name] for name in nodes if name in roots}
