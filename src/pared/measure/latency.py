"""How long files take, timed in turn, and whether one is faster than another: with an interval and a verdict.

Before-then-after timing measures the weather. Here each file has a worker process of its own, and turns of a few
milliseconds are handed from one to the next, so that a slow second hits all of them alike and cancels in the ratio.
What does not cancel is luck that lasts as long as a process does (which cores its threads settle on, where its memory
lies): two workers of the same file differ by it for their whole life. So the workers are started anew several times,
and the interval is taken over these sittings.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence

import numpy as np

from pared.errors import MeasureError
from pared.measure.process import WorkerProcess
from pared.report.data import Latency, Speedup, Verdict

Sitting = list[list[float]]  # milliseconds of each call, by round; one life of a worker
Timings = list[Sitting]

ROUNDS = 96
SECONDS_PER_FILE = 1.5
SITTINGS = 8
WARM_UP_S = 0.05
TURN_MS = 5.0
MAX_CALLS = 1000
RESAMPLES = 4000
# What a 95 % interval cuts off at each end: 2.5 %, were there many sittings. The bootstrap of a few is too narrow, so
# Hesterberg (2014, arXiv:1411.5279) moves its ends out to where the normal distribution is beyond sqrt(n / (n - 1))
# times Student's t with n - 1 degrees of freedom: for n = 8 that is 2.53, and 0.57 %.
TAIL = 0.005


def time_in_turn(
    commands: Sequence[Sequence[str]],
    *,
    rounds: int = ROUNDS,
    budget_s: float | None = None,
    timeout_s: float = 120.0,
) -> list[Timings]:
    """Time every call of every file, one worker process a file, in turn.

    There are eight sittings, each with fresh workers, which are warmed up and told how many calls make a turn of about
    5 ms. In every second round the order is reversed (A B C, C B A), and the first to go rotates, so that neither drift
    nor coming after a certain neighbour favours a file.

    Args:
        commands: For each file, the arguments that start its worker.
        rounds: Most rounds to run, over all sittings; each sitting has an even number, at least 2.
        budget_s: Stop after so long, as far as that minimum allows. 1.5 s a file by default; starting and warming the
            workers up come on top, about 0.5 s a sitting.
        timeout_s: How long one turn may take.

    Returns:
        For each file, sitting and round: the milliseconds of each call.

    Raises:
        MeasureError: A worker died or gave no answer in time.
    """
    budget = SECONDS_PER_FILE * len(commands) if budget_s is None else budget_s
    pairs = max(rounds // (2 * SITTINGS), 1)
    timings: list[Timings] = [[] for _ in commands]
    for number in range(SITTINGS):
        with contextlib.ExitStack() as stack:
            workers = {
                index: stack.enter_context(WorkerProcess(commands[index], timeout_s=timeout_s))
                for index in order(number, len(commands))
            }
            sitting = sit([workers[index] for index in range(len(commands))], 2 * pairs, budget / SITTINGS)
        for own, turns in zip(timings, sitting, strict=True):
            own.append(turns)
    return timings


def sit(workers: Sequence[WorkerProcess], rounds: int, budget_s: float) -> list[Sitting]:
    """One sitting: for each worker and round, the milliseconds of each call."""
    for worker in workers:
        worker.wait_ready()
    calls = [calls_per_turn(worker) for worker in workers]
    turns: list[Sitting] = [[] for _ in workers]
    start = time.monotonic()
    for number in range(rounds):
        if number and number % 2 == 0 and time.monotonic() - start > budget_s:
            break
        for index in order(number, len(workers)):
            turns[index].append(workers[index].time(calls[index]))
    return turns


def order(number: int, files: int) -> list[int]:
    """Who goes when in a round.

    Example:
        >>> [order(number, 3) for number in range(4)]
        [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]]
    """
    first = number // 2 % max(files, 1)
    forward = [(first + i) % files for i in range(files)]
    return forward[::-1] if number % 2 else forward


def calls_per_turn(worker: WorkerProcess) -> int:
    """Warm a worker up, and find how many of its calls fill a turn."""
    end = time.monotonic() + WARM_UP_S
    recent = worker.time(1)
    while time.monotonic() < end:
        recent = worker.time(min(2 * len(recent), MAX_CALLS))
    return min(max(round(TURN_MS / statistics.median(recent)), 1), MAX_CALLS)


def percentiles(timings: Timings) -> Latency:
    """The median and the 90th percentile of all calls of a file, in milliseconds."""
    calls = [call for sitting in timings for turn in sitting for call in turn]
    p50, p90 = np.percentile(calls, [50, 90])
    return Latency(p50=float(p50), p90=float(p90))


def speedup(baseline: Timings, candidate: Timings, *, seed: int = 0) -> Speedup:
    """Baseline time over candidate time, with a 95 % interval and a verdict.

    A turn counts by its median call, a round by its ratio, two neighbouring rounds (one in each order) by the geometric
    mean of theirs, a sitting by the median of those; the value is the geometric mean over the sittings. Paired ratios,
    not the ratio of medians: a slow spell that covers a part of the rounds shifts both medians by amounts that need not
    cancel, while each pair inside it is still fair.

    The interval is a two-level bootstrap: sittings are drawn with replacement, and in each the pairs. A bootstrap over
    rounds alone is too sure of itself, as it cannot see what differs from one life of a process to the next: on a busy
    machine it called up to 23 % of comparisons of a file with itself a change; this one 1 % or less. See Kalibera and
    Jones, "Rigorous benchmarking in reasonable time" (2013), on repeating at the highest level that varies.

    Args:
        baseline: What `time_in_turn` gave for the baseline.
        candidate: The same, for the other file, from the same call of `time_in_turn`.
        seed: Of the bootstrap.

    Raises:
        MeasureError: The two do not have the same sittings and rounds, or fewer than two sittings.
    """
    shapes = [[len(sitting) for sitting in timings] for timings in (baseline, candidate)]
    if shapes[0] != shapes[1] or len(shapes[0]) < 2 or min(shapes[0]) < 2:
        raise MeasureError(
            f"a speedup needs the same rounds of both files, 2 or more in 2 or more sittings, found {shapes[0]} and "
            f"{shapes[1]}; time both in one call of time_in_turn"
        )
    pairs = [pair_ratios(a, b) for a, b in zip(baseline, candidate, strict=True)]
    value = math.exp(statistics.fmean(float(np.median(values)) for values in pairs))
    low, high = (math.exp(bound) for bound in interval(pairs, seed))
    verdict: Verdict = "faster" if low > 1 else "slower" if high < 1 else "no measurable change"
    return Speedup(value=value, low=low, high=high, verdict=verdict)


def pair_ratios(baseline: Sitting, candidate: Sitting) -> np.ndarray:
    """The logarithm of baseline over candidate, for each two neighbouring rounds of a sitting."""
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(baseline, candidate, strict=True)]
    logs = np.log(ratios[: len(ratios) // 2 * 2])
    means: np.ndarray = logs.reshape(-1, 2).mean(axis=1)
    return means


def interval(sittings: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean over sittings of the median of each."""
    generator = np.random.default_rng(seed)
    count = len(sittings)
    medians = np.stack([np.median(generator.choice(own, (RESAMPLES, len(own))), axis=1) for own in sittings])
    shape = (RESAMPLES, count)
    means = medians[generator.integers(count, size=shape), generator.integers(RESAMPLES, size=shape)].mean(axis=1)
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return float(low), float(high)
