"""Losses on outputs, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pared
from pared.distill.decoupled import decoupled_divergence
from pared.distill.response import ResponseLoss, bernoulli_divergence, soft_divergence
from pared.errors import DataError, SettingError


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_divergence_is_the_sum_over_classes_when_written_out(temperature: float) -> None:
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    expected = [
        temperature**2 * divergence(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    found = soft_divergence(student, teacher, temperature=temperature)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert soft_divergence(teacher, teacher, temperature=temperature).abs().max() < 1e-12


def test_soft_divergence_has_the_gradient_of_the_paper_when_softened() -> None:
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    soft_divergence(student, teacher, temperature=3.0).sum().backward()
    # Equation 2 of the paper, (q - p) / T, times T^2.
    expected = 3.0 * (F.softmax(student / 3, 1) - F.softmax(teacher / 3, 1))
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("beta", [0.0, 1.0, 8.0])
def test_decoupled_divergence_is_its_two_parts_when_written_out(beta: float) -> None:
    student, teacher, target = logits(4, 5), logits(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    expected = []
    for s, t, hit in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p, q = softmax(t, 2.0), softmax(s, 2.0)
        first = divergence([p[hit], 1 - p[hit]], [q[hit], 1 - q[hit]])
        others = [[x / (1 - row[hit]) for i, x in enumerate(row) if i != hit] for row in (p, q)]
        expected.append(4 * (first + beta * divergence(*others)))
    found = decoupled_divergence(student, teacher, target, temperature=2.0, beta=beta)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_decoupled_divergence_is_the_plain_one_when_beta_is_the_rest_of_the_teachers_probability() -> None:
    student, teacher, target = logits(1, 5), logits(1, 5, seed=1), torch.tensor([3])
    beta = 1 - F.softmax(teacher / 2, 1)[0, 3].item()
    found = decoupled_divergence(student, teacher, target, temperature=2.0, beta=beta)
    torch.testing.assert_close(found, soft_divergence(student, teacher, temperature=2.0))


def test_decoupled_divergence_has_a_gradient_when_one_class_is_certain() -> None:
    student = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    found = decoupled_divergence(student, student.detach() * 2, torch.tensor([0]), temperature=1.0, beta=8.0)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    small = logits(2, 3).requires_grad_()
    other, labels = logits(2, 3, seed=1), torch.tensor([0, 2])
    assert torch.autograd.gradcheck(
        lambda x: decoupled_divergence(x, other, labels, temperature=2.0, beta=3.0), (small,)
    )


def test_bernoulli_divergence_is_the_mean_over_labels_when_written_out() -> None:
    student, teacher = logits(3, 4), logits(3, 4, seed=1)
    expected = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-value / 2)) for value in (t, s))
        expected += 4 * divergence([p, 1 - p], [q, 1 - q]) / 12
    assert bernoulli_divergence(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-12)
    assert bernoulli_divergence(teacher, teacher, temperature=2.0).abs() < 1e-12


def test_response_loss_is_the_mean_over_samples_when_called_in_an_own_loop() -> None:
    student, teacher = logits(6, 3), logits(6, 3, seed=1)
    expected = F.kl_div(
        F.log_softmax(student / 4, 1), F.log_softmax(teacher / 4, 1), reduction="batchmean", log_target=True
    )
    found = pared.distill.ResponseLoss(temperature=4)(student, teacher)
    torch.testing.assert_close(found, expected * 16)
    assert ResponseLoss(kind="mse")(student, teacher) == F.mse_loss(student, teacher)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["kl", "decoupled"])
def test_response_loss_leaves_positions_out_when_their_label_is_ignored(kind: str, last: bool) -> None:
    student, teacher = logits(2, 5, 3), logits(2, 5, 3, seed=1)  # samples, classes, positions
    target = torch.tensor([[0, -100, 4], [-100, 1, 2]])
    loss = ResponseLoss(kind=kind, temperature=2)
    kept = [(i, j) for i in range(2) for j in range(3) if target[i, j] >= 0]
    rows = [torch.stack([x[i, :, j] for i, j in kept]) for x in (student, teacher)]
    expected = loss(*rows, torch.stack([target[i, j] for i, j in kept]))
    given = [x.transpose(1, 2) if last else x for x in (student, teacher)]
    torch.testing.assert_close(loss(*given, target), expected)
    everything = loss(*given, torch.full_like(target, 7), ignore_index=7)
    assert everything == 0


def test_response_loss_takes_halves_when_mixed_precision_gives_them() -> None:
    student, teacher = logits(4, 3).half(), logits(4, 3, seed=1)
    found = ResponseLoss()(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ResponseLoss()(student.float(), teacher.float()))


def test_response_loss_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(DataError, match=r"student's outputs are \(2, 3\), the teacher's \(2, 4\)"):
        ResponseLoss()(logits(2, 3), logits(2, 4))
    with pytest.raises(DataError, match="needs class indices as labels"):
        ResponseLoss(kind="decoupled")(logits(2, 3), logits(2, 3))
    with pytest.raises(SettingError, match="temperature"):
        ResponseLoss(temperature=0)
    with pytest.raises(SettingError, match="did you mean 'temperature'"):
        ResponseLoss(temperatur=2)
