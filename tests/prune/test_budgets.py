"""Budgets: how many units stay, on groups made by hand."""

from __future__ import annotations

import torch

from pared.graph.channels import Channels, Group, Member
from pared.prune.budgets import Rules, choose


def made(sizes, widths=None, equal=(), rows=(), skips=()):
    """Groups a, b, c, ... that one convolution each makes; `rows` are further producers that several groups share."""
    names = "abcdefgh"[: len(sizes)]
    widths = widths or [1] * len(sizes)
    groups, tensors, start = [], {}, 0
    for name, size, width in zip(names, sizes, widths, strict=True):
        members = [Member(f"{name}.weight", 0, "out")]
        members += [Member(f"{row}.weight", 0, "out") for row in rows if name in row]
        alone = not any(name in row for row in rows)
        if alone:
            tensors[f"{name}.weight", 0] = torch.arange(start, start + size).repeat_interleave(width)
        groups.append(Group(name, start, size, tuple(members[0 if alone else 1 :]), (name,), width))
        start += size
    for row in rows:
        units = [torch.arange(g.start, g.start + g.size).repeat_interleave(g.width) for g in groups if g.name in row]
        tensors[f"{row}.weight", 0] = torch.cat(units)
    return Channels(None, tuple(groups), start, tensors, {}, tuple(equal), tuple(skips))


def drawn(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) + 0.01 for group in channels.groups}


def total(keep):
    return float(keep.sum())


def test_choose_keeps_the_best_of_each_group_when_local():
    channels = made([4, 2])
    scores = {"a": torch.tensor([3.0, 1.0, 4.0, 2.0]), "b": torch.tensor([0.1, 0.2])}
    assert choose(channels, scores, 0.5).keep.tolist() == [True, False, True, False, False, True]


def test_choose_compares_groups_when_global():
    channels = made([4, 4])
    scores = {"a": torch.tensor([9.0, 9.0, 9.0, 9.0]), "b": torch.tensor([1.0, 1.0, 1.0, 20.0])}
    choice = choose(channels, scores, 0.375, Rules(scope="global", normalize="none"))
    assert choice.sizes == {"a": 4, "b": 1}


def test_choose_says_so_when_a_layer_would_be_emptied():
    channels = made([4, 2])
    choice = choose(channels, drawn(channels), 1.0)
    assert choice.sizes == {"a": 1, "b": 1}
    assert "one of its 4 units stays" in choice.notes[0]
    assert choose(channels, drawn(channels), 1.0, Rules(scope="global")).sizes == {"a": 1, "b": 1}
