"""How long files take, timed in turn, and whether one is faster than another: with an interval and a verdict.

Before-then-after timing measures the weather. Here each file has a worker process of its own, and turns of a few milliseconds
are handed from one to the next, so that a slow second hits all of them alike and cancels in the ratio.
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

Turns = list[list[float]]  # milliseconds of each call, by round

ROUNDS = 200
SECONDS_PER_FILE = 2.0
MIN_ROUNDS = 12  # 6 pairs of rounds: fewer give no honest interval, however long a call takes
WARM_UP_S = 0.2
TURN_MS = 5.0
MAX_CALLS = 1000
RESAMPLES = 4000


def time_in_turn(
    commands: Sequence[Sequence[str]],
    *,
    rounds: int = ROUNDS,
    budget_s: float | None = None,
    timeout_s: float = 120.0,
) -> list[Turns]:
    """Time every call of every file, one worker process a file, in turn.

    Each worker is warmed up and told how many calls make a turn of about 5 ms. In every second round the order is reversed
    (A B C, C B A), and the first to go rotates, so that neither drift nor coming after a certain neighbour favours a file.

    Args:
        commands: For each file, the arguments that start its worker.
        rounds: Most rounds to run; made even.
        budget_s: Stop after so long, but not before 12 rounds. 2 s a file by default; starting and warming up come on top.
        timeout_s: How long one turn may take.

    Returns:
        For each file, for each round, the milliseconds of each call.

    Raises:
        MeasureError: A worker died or gave no answer in time.
    """
    budget = SECONDS_PER_FILE * len(commands) if budget_s is None else budget_s
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(command, timeout_s=timeout_s)) for command in commands]
        for worker in workers:
            worker.wait_ready()
        calls = [calls_per_turn(worker) for worker in workers]
        turns: list[Turns] = [[] for _ in workers]
        start = time.monotonic()
        for number in range(max(rounds + rounds % 2, MIN_ROUNDS)):
            if number >= MIN_ROUNDS and number % 2 == 0 and time.monotonic() - start > budget:
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


def percentiles(turns: Turns) -> Latency:
    """The median and the 90th percentile of a file's calls, in milliseconds."""
    p50, p90 = np.percentile(np.concatenate([np.asarray(turn) for turn in turns]), [50, 90])
    return Latency(p50=float(p50), p90=float(p90))


def speedup(baseline: Turns, candidate: Turns, *, seed: int = 0) -> Speedup:
    """Baseline time over candidate time, with a 95 % interval and a verdict.

    A turn counts by its median call, a round by its ratio, two neighbouring rounds (one in each order) by the geometric mean
    of theirs; the value is the median of those. The median of paired ratios, not the ratio of medians: a slow spell that
    covers a part of the rounds shifts both medians by amounts that need not cancel, while each pair inside it is still fair.

    The interval is a circular block bootstrap (Politis and Romano 1992), because neighbouring rounds share their weather and
    resampling them one by one would be too sure; its quantiles are moved out by Student's factor, because the bootstrap of a
    few blocks is too narrow (Hesterberg 2014, arXiv:1411.5279, section 5.3).

    Args:
        baseline: What `time_in_turn` gave for the baseline.
        candidate: The same, for the other file, from the same call of `time_in_turn`.
        seed: Of the bootstrap.

    Raises:
        MeasureError: The two do not have the same number of rounds, or fewer than 12.
    """
    if len(baseline) != len(candidate) or len(baseline) < MIN_ROUNDS:
        raise MeasureError(
            f"a speedup needs the same {MIN_ROUNDS} or more rounds of both files, found {len(baseline)} and {len(candidate)}; "
            "time them in one call of time_in_turn"
        )
    ratios = [math.log(statistics.median(a) / statistics.median(b)) for a, b in zip(baseline, candidate, strict=True)]
    pairs = np.asarray(ratios[: len(ratios) // 2 * 2]).reshape(-1, 2).mean(axis=1)
    low, high = (math.exp(bound) for bound in median_interval(pairs, seed))
    verdict: Verdict = "faster" if low > 1 else "slower" if high < 1 else "no measurable change"
    return Speedup(value=math.exp(float(np.median(pairs))), low=low, high=high, verdict=verdict)


def median_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % interval of the median of a series whose neighbours may be correlated."""
    count = len(values)
    length = math.ceil(math.sqrt(count) / 2)
    blocks = math.ceil(count / length)
    starts = np.random.default_rng(seed).integers(count, size=(RESAMPLES, blocks, 1))
    resampled = values[(starts + np.arange(length)) % count].reshape(RESAMPLES, -1)[:, :count]
    normal = statistics.NormalDist()
    tail = normal.cdf(-math.sqrt(blocks / (blocks - 1)) * student(blocks - 1))
    low, high = np.quantile(np.median(resampled, axis=1), [tail, 1 - tail])
    return float(low), float(high)


def student(freedom: int) -> float:
    """Student's t at 97.5 %, by the first terms of its expansion about the normal (Abramowitz and Stegun 26.7.5).

    Example:
        >>> round(student(5), 2), round(student(30), 2)
        (2.57, 2.04)
    """
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
