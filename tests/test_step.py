"""Settings, plans and the record of a step: strict, plain, and the same after JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pared.errors import SettingError
from pared.step import Edit, Plan, Skip, settings, settings_of

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
MAPPINGS = st.dictionaries(st.text(), PLAIN, max_size=3)
KINDS = st.sampled_from(["slice", "replace", "set_attribute", "cast", "mask", "quantize"])
PLANS = st.builds(
    Plan,
    step=st.text(),
    settings=MAPPINGS,
    edits=st.lists(st.builds(Edit, KINDS, st.text(), MAPPINGS), max_size=3).map(tuple),
    skips=st.lists(st.builds(Skip, st.text(), st.text()), max_size=3).map(tuple),
    facts=MAPPINGS,
    estimate=st.booleans(),
)


@given(PLANS)
def test_plan_is_the_same_after_json(plan: Plan) -> None:
    text = json.dumps(plan.to_json(), allow_nan=False)
    assert Plan.from_json(json.loads(text)) == plan


def test_plan_is_refused_as_json_when_it_holds_what_json_has_not() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Plan("Step", facts={"range": float("nan")}).to_json()


def test_plan_names_each_changed_module_once_and_in_order() -> None:
    edits = tuple(Edit("mask", name) for name in ("b", "a", "b"))
    assert Plan("Step", edits=edits).changed == ("b", "a")


@settings
class Inner:
    """A small frozen value."""

    kind: Annotated[str, pydantic.Field(description="Which.")] = "inner"


@settings
class Example:
    """A step's settings."""

    ratio: Annotated[float, pydantic.Field(description="Share.", ge=0, le=1)] = 0.5
    count: Annotated[int | None, pydantic.Field(description="How many.", ge=1)] = None
    names: Annotated[tuple[str, ...], pydantic.Field(description="Which.")] = ()
    flag: Annotated[bool, pydantic.Field(description="Whether.")] = False
    inner: Annotated[Inner, pydantic.Field(description="More.")] = Inner()


def test_settings_take_what_people_write() -> None:
    made = Example(ratio=1, count=3, names=["a", "b"], flag=True, inner={"kind": "other"})  # type: ignore[arg-type]
    assert settings_of(made) == {
        "ratio": 1.0, "count": 3, "names": ["a", "b"], "flag": True, "inner": {"kind": "other"}
    }  # fmt: skip
    assert made == Example(**settings_of(made))
    assert hash(made) == hash(Example(**settings_of(made)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratoi": 0.1}, "Example has no setting 'ratoi'; did you mean 'ratio'"),
        ({"zzz": 0.1}, "Example has no setting 'zzz'; valid: count, flag, inner, names, ratio"),
        ({"ratio": 1.5}, "Example.ratio: input should be less than or equal to 1, found 1.5"),
        ({"ratio": "0.5"}, "Example.ratio: expected float, found '0.5'"),
        ({"ratio": True}, "Example.ratio: expected float, found True"),
        ({"count": 0}, "Example.count: input should be greater than or equal to 1, found 0"),
        ({"count": 2.5}, "Example.count: .*valid integer"),
        ({"count": "3"}, "Example.count: expected int, found '3'"),
        ({"names": "abc"}, "Example.names: input should be a valid tuple, found 'abc'"),
        ({"flag": "yes"}, "Example.flag: expected bool, found 'yes'"),
        ({"inner": {"knid": "x"}}, "'inner.knid'|'knid'"),
        ({"ratoi": 1, "count": 0}, "no setting 'ratoi'.*; .*Example.count|Example.count.*; .*no setting 'ratoi'"),
    ],
)
def test_settings_are_refused_with_their_name_when_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Example(**given)


def test_settings_go_by_name_and_are_frozen() -> None:
    with pytest.raises(SettingError, match="Example takes its settings by name: ratio, count, names, flag, inner"):
        Example(0.5)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().ratio = 0.1  # type: ignore[misc]
    assert dataclasses.replace(Example(), ratio=0.25).ratio == 0.25
    with pytest.raises(SettingError, match="less than or equal"):
        dataclasses.replace(Example(), ratio=2)
