"""Budgets: how many units stay, on groups made by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from channels_by_hand import tiny
from pared.errors import PlanError
from pared.graph.channels import Channels, Group, Member
from pared.prune.budgets import Rules, candidates, choose, meet
from pared.prune.costs import Work, marginal, params_of
from pared.prune.latency import fit_latency
from pared.step import Skip


def made(sizes, widths=None, equal=(), rows=(), skips=()):
    """Groups a, b, c, ... of these sizes, each made by a layer of its own, or side by side by one that is named after
    them all: `rows=["ab"]`."""
    widths = widths or [1] * len(sizes)
    groups, tensors, start = [], {}, 0
    for name, size, width in zip("abcdefgh", sizes, widths, strict=False):
        row = next((row for row in rows if name in row), name)
        units = torch.arange(start, start + size).repeat_interleave(width)
        key = f"{row}.weight", 0
        tensors[key] = torch.cat([tensors[key], units]) if key in tensors else units
        groups.append(Group(name, start, size, (Member(*key, "out"),), (row,), width))
        start += size
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


def test_normalize_decides_which_groups_lose_when_global():
    channels = made([4, 4])
    scores = {"a": torch.tensor([1.0, 1.0, 1.0, 9.0]), "b": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    sizes = {
        how: choose(channels, scores, 0.375, Rules(scope="global", normalize=how)).sizes
        for how in ("none", "mean", "max")
    }
    assert sizes == {"none": {"a": 1, "b": 4}, "mean": {"a": 1, "b": 4}, "max": {"a": 1, "b": 4}}
    scores["b"] = torch.tensor([0.5, 0.5, 0.5, 0.6])
    assert choose(channels, scores, 0.375, Rules(scope="global", normalize="none")).sizes == {"a": 4, "b": 1}
    assert choose(channels, scores, 0.375, Rules(scope="global", normalize="mean")).sizes == {"a": 1, "b": 4}
    scores["b"] = torch.tensor([0.1, 0.1, 0.1, 10.0])
    assert choose(channels, scores, 0.375, Rules(scope="global", normalize="max")).sizes == {"a": 4, "b": 1}


def test_a_zero_group_is_compared_as_it_is():
    channels = made([4, 4])
    scores = {"a": torch.zeros(4), "b": torch.ones(4)}
    assert choose(channels, scores, 0.375, Rules(scope="global")).sizes == {"a": 1, "b": 4}


def test_wide_units_count_for_all_their_channels_when_global():
    channels = made([4, 64], widths=[64, 1])
    scores = {"a": torch.full((4,), 0.1), "b": torch.ones(64)}
    assert choose(channels, scores, 0.4, Rules(scope="global", normalize="none")).sizes == {"a": 2, "b": 64}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_choose_says_so_when_a_layer_would_be_emptied(scope):
    channels = made([4, 2])
    choice = choose(channels, drawn(channels), 1.0, Rules(scope=scope))
    assert choice.sizes == {"a": 1, "b": 1}
    assert choice.notes == (
        "a: one of its 4 units stays, though all were to go: a layer needs one",
        "b: one of its 2 units stays, though all were to go: a layer needs one",
    )
    assert choose(channels, drawn(channels), 0.5, Rules(scope=scope)).notes == ()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_meet_says_so_when_a_layer_would_be_emptied(scope):
    channels = made([16, 2])
    scores = {"a": torch.linspace(1, 2, 16), "b": torch.tensor([0.1, 0.1])}
    rules = Rules(scope=scope, normalize="none")
    # With global scope, both units of b are the worst of all; with local scope it loses one of two.
    assert [note[0] for note in meet(channels, scores, total, 0.5, rules).notes] == (["b"] if scope == "global" else [])


def test_ratios_may_differ_by_group():
    channels = made([8, 8, 8])
    assert choose(channels, drawn(channels), {"a": 0.25, "c": 0.5}).sizes == {"a": 6, "b": 8, "c": 4}


def test_groups_without_scores_stay_whole():
    channels = made([8, 8])
    choice = choose(channels, {"b": drawn(channels)["b"]}, 0.5)
    assert choice.sizes == {"a": 8, "b": 4}
    assert bool(choice.keep[:8].all())


def test_limits_are_floors_and_caps():
    channels = made([16, 16, 16])
    rules = Rules(limits={"a": (0.75, 1.0), "b": (0.0, 0.25), "[ab]": (0.1, 0.9)})
    assert choose(channels, drawn(channels), 0.5, rules).sizes == {"a": 12, "b": 4, "c": 8}
    assert choose(channels, drawn(channels), 0.0, rules).sizes == {"a": 14, "b": 4, "c": 16}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"z": (0.0, 1.0)}, "limits='z' matches no layer"),
        ({"a": (0.5, 0.2)}, "needs \\(least, most\\) fractions"),
        ({"a": (0.5, 1.0), "*": (0.0, 0.2)}, "leave a no size"),
    ],
)
def test_limits_that_cannot_hold_are_refused(limits, message):
    channels = made([16])
    with pytest.raises(PlanError, match=message):
        choose(channels, drawn(channels), 0.5, Rules(limits=limits))


@pytest.mark.parametrize(
    ("size", "width", "round_to", "ratio", "want"),
    [
        (64, 1, 8, 0.3, 48),  # 44.8: nearest multiple
        (64, 1, 8, 0.99, 8),  # never below one
        (60, 1, 8, 0.0, 60),  # all of it is always allowed
        (60, 1, 32, 0.2, 60),  # 48 is nearer to 60 than to 32
        (6, 1, 8, 0.5, 3),  # smaller than one multiple
        (12, 64, 32, 0.5, 6),  # heads are multiples already
        (12, 12, 8, 0.4, 8),  # 7.2: of 12 channels each, an even number
    ],
)
def test_widths_are_rounded_to_the_nearest_multiple(size, width, round_to, ratio, want):
    channels = made([size], widths=[width])
    assert choose(channels, drawn(channels), ratio, Rules(round_to=round_to)).sizes == {"a": want}


def test_the_width_of_a_layer_that_several_groups_share_is_rounded():
    channels = made([20, 12, 8], rows=["ab"])
    sizes = choose(channels, drawn(channels), 0.3, Rules(round_to=8)).sizes
    assert (sizes["a"] + sizes["b"]) % 8 == 0
    assert sizes == {"a": 15, "b": 9, "c": 8}


def test_groups_that_must_stay_equal_keep_the_same_fraction():
    channels = made([4, 256, 10], widths=[64, 1, 1], equal=[("a", "b")])
    for ratio in (0.1, 0.3, 0.5, 0.9):
        sizes = choose(channels, drawn(channels), ratio).sizes
        assert sizes["a"] * 64 == sizes["b"]
    assert choose(channels, drawn(channels), 0.5, Rules(limits={"b": (0.6, 1.0)})).sizes["a"] == 3
    # Without scores for one of them, neither changes.
    assert choose(channels, {"a": torch.ones(4), "c": torch.ones(10)}, 0.5).sizes == {"a": 4, "b": 256, "c": 5}


def test_groups_that_must_stay_equal_are_refused_when_their_limits_share_no_size():
    channels = made([4, 4], equal=[("a", "b")])
    with pytest.raises(PlanError, match="no fraction of channels fits a, b at once"):
        choose(channels, drawn(channels), 0.5, Rules(limits={"a": (0.0, 0.25), "b": (0.75, 0.8)}))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_meet_is_within_the_budget_by_less_than_one_unit(scope, share):
    model, _, _, channels = tiny()
    scores = drawn(channels)
    for cost in (Work(channels, model), lambda keep: params_of(channels, model, keep)):
        base = cost(torch.ones(channels.units, dtype=torch.bool))
        choice = meet(channels, scores, cost, share, Rules(scope=scope))
        assert 0 <= share * base - cost(choice.keep) < max(marginal(channels, cost).values())
        assert share < 1.0 or bool(choice.keep.all())
        assert torch.equal(meet(channels, scores, cost, share, Rules(scope=scope)).keep, choice.keep)


def test_meet_fills_the_budget_up_group_by_group_when_all_would_change_at_once():
    channels = made([8] * 6)
    choice = meet(channels, drawn(channels), total, 33 / 48)
    assert total(choice.keep) == 33
    assert set(choice.sizes.values()) == {5, 6}


def test_a_budget_that_cannot_be_met_says_what_can_and_what_holds_it():
    skips = (Skip("head", "its channels are the model's output"),)
    channels = made([10, 10, 10, 70], skips=skips)
    scores = {name: value for name, value in drawn(channels).items() if name != "d"}
    with pytest.raises(PlanError) as caught:
        meet(channels, scores, total, 0.6, Rules(limits={"a": (0.5, 1.0)}), "params")
    assert str(caught.value) == (
        "params=0.6 cannot be met: the least that can be reached is 0.770 (77 of 100); limits hold a; d may not be "
        "pruned; head cannot be pruned (its channels are the model's output); ask for less, or let more layers be "
        "pruned"
    )


def test_nothing_to_prune_is_an_error():
    with pytest.raises(PlanError, match="no channel can be removed: a may not be pruned"):
        choose(made([4]), {}, 0.5)


def test_candidates_follow_the_patterns():
    channels = made([4, 4, 4], rows=["ab"])
    assert [g.name for g in candidates(channels)[0]] == ["a", "b", "c"]
    chosen, skips = candidates(channels, include=["ab"], exclude=["b"])
    assert [g.name for g in chosen] == ["a"]
    assert skips == [Skip("b", "excluded by 'b'"), Skip("c", "not in include")]


def test_a_pattern_that_matches_nothing_that_can_be_pruned_is_refused():
    channels = made([4], skips=[Skip("head", "its channels are the model's output")])
    with pytest.raises(PlanError, match="channels of head cannot be removed: its channels are the model's output"):
        candidates(channels, include=["head"])
    with pytest.raises(PlanError, match="include='heat' matches no layer"):
        candidates(channels, include=["heat"])
    assert candidates(channels, exclude=["head"])[1] == []


def test_groups_with_small_units_use_up_what_heads_leave_of_a_budget():
    channels = made([4, 256, 100], widths=[64, 1, 1], equal=[("a", "b")])
    choice = meet(channels, drawn(channels), total, 0.6)
    assert choice.sizes == {"a": 2, "b": 128, "c": 86}
    assert total(choice.keep) == 216 == 0.6 * 360


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    widths = draw(st.lists(st.sampled_from([1, 1, 2, 12]), min_size=len(sizes), max_size=len(sizes)))
    channels = made(sizes, widths)
    low = draw(st.floats(0, 1))
    limits = {"a": (low, draw(st.floats(low, 1)))} if draw(st.booleans()) else {}
    rules = Rules(
        scope=draw(st.sampled_from(["local", "global"])),
        normalize=draw(st.sampled_from(["mean", "max", "none"])),
        round_to=draw(st.sampled_from([1, 8])),
        limits=limits,
    )
    return channels, drawn(channels, draw(st.integers(0, 9))), rules


@settings(max_examples=25, deadline=None)
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_choose_never_empties_and_respects_limits_and_is_monotone(problem, first, second):
    channels, scores, rules = problem
    few, many = (choose(channels, scores, ratio, rules) for ratio in sorted((first, second)))
    for choice in (few, many):
        for group in channels.groups:
            size = choice.sizes[group.name]
            assert int(choice.keep[group.units].sum()) == size >= 1
            kept, gone = scores[group.name][choice.keep[group.units]], scores[group.name][~choice.keep[group.units]]
            assert len(gone) == 0 or kept.min() >= gone.max()
            if group.name in rules.limits:
                low, high = rules.limits[group.name]
                # At least one unit, and of limits closer than one unit the lower.
                assert size >= low * group.size - 1e-6
                assert size <= max(high * group.size + 1e-6, low * group.size + 1, 1)
    width = {group.name: group.width for group in channels.groups}
    channel_count = [sum(n * width[name] for name, n in choice.sizes.items()) for choice in (few, many)]
    assert channel_count[0] >= channel_count[1]


@settings(max_examples=25, deadline=None)
@given(problems(), st.floats(0.05, 1))
def test_meet_is_within_the_budget_or_refuses(problem, share):
    channels, scores, rules = problem
    rules = dataclasses.replace(rules, limits={})
    try:
        choice = meet(channels, scores, total, share, rules)
    except PlanError:
        least = choose(channels, scores, 1.0, rules)
        assert total(least.keep) > share * channels.units
    else:
        assert total(choice.keep) <= share * channels.units


class Clock:
    """Latency of a choice: grows with a power of the kept units, in steps of a tile, with noise."""

    def __init__(self, seed, units):
        draw = torch.Generator().manual_seed(seed)
        rand = lambda: float(torch.rand((), generator=draw))  # noqa: E731
        self.generator, self.units = draw, units
        self.tile = [1, 4, 8][int(rand() * 3)]
        self.least, self.power = rand() * 0.25, 0.8 + rand() * 1.4
        self.calls = 0

    def exact(self, width):
        return self.least + (1 - self.least) * (min(width, self.units) / self.units) ** self.power

    def __call__(self, keep):
        self.calls += 1
        noise = 1 + 0.01 * float(torch.randn((), generator=self.generator))
        return self.exact(-(-int(keep.sum()) // self.tile) * self.tile) * noise


def along(units):
    return lambda ratio: torch.arange(units) < max(1, round(units * (1 - ratio)))


@pytest.mark.parametrize("wanted", [0.45, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(6))
def test_latency_is_met_within_five_percent_in_ten_measurements(seed, wanted):
    clock = Clock(seed, 96)
    reachable = min(abs(clock.exact(width) / wanted - 1) for width in range(clock.tile, 97, clock.tile))
    fit = fit_latency(clock, wanted, along(96), start=1.0)
    assert clock.calls == len(fit.journal) <= 10
    assert fit.met or reachable > 0.03  # noise of 1 % may hide a step that is only just near enough
    assert (fit.ratio, fit.latency) in fit.journal
    assert fit.met == (abs(fit.latency / wanted - 1) <= 0.05)


def test_latency_is_not_measured_again_for_a_choice():
    clock = Clock(3, 16)
    first = fit_latency(clock, 0.515, along(16), start=1.0, tolerance=0.0)
    keeps = [tuple(along(16)(ratio).tolist()) for ratio, _ in first.journal]
    assert len(set(keeps)) == len(keeps)
    assert clock.calls == len(keeps)


def test_latency_that_cannot_be_reached_gives_the_fastest():
    fit = fit_latency(lambda _: 0.9, 0.5, along(16), start=1.0)
    assert not fit.met
    assert fit.latency == 0.9
