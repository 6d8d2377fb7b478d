"""Labels through what sums over channels: convolutions, linear layers, matrix products, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from pared.graph.capture import operator, owner
from pared.graph.macs import shape_of
from pared.graph.reading import Atoms, Labels, Reading, Rule, argument
from pared.graph.rules_norm import with_dim

READS = "it reads channels that always stay"
LENGTHS = "it is a position, not a channel"


def convolution(reading: Reading, node: fx.Node) -> Labels:
    """Filters make channels, and read those of the input; grouped ones are told apart below."""
    x, weight = node.args[0], node.args[1]
    shape, sizes = shape_of(x), shape_of(weight)
    transposed = "transpose" in operator(node)
    groups = int(argument(node, 6, "groups", 1))
    labels, held = reading.labels(x), reading.labels(weight)
    channel = len(shape) - (len(sizes) - 2) - 1
    out, into = (1, 0) if transposed else (0, 1)
    reading.mark(weight, held.get(out), "out")
    reading.mark(weight, held.get(into), "in")
    for dim in range(2, len(sizes)):
        reading.pin(held.get(dim), LENGTHS)
    for dim in range(channel + 1, len(shape)):
        reading.pin(labels.get(dim), LENGTHS)
    if groups > 1:
        made = grouped(reading, node, labels.get(channel), groups, transposed)
    else:
        if shape[channel] > 1:
            reading.tie(labels.get(channel), held.get(into), READS)
        made = held.get(out)
    bias = argument(node, 2, "bias")
    if isinstance(bias, fx.Node) and shape_of(bias)[0] > 1:
        made = reading.join([made, reading.labels(bias).get(0)])
    kept = {dim: label for dim, label in labels.items() if dim < channel}
    return with_dim(kept, channel, made)


def grouped(reading: Reading, node: fx.Node, channel: Atoms | None, groups: int, transposed: bool) -> Atoms | None:
    """Label of the channels that a grouped convolution makes.

    Either the same index leaves in every group, or whole groups do: both give a grouped convolution again. The one with
    more units is taken; where each filter reads one channel of its own, that is the second.
    """
    weight = node.args[1]
    held, sizes = reading.labels(weight), shape_of(weight)
    inside = (sizes[0] if transposed else sizes[1] * groups) // groups
    outside = (sizes[1] * groups if transposed else sizes[0]) // groups
    # One dimension of the weight runs over all groups, the other is shared by them.
    over_all = held[0].reshape(groups, -1) if 0 in held else None
    if min(inside, outside) >= groups:
        mine, shared = (channel.reshape(groups, -1) if channel is not None else None), held.get(1)
        first = reading.tie_along(mine, 0) if mine is not None else None
        second = reading.tie_along(over_all, 0) if over_all is not None else None
        if transposed:
            reading.tie(first, second, READS)
            return None if shared is None else np.tile(shared, groups)
        reading.tie(first, shared, READS)
        return None if second is None else np.tile(second, groups)
    reading.pin(held.get(1), "it is shared by all groups, which leave as a whole")
    first = reading.tie_along(channel.reshape(groups, -1), 1) if channel is not None else None
    second = reading.tie_along(over_all, 1) if over_all is not None else None
    whole = reading.join([second, first], READS)
    if whole is None:
        return None
    # Where a filter reads one channel and is the only one to do so, surgery lets the groups follow the weight.
    if transposed or outside > 1 or inside > 1:
        reading.counts.append((owner(node), "groups", whole))
    return np.repeat(whole, outside)


def linear(reading: Reading, node: fx.Node) -> Labels:
    """Rows make channels, columns read them."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    shape, sizes, held = shape_of(x), shape_of(weight), reading.labels(weight)
    labels = reading.labels(x)
    reading.mark(weight, held.get(0), "out")
    reading.mark(weight, held.get(1), "in")
    if sizes[1] > 1:
        reading.tie(labels.get(len(shape) - 1), held.get(1), READS)
    made = held.get(0)
    if isinstance(bias, fx.Node) and sizes[0] > 1:
        made = reading.join([made, reading.labels(bias).get(0)])
    return with_dim(labels, len(shape) - 1, made)


def embedding(reading: Reading, node: fx.Node) -> Labels:
    """Rows are looked up by number, so that all of them stay."""
    weight, index = node.args[0], node.args[1]
    held = reading.labels(weight)
    reading.pin(held.get(0), "its rows are looked up by number")
    reading.mark(weight, held.get(1), "out")
    return with_dim(reading.labels(index), len(shape_of(index)), held.get(1))


def contract(
    reading: Reading,
    terms: Sequence[str],
    operands: Sequence[Any],
    result: str,
    batch: str | None = None,
    known: Sequence[Labels] | None = None,
) -> Labels:
    """Einstein's sum: each letter is one dimension; the same letter is the same label, broadcasting size 1.

    `known` are the labels of the operands, where they are not those of the graph.
    """
    found: dict[str, list[Atoms | None]] = {}
    known = known or [reading.labels(operand) for operand in operands]
    for term, operand, labels in zip(terms, operands, known, strict=True):
        for dim, (letter, size) in enumerate(zip(term, shape_of(operand), strict=True)):
            if size == 1:
                continue
            found.setdefault(letter, []).append(labels.get(dim))
            if letter not in result:
                reading.mark(operand, labels.get(dim), "in")
            elif sum(letter in other for other in terms) == 1:
                reading.mark(operand, labels.get(dim), "out")
    joined = {letter: reading.join(several, READS) for letter, several in found.items()}
    if batch is None:
        batch = "".join(letter for letter in result if all(letter in term for term in terms))
    inner = [label for letter, label in joined.items() if letter in batch and label is not None]
    others = [label for letter, label in joined.items() if letter not in batch and label is not None]
    reading.products.append((inner, others))
    return {dim: label for dim, letter in enumerate(result) if (label := joined.get(letter)) is not None}


LETTERS = "abcdefghijklmnopqrstuvw"


def matrix_product(reading: Reading, node: fx.Node) -> Labels:
    """matmul, mm, bmm: batch dimensions are aligned from the right."""
    return multiply(reading, node.args[0], node.args[1])


def multiply(reading: Reading, first: Any, second: Any) -> Labels:
    """Labels of a matrix product of two operands."""
    one, two = len(shape_of(first)), len(shape_of(second))
    left, right = ("xz" if one > 1 else "z"), ("zy" if two > 1 else "z")
    batch = LETTERS[: max(one, two, 2) - 2]
    left = batch[len(batch) - (one - len(left)) :] + left if one > 2 else left
    right = batch[len(batch) - (two - len(right)) :] + right if two > 2 else right
    result = batch + ("x" if one > 1 else "") + ("y" if two > 1 else "")
    return contract(reading, [left, right], [first, second], result, batch)


def product_and_sum(reading: Reading, node: fx.Node) -> Labels:
    """addmm, baddbmm: a matrix product and something that is broadcast to it."""
    made, bias, shape = multiply(reading, node.args[1], node.args[2]), node.args[0], shape_of(node)
    held, sizes = reading.labels(bias), shape_of(bias)
    for dim, size in enumerate(sizes):
        place = dim + len(shape) - len(sizes)
        if size > 1:
            made = with_dim(made, place, reading.join([made.get(place), held.get(dim)]))
    return made


def einsum(reading: Reading, node: fx.Node) -> Labels:
    """An equation without ellipsis; of one with, nothing is known."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (list, tuple)) or "." in equation or "->" not in equation:
        for operand in operands if isinstance(operands, (list, tuple)) else ():
            reading.pin_all(reading.labels(operand), "its equation is not read")
        return {}
    left, result = equation.split("->")
    terms = left.split(",")
    if any(len(set(term)) < len(term) for term in terms):
        for operand in operands:
            reading.pin_all(reading.labels(operand), "it takes a diagonal")
        return {}
    return contract(reading, terms, operands, result)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys([f"aten.conv{n}d" for n in (1, 2, 3)], convolution),
    **dict.fromkeys([f"aten.conv_transpose{n}d" for n in (1, 2, 3)], convolution),
    "aten.linear": linear,
    "aten.embedding": embedding,
    **dict.fromkeys(["aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot"], matrix_product),
    **dict.fromkeys(["aten.addmm", "aten.baddbmm"], product_and_sum),
    "aten.einsum": einsum,
}
