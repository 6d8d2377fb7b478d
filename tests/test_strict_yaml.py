"""Recipes hold what JSON can hold, and nothing else is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pared.errors import RecipeError
from pared.strict_yaml import read_json, read_yaml

printable = st.text(st.characters(min_codepoint=32, max_codepoint=126))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | printable
plain = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(printable, inner), max_leaves=12)


@given(plain)
def test_read_yaml_gives_the_same_as_json_when_the_text_is_json(data: Any) -> None:
    # JSON is a subset of YAML 1.2 for printable text, so json is an independent oracle. Types count: 1 is not 1.0.
    assert repr(read_yaml(json.dumps(data), "text")) == repr(json.loads(json.dumps(data)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        ("4.", 4.0),
        ("-3", -3),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("0x1f", "0x1f"),
        ("~", None),
        ("", None),
        ("True", True),
        ("'1'", "1"),
        ("=", "="),
        (".nan", ".nan"),
    ],
)
def test_read_yaml_follows_yaml_1_2_when_1_1_reads_scalars_otherwise(text: str, value: Any) -> None:
    assert repr(read_yaml(text, "text")) == repr(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "line 1: the tag .*os.system.* is not read"),
        ("b: 1\na: !!python/name:os.system ''", "line 2: the tag .* is not read"),
        ("a: !!set {x}", "the tag .*set.* is not read"),
        ("a: !!binary aGk=", "the tag .*binary.* is not read"),
        ("a: !!int x", "does not fit its tag"),
        ("a: !!bool x", "does not fit its tag"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' stands there twice"),
        ("a: {b: 1, b: 2}", "'b' stands there twice"),
        ("a: &x [1]\nb: *x", "line 2: aliases are not read"),
        ("1: a", "keys are text, found 1"),
        ("a: [1", "text, line 1"),
        ("a: 1\n--- \nb: 2", "line 2"),
        ("a: \0", "is not YAML"),
        ("[" * 5000, "nested too deep"),
    ],
)
def test_read_yaml_refuses_when_the_text_is_more_than_plain_data(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_yaml(text, "text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{\n"a": }', "text, line 2"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_read_json_refuses_when_the_text_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_json(text, "text")
