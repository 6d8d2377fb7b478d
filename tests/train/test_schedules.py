"""The schedules against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from pared.errors import SettingError
from pared.train.optimizers import SGD
from pared.train.schedules import Constant, Cosine, StepDecay

PER_EPOCH, EPOCHS = 7, 6


def rates(schedule: Constant | Cosine | StepDecay) -> list[float]:
    return [schedule.factor(step, PER_EPOCH, EPOCHS) for step in range(PER_EPOCH * EPOCHS)]


def rates_of_torch(make: object, every: int = 1) -> list[float]:
    """What a PyTorch scheduler, stepped after every `every` batches, sets a rate of 1 to."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for step in range(PER_EPOCH * EPOCHS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return found


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_cosine_equals_pytorchs_when_given_the_same_period(final: float) -> None:
    expected = rates_of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=PER_EPOCH * EPOCHS, eta_min=final))
    # PyTorch's is a recursion over 42 steps, ours the closed form.
    assert rates(Cosine(final=final)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_step_equals_pytorchs_when_given_the_same_period(every: int) -> None:
    expected = rates_of_torch(lambda o: lr_scheduler.StepLR(o, step_size=every, gamma=0.3), every=PER_EPOCH)
    assert rates(StepDecay(every=every, factor_each=0.3)) == pytest.approx(expected, rel=1e-12)


def test_constant_stays_when_there_is_no_warmup() -> None:
    assert rates(Constant()) == [1.0] * (PER_EPOCH * EPOCHS)


def test_warmup_rises_in_a_line_when_asked_for() -> None:
    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / 15, total_iters=14)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=PER_EPOCH * EPOCHS - 14)
        return lr_scheduler.ChainedScheduler([rise]) if optimizer is None else SwitchAt(rise, fall, 14)

    class SwitchAt:
        """PyTorch's SequentialLR warns of its own misuse of `step(epoch)`; this steps one, then the other."""

        def __init__(self, first: lr_scheduler.LRScheduler, then: lr_scheduler.LRScheduler, at: int) -> None:
            self.first, self.then, self.left = first, then, at

        def step(self) -> None:
            (self.first if self.left > 0 else self.then).step()
            self.left -= 1

    found = rates(Cosine(warmup_epochs=2))
    expected = rates_of_torch(make)
    # Both schedulers of PyTorch multiply the one rate; before its end the rise alone has moved it.
    assert found[:15] == pytest.approx([(step + 1) / 15 for step in range(15)])
    assert found == pytest.approx([min(value, 1.0) for value in expected], abs=1e-9)


@pytest.mark.parametrize("schedule", [Constant(warmup_epochs=0.5), StepDecay(every=2, warmup_epochs=0.5)])
def test_warmup_may_be_part_of_an_epoch_when_epochs_are_long(schedule: Constant | StepDecay) -> None:
    factors = [schedule.factor(step, per_epoch=100, epochs=3) for step in range(60)]
    assert factors[0] == pytest.approx(1 / 51)
    assert factors[:51] == sorted(factors[:51])
    assert factors[50:] == [1.0] * 10


def test_cosine_stays_between_its_ends_when_warmup_is_as_long_as_the_run() -> None:
    factors = [Cosine(warmup_epochs=9).factor(step, PER_EPOCH, EPOCHS) for step in range(PER_EPOCH * EPOCHS)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StepDecay(every=0), "every"),
        (lambda: Cosine(finall=0.1), "final"),
        (lambda: SGD(nesterov=True, momentum=0.0), "momentum above 0"),
        (lambda: SGD(momentum=1.0), "momentum"),
    ],
)
def test_settings_are_refused_when_they_make_no_sense(make: object, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()  # type: ignore[operator]
