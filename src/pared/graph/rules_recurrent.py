"""Labels through recurrent layers: a hidden unit is a row of every gate, and a column of what reads the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from pared.graph.capture import operator
from pared.graph.macs import shape_of
from pared.graph.reading import Labels, Reading, Rule, Value
from pared.graph.rules_norm import with_dim

GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}


def recurrent(reading: Reading, node: fx.Node) -> Value:
    """lstm(x, states, weights, has_biases, layers, dropout, train, both_ways, batch_first) and its relatives.

    One tensor holds the states of all layers and directions, so that they all lose the same hidden units.
    """
    x, given, weights = node.args[:3]
    if not isinstance(weights, (list, tuple)) or not isinstance(node.args[4], int):
        return packed(reading, node)
    biased, layers, both_ways = bool(node.args[3]), node.args[4], bool(node.args[7])
    states: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    cells = layers * (2 if both_ways else 1)
    each = len(weights) // cells
    labels, ndim = reading.labels(x), len(shape_of(x))
    if each != (4 if biased else 2):
        for value in [x, *states, *weights]:
            reading.pin_all(reading.labels(value), "it projects its state")
        return results(node, {}, {}, ndim)
    gates, width = GATES[operator(node)], shape_of(weights[1])[1]
    hidden = reading.join([reading.labels(state).get(2) for state in states]) if width > 1 else None
    known = hidden is not None or width == 1
    read = labels.get(ndim - 1)
    for first in range(0, len(weights), each * (cells // layers)):
        made = []
        for cell in range(first, first + each * (cells // layers), each):
            into, again, *biases = weights[cell : cell + each]
            unit = one_cell(reading, into, again, biases, read, gates)
            if known and width > 1:
                reading.tie(hidden, unit, "its states come from outside")
            made.append(unit)
        if not known:
            for unit in made:
                reading.pin(unit, "its states come from outside")
            made = [None for _ in made]
        read = None if any(unit is None for unit in made) else np.concatenate(made)
    return results(node, with_dim(labels, ndim - 1, read), {} if hidden is None else {2: hidden}, ndim)


def one_cell(reading: Reading, into: Any, again: Any, biases: Sequence[Any], read: Any, gates: int) -> Any:
    """Label of the hidden units of one layer in one direction."""
    held, back = reading.labels(into), reading.labels(again)
    reading.mark(into, held.get(0), "out")
    reading.mark(again, back.get(0), "out")
    reading.mark(into, held.get(1), "in")
    reading.mark(again, back.get(1), "in")
    if shape_of(into)[1] > 1:
        reading.tie(read, held.get(1), "it reads channels that always stay")
    rows = reading.join([held.get(0), back.get(0), *(reading.labels(bias).get(0) for bias in biases)])
    if rows is None:
        reading.pin(back.get(1), "a gate of it always stays")
        return None
    unit = reading.tie_along(rows.reshape(gates, -1), 0)
    if len(unit) == 1:
        reading.pin(unit, "it has one hidden unit")
        return None
    return reading.join([unit, back.get(1)])


def results(node: fx.Node, output: Labels, state: Labels, ndim: int) -> Value:
    """Labels of the outputs of every step, and of the last states."""
    last = state if ndim == 3 else {}
    return [output, *(last for _ in node.meta["val"][1:])]


def packed(reading: Reading, node: fx.Node) -> Value:
    """A packed sequence, whose weights stand elsewhere among the arguments: not read."""
    for arg in node.all_input_nodes:
        reading.pin_all(reading.labels(arg), "a packed sequence is not read")
    return [{} for _ in node.meta["val"]]


RULES: Mapping[str, Rule] = dict.fromkeys(GATES, recurrent)
