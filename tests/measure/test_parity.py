from __future__ import annotations

import pytest

from pared.errors import ParityError
from pared.measure.parity import FLOAT_FLOOR_DB, check_parity
from pared.report.data import Agreement


def agreement(sqnr_db: float | None) -> Agreement:
    return Agreement(sqnr_db=sqnr_db, max_abs=0.25, agreement=0.93)


@pytest.mark.parametrize("sqnr_db", [None, FLOAT_FLOOR_DB, 120.0])
def test_check_parity_passes_when_at_or_above_the_floor(sqnr_db: float | None) -> None:
    check_parity(agreement(sqnr_db), where="baseline")


def test_check_parity_raises_with_all_figures_when_below_the_floor() -> None:
    with pytest.raises(ParityError, match=r"1 QuantizeStatic: .* 59\.9 dB .* 60\.0 dB .* 0\.25, .* 93\.0%"):
        check_parity(agreement(59.9), where="1 QuantizeStatic")


def test_check_parity_uses_the_floor_when_one_is_given() -> None:
    check_parity(agreement(31.0), floor_db=30.0, where="1 QuantizeStatic")
    with pytest.raises(ParityError, match=r"31\.0 dB where at least 32\.0 dB"):
        check_parity(agreement(31.0), floor_db=32.0, where="1 QuantizeStatic")


def test_check_parity_says_where_they_part_and_still_that_they_do_when_the_search_fails() -> None:
    with pytest.raises(ParityError, match=r"the run stops here; they part at layer a$"):
        check_parity(agreement(31.0), where="baseline", parted=lambda: "they part at layer a")
    with pytest.raises(ParityError, match=r"31\.0 dB .*; compare the outputs of single layers") as caught:
        check_parity(agreement(31.0), where="baseline", parted=lambda: str(1 / 0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_check_parity_fails_when_the_ratio_is_nan() -> None:
    with pytest.raises(ParityError):
        check_parity(agreement(float("nan")), where="baseline")
