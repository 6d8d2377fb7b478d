"""What a recipe may hold, for editors and for people: the JSON schema and the option tables, both from the settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic

from pared.recipe import AROUND, DURING, STEPS, Recipe, step_class

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMES = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "null": "null", "object": "mapping"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One row of an option table, every cell as text; `default` is "" where a value must be given."""

    name: str
    type: str
    default: str
    description: str


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of recipes, steps and their settings included."""
    adapters = [("Recipe", pydantic.TypeAdapter(Recipe))]
    adapters += [(name, pydantic.TypeAdapter(step_class(name))) for name in (*STEPS, *AROUND, *DURING)]
    places, shared = pydantic.TypeAdapter.json_schemas([(name, "validation", made) for name, made in adapters])
    definitions = shared["$defs"]

    def entries(names: Iterable[str]) -> dict[str, Any]:
        """One entry of a list: a name, or a name with its settings."""
        by_name = [
            {
                "type": "object",
                "description": definitions[name].get("description", ""),
                "properties": {name: {"anyOf": [dict(places[name, "validation"]), {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
            for name in names
        ]
        return {"anyOf": [{"type": "string", "enum": list(names)}, *by_name]}

    definitions["Recipe"]["properties"]["steps"]["items"] = entries({**STEPS, **AROUND})
    definitions["Repeat"]["properties"]["steps"]["items"] = entries(STEPS)
    definitions["Train"]["properties"]["during"]["items"] = entries(DURING)
    recipe = definitions.pop("Recipe")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **recipe,
        "title": "pared recipe",
        "$defs": definitions,
    }


def option_table(kind: type[Any]) -> list[Option]:
    """The settings of a class, in order.

    Example:
        >>> from pared.recipe import Budget
        >>> option_table(Budget)[1]
        Option(name='allow_slower', type='bool', default='false', description='Keep a block that is measurably slower')
    """
    return rows_of(pydantic.TypeAdapter(kind).json_schema())


def value_tables(kind: type[Any]) -> dict[str, list[Option]]:
    """The settings of the values that stand in a class's settings, by the values' names.

    Example:
        >>> from pared.recipe import Recipe
        >>> list(value_tables(Recipe))
        ['Budget', 'Factory', 'TimingSettings']
    """
    return {name: rows_of(node) for name, node in pydantic.TypeAdapter(kind).json_schema().get("$defs", {}).items()}


def rows_of(schema: Mapping[str, Any]) -> list[Option]:
    """One row a property of a schema node."""
    return [
        Option(
            name,
            type_text(node),
            json.dumps(node.get("default", node.get("const"))) if {"default", "const"} & node.keys() else "",
            node.get("description", ""),
        )
        for name, node in schema.get("properties", {}).items()
    ]


def type_text(node: Mapping[str, Any]) -> str:
    """A schema node in words.

    Example:
        >>> type_text({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
        'int >= 1 | null'
    """
    if "$ref" in node:
        return str(node["$ref"]).rpartition("/")[2]
    if "enum" in node:
        return " | ".join(str(value) for value in node["enum"])
    if "const" in node:
        return str(node["const"])
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if inner:
        return " | ".join(dict.fromkeys(type_text(item) for item in inner))
    if node.get("type") == "array":
        return f"list of {type_text(node['items'])}" if node.get("items") else "list"
    name = NAMES.get(str(node.get("type")), "any")
    return " ".join([name, *(f"{sign} {node[bound]}" for bound, sign in BOUNDS.items() if bound in node)])
