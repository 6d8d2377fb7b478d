from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pared.errors import MeasureError
from pared.measure import latency
from pared.measure.latency import SITTINGS, Timings, pair_ratios, percentiles, speedup, time_in_turn
from pared.targets.worker import worker_command, write_inputs
from tiny_onnx import write_chain

FAKE = str(Path(__file__).with_name("fake_worker.py"))


def fake(folder: Path, name: str, **options: float) -> list[str]:
    return [sys.executable, FAKE, str(folder), name, *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request to find the number of calls, so that what a fake worker does is the same every time."""
    monkeypatch.setattr(latency, "WARM_UP_S", 0.0)


def made_up(generator: np.random.Generator, *, ms: float = 1.0, luck: float, noise: float, rounds: int = 12) -> Timings:
    """Timings whose rounds differ by `noise` and whose sittings differ by `luck`, both relative."""
    lives = ms * np.exp(luck * generator.standard_normal(SITTINGS))
    return [[[life * np.exp(noise * generator.standard_normal())] for _ in range(rounds)] for life in lives]


@pytest.mark.parametrize(("luck", "noise"), [(0.0, 0.1), (0.03, 0.03), (0.05, 0.01)])
def test_speedup_sees_no_change_when_a_file_meets_itself(luck: float, noise: float) -> None:
    # Sittings that differ (luck) are what a bootstrap over rounds alone mistakes for a change. An honest 95 % interval
    # is wrong 5 times of 100; more than 12 have a probability of 0.1 % (binomial).
    generator = np.random.default_rng(1)
    pairs = [[made_up(generator, luck=luck, noise=noise) for _ in range(2)] for _ in range(100)]
    false = [result for a, b in pairs if (result := speedup(a, b)).verdict != "no measurable change"]
    assert len(false) <= 12
    assert all(result.low <= result.value <= result.high for result in false)


def test_speedup_covers_the_truth_when_one_file_is_faster() -> None:
    generator = np.random.default_rng(2)
    results = [
        speedup(made_up(generator, ms=1.1, luck=0.01, noise=0.05), made_up(generator, luck=0.01, noise=0.05))
        for _ in range(50)
    ]
    assert sum(result.low <= 1.1 <= result.high for result in results) >= 46
    assert sum(result.verdict == "faster" for result in results) >= 46


def test_speedup_says_slower_when_the_whole_interval_is_below_1() -> None:
    generator = np.random.default_rng(3)
    result = speedup(made_up(generator, luck=0, noise=0.02), made_up(generator, ms=2.0, luck=0, noise=0.02))
    assert result.verdict == "slower"
    assert result.low < 0.5 < result.high < 0.55


def test_speedup_is_the_inverse_when_files_change_places() -> None:
    generator = np.random.default_rng(4)
    a, b = made_up(generator, luck=0.02, noise=0.05), made_up(generator, ms=0.5, luck=0.02, noise=0.05)
    there, back = speedup(a, b), speedup(b, a)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low < 1 / back.value < there.high


def test_speedup_ignores_a_slow_spell_when_it_hits_both_files() -> None:
    def timings(ms: float) -> Timings:
        return [[[ms * (10 if 4 <= turn < 7 else 1)] for turn in range(12)] for _ in range(SITTINGS)]

    result = speedup(timings(3.0), timings(2.0))
    assert (result.value, result.low, result.high) == pytest.approx((1.5, 1.5, 1.5))


def test_speedup_repeats_when_the_seed_is_the_same() -> None:
    generator = np.random.default_rng(5)
    a, b = made_up(generator, luck=0.1, noise=0.1), made_up(generator, luck=0.1, noise=0.1)
    assert speedup(a, b, seed=7) == speedup(a, b, seed=7)
    assert speedup(a, b, seed=7) != speedup(a, b, seed=8)


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([[[1.0]] * 4] * 6, [[[1.0]] * 4] * 5), ([[[1.0]] * 4] * 6, [[[1.0]] * 6] * 6), ([[[1.0]] * 4], [[[1.0]] * 4])],
)
def test_speedup_refuses_when_rounds_are_not_paired(baseline: Timings, candidate: Timings) -> None:
    with pytest.raises(MeasureError, match="one call of time_in_turn"):
        speedup(baseline, candidate)


def test_percentiles_are_over_calls_when_turns_hold_several() -> None:
    result = percentiles([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0, 11.0]]])
    assert (result.p50, result.p90) == (6.0, 10.0)


@pytest.mark.usefixtures("no_warm_up")
def test_time_in_turn_hands_turns_over_when_there_are_two_files(tmp_path: Path) -> None:
    a, b = time_in_turn([fake(tmp_path, "a", ms=1.0), fake(tmp_path, "b", ms=0.5)], rounds=4 * SITTINGS)
    turns = (tmp_path / "turns").read_text().split()
    # A sitting: one turn each to find the number of calls, then the order is reversed in every second round, and the
    # first to go changes.
    assert turns == ["a", "b", *"abba", *"baab"] * SITTINGS
    assert [len(turn) for turn in a[0]] == [5] * 4
    assert [len(turn) for turn in b[0]] == [10] * 4
    assert {call for sitting in b for turn in sitting for call in turn} == {0.5}
    assert (tmp_path / "lives-a").read_text().count("life") == SITTINGS
    assert speedup(a, b).value == pytest.approx(2.0)


@pytest.mark.usefixtures("no_warm_up")
def test_time_in_turn_favours_no_file_when_the_machine_slows_down(tmp_path: Path) -> None:
    # Each turn is 1 % slower than the one before: the second of a round looks slower, unless the order is reversed.
    a, b = time_in_turn([fake(tmp_path, "a", drift=0.01), fake(tmp_path, "b", drift=0.01)], rounds=4 * SITTINGS)
    # What is left is the curvature of the drift: 0.01^2 times a few.
    assert all(np.abs(pair_ratios(own, other)).max() < 1e-3 for own, other in zip(a, b, strict=True))
    assert percentiles(a).p90 > 1.3


@pytest.mark.usefixtures("no_warm_up")
def test_time_in_turn_sees_no_change_when_lives_differ_by_luck(tmp_path: Path) -> None:
    a, b = time_in_turn(
        [fake(tmp_path, "a", luck=0.05, noise=0.01), fake(tmp_path, "b", luck=0.05, noise=0.01)], rounds=8 * SITTINGS
    )
    assert speedup(a, b).verdict == "no measurable change"


@pytest.mark.usefixtures("no_warm_up")
def test_time_in_turn_keeps_two_rounds_a_sitting_when_the_budget_is_spent(tmp_path: Path) -> None:
    a, _ = time_in_turn([fake(tmp_path, "a"), fake(tmp_path, "b")], rounds=1000, budget_s=0.0)
    assert [len(sitting) for sitting in a] == [2] * SITTINGS


def test_time_in_turn_judges_rightly_when_files_are_real(tmp_path: Path) -> None:
    """Twice the same file, and one with eight times the work, in ONNX Runtime."""
    width = 64
    short = write_chain(tmp_path / "short.onnx", width=width, layers=20, shape=("batch", width))
    long = write_chain(tmp_path / "long.onnx", width=width, layers=160, shape=("batch", width))
    inputs = tmp_path / "inputs.npz"
    write_inputs(inputs, [np.ones((64, width), np.float32)])
    commands = [worker_command("onnxruntime", file, threads=1, inputs_file=inputs) for file in (short, short, long)]
    first, second, third = time_in_turn(commands, rounds=2 * SITTINGS)
    same, longer = speedup(first, second), speedup(first, third)
    # A busy machine may put an end of the interval on 1 by chance; 5 % beyond it would be a fault of ours.
    assert same.low < 1.05 and same.high > 0.95
    assert longer.verdict == "slower"
    assert longer.value < 0.4
    assert percentiles(third).p50 > percentiles(first).p50
