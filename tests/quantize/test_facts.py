"""Tensors in a plan: exact, small, and damaged ones told."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pared.errors import QuantizeError
from pared.quantize.facts import from_fact, to_fact


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=40))
def test_floats_come_back_to_the_bit(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    found = from_fact(json.loads(json.dumps(to_fact(tensor))))
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == tensor.numpy().tobytes()


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_booleans_come_back_whatever_their_number(values: list[list[bool]]) -> None:
    assert from_fact(to_fact(torch.tensor(values))).tolist() == values


def test_eight_booleans_take_one_byte() -> None:
    assert len(to_fact(torch.zeros(3 * 4096, dtype=torch.bool))["base64"]) == 3 * 4096 // 8 * 4 // 3


def test_other_types_and_damaged_data_are_refused() -> None:
    with pytest.raises(QuantizeError, match="float32 or bool, found int64"):
        to_fact(torch.ones(2, dtype=torch.int64))
    good = to_fact(torch.ones(3))
    for wrong in ({**good, "base64": "%%"}, {**good, "shape": [4]}, {"dtype": "float32"}):
        with pytest.raises(QuantizeError, match=r"damaged.*plan again"):
            from_fact(wrong)
