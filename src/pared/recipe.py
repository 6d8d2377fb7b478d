"""The recipe: model, data, steps, target and budgets as plain data, read strictly from YAML or JSON.

Holds the only table of step names. Loading what a recipe names is `loading`'s work, running it is `pipeline`'s.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from pared.errors import RecipeError, SettingError, UsageError, nearest
from pared.measure.latency import ROUNDS
from pared.step import settings, settings_of
from pared.strict_yaml import read_json, read_yaml

# Modules are imported only when a step is used, so that help texts need no torch.
STEPS: Mapping[str, str] = {
    "Train": "pared.train.step:Train",
    "PruneChannels": "pared.prune.step:PruneChannels",
    "QuantizeStatic": "pared.quantize.static:QuantizeStatic",
    "QuantizeWeights": "pared.quantize.weights:QuantizeWeights",
    "CastHalf": "pared.quantize.half:CastHalf",
    "QuantizeDynamic": "pared.quantize.dynamic:QuantizeDynamic",
}
# Techniques that run while training: entries of `Train(during=[...])`.
DURING: Mapping[str, str] = {
    "QuantizeAware": "pared.quantize.aware:QuantizeAware",
    "Distill": "pared.distill.step:Distill",
    "Slim": "pared.prune.slimming:Slim",
}
# What stands among the steps of a recipe and holds some of them.
AROUND: Mapping[str, str] = {"Repeat": "pared.recipe:Repeat"}
Place = tuple[str | int, ...]


@settings
class Budget:
    """What a block of steps may cost before it is rolled back."""

    max_drop: Annotated[
        float | None,
        pydantic.Field(description="Largest drop of the first metric on validation data, in its own unit", ge=0),
    ] = None
    allow_slower: Annotated[bool, pydantic.Field(description="Keep a block that is measurably slower")] = False
    allow_larger: Annotated[bool, pydantic.Field(description="Keep a block whose exported file is larger")] = False


@settings
class TimingSettings:
    """How latency is taken: the exported files run in turn, each in a process of its own."""

    batch_size: Annotated[int, pydantic.Field(description="Samples in one call", ge=1)] = 1
    threads: Annotated[
        int | None, pydantic.Field(description="Threads of the runtime; null: every usable core", ge=1)
    ] = None
    rounds: Annotated[int, pydantic.Field(description="Most turns that each file gets", ge=1)] = ROUNDS


@settings
class Factory:
    """A callable by its name, with keyword arguments."""

    factory: Annotated[
        str,
        pydantic.Field(
            description="`package.module:callable`, `file.py:callable` or a name that `pared list` shows", min_length=1
        ),
    ]
    arguments: Annotated[dict[str, Any], pydantic.Field(description="Keyword arguments of the callable")] = (
        dataclasses.field(default_factory=dict)
    )


def _form(value: Any) -> str | None:
    """Which form a named callable is written in, so that an error speaks of that form only."""
    if isinstance(value, str):
        return "by name"
    return "by mapping" if isinstance(value, (Mapping, Factory)) else None


Named = Annotated[
    Annotated[str, pydantic.Tag("by name")] | Annotated[Factory, pydantic.Tag("by mapping")],
    pydantic.Discriminator(
        _form,
        custom_error_type="named_callable",
        custom_error_message="Input should be a name or a mapping with factory and arguments",
    ),
]


Entry = Annotated[Any, pydantic.PlainSerializer(lambda step: {type(step).__name__: settings_of(step)})]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Do steps in several rounds, each of them more than the one before: `Repeat(3, [PruneChannels(), Train()])`.

    In round k of n, a step that has `at(fraction)` stands as `step.at(k / n)`, and any other as it is.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    times: Annotated[int, pydantic.Field(description="How many rounds there are", ge=1)]
    steps: Annotated[tuple[Entry, ...], pydantic.Field(description="The steps of one round, in order", min_length=1)]

    def __post_init__(self) -> None:
        if type(self.times) is not int or self.times < 1:
            raise SettingError(f"Repeat.times: give how many rounds, 1 or more, found {self.times!r}")
        if not isinstance(self.steps, (list, tuple)) or not self.steps:
            raise SettingError(f"Repeat.steps: give a list of at least one step, found {self.steps!r}")
        if any(isinstance(step, Repeat) for step in self.steps):
            raise SettingError("Repeat.steps: a Repeat in a Repeat; write its steps out, or one Repeat after the other")
        object.__setattr__(self, "steps", tuple(self.steps))


def unrolled(steps: Sequence[Any]) -> list[Any]:
    """The steps as they are done one by one, those of each `Repeat` written out.

    Example:
        >>> from pared.train.step import Train
        >>> [step.epochs for step in unrolled([Repeat(2, [Train(epochs=1), Train(epochs=3)]), Train(epochs=2)])]
        [1, 3, 1, 3, 2]
    """
    flat: list[Any] = []
    for entry in steps:
        if not isinstance(entry, Repeat):
            flat.append(entry)
            continue
        for done in range(1, entry.times + 1):
            flat += [step.at(done / entry.times) if hasattr(step, "at") else step for step in entry.steps]
    return flat


@settings
class Recipe:
    """What `pared run` does: compress a model, for a task, by steps, towards a target, within a budget."""

    model: Annotated[
        Named, pydantic.Field(description="What builds the model: `module:callable`, `file.py:callable` or a zoo name")
    ]
    weights: Annotated[
        str | None,
        pydantic.Field(description="Trained weights: safetensors, or a checkpoint that loads with weights_only=True"),
    ] = None
    task: Annotated[
        Named,
        pydantic.Field(description="What builds the Task: `module:callable`, `file.py:callable` or an embedded one"),
    ]
    data: Annotated[Literal["embedded", "full"], pydantic.Field(description="Which data an embedded task reads")] = (
        "embedded"
    )
    target: Annotated[str, pydantic.Field(description="The runtime that the model ships on")] = "onnxruntime"
    seed: Annotated[int, pydantic.Field(description="Seed of everything random", ge=0, lt=2**32)] = 0
    budget: Annotated[Budget, pydantic.Field(description="When a block of steps is rolled back")] = Budget()
    timing: Annotated[TimingSettings, pydantic.Field(description="How latency is taken")] = TimingSettings()
    steps: Annotated[tuple[Any, ...], pydantic.Field(description="The steps, in order", min_length=1)]

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML or JSON file, after overrides `path=value` (`steps.1.QuantizeStatic.ranges=percentile`).

        Raises:
            RecipeError: The file is missing, is not plain data, or an entry is unknown or of a wrong type.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf8")
        except (FileNotFoundError, IsADirectoryError):
            raise RecipeError(f"no recipe at {path}; give a YAML or JSON file") from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not text; give a YAML or JSON file") from None
        data = (read_json if path.suffix == ".json" else read_yaml)(text, str(path))
        return cls.from_json(override(data, overrides) if overrides else data, where=str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = "recipe") -> Recipe:
        """The inverse of `to_json`. Raises: RecipeError, with the path of the wrong entry and the nearest name."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where}: a recipe is a mapping with model, task and steps, found {type(data).__name__}")
        entries = data.get("steps")
        if not isinstance(entries, list):
            return validate(cls, data, ())  # type: ignore[no-any-return]
        steps = [read_step(entry, ("steps", i), {**STEPS, **AROUND}) for i, entry in enumerate(entries)]
        return with_parts(cls, data, (), "steps", steps)  # type: ignore[no-any-return]

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data, every setting written out."""
        data = settings_of(dataclasses.replace(self, steps=(None,)))
        return data | {"steps": [{type(step).__name__: settings_of(step)} for step in self.steps]}


def step_class(name: str) -> type[Any]:
    """The class of a step, of what holds steps, or of a technique that runs while training. Raises: UsageError."""
    known = {**STEPS, **AROUND, **DURING}
    if name not in known:
        raise UsageError(f"no step {name!r}; {nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def read_step(entry: Any, place: Place, known: Mapping[str, str] = STEPS) -> Any:
    """A step, or what else `known` names, from `Name` or `{Name: {setting: value}}`. Raises: RecipeError."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        found = " and ".join(entry) if isinstance(entry, Mapping) and entry else repr(entry)
        raise RecipeError(f"{at(place)}: a step is one name, or one name with its settings, found {found}")
    ((name, given),) = entry.items()
    if name not in known:
        if name in DURING:
            raise RecipeError(f"{at(place)}: {name} runs while training; write Train: {{during: [{name}]}}")
        if name in AROUND:
            raise RecipeError(f"{at(place)}: {name} holds steps, and stands among the recipe's own; move it there")
        if name in STEPS:
            raise RecipeError(f"{at(place)}: {name} is a step of its own; move it out of `during`, behind Train")
        raise RecipeError(f"{at(place)}: no step {name!r}; {nearest(name, known)}")
    place, kind = (*place, name), step_class(name)
    holders: Mapping[str, tuple[str, Mapping[str, str]]] = {"Train": ("during", DURING), "Repeat": ("steps", STEPS)}
    key, inside = holders.get(name, ("", {}))
    entries = given.get(key) if isinstance(given, Mapping) else None
    if not isinstance(entries, list):
        return validate(kind, {} if given is None else given, place)
    parts = [read_step(part, (*place, key, i), inside) for i, part in enumerate(entries)]
    return with_parts(kind, given, place, key, parts)


def with_parts(kind: type[Any], data: Mapping[str, Any], place: Place, key: str, parts: Sequence[Any]) -> Any:
    """An instance from plain data, one list of it read already, each entry by its own class. Raises: RecipeError."""
    # Of steps only the number counts here; of techniques not even that.
    stand_ins = [None] * len(parts) if key == "steps" else []
    return dataclasses.replace(validate(kind, {**data, key: stand_ins}, place), **{key: tuple(parts)})


def validate(kind: type[Any], data: Any, place: Place) -> Any:
    """An instance of a settings class from plain data, strictly. Raises: RecipeError."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{at(place)}: not plain data ({error})") from None
    try:
        # JSON mode, because strict there still takes a list for a tuple and an integer for a float, and nothing else.
        return pydantic.TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        lines = [explain(dict(item), kind, data, place) for item in error.errors(include_url=False)]
        raise RecipeError("; ".join(lines)) from None
    except SettingError as error:  # what a step's own __post_init__ found
        raise RecipeError(f"{at(place)}: {error}") from None


def explain(item: Mapping[str, Any], kind: type[Any], data: Any, place: Place) -> str:
    """One line for one mistake: its path, what was found, and what to write instead."""
    unknown = item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}
    missing = item["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}
    inner = data_place(data, item["loc"], absent=missing)
    where = at((*place, *inner))
    if unknown:
        valid = names_at(pydantic.TypeAdapter(kind).json_schema(), inner[:-1])
        return f"{where}: unknown key; {nearest(str(inner[-1]), valid)}"
    if missing:
        return f"{where} is missing"
    if item["type"] == "too_short":
        return f"{where}: name at least one"
    context = item.get("ctx", {})
    if item["type"] == "union_tag_invalid":
        expected = context["expected_tags"].replace("'", "").split(", ")
        return f"{where}: no {context['tag']!r}; {nearest(context['tag'], expected)}"
    if item["type"] == "union_tag_not_found":
        return f"{where}: its {context['discriminator']} is missing, found {item['input']!r}"
    message = item["msg"].replace("an object", "a mapping").replace("array", "list").removeprefix("Value error, ")
    return f"{where}: {message.replace('Input should be', 'should be')}, found {item['input']!r}"


def data_place(data: Any, loc: Sequence[str | int], *, absent: bool) -> Place:
    """A pydantic location without its union tags, which are no entries of the data.

    Args:
        data: What was validated.
        loc: Where pydantic found the mistake.
        absent: True where the last part is an entry that the data lacks.
    """
    place: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(data, Mapping) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (absent and i == len(loc) - 1):
            continue
        place.append(part)
    return tuple(place)


def at(place: Place) -> str:
    """A path as people write it.

    Example:
        >>> at(("steps", 1, "Train", "lr"))
        'steps[1].Train.lr'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".") or "recipe"


def names_at(schema: Mapping[str, Any], place: Place) -> list[str]:
    """The keys that a JSON schema allows at a path."""
    nodes = expand(schema, [schema])
    for part in place:
        if isinstance(part, int):
            below = [node["items"] for node in nodes if "items" in node]
        else:
            below = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
        nodes = expand(schema, below)
    return sorted({name for node in nodes for name in node.get("properties", {})})


def expand(schema: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Schema nodes with references followed and alternatives listed."""
    found: list[Mapping[str, Any]] = []
    for node in nodes:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        inner = [*node.get("anyOf", ()), *node.get("oneOf", ())]
        found += expand(schema, inner) if inner else [node]
    return found


def override(data: Any, overrides: Sequence[str]) -> Any:
    """A copy of plain recipe data with each `path=value` set; values are YAML. Raises: RecipeError."""
    data = json.loads(json.dumps(data))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {text}: write path=value, e.g. steps.1.QuantizeStatic.ranges=percentile")
        *above, last = path.split(".")
        node = data
        for i, part in enumerate(above):
            node = descend(node, part, tuple(above[:i]), text)
        if isinstance(node, list):
            node[index_of(last, node, text)] = read_yaml(value, f"--set {path}")
        elif isinstance(node, dict):
            node[last] = read_yaml(value, f"--set {path}")
        else:
            raise RecipeError(f"--set {text}: {'.'.join(above)} is {node!r}, which has no parts")
    return data


def descend(node: Any, part: str, above: tuple[str, ...], text: str) -> Any:
    """The entry below `node`, made where it is absent, so that validation can judge its name."""
    if isinstance(node, list):
        i = index_of(part, node, text)
        if isinstance(node[i], str) and above[-1:] in {("steps",), ("during",)}:
            node[i] = {node[i]: {}}
        return node[i]
    if isinstance(node, dict):
        if isinstance(node.get(part), str) and above == () and part in {"model", "task"}:
            node[part] = {"factory": node[part]}
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise RecipeError(f"--set {text}: {'.'.join(above) or 'the recipe'} is {node!r}, which has no parts")


def index_of(part: str, node: list[Any], text: str) -> int:
    """A list index. Raises: RecipeError where it is no number or out of range."""
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(f"--set {text}: {part!r} is no index of a list of {len(node)}; the first is 0")
    return int(part)
