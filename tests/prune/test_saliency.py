"""Criteria: each against a naive loop over the units of a small model with groups written down by hand."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from channels_by_hand import tiny
from pared.errors import SettingError, UsageError
from pared.prune.evidence import Evidence, gather
from pared.prune.saliency import CRITERIA, combine, needs_of, rank_of_maps, score
from pared.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")


def known(**settings):
    model, data, task, channels = tiny()
    return Evidence(channels=channels, model=model, task=task, **settings), data


def scores_of(evidence, name):
    found, skips = score(evidence, name, evidence.channels.groups)
    assert not skips
    return found


def blended(pair):
    """What `combine` says of two layers, by its definition."""
    means = [values.mean() for values in pair]
    return sum(values / m for values, m in zip(pair, means, strict=True)) / 2 * sum(means) / 2


NAIVE = {
    "l1": lambda w: sum(abs(v) for v in w.flatten().tolist()),
    "l2": lambda w: math.sqrt(sum(v * v for v in w.flatten().tolist())),
    "std": lambda w: w.detach().double().numpy().std(),
    "mean": lambda w: abs(math.fsum(w.flatten().tolist())) / w.numel(),
}


@pytest.mark.parametrize("name", NAIVE)
def test_weight_criteria_agree_with_a_loop_over_filters(name):
    evidence, _ = known()
    found = scores_of(evidence, name)
    model = evidence.model
    one, two, three = (
        torch.tensor([float(NAIVE[name](w)) for w in conv.weight], dtype=torch.float64)
        for conv in (model.conv1, model.conv2, model.conv3)
    )
    torch.testing.assert_close(found["conv3"], three)
    torch.testing.assert_close(found["conv1"], blended([one, two]))


def test_fpgm_sums_distances_to_all_other_filters():
    evidence, _ = known()
    rows = evidence.model.conv3.weight.detach().double().flatten(1)
    want = [sum(float((a - b).norm()) for b in rows) for a in rows]
    torch.testing.assert_close(scores_of(evidence, "fpgm")["conv3"], torch.tensor(want, dtype=torch.float64))


def test_gamma_is_the_norms_scale_and_skips_groups_without_one():
    evidence, _ = known()
    found, skips = score(evidence, "gamma", evidence.channels.groups)
    torch.testing.assert_close(found["conv1"], evidence.model.norm1.weight.detach().abs().double())
    assert [skip.module for skip in skips] == ["conv4"]
    assert "gamma" in skips[0].reason


def test_taylor_is_the_slope_of_the_loss_along_the_removal_of_a_unit():
    evidence, (x, y) = known()
    found = scores_of(evidence, "taylor")
    model = copy.deepcopy(evidence.model).double()
    step = 1e-6

    def slope(unit, part):
        """Change of the loss as the unit's own weights shrink, by finite differences."""
        losses = []
        for scale in (1 + step, 1 - step):
            small = copy.deepcopy(model)
            with torch.no_grad():
                for tensor in (small.conv3.weight, small.norm3.weight, small.norm3.bias):
                    tensor[unit] *= scale
            losses.append(F.cross_entropy(small(x[part].double()), y[part]).item())
        return (losses[0] - losses[1]) / (2 * step)

    want = [sum(abs(slope(unit, part)) for part in (slice(6), slice(6, 12))) / 2 for unit in range(4)]
    # The gradients are taken in float32.
    torch.testing.assert_close(found["conv3"], torch.tensor(want, dtype=torch.float64), rtol=1e-3, atol=1e-6)


def test_gradients_are_those_of_autograd_and_leave_the_model_alone():
    evidence, (x, y) = known(batches=1)
    evidence.model.requires_grad_(False)
    evidence.model.train()
    found = evidence.gradients["conv1.weight"]
    assert not any(p.requires_grad or p.grad is not None for p in evidence.model.parameters())
    assert evidence.model.training
    assert int(evidence.model.norm1.num_batches_tracked) == 0
    twin = copy.deepcopy(evidence.model).eval().requires_grad_(True)
    F.cross_entropy(twin(x[:6]), y[:6]).backward()
    torch.testing.assert_close(found, twin.conv1.weight.grad.double())


def maps_of(evidence, x):
    """What conv2, conv3 and conv4 read of conv1, and what conv4 and fc read of conv3 and conv4."""
    m = evidence.model
    with torch.no_grad():
        first = F.relu(m.norm1(m.conv1(x)))
        added = first + m.conv2(first)
        third = F.relu(m.norm3(m.conv3(added)))
        cut = added[:, :, 1:-1, 1:-1]
        last = m.conv4(torch.cat([cut, third], 1))
    return {"conv1": [first, added, cut], "conv3": [third], "conv4": [last]}


def test_activation_is_the_mean_size_of_what_the_next_layers_read():
    evidence, (x, _) = known()
    maps = maps_of(evidence, x)
    found = scores_of(evidence, "activation")
    means = {name: [v.abs().double().mean((0, 2, 3)) for v in values] for name, values in maps.items()}
    for name, values in means.items():
        torch.testing.assert_close(found[name], combine(values), rtol=1e-5, atol=1e-7)


def test_hrank_is_the_mean_rank_of_what_the_next_layers_read():
    evidence, (x, _) = known()
    maps = maps_of(evidence, x)["conv3"][0].numpy()

    want = [np.mean([np.linalg.matrix_rank(sample[c]) for sample in maps]) for c in range(4)]
    torch.testing.assert_close(scores_of(evidence, "hrank")["conv3"], torch.tensor(want, dtype=torch.float64))


def test_feature_maps_are_those_of_the_first_samples_only():
    evidence, (x, _) = known(samples=5)
    want = maps_of(evidence, x[:5])["conv3"][0].abs().double().mean((0, 2, 3))
    torch.testing.assert_close(scores_of(evidence, "activation")["conv3"], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 1, 2, 7), (3, 4, 2, 7), (3, 1, 2, 7, 5), (3, 2, 2, 7, 5)])
def test_rank_of_maps_takes_maps_of_any_dimensions(shape):
    assert rank_of_maps(torch.randn(shape)).shape == (3, 2)
    assert bool((rank_of_maps(torch.zeros(shape)) == 0).all())


def test_rank_of_maps_lays_the_indices_of_a_unit_side_by_side_when_there_is_one_further_dimension():
    ones = torch.ones(1, 4, 1, 6)
    assert rank_of_maps(ones).item() == 1
    assert rank_of_maps(torch.randn(1, 4, 1, 6)).item() == 4


def test_random_depends_on_the_seed_and_the_group_alone():
    first, second = scores_of(known(seed=1)[0], "random"), scores_of(known(seed=1)[0], "random")
    other = scores_of(known(seed=2)[0], "random")
    assert torch.equal(first["conv1"], second["conv1"])
    assert not torch.equal(first["conv1"], other["conv1"])
    assert not torch.equal(first["conv1"][:3], first["conv4"])


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_gives_one_repeatable_score_a_unit(name):
    (first, _), (second, _) = (score(e, name, e.channels.groups) for e in (known()[0], known()[0]))
    assert first.keys() == second.keys()
    for group in known()[0].channels.groups:
        if group.name in first:
            assert first[group.name].shape == (group.size,)
            assert torch.equal(first[group.name], second[group.name])
            assert bool((first[group.name] >= 0).all())


def test_needs_say_which_data_a_criterion_reads():
    assert {name: needs_of(name) for name in ("l1", "taylor", "hrank")} == {
        "l1": frozenset(),
        "taylor": frozenset({"train"}),
        "hrank": frozenset({"calibration"}),
    }


def by_first_weight(group, evidence):
    return evidence.tensors[group.members[0].tensor].flatten(1)[:, 0].abs()


by_first_weight.needs = ("validation",)


def half(group, evidence):
    return torch.ones(group.size // 2)


def test_a_criterion_from_outside_is_loaded_by_its_name(monkeypatch):

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(first=by_first_weight, half=half, number=3))
    evidence, _ = known()
    found = scores_of(evidence, "mine:first")["conv3"]
    torch.testing.assert_close(found, evidence.model.conv3.weight[:, 0, 0, 0].abs().double().detach())
    assert needs_of("mine:first") == {"validation"}
    with pytest.raises(SettingError, match=r"conv1 must be 6 finite numbers, one a unit; found \(3,\)"):
        scores_of(evidence, "mine:half")
    with pytest.raises(SettingError, match="is a int, not a function"):
        needs_of("mine:number")


@pytest.mark.parametrize("name", ["l3", "no_such_module:f", "math:nothing"])
def test_an_unknown_criterion_is_refused(name):
    with pytest.raises(SettingError, match=name.split(":")[0]):
        needs_of(name)


def test_taylor_without_a_loss_says_what_to_give():
    model, (x, _), _, channels = tiny()
    evidence = Evidence(channels=channels, model=model, task=Task(example_inputs=x[:2]), by="PruneChannels")
    with pytest.raises(UsageError, match=r"PruneChannels needs a loss.*Task\(loss="):
        score(evidence, "taylor", channels.groups)


def test_a_bad_score_is_refused():
    evidence, _ = known()
    nn.init.constant_(evidence.model.conv1.weight, math.nan)
    with pytest.raises(SettingError, match="NaN"):
        score(evidence, "l2", evidence.channels.groups)


def test_gather_fills_units_with_fewer_indices_with_zeros():
    group = known()[0].channels.groups[2]
    value = torch.arange(1.0, 5.0)
    assert gather(value, 0, torch.tensor([10, 12, 10, -1]), group).tolist() == [[1, 3], [0, 0], [2, 0]]


def test_combine_gives_each_layer_one_voice():
    loud, quiet = torch.tensor([100.0, 300.0]), torch.tensor([3.0, 1.0])
    assert combine([loud, quiet]).tolist() == [101.0, 101.0]
    assert combine([loud, torch.zeros(2)]).tolist() == [25.0, 75.0]
    assert combine([]) is None
