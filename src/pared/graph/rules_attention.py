"""Labels through attention as one operator, and where whole heads are told from what is inside a head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from pared.graph.macs import shape_of
from pared.graph.reading import Atoms, Labels, Mode, Reading, Rule, argument
from pared.graph.rules_contraction import contract
from pared.graph.units import components

LETTERS = "abcdefghijklm"
POSITION = "attention weighs its positions"


def attention(reading: Reading, node: fx.Node) -> Labels:
    """softmax(q k' s + mask) v: heads are a batch dimension, positions stay, the inside of a head is summed over."""
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    ndim = len(shape_of(query))
    if argument(node, 7, "enable_gqa", False):
        for operand in (query, key, value):
            reading.pin(reading.labels(operand).get(ndim - 3), "several heads of its queries share one of its keys")
    batch = LETTERS[: ndim - 2]
    # Four letters more: positions of queries (x) and of keys (y), the inside of a key (z) and of a value (v).
    scores = contract(reading, [batch + "xz", batch + "yz"], [query, key], batch + "xy", batch)
    if argument(node, 6, "scale") is None and ndim - 1 in reading.labels(query):
        reading.blur(reading.labels(query)[ndim - 1], "the scale of the attention")
    reading.pin(scores.get(ndim - 1), POSITION)
    if isinstance(mask, fx.Node):
        held, sizes = reading.labels(mask), shape_of(mask)
        for dim, size in enumerate(sizes):
            place = dim + ndim - len(sizes)
            if size > 1:
                reading.join([scores.get(place), held.get(dim)])
    mixed = contract(reading, [batch + "yv"], [value], batch + "yv", batch)
    reading.pin(mixed.get(ndim - 2), POSITION)
    result: Labels = {}
    for dim in range(ndim - 2):
        label = reading.join([scores.get(dim), mixed.get(dim)]) if shape_of(node)[dim] > 1 else None
        if label is not None:
            result[dim] = label
    if ndim - 2 in scores:
        result[ndim - 2] = scores[ndim - 2]
    if ndim - 1 in mixed:
        result[ndim - 1] = mixed[ndim - 1]
    return result


def free_dimensions(scouted: Reading, mode: Mode) -> dict[tuple[str, int], int]:
    """For each reshape that takes attention heads apart, the dimension of which whole indices shall leave.

    In attention, one dimension of a split (the heads) is a batch dimension of a product and another one (the inside of
    a head) is not.

    Args:
        scouted: A reading in which each part of a split has a label of its own.
        mode: "heads" removes whole heads, "head_dim" the same indices of every head.
    """
    root = components(scouted.atoms, scouted.edges)
    tokens: dict[int, set[tuple[tuple[str, int], int]]] = {}
    for key, split in scouted.splits.items():
        for part, label in split.parts.items():
            for atom in set(root[label].tolist()):
                tokens.setdefault(atom, set()).add((key, part))

    def carried(labels: list[Atoms]) -> set[tuple[tuple[str, int], int]]:
        return {token for label in labels for atom in set(root[label].tolist()) for token in tokens.get(atom, ())}

    found: dict[tuple[str, int], int] = {}
    for batch, others in scouted.products:
        inside = carried(others)
        for key, part in sorted(carried(batch)):
            for other in sorted(one for same, one in inside if same == key and one != part):
                sizes = scouted.splits[key].sizes
                found.setdefault(key, part if mode == "heads" and sizes[part] > 1 else other)
    return found


RULES: Mapping[str, Rule] = {"aten.scaled_dot_product_attention": attention}


def any_product(operators: set[str]) -> bool:
    """True where a graph multiplies tensors with one another, as attention does."""
    names = {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum", *RULES}
    return bool(names & operators)
