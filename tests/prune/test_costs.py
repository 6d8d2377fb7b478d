"""Costs of a choice, against the counts of the model that is really cut."""

from __future__ import annotations

import pytest
import torch

from channels_by_hand import tiny
from pared.graph.capture import capture
from pared.graph.counts import count, totals
from pared.graph.labels import find_channels
from pared.prune.budgets import choose
from pared.prune.costs import Work, kept_along, macs_of, marginal, params_of
from pared.prune.edits import edits_of
from pared.step import Edit
from pared.surgery import apply_edits
from pared.task import Task
from zoo_models import make

pytestmark = pytest.mark.usefixtures("one_thread")


def cut(model, channels, keep):
    """The pruned model, by surgery."""
    edits = []
    for (tensor, dim), units in channels.tensors.items():
        module, _, name = tensor.rpartition(".")
        stay = [i for i, unit in enumerate(units.tolist()) if unit < 0 or keep[unit]]
        edits.append(Edit("slice", module, {"tensor": name, "dim": dim, "keep": stay}))
    return apply_edits(model, edits, {})


@pytest.mark.parametrize("seed", range(4))
def test_costs_are_those_of_the_pruned_model(seed):
    model, _, task, channels = tiny()
    keep = torch.rand(channels.units, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[[0, 6, 10]] = True
    found = totals(count(cut(model, channels, keep), task.example_inputs))
    assert params_of(channels, model, keep) == found.params
    assert macs_of(channels, model, keep) == found.macs


def test_costs_of_everything_are_those_of_the_model_whatever_was_asked_before():
    model, _, task, channels = tiny()
    work = Work(channels, model)
    keep = torch.ones(channels.units, dtype=torch.bool)
    whole = totals(count(model, task.example_inputs))
    part = work(keep & (torch.arange(channels.units) % 2 == 0))
    assert part < whole.macs
    assert work(keep) == whole.macs
    assert params_of(channels, model, keep) == whole.params


def test_kept_along_counts_what_always_stays_when_the_last_unit_goes():
    assert kept_along(torch.tensor([-1, 0, 1, -1]), torch.tensor([True, False])) == 3


def test_marginal_is_what_one_unit_costs():
    model, _, _, channels = tiny()
    found = marginal(channels, lambda keep: params_of(channels, model, keep))
    # conv1: 3 x 9 weights, scale and shift, a row and a column of conv2 that meet, 4 x 9 of conv3, 3 of conv4.
    assert found["conv1"] == 27 + 2 + 11 + 36 + 3
    assert found["conv4"] == 10 + 9 * 5


@pytest.mark.parametrize("name", ["depthwise", "grouped", "squeeze_excite", "attention_fused_qkv", "lstm"])
def test_costs_of_groups_read_off_a_graph_are_those_of_the_pruned_model(name):
    model, inputs = make(name)
    task = Task(example_inputs=inputs)
    channels = find_channels(capture(model, task), model)
    keep = choose(channels, {group.name: torch.rand(group.size) for group in channels.groups}, 0.5).keep
    pruned = apply_edits(model, edits_of(model, channels, keep, task, prove=False).edits, {})
    found = totals(count(pruned, task.example_inputs))
    assert (params_of(channels, model, keep), macs_of(channels, model, keep)) == (found.params, found.macs)
