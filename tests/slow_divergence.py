"""The search for a clipping range written out from the raw values, one candidate at a time, in numpy: an oracle.

Nothing here is pared's. Import it as `from slow_divergence import DISTRIBUTIONS, search`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

COUNT = 20_000


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=COUNT)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": normal,
    "shifted normal": lambda rng: normal(rng) + 1.5,
    "far from zero": lambda rng: normal(rng) * 0.1 + 6,
    "far below zero": lambda rng: normal(rng) * 0.1 - 6,
    "laplace": lambda rng: rng.laplace(size=COUNT),
    "relu": lambda rng: np.maximum(normal(rng), 0),
    "relu6": lambda rng: np.clip(normal(rng) * 4, 0, 6),
    "leaky relu": lambda rng: np.where((x := normal(rng)) > 0, x, 0.01 * x),
    "gelu": lambda rng: (x := normal(rng)) * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
    "uniform": lambda rng: rng.uniform(-1, 3, COUNT),
    "exponential": lambda rng: rng.exponential(size=COUNT),
    "negative exponential": lambda rng: -rng.exponential(size=COUNT),
    "bimodal": lambda rng: np.concatenate([normal(rng) * 0.3 - 4, normal(rng) + 5]),
    "student t, 2": lambda rng: rng.standard_t(2, COUNT),
    "student t, 4, one-sided": lambda rng: np.abs(rng.standard_t(4, COUNT)),
    "lognormal": lambda rng: rng.lognormal(sigma=1.2, size=COUNT),
    "constant": lambda rng: np.full(100, 2.5),
    "empty bins": lambda rng: rng.integers(-9, 14, COUNT) * 0.37,
    "outliers": lambda rng: np.concatenate([normal(rng), [40.0, 41.5, -25.0]]),
    "tiny": lambda rng: normal(rng) * 1e-6,
}


def values_of(name: str) -> np.ndarray:
    """The values of a distribution, float32, the same at every call."""
    return DISTRIBUTIONS[name](np.random.default_rng(sum(map(ord, name)))).astype(np.float32)


def search(
    values: np.ndarray, kind: str, *, lowest: int, highest: int, symmetric: bool, bins: int
) -> tuple[int, int, float]:
    """First bin, bin after the last, both counted from 0 (negative below it), and the width of a bin."""
    x = values.astype(np.float64)
    bottom, top = min(x.min(), 0.0), max(x.max(), 0.0)
    fine = 2.0 ** (math.floor(math.log2(max(-bottom, top))) + 1) / 8192
    below, above = -math.floor(bottom / fine), (math.floor(top / fine) + 1 if top > 0 else 0)
    group = next(g for g in range(1, 99) if -(-below // g) + -(-above // g) <= bins)
    width, below, above = fine * group, -(-below // group), -(-above // group)
    edges = np.arange(-below, above + 1) * width
    counts = np.histogram(x[x != 0], edges)[0].astype(float)
    ends = np.clip(edges, bottom, top)
    middles = (ends[1:] + ends[:-1]) / 2
    integers = highest - lowest + 1

    def divergence(first: int, last: int) -> float:
        a, b = ends[below + first], ends[below + last]
        if symmetric:
            scale = np.float64(np.float32(2 * max(-a, b) / (highest - lowest)))
            zero = (lowest + highest + 1) // 2
        else:
            scale = np.float64(np.float32((b - a) / (highest - lowest)))
            zero = int(np.clip(lowest - np.rint(a / scale), lowest, highest))
        q_of = np.clip(np.rint(middles / scale) + zero, lowest, highest).astype(int) - lowest
        if kind == "mse":
            return float((counts * ((q_of + lowest - zero) * scale - middles) ** 2).sum() / counts.sum())
        inside = counts[below + first : below + last]
        q_of = q_of[below + first : below + last]
        p = inside.copy()
        p[0] += counts[: below + first].sum()
        p[-1] += counts[below + last :].sum()
        mass = np.bincount(q_of, inside, integers)
        holding = np.bincount(q_of, inside > 0, integers)
        q = np.where(inside > 0, mass[q_of] / np.maximum(holding[q_of], 1), 0)
        if inside.sum() == 0:
            q = np.ones(len(inside))
        p, q = p / p.sum(), q / q.sum()
        if kind == "js":
            return (kullback(p, (p + q) / 2) + kullback(q, (p + q) / 2)) / 2
        p, q = ((1 - 1e-4) * part + 1e-4 / len(part) for part in (p, q))
        return kullback(p, q) + (kullback(q, p) if kind == "symmetric_kl" else 0.0)

    def best(tried: list[tuple[int, int]]) -> tuple[int, int]:
        scores = [divergence(*ends) for ends in tried]
        return next(e for e, s in zip(tried, scores, strict=True) if s <= min(scores) + 1e-9 * (1 + min(scores)))

    def steps(most: int, least: int) -> list[int]:
        least = max(0, min(least, most))
        count = min(most - least + 1, 128)
        return [int(np.rint(most + (least - most) * i / max(count - 1, 1))) for i in range(count)]

    if symmetric:
        reach = steps(max(below, above), -(-integers // 2))
        return *best([(max(-r, -below), min(r, above)) for r in reach]), width
    first, last = -below, above
    for _ in range(3):
        before = first, last
        if above:
            first, last = best([(first, end) for end in steps(above, integers + first)])
        if below:
            first, last = best([(-start, last) for start in steps(below, integers - last)])
        if (first, last) == before:
            break
    return first, last, width


def kullback(p: np.ndarray, q: np.ndarray) -> float:
    """Sum of p log(p / q), where 0 log 0 is 0."""
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
