"""Losses on features and relations, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pared.distill.contrastive import contrastive_loss
from pared.distill.hints import attention_loss, attention_map, hint_loss, resize
from pared.distill.knowledge import Attention, Contrastive, Flow, Hint, Relational, Similarity
from pared.distill.relations import (
    angle_loss,
    angles,
    distance_loss,
    distances,
    flow,
    flow_loss,
    similarities,
    similarity_loss,
)
from pared.errors import SettingError


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def test_hint_loss_is_the_mean_square_when_written_out() -> None:
    student, teacher = values(2, 3, 2, 2), values(2, 3, 2, 2, seed=1)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / 24
    assert hint_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert Hint()(student, teacher) == hint_loss(student, teacher)


def test_attention_loss_compares_where_layers_look_when_channels_differ() -> None:
    student, teacher = values(2, 3, 2, 2), values(2, 5, 2, 2, seed=1)
    expected = 0.0
    for i in range(2):
        maps = []
        for x in (student[i], teacher[i]):
            energy = [sum(x[c, h, w].item() ** 2 for c in range(len(x))) for h in range(2) for w in range(2)]
            length = math.sqrt(sum(e * e for e in energy))
            maps.append([e / length for e in energy])
        expected += sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / 2
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert attention_loss(student, 3 * student).item() == pytest.approx(0, abs=1e-24)
    assert Attention()(student, teacher) == attention_loss(student, teacher)
    # Tokens: channels come last.
    assert torch.equal(attention_map(values(2, 4, 3)), attention_map(values(2, 4, 3).transpose(1, 2)[..., None]))
    assert attention_map(torch.zeros(1, 2, 2, 2)).abs().sum() == 0


def test_resize_averages_or_interpolates_when_sizes_differ() -> None:
    x = values(1, 2, 4, 4)
    torch.testing.assert_close(resize(x, (2, 2)), x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)))
    assert resize(x, (4, 4)) is x
    assert resize(x, (8, 8)).shape == (1, 2, 8, 8)
    assert resize(values(1, 4, 3), (6,)).shape == (1, 6, 3)


def test_contrastive_loss_is_the_cross_entropy_of_the_own_sample_when_written_out() -> None:
    student, teacher, others = values(3, 4), values(3, 4, seed=1), values(2, 4, seed=2)
    labels = [0, 1, 0, 1, 2]  # of the batch, then of the queue
    allowed = torch.tensor([[labels[i] != labels[j] for j in range(5)] for i in range(3)])
    candidates = [*teacher, *others]
    expected = 0.0
    for i in range(3):
        cosines = [torch.dot(student[i], c).item() / (student[i].norm() * c.norm()).item() for c in candidates]
        powers = [math.exp(cosine / 0.5) for cosine in cosines]
        total = sum(p for j, p in enumerate(powers) if j == i or labels[i] != labels[j])
        expected -= math.log(powers[i] / total) / 3
    found = contrastive_loss(student, teacher, others, temperature=0.5, allowed=allowed)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert Contrastive(temperature=0.5)(student, teacher, others, allowed) == found
    assert contrastive_loss(student, teacher, others, temperature=0.5) > found  # more to be told apart
    assert contrastive_loss(7 * student, teacher, temperature=0.5) == pytest.approx(
        contrastive_loss(student, teacher, temperature=0.5).item()
    )


def test_flow_is_the_mean_of_products_over_places_when_written_out() -> None:
    first, second = values(2, 3, 2, 2), values(2, 4, 2, 2, seed=1)
    found = flow(first, second)
    assert found.shape == (2, 3, 4)
    for b in range(2):
        for m in range(3):
            for n in range(4):
                expected = sum(
                    first[b, m, h, w].item() * second[b, n, h, w].item() / 4 for h in range(2) for w in range(2)
                )
                assert found[b, m, n].item() == pytest.approx(expected, rel=1e-12)
    others = values(2, 3, 2, 2, seed=2), values(2, 4, 2, 2, seed=3)
    expected_loss = (found - flow(*others)).square().mean()
    assert flow_loss((first, second), others) == expected_loss == Flow()((first, second), others)


def test_distances_are_of_all_pairs_and_of_mean_one_when_written_out() -> None:
    x, y = values(4, 3), values(4, 2, 2, seed=1)
    found = []
    for z in (x, y.flatten(1)):
        raw = [[math.dist(a, b) for b in z.tolist()] for a in z.tolist()]
        mean = sum(map(sum, raw)) / 12
        found.append([[d / mean for d in row] for row in raw])
    torch.testing.assert_close(distances(x), torch.tensor(found[0], dtype=torch.float64))
    expected = sum(huber(found[0][i][j] - found[1][i][j]) for i in range(4) for j in range(4)) / 16
    assert distance_loss(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_angles_are_the_cosines_at_each_sample_when_written_out() -> None:
    x, y = values(4, 3), values(4, 5, seed=1)
    found: list[list[float]] = []
    for z in (x, y):
        cosines = []
        for j in range(4):
            for i in range(4):
                for k in range(4):
                    one, other = z[i] - z[j], z[k] - z[j]
                    lengths = one.norm().item() * other.norm().item()
                    cosines.append(torch.dot(one, other).item() / lengths if lengths else 0.0)
        found.append(cosines)
    torch.testing.assert_close(angles(x).flatten(), torch.tensor(found[0], dtype=torch.float64))
    expected = sum(huber(a - b) for a, b in zip(*found, strict=True)) / 64
    assert angle_loss(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert Relational(distance=2, angle=3)(x, y).item() == pytest.approx(
        2 * distance_loss(x, y).item() + 3 * angle_loss(x, y).item()
    )
    assert Relational(distance=0, angle=3)(x, y) == 3 * angle_loss(x, y)


def test_similarities_are_rows_of_products_when_written_out() -> None:
    x, y = values(3, 2, 2), values(3, 5, seed=1)
    rows = []
    for z in (x.flatten(1), y):
        products = [[torch.dot(a, b).item() for b in z] for a in z]
        rows.append([[p / math.sqrt(sum(q * q for q in row)) for p in row] for row in products])
    torch.testing.assert_close(similarities(x), torch.tensor(rows[0], dtype=torch.float64))
    expected = sum((rows[0][i][j] - rows[1][i][j]) ** 2 for i in range(3) for j in range(3)) / 9
    assert similarity_loss(x, y).item() == pytest.approx(expected, rel=1e-12) == Similarity()(x, y).item()


@pytest.mark.parametrize("loss", [distance_loss, angle_loss, similarity_loss, attention_loss])
def test_relation_losses_have_right_and_finite_gradients_when_samples_are_equal(loss: object) -> None:
    shape = (4, 3, 2, 2)
    x, y = values(*shape).requires_grad_(), values(*shape, seed=1)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), (x,))  # type: ignore[operator]
    same = torch.ones(shape, requires_grad=True)
    loss(same, y.float()).backward()  # type: ignore[operator]
    assert same.grad is not None and torch.isfinite(same.grad).all()
    dead = torch.zeros(shape, requires_grad=True)
    loss(dead, y.float()).backward()  # type: ignore[operator]
    assert dead.grad is not None and torch.isfinite(dead.grad).all()


def test_relational_needs_a_weight_when_both_are_zero() -> None:
    with pytest.raises(SettingError, match="distance and angle are both 0"):
        Relational(distance=0, angle=0)


def test_normalising_is_torch_functional_when_nothing_is_zero() -> None:
    x = values(3, 4)
    torch.testing.assert_close(similarities(x), F.normalize(x @ x.T, dim=1))
