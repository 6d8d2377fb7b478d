"""Labels through attention as one operator, and where whole heads are told from what is inside a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from pared.graph.capture import operator, owner
from pared.graph.macs import shape_of
from pared.graph.reading import Atoms, Heads, Labels, Mode, Reading, Rule, Split, argument
from pared.graph.rules_contraction import contract
from pared.graph.units import components

LETTERS = "abcdefghijklm"
POSITION = "attention weighs its positions"


def attention(reading: Reading, node: fx.Node) -> Labels:
    """softmax(q k' s + mask) v: heads are a batch dimension, positions stay, the inside of a head is summed over."""
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    ndim = len(shape_of(query))
    known = [dict(reading.labels(operand)) for operand in (query, key, value)]
    for labels, operand in zip(known[1:], (key, value), strict=True):
        if argument(node, 7, "enable_gqa", False) and ndim - 3 in labels:
            # Several heads of the queries share one of the keys, and leave with it.
            times = shape_of(query)[ndim - 3] // shape_of(operand)[ndim - 3]
            labels[ndim - 3] = np.repeat(labels[ndim - 3], times)
    batch = LETTERS[: ndim - 2]
    # Four letters more: positions of queries (x) and of keys (y), the inside of a key (z) and of a value (v).
    scores = contract(reading, [batch + "xz", batch + "yz"], [query, key], batch + "xy", batch, known[:2])
    if argument(node, 6, "scale") is None and ndim - 1 in reading.labels(query):
        reading.blur(reading.labels(query)[ndim - 1], "the scale of the attention")
    reading.pin(scores.get(ndim - 1), POSITION)
    if isinstance(mask, fx.Node):
        held, sizes = reading.labels(mask), shape_of(mask)
        for dim, size in enumerate(sizes):
            place = dim + ndim - len(sizes)
            if size > 1:
                reading.join([scores.get(place), held.get(dim)])
    mixed = contract(reading, [batch + "yv"], [value], batch + "yv", batch, known[2:])
    reading.pin(mixed.get(ndim - 2), POSITION)
    result: Labels = {}
    for dim, size in enumerate(shape_of(node)[: ndim - 2]):
        # One head of keys or values may serve all queries.
        sides = [(scores, query), (scores, key), (mixed, value)]
        found = [labels.get(dim) for labels, operand in sides if shape_of(operand)[dim] > 1]
        label = reading.join(found) if size > 1 else None
        if label is not None:
            result[dim] = label
    if ndim - 2 in scores:
        result[ndim - 2] = scores[ndim - 2]
    if ndim - 1 in mixed:
        result[ndim - 1] = mixed[ndim - 1]
    return result


def heads_of(scouted: Reading, mode: Mode) -> Heads:
    """For each reshape that takes attention heads apart, the dimension of which whole indices leave, and the other.

    In attention, one dimension of a split (the heads) is a batch dimension of a product and another one (the inside of
    a head) is not.

    Args:
        scouted: A reading in which each part of a split has a label of its own.
        mode: "heads" removes whole heads, "head_dim" the same indices of every head.
    """
    root = components(scouted.atoms, scouted.edges)
    tokens: dict[int, set[tuple[tuple[str, int], int]]] = {}

    def carried(labels: list[Atoms]) -> set[tuple[tuple[str, int], int]]:
        return {token for label in labels for atom in set(root[label].tolist()) for token in tokens.get(atom, ())}

    for key, split in scouted.splits.items():
        # What is taken apart twice, such as batch and heads in one dimension, is part of both splits.
        before = carried([split.whole])
        for part, label in split.parts.items():
            for atom in set(root[label].tolist()):
                tokens.setdefault(atom, set()).update(before | {(key, part)})

    found: dict[tuple[str, int], tuple[int, int]] = {}
    for batch, others in scouted.products:
        inside = carried(others)
        for key, heads in sorted(carried(batch)):
            for width in sorted(one for same, one in inside if same == key and one != heads):
                found.setdefault(key, (heads, width) if mode == "heads" else (width, heads))
    return found


def equal_widths(reading: Reading) -> list[tuple[Atoms, Atoms]]:
    """Labels of an attention's input and of its inside, where both are equally wide.

    Forwards often take the one width for the other, so that they must stay equal.
    """
    return [(label, split.whole) for split, label in read_by(reading) if label is not None]


def pin_fixed_widths(reading: Reading, model: nn.Module) -> None:
    """Pin the inside of every `nn.MultiheadAttention` whose input always stays: it refuses to be narrower than that."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for split, label in list(read_by(reading)):
        module = modules.get(owner(split.node))
        # With a weight for keys and one for values of their own, these may be as wide as they like.
        if label is None and isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            reading.pin(split.whole, "nn.MultiheadAttention is as wide as its input, which always stays", exact=True)


def read_by(reading: Reading) -> Iterator[tuple[Split, Atoms | None]]:
    """Each attention's split, with the label of the equally wide input of its projection; None where that stays."""
    for key, (free, whole) in reading.free.items():
        split = reading.splits.get(key)
        if split is None or free not in split.sizes or whole not in split.sizes:
            continue
        width = min(split.sizes[free] * split.sizes[whole], len(split.whole))
        node: Any = split.node
        while isinstance(node, fx.Node) and owner(node).startswith(owner(split.node)):
            node = node.args[0] if node.args else None
            if isinstance(node, fx.Node) and operator(node) in PROJECTIONS:
                x = node.args[1 if operator(node) == "aten.addmm" else 0]
                dim = 1 if "conv" in operator(node) else len(shape_of(x)) - 1
                if shape_of(x)[dim] == width:
                    yield split, reading.labels(x).get(dim)
                    break


PROJECTIONS = ("aten.linear", "aten.addmm", "aten.matmul", "aten.mm", "aten.conv1d", "aten.conv2d", "aten.conv3d")
RULES: Mapping[str, Rule] = {"aten.scaled_dot_product_attention": attention}


def any_product(operators: set[str]) -> bool:
    """True where a graph multiplies tensors with one another, as attention does."""
    names = {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum", *RULES}
    return bool(names & operators)
