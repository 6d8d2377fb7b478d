"""Labels through operators that take some of the values, or put several side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from pared.graph.capture import operator
from pared.graph.macs import concrete, shape_of
from pared.graph.reading import Atoms, Labels, Reading, Rule, Value, argument, dims_of, results
from pared.graph.rules_norm import with_dim

MOST_PARTS = 16  # in more, hardly a unit would be left
UNEQUAL = "it takes some of its channels, by number"


def part(reading: Reading, label: Atoms | None, start: int, length: int) -> Atoms | None:
    """Label of a run of indices.

    The forward may find its ends from a width, or have them written into it: nobody can tell. So the dimension is cut
    in equal parts that are as long as can be, with the run's ends between two of them, and the same index leaves in
    each: then every width shrinks in the same proportion.
    """
    if label is None or length == len(label):
        return label
    each = math.gcd(start, length, len(label))
    if each == 1 or len(label) // each > MOST_PARTS:
        reading.pin(label, UNEQUAL)
        return None
    return np.tile(reading.tie_along(label.reshape(-1, each), 0), length // each)


def slicing(reading: Reading, node: fx.Node) -> Labels:
    """A run of indices of one dimension."""
    x = node.args[0]
    labels, shape = reading.labels(x), shape_of(x)
    dim, start, step = (
        argument(node, 1, "dim", 0) % len(shape),
        argument(node, 2, "start"),
        argument(node, 4, "step", 1),
    )
    if dim not in labels:
        return labels
    length = shape_of(node)[dim]
    if step != 1 or not isinstance(start, (int, type(None))):
        reading.pin(labels[dim], UNEQUAL)
        return with_dim(labels, dim, None)
    start = start or 0
    start = max(start + shape[dim], 0) if start < 0 else start
    return with_dim(labels, dim, part(reading, labels[dim], start, length))


def splitting(reading: Reading, node: fx.Node) -> Value:
    """split, chunk, split_with_sizes: several runs of indices."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    dim = int(argument(node, 2, "dim", 0)) % len(shape)
    results, start = [], 0
    for held in node.meta["val"]:
        length = concrete(held.shape[dim])
        results.append(with_dim(labels, dim, part(reading, labels.get(dim), start, length)))
        start += length
    return results


def taking(reading: Reading, node: fx.Node) -> Value:
    """select and unbind: one index of a dimension, which goes."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    reading.pin(labels.get(dim), UNEQUAL)
    rest = {place - (place > dim): label for place, label in labels.items() if place != dim}
    return results(node, rest)


def item(reading: Reading, node: fx.Node) -> Value:
    """One of several results."""
    several, number = reading.values.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
    return several[number] if isinstance(several, list) and isinstance(number, int) else {}


def concatenation(reading: Reading, node: fx.Node) -> Labels:
    """Channels side by side; the other dimensions are the same in all parts."""
    parts: Sequence[Any] = node.args[0]  # type: ignore[assignment]
    shape = shape_of(node)
    parts = [one for one in parts if shape_of(one) != (0,)]
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    result: Labels = {}
    for place in range(len(shape)):
        several = [reading.labels(one).get(place) for one in parts]
        if place != dim:
            label = reading.join(several) if shape[place] > 1 else None
        elif any(label is not None for label in several):
            stays = [np.zeros(shape_of(one)[dim], dtype=np.int64) for one in parts]
            label = np.concatenate([zero if one is None else one for one, zero in zip(several, stays, strict=True)])
        else:
            label = None
        if label is not None:
            result[place] = label
    return result


def scattering(reading: Reading, node: fx.Node) -> Labels:
    """slice_scatter: a run of indices is written over."""
    x, source = node.args[:2]
    labels, shape = dict(reading.labels(x)), shape_of(x)
    dim, start = int(argument(node, 2, "dim", 0)) % len(shape), argument(node, 3, "start") or 0
    new = reading.labels(source)
    for place, size in enumerate(shape):
        if size == 1:
            continue
        label = labels.pop(place, None)
        if place == dim and shape_of(source)[dim] != size:
            known = isinstance(start, int) and argument(node, 5, "step", 1) == 1
            start = start if known else 1  # a run that fits nowhere
            written = part(reading, label, start + size if start < 0 else start, shape_of(source)[dim])
            reading.tie(written, new.get(dim))
            label = label if written is not None and dim in new else None
        else:
            label = reading.join([label, new.get(place)])
        if label is not None:
            labels[place] = label
    return labels


def stack(reading: Reading, node: fx.Node) -> Labels:
    """The same index of every part, with a new dimension."""
    parts: Sequence[Any] = node.args[0]  # type: ignore[assignment]
    shape = shape_of(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    result: Labels = {}
    for place in range(len(shape) - 1):
        label = reading.join([reading.labels(one).get(place) for one in parts])
        if label is not None:
            result[place + (place >= dim)] = label
    return result


def pad(reading: Reading, node: fx.Node) -> Labels:
    """Constants beside a dimension always stay; a reflection of channels cannot be followed."""
    labels, shape = dict(reading.labels(node.args[0])), shape_of(node.args[0])
    amounts: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    constant = operator(node) == "aten.constant_pad_nd" or argument(node, 2, "mode", "constant") == "constant"
    after = shape_of(node)
    for pair in range(len(amounts) // 2):
        dim = len(shape) - 1 - pair
        before, behind = amounts[2 * pair : 2 * pair + 2]
        if dim not in labels or (before == 0 and behind == 0):
            continue
        if not constant or not isinstance(before, int) or not isinstance(behind, int) or min(before, behind) < 0:
            reading.pin(labels.pop(dim), "it pads its channels")
            continue
        wide = np.zeros(after[dim], dtype=np.int64)
        wide[before : before + shape[dim]] = labels[dim]
        labels[dim] = wide
    return labels


def moving(reading: Reading, node: fx.Node) -> Labels:
    """roll and flip: other dimensions pass."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    given = argument(node, 2 if operator(node) == "aten.roll" else 1, "dims")
    dims = dims_of(given, len(shape))
    for dim in dims:
        reading.pin(labels.get(dim), "it moves its channels")
    return {dim: label for dim, label in labels.items() if dim not in dims}


def indexing(reading: Reading, node: fx.Node) -> Labels:
    """x[i, j]: what is looked up by number stays; the dimensions that are not indexed pass."""
    labels, shape, given = reading.labels(node.args[0]), shape_of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    places = [dim for dim, index in enumerate(given) if index is not None]
    for dim in places:
        reading.pin(labels.get(dim), "its indices are looked up by number")
        reading.pin_all(reading.labels(given[dim]), "it is an index")
    if any(b - a > 1 for a, b in itertools.pairwise(places)):
        reading.pin_all(labels, "it looks up dimensions that stand apart")
        return {}
    shift = len(shape_of(node)) - len(shape)
    first = places[0] if places else len(shape)
    return {dim if dim < first else dim + shift: label for dim, label in labels.items() if dim not in places}


def index_select(reading: Reading, node: fx.Node) -> Labels:
    """Some indices of one dimension, by number."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % max(len(shape), 1)
    reading.pin(labels.get(dim), "its indices are looked up by number")
    return with_dim(labels, dim, None)


def gated(reading: Reading, node: fx.Node) -> Labels:
    """glu: the first half of a dimension times the sigmoid of the second."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    dim = int(argument(node, 1, "dim", -1)) % len(shape)
    return with_dim(labels, dim, part(reading, labels.get(dim), 0, shape[dim] // 2))


def windows(reading: Reading, node: fx.Node) -> Labels:
    """unfold: overlapping runs of one dimension, in a new last one."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    dim = int(argument(node, 1, "dimension")) % len(shape)
    reading.pin(labels.get(dim), UNEQUAL)
    return with_dim(labels, dim, None)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(["aten.split", "aten.chunk", "aten.split_with_sizes", "aten.unsafe_chunk"], splitting),
    **dict.fromkeys(["aten.unsafe_split", "aten.tensor_split"], splitting),
    **dict.fromkeys(["aten.select", "aten.unbind"], taking),
    **dict.fromkeys(["aten.cat", "aten.concat", "aten.concatenate"], concatenation),
    **dict.fromkeys(["aten.pad", "aten.constant_pad_nd"], pad),
    **dict.fromkeys(["aten.roll", "aten.flip"], moving),
    "aten.unfold": windows,
    "aten.slice": slicing,
    "getitem": item,
    "aten.slice_scatter": scattering,
    "aten.stack": stack,
    "aten.index": indexing,
    "aten.index_select": index_select,
    "aten.glu": gated,
}
