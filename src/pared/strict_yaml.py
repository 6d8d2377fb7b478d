"""Plain data from YAML or JSON text, strictly: no object tags, no duplicate keys, no aliases, no surprises of YAML 1.1.

What comes out is exactly what JSON can hold. What the data means is `recipe`'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from pared.errors import RecipeError

# YAML 1.2's core schema. PyYAML's own 1.1 rules read `no` as False, `1e-3` as text, `010` as 8 and `1:30` as 90.
PLAIN_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
)
KINDS = ("bool", "null", "int", "float", "str", "seq", "map")


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped here
    """A safe loader for JSON's kinds only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own protocol
    yaml_constructors: dict[str | None, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read; write the value out", mark)
        return super().compose_node(parent, index)

    def mapping(self, node: Any) -> Iterator[dict[str, Any]]:
        data: dict[str, Any] = {}
        yield data
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"keys are text, found {key!r}", key_node.start_mark
                )
            if key in data:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice", key_node.start_mark)
            data[key] = self.construct_object(value_node, deep=True)

    def floating(self, node: Any) -> float:
        return float(self.construct_scalar(node))

    def refuse(self, node: Any) -> None:
        raise yaml.constructor.ConstructorError(
            None, None, f"the tag {node.tag!r} is not read; a recipe holds plain data only", node.start_mark
        )


for _tag, _pattern, _first in PLAIN_SCALARS:
    StrictLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [*_first.replace("\0", ""), ""])
for _kind in KINDS:
    _name = f"tag:yaml.org,2002:{_kind}"
    StrictLoader.add_constructor(_name, yaml.SafeLoader.yaml_constructors[_name])
StrictLoader.add_constructor("tag:yaml.org,2002:map", StrictLoader.mapping)
StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader.floating)
StrictLoader.add_constructor(None, StrictLoader.refuse)


def read_yaml(text: str, where: str) -> Any:
    """The plain data in a YAML text.

    Args:
        text: The text.
        where: What the text is, for the message.

    Raises:
        RecipeError: The text is not YAML, or holds a tag, an alias, a duplicate key or a key that is no text.

    Example:
        >>> read_yaml("lr: 1e-3\\nname: no", "example")
        {'lr': 0.001, 'name': 'no'}
    """
    try:
        return yaml.load(text, Loader=StrictLoader)  # a safe loader, made stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{where}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}") from None
    except (ValueError, KeyError) as error:  # a scalar that its own explicit tag does not fit: `!!int abc`
        raise RecipeError(f"{where}: a value does not fit its tag ({error})") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deep to be a recipe") from None


def read_json(text: str, where: str) -> Any:
    """The plain data in a JSON text. Raises: RecipeError, as `read_yaml`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in pairs:
            if key in data:
                raise RecipeError(f"{where}: {key!r} stands there twice")
            data[key] = value
        return data

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}, line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deep to be a recipe") from None
