"""How much each unit of a group matters: one function a criterion, and the one table of them.

A criterion takes a group and the evidence on the model, and gives one score a unit: larger stays longer. It looks at
one group alone; comparing groups is `budgets`'s work. To add one, write a function and a row in `CRITERIA`, or pass
`package.module:function` from outside.

Where several layers make the channels of a group, as where a residual sum ties them, each of them has one voice: scores
are averaged over layers after division by each layer's own mean, and the average has the mean of all their means. A
plain average, as Torch-Pruning takes it, follows the layer with the most weights a channel: a 3x3 convolution would
outvote the 1x1 convolution that it is tied to nine to one.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import SettingError, nearest
from pared.graph.channels import Group
from pared.prune.evidence import Evidence, gather
from pared.step import Need, Skip

# Scores (group.size,), or None where the group has nothing that the criterion looks at.
Criterion = Callable[[Group, Evidence], Tensor | None]


def combine(scores: Sequence[Tensor]) -> Tensor | None:
    """One score a unit from the scores that several layers or activations give it, each with one voice.

    Args:
        scores: Of shape (units,) each, not negative.

    Returns:
        float64, shape (units,); None where there are none. One layer's scores come back as they are.

    Example:
        >>> combine([torch.tensor([1.0, 3.0]), torch.tensor([30.0, 10.0])]).tolist()
        [11.0, 11.0]
    """
    if len(scores) < 2:
        return scores[0].double() if scores else None
    stacked = torch.stack(list(scores)).double()
    means = stacked.mean(1, keepdim=True)
    # A layer of zeros has no say.
    shares = stacked / torch.where(means > 0, means, torch.ones_like(means))
    return shares.mean(0) * means.mean()


def filters(group: Group, evidence: Evidence) -> Iterator[Tensor]:
    """The weights of each layer that makes the group's channels, float64, shape (units, weights of one).

    Biases are left out: they are no part of what a filter looks for.
    """
    members = [member for member in group.members if member.role == "out"]
    whole = [member for member in members if evidence.tensors[member.tensor].ndim > 1]
    for member in whole or members:
        units = evidence.channels.tensors[member.tensor, member.dim]
        yield gather(evidence.tensors[member.tensor], member.dim, units, group).flatten(1).double()


def l1(group: Group, evidence: Evidence) -> Tensor | None:
    """Sum of absolute weights. Source: Li et al. 2017, arXiv:1608.08710."""
    return combine([torch.linalg.vector_norm(rows, 1, dim=1) for rows in filters(group, evidence)])


def l2(group: Group, evidence: Evidence) -> Tensor | None:
    """Euclidean norm of the weights. Source: He et al. 2018, arXiv:1808.06866."""
    return combine([torch.linalg.vector_norm(rows, 2, dim=1) for rows in filters(group, evidence)])


def std(group: Group, evidence: Evidence) -> Tensor | None:
    """Standard deviation of a filter's weights: one with equal weights everywhere only averages its input."""
    return combine([rows.std(1, correction=0) for rows in filters(group, evidence)])


def mean(group: Group, evidence: Evidence) -> Tensor | None:
    """Absolute mean of a filter's weights: how strongly it answers to the level of its inputs, which are positive after
    a ReLU. The mean of absolute weights would rank the filters of a layer as `l1` does."""
    return combine([rows.mean(1).abs() for rows in filters(group, evidence)])


def gamma(group: Group, evidence: Evidence) -> Tensor | None:
    """Absolute scale of the batch norms that a channel goes through. Source: Liu et al. 2017, arXiv:1708.06519."""
    scales = []
    for member in group.members:
        module, _, name = member.tensor.rpartition(".")
        norm = evidence.model.get_submodule(module)
        if name == "weight" and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            units = evidence.channels.tensors[member.tensor, member.dim]
            rows = gather(evidence.tensors[member.tensor].double(), member.dim, units, group)
            scales.append(rows.flatten(1).abs().mean(1))
    return combine(scales)


def taylor(group: Group, evidence: Evidence) -> Tensor | None:
    """Estimated change of the loss without the unit: |sum of weight x gradient| over all that it owns, averaged over
    batches.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8. Deviation: absolute values are averaged, not squares.
    """
    return evidence.first_order[group.units]


def fpgm(group: Group, evidence: Evidence) -> Tensor | None:
    """Sum of distances to all other filters of the layer: one near the geometric median can be replaced by others.

    Source: He et al. 2019, arXiv:1811.00250, eq. 8.
    """
    return combine([torch.cdist(rows, rows).sum(1) for rows in filters(group, evidence)])


def hrank(group: Group, evidence: Evidence) -> Tensor | None:
    """Mean rank of the channel's feature maps, as the next layers read them.

    A channel without height and width has a map of one number, whose rank says how often it is not zero.

    Source: Lin et al. 2020, arXiv:2002.10179, eq. 5.
    """
    return combine(evidence.averages(rank_of_maps)[group.name])


def activation(group: Group, evidence: Evidence) -> Tensor | None:
    """Mean absolute value of the channel, as the next layers read it. Source: Molchanov et al. 2017, arXiv:1611.06440,
    section 2.2. Deviation: absolute, for activations that can be negative."""
    return combine(evidence.averages(mean_size)[group.name])


def random(group: Group, evidence: Evidence) -> Tensor | None:
    """Evenly distributed in [0, 1), drawn from the group's name and the seed alone."""
    digest = hashlib.sha256(f"{evidence.seed}:{group.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


CRITERIA: Mapping[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "std": std,
    "mean": mean,
    "gamma": gamma,
    "taylor": taylor,
    "fpgm": fpgm,
    "hrank": hrank,
    "activation": activation,
    "random": random,
}
# The data that they look at; all others look at the weights alone.
NEEDS: Mapping[str, Need] = {"taylor": "train", "hrank": "calibration", "activation": "calibration"}


def rank_of_maps(maps: Tensor) -> Tensor:
    """Mean rank over all maps of each sample.

    Args:
        maps: Shape (units, indices of one, samples, ...). The last two of the further dimensions are a map; with fewer
            than two, the indices of a unit are its other side.

    Returns:
        Shape (units, samples).
    """
    units, _, samples = maps.shape[:3]
    beside = maps.movedim(1, -1) if maps.ndim < 5 else maps.movedim(1, 2)
    while beside.ndim < 4:
        beside = beside.unsqueeze(-1)
    ranks: Tensor = torch.linalg.matrix_rank(beside.float())
    return ranks.double().reshape(units, samples, -1).mean(-1)


def mean_size(maps: Tensor) -> Tensor:
    """Mean absolute value. Args and result as for `rank_of_maps`."""
    return maps.abs().transpose(1, 2).flatten(2).double().mean(-1)


def criterion_of(name: str) -> Criterion:
    """A criterion by its name in the table, or as `package.module:function`. Raises: SettingError."""
    if name in CRITERIA:
        return CRITERIA[name]
    source, colon, attribute = name.rpartition(":")
    if not colon:
        raise SettingError(
            f"no saliency {name!r}; {nearest(name, CRITERIA)} (or write package.module:function for one of your own)"
        )
    try:
        found: Any = getattr(importlib.import_module(source), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise SettingError(f"saliency {name!r} is not there: {error}; write package.module:function") from error
    if not callable(found):
        raise SettingError(f"saliency {name!r} is a {type(found).__name__}, not a function")
    criterion: Criterion = found
    return criterion


def needs_of(name: str) -> frozenset[Need]:
    """The data that a criterion reads; one from outside the package says so as its attribute `needs`."""
    if name in CRITERIA:
        return frozenset({NEEDS[name]}) if name in NEEDS else frozenset()
    return frozenset(getattr(criterion_of(name), "needs", ()))


def score(evidence: Evidence, name: str, groups: Sequence[Group]) -> tuple[dict[str, Tensor], list[Skip]]:
    """The scores of groups.

    Args:
        evidence: On the model.
        name: Of a criterion.
        groups: Which to score, those that may be pruned.

    Returns:
        {name of the group: float64 of shape (size,)}, and the groups that the criterion cannot tell about.

    Raises:
        SettingError: No such criterion, or one that does not give a finite score for each unit.
    """
    criterion, scores, skips = criterion_of(name), {}, []
    for group in groups:
        found = criterion(group, evidence)
        if found is None:
            skips.append(Skip(group.name, f"saliency {name!r} finds nothing there to judge the channels by"))
            continue
        if not isinstance(found, Tensor) or found.shape != (group.size,) or not bool(torch.isfinite(found).all()):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SettingError(
                f"saliency {name!r} of {group.name} must be {group.size} finite numbers, one a unit; found {shape}"
                + (" with NaN or infinity" if shape == (group.size,) else "")
            )
        scores[group.name] = found.detach().double().cpu()
    return scores, skips
