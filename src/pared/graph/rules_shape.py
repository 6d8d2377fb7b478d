"""Labels through operators that keep all values and only say anew where they stand, or repeat them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from pared.graph.capture import operator
from pared.graph.macs import Shape, shape_of
from pared.graph.reading import Atoms, Labels, Reading, Rule, Split, argument, dims_of
from pared.graph.rules_norm import with_dim

MIXED = "it mixes two dimensions that both hold channels"


def reshape(reading: Reading, node: fx.Node) -> Labels:
    """All that keeps the order of the values: the smallest runs of dimensions with equal products go together."""
    labels, before, after = reading.labels(node.args[0]), shape_of(node.args[0]), shape_of(node)
    result: Labels = {}
    for old, new in blocks(before, after):
        held = [dim for dim in old if dim in labels]
        for dim in held[:]:
            # What is only repeated, and has met nothing yet, can as well stay.
            if len(held) > 1 and reading.is_loose(labels[dim]):
                reading.pin(labels[dim], MIXED)
                held.remove(dim)
        if len(held) > 1:
            for dim in held:
                if reading.scouting:
                    continue
                reading.pin(labels[dim], MIXED)
            continue
        if not held:
            continue
        if len(old) == len(new) == 1:
            result[new[0]] = labels[held[0]]
            continue
        result |= regroup(reading, node, labels[held[0]], held[0], [before[dim] for dim in old], old, new)
    return result


def blocks(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions, of size above 1, before and after, that hold the same values.

    Example:
        >>> blocks((2, 12, 1, 5), (2, 3, 4, 5))
        [([0], [0]), ([1], [1, 2]), ([3], [3])]
    """
    olds = [dim for dim, size in enumerate(before) if size != 1]
    news = [dim for dim, size in enumerate(after) if size != 1]
    found, i, j = [], 0, 0
    while i < len(olds) and j < len(news):
        first, second = i, j
        left, right = before[olds[i]], after[news[j]]
        i, j = i + 1, j + 1
        while left != right and (i < len(olds) or j < len(news)):
            if left < right:
                left, i = left * before[olds[i]], i + 1
            else:
                right, j = right * after[news[j]], j + 1
        found.append((olds[first:i], news[second:j]))
    return found


def regroup(
    reading: Reading, node: fx.Node, label: Atoms, dim: int, sizes: list[int], old: list[int], new: list[int]
) -> Labels:
    """Labels after a block of dimensions, one of which has a label, becomes other dimensions of as many values.

    Kept indices must form a product, so where the label varies along several dimensions, one of them stays free and
    the others leave or stay as a whole.
    """
    after = shape_of(node)
    frame = [1] * len(old)
    frame[old.index(dim)] = -1
    grid = np.broadcast_to(label.reshape(frame), sizes).reshape([after[d] for d in new])
    varying = [axis for axis in range(len(new)) if (grid != grid.take([0], axis)).any()]
    if not varying:
        reading.pin(label, "all of its channels leave together")
        return {}
    if len(varying) == 1:
        return {new[varying[0]]: straight(grid, varying[0])}
    parts = {new[axis]: after[new[axis]] for axis in varying}
    if reading.scouting:
        made = {part: reading.fresh(size) for part, size in parts.items()}
        reading.splits[(node.name, dim)] = Split(node, label, made, parts)
        return made
    free, _ = reading.free.get((node.name, dim), (None, None))
    if free not in parts:
        free = max(parts, key=lambda part: (parts[part], part))
    for axis in reversed(range(len(new))):
        if new[axis] != free:
            grid = np.expand_dims(reading.tie_along(grid, axis), axis)
    made = {free: grid.ravel()}
    reading.splits[(node.name, dim)] = Split(node, label, made, parts)
    return made


def straight(grid: Atoms, axis: int) -> Atoms:
    """The line through the origin of a grid along one axis."""
    place: list[Any] = [0] * grid.ndim
    place[axis] = slice(None)
    line: Atoms = grid[tuple(place)].copy()
    return line


def permute(reading: Reading, node: fx.Node) -> Labels:
    """Any change of the order of dimensions."""
    labels, ndim, name = reading.labels(node.args[0]), len(shape_of(node.args[0])), operator(node)
    order = list(range(ndim))
    if name == "aten.permute":
        order = dims_of(argument(node, 1, "dims"), ndim)
    elif name in ("aten.movedim", "aten.moveaxis"):
        source, target = dims_of(argument(node, 1, "source"), ndim), dims_of(argument(node, 2, "destination"), ndim)
        order = [dim for dim in order if dim not in source]
        for place, dim in sorted(zip(target, source, strict=True)):
            order.insert(place, dim)
    elif ndim > 1:
        pair = (-1, -2) if name in ("aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint") else node.args[1:3]
        first, second = dims_of(list(pair), ndim)
        order[first], order[second] = order[second], order[first]
    return {place: labels[dim] for place, dim in enumerate(order) if dim in labels}


def expand(reading: Reading, node: fx.Node) -> Labels:
    """What is repeated has no channels of its own, so that it follows whatever it meets."""
    labels, before = reading.labels(node.args[0]), shape_of(node.args[0])
    sizes = node.meta["val"].shape
    result: Labels = {}
    for dim, size in enumerate(sizes):
        local = dim - len(sizes) + len(before)
        if local >= 0 and before[local] != 1:
            if local in labels:
                result[dim] = labels[local]
        elif isinstance(size, int) and size > 1:
            result[dim] = reading.loose(size)
    return result


def repeat(reading: Reading, node: fx.Node) -> Labels:
    """Copies side by side: the same index of each leaves together."""
    labels, before, after = reading.labels(node.args[0]), shape_of(node.args[0]), shape_of(node)
    shift = len(after) - len(before)
    return {dim + shift: np.tile(label, after[dim + shift] // before[dim]) for dim, label in labels.items()}


def repeat_interleave(reading: Reading, node: fx.Node) -> Labels:
    """Each index several times in a row."""
    labels, shape, times = reading.labels(node.args[0]), shape_of(node.args[0]), argument(node, 1, "repeats")
    dim = argument(node, 2, "dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        reading.pin_all(labels, "it repeats its channels")
        return {}
    dim %= len(shape)
    return {**labels, dim: np.repeat(labels[dim], times)} if dim in labels else labels


def pixel_shuffle(reading: Reading, node: fx.Node) -> Labels:
    """(c * r * r, h, w) becomes (c, h * r, w * r): a channel is r * r of the input's."""
    labels, ndim, factor = reading.labels(node.args[0]), len(shape_of(node.args[0])), int(str(node.args[1]))
    for dim in (ndim - 2, ndim - 1):
        reading.pin(labels.get(dim), "it is a position, not a channel")
    label = labels.get(ndim - 3)
    if label is not None:
        unshuffled = operator(node) == "aten.pixel_unshuffle"
        square = factor * factor
        label = np.repeat(label, square) if unshuffled else reading.tie_along(label.reshape(-1, square), 1)
    return with_dim({d: known for d, known in labels.items() if d < ndim - 3}, ndim - 3, label)


def channel_shuffle(reading: Reading, node: fx.Node) -> Labels:
    """(g, c / g) becomes (c / g, g): g is written into the forward, so the same index leaves in every group."""
    labels, groups = reading.labels(node.args[0]), int(str(node.args[1]))
    if 1 not in labels:
        return labels
    return with_dim(labels, 1, np.repeat(reading.tie_along(labels[1].reshape(groups, -1), 0), groups))


def unfolded(reading: Reading, node: fx.Node) -> Labels:
    """im2col: (n, c, h, w) becomes (n, c * kernel, positions)."""
    labels = reading.labels(node.args[0])
    for dim in (2, 3):
        reading.pin(labels.get(dim), "it is a position, not a channel")
    kernel = math.prod(argument(node, 1, "kernel_size"))
    return {1: np.repeat(labels[1], kernel)} if 1 in labels else {}


def folded(reading: Reading, node: fx.Node) -> Labels:
    """col2im, the inverse: overlapping windows are added up, (n, c * kernel, positions) becomes (n, c, h, w)."""
    labels = reading.labels(node.args[0])
    reading.pin(labels.get(2), "it is a position, not a channel")
    kernel = math.prod(argument(node, 2, "kernel_size"))
    return {1: reading.tie_along(labels[1].reshape(-1, kernel), 1)} if 1 in labels else {}


RESHAPES = (
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.squeeze",
    "aten.unsqueeze",
    "aten.view_as",
    "aten.reshape_as",
    "aten._reshape_alias",
    "aten.unsafe_view",
)
PERMUTES = (
    "aten.permute",
    "aten.transpose",
    "aten.t",
    "aten.movedim",
    "aten.moveaxis",
    "aten.swapaxes",
    "aten.swapdims",
    "aten.numpy_T",
    "aten.mT",
    "aten.adjoint",
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(PERMUTES, permute),
    **dict.fromkeys(["aten.expand", "aten.expand_as", "aten.broadcast_to"], expand),
    **dict.fromkeys(["aten.pixel_shuffle", "aten.pixel_unshuffle"], pixel_shuffle),
    **dict.fromkeys(["aten.channel_shuffle", "aten.native_channel_shuffle"], channel_shuffle),
    "aten.repeat": repeat,
    "aten.tile": repeat,
    "aten.repeat_interleave": repeat_interleave,
    "aten.im2col": unfolded,
    "aten.col2im": folded,
}
