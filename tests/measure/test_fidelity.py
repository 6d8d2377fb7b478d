from __future__ import annotations

import math

import numpy as np
import pytest

from pared.errors import MeasureError
from pared.measure.fidelity import Comparison
from pared.report.data import Agreement


def compare(reference: np.ndarray, candidate: np.ndarray) -> Agreement:
    comparison = Comparison()
    comparison.update(reference, candidate)
    return comparison.result()


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)


def test_comparison_has_no_ratio_when_outputs_are_equal(scores: np.ndarray) -> None:
    assert compare(scores, scores.copy()) == Agreement(sqnr_db=None, max_abs=0.0, agreement=1.0)


def test_comparison_gives_0_db_when_output_is_twice_too_large(scores: np.ndarray) -> None:
    # The error 2x - x has the energy of x itself. The classes are all the same, and so is the cosine.
    result = compare(scores, 2 * scores)
    assert result.sqnr_db == pytest.approx(0.0, abs=1e-9)
    assert result.agreement == 1.0


def test_comparison_sees_the_shift_when_output_is_shifted() -> None:
    # Signal 4 * 1, noise 4 * 0.1^2: 20 dB.
    result = compare(np.ones((2, 2)), np.ones((2, 2)) + 0.1)
    assert result.sqnr_db == pytest.approx(20.0)
    assert result.max_abs == pytest.approx(0.1)


def test_comparison_falls_below_0_db_when_rows_are_permuted(scores: np.ndarray) -> None:
    # Independent rows: the noise has twice the energy of the signal, -3 dB, give or take the sample.
    result = compare(scores, np.roll(scores, 1, axis=0))
    assert result.sqnr_db == pytest.approx(10 * math.log10(0.5), abs=1.0)
    assert result.agreement is not None and result.agreement < 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_comparison_refuses_when_a_value_is_not_finite(scores: np.ndarray, bad: float, side: int) -> None:
    pair = [scores, scores.copy()]
    pair[side] = pair[side].copy()
    pair[side][3, 4] = bad
    with pytest.raises(MeasureError, match=r"NaN or infinity in 1 of 640"):
        compare(pair[0], pair[1])


def test_comparison_refuses_when_shapes_differ() -> None:
    with pytest.raises(MeasureError, match=r"\(2, 3\) and \(3, 2\)"):
        compare(np.ones((2, 3)), np.ones((3, 2)))


def test_comparison_refuses_when_nothing_was_counted() -> None:
    with pytest.raises(MeasureError, match="at least one batch"):
        Comparison().result()


def test_comparison_equals_the_whole_when_fed_in_batches(scores: np.ndarray) -> None:
    noisy = scores + np.float32(0.01) * scores[::-1]
    comparison = Comparison()
    for start in range(0, 64, 7):
        comparison.update(scores[start : start + 7], noisy[start : start + 7])
    whole, parts = compare(scores, noisy), comparison.result()
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert (parts.max_abs, parts.agreement) == (whole.max_abs, whole.agreement)


def test_comparison_counts_rows_with_the_same_class_when_outputs_are_scores() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    candidate = np.array([[2.0, 0.0], [1.0, 0.0], [0.6, 0.5], [0.0, 0.1]])
    assert compare(reference, candidate).agreement == 0.5


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 2)])
def test_comparison_has_no_agreement_when_outputs_are_not_scores(shape: tuple[int, ...]) -> None:
    assert compare(np.ones(shape), np.ones(shape)).agreement is None


def test_comparison_has_no_agreement_when_outputs_are_integers() -> None:
    result = compare(np.array([[1, 2]]), np.array([[1, 4]]))
    assert result.agreement is None
    assert result.max_abs == 2.0


def test_comparison_gives_a_low_finite_ratio_when_reference_is_zero() -> None:
    # Minus infinity would be written to JSON as null, which means "equal".
    result = compare(np.zeros((2, 2)), np.full((2, 2), 1e-3))
    assert result.sqnr_db is not None and -4000 < result.sqnr_db < -1000


def test_comparison_keeps_precision_when_values_are_float16() -> None:
    # 60000^2 overflows float16; in float64 the ratio is 60000 / 32, 65.5 dB.
    reference = np.full((1, 2), 60000, np.float16)
    candidate = np.full((1, 2), 59968, np.float16)
    assert compare(reference, candidate).sqnr_db == pytest.approx(20 * math.log10(60000 / 32))
