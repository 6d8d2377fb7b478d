"""The nouns that every technique shares: Edit, Skip, Plan, Step, Context, Scheme, Target.

A step is its own configuration: a frozen, strict, keyword-only dataclass made by `settings`, with `plan` (reads only)
and `apply`. This file knows no technique and no runtime.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses

from pared.errors import SettingError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from pared.task import Task

T = TypeVar("T")
EditKind = Literal["slice", "replace", "set_attribute", "cast", "mask", "quantize"]
Need = Literal["calibration", "train", "validation"]
Saturating = Literal["no", "neighbours", "any"]


# Operators that keep every value and only say anew where it stands; and all that move values or leave some out.
RESHAPES = frozenset(
    {
        "aten.view",
        "aten.reshape",
        "aten._unsafe_view",
        "aten.flatten",
        "aten.unflatten",
        "aten.transpose",
        "aten.permute",
        "aten.squeeze",
        "aten.unsqueeze",
    }
)
MOVES = RESHAPES | {
    "aten.slice",
    "aten.select",
    "aten.chunk",
    "aten.split",
    "aten.split_with_sizes",
    "aten.expand",
    "getitem",
}


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of structure, as plain data.

    Attributes:
        kind: One of the closed set that `surgery` replays; `quantize` is the last, and makes an exported program.
        module: Dotted name of the module that changes, as in `named_modules()`.
        detail: Whatever the kind needs, JSON only.
    """

    kind: EditKind
    module: str
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skip:
    """A candidate that a step left as it was, and why."""

    module: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step will change, as plain data that survives JSON unchanged.

    Attributes:
        step: Name of the step's class.
        settings: The step's settings, as `settings_of` gives them.
        edits: What changes, in order.
        skips: Every candidate that does not change, with the reason.
        facts: What the step decided on (ranges, scores), so that `apply` needs no data.
        estimate: True where a dry run could only estimate.
    """

    step: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    skips: tuple[Skip, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    estimate: bool = False

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the modules that change, each once, in order."""
        return tuple(dict.fromkeys(edit.module for edit in self.edits))

    def to_json(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, strings, numbers."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        return cls(
            step=data["step"],
            settings=data["settings"],
            edits=tuple(Edit(**edit) for edit in data["edits"]),
            skips=tuple(Skip(**skip) for skip in data["skips"]),
            facts=data["facts"],
            estimate=data["estimate"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a runtime wants tensors quantized. `quantize.placement` reads it; each target declares one.

    Operators are named as in the exported graph, without overload: "aten.conv2d".

    Attributes:
        activation_dtype: Integer type of activations.
        activation_symmetric: True puts every activation's zero point at 0.
        weighted: Operators with a weight that run in integers: the anchors of the placement.
        whole: Of these, the ones that run in integers only where their output is quantized too.
        joining: Operators that run in integers between anchors (residual adds, concats), and in float elsewhere.
        following: Operators that pass on the quantization of their input (pooling by maximum, reshapes).
        absorbed: Activations that the runtime fuses into the operator before them.
        saturating: Whether two products of an unsigned activation and a signed weight are added in 16 bits on x86
            without VNNI: "no"; of "neighbours", as `measure.saturation` orders them; or of "any" two weights of a
            channel, where the order is not known.
        sharing: Joining operators that take and give integers of one scale and zero point alone.
        bias_dtype: How biases are written: integers in units of input scale x weight scale, or as they are.
        weight_zero_points: True where the runtime wants to see the zeros that symmetric weights have.
        float_activations: True where an integer layer with an absorbed activation may write float.
        summed: Joining operators that the runtime computes on the accumulator of a convolution before them, which then
            needs no integer output of its own.
        weight_only: Operators whose weight alone may be integers, beside float activations.
        halves: Of "float16" and "bfloat16", what weights can be stored in so that the file becomes smaller.
        computed_halves: Of these, what the runtime also has operators in.
        least_inputs: Fewest input channels of a convolution that the runtime computes rightly in integers.
        dynamic: Operators whose activations the runtime can quantize at run time (embeddings: store in integers).
        dynamic_rows: True where it then gives each row a scale and a zero point of its own, whatever it is told.
        narrow_activations: True where integers of fewer than 8 bits, stored in 8, are clipped at their own ends.
        norms_as_convolutions: True where a batch norm between integers is best written as a depthwise convolution.
    """

    activation_dtype: Literal["uint8", "int8"]
    activation_symmetric: bool
    weighted: frozenset[str]
    whole: frozenset[str]
    joining: frozenset[str]
    following: frozenset[str]
    absorbed: frozenset[str]
    saturating: Saturating = "no"
    sharing: frozenset[str] = frozenset()
    bias_dtype: Literal["int32", "float32"] = "int32"
    weight_zero_points: bool = False
    float_activations: bool = False
    summed: frozenset[str] = frozenset()
    weight_only: frozenset[str] = frozenset()
    halves: frozenset[str] = frozenset()
    computed_halves: frozenset[str] = frozenset()
    dynamic: frozenset[str] = frozenset()
    dynamic_rows: bool = False
    least_inputs: int = 1
    narrow_activations: bool = False
    norms_as_convolutions: bool = False


class InputSpec(Protocol):
    """One input of an exported file."""

    @property
    def name(self) -> str: ...


class Session(Protocol):
    """An exported file, opened in its runtime."""

    @property
    def inputs(self) -> Sequence[InputSpec]: ...
    @property
    def options(self) -> Mapping[str, str]:
        """Version of the runtime and how it was set up, for the report."""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs for the given inputs, both in the file's order."""


class Target(Protocol):
    """A runtime that ships models."""

    @property
    def name(self) -> str: ...
    @property
    def scheme(self) -> Scheme: ...
    @property
    def filename(self) -> str:
        """Name of the exported file inside an artifact."""

    def export(self, model: nn.Module, task: Task, path: Path) -> None:
        """Write `model` to `path` for this runtime.

        Raises:
            CaptureError: The model cannot be captured.
            TargetError: It cannot be written for this runtime.
            RefusedError: It could be, were it not for certain layers.
        """

    def open(self, path: Path, *, threads: int) -> Session:
        """The file, ready to run. Raises: TargetError."""


class Progress(Protocol):
    """Told how far a long piece of work is."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """The progress that says nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may ask of the run.

    Attributes:
        task: What the model is for.
        target: The runtime that it ships on.
        work: Folder for the step's own checkpoints and caches; survives a kill.
        dense: The model before anything of its structure was changed: as it came in, or as the trainings that began the
            recipe left it. The default teacher. Never changed.
        seed: Seed of everything random.
        history: Plans of the steps kept so far, oldest first.
        later: The steps after this one, in order.
        refused: Modules that the runtime refused as this step first planned them: to be left as they are, and listed.
        deadline: `time.monotonic()` at which searches should stop, or None.
        dry: True when only planning: nothing expensive, estimates marked.
        progress: Told how far long work is.
        batch_size: Samples in one call, where a step times files.
        threads: Threads of one call, where a step times files; None: every usable core.
        floating: The last module before activations were quantized, where the model given is a program.
        memo: What `plan` leaves for the `apply` right after it, so that nothing is captured twice; may always be empty.
            `apply` leaves "floating" where it made a program and trained the module that the program was made of.
    """

    task: Task
    target: Target
    work: Path
    dense: nn.Module
    seed: int = 0
    history: tuple[Plan, ...] = ()
    later: tuple[Step, ...] = ()
    refused: tuple[str, ...] = ()
    deadline: float | None = None
    dry: bool = False
    progress: Progress = silent
    batch_size: int = 1
    threads: int | None = None
    floating: nn.Module | None = None
    memo: dict[str, Any] = dataclasses.field(default_factory=dict)


class Step(Protocol):
    """One technique with its settings."""

    @property
    def trains(self) -> bool:
        """True for a training alone, which belongs to the block of the change before it."""

    @property
    def needs(self) -> frozenset[Need]:
        """The data that the step reads; may depend on its settings."""

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """What would change. Reads only. Raises: PlanError where nothing would, or the order cannot work."""

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """A changed copy of `model`; `model` itself stays as it is."""


def explain(error: pydantic.ValidationError, owner: str, valid: list[str]) -> str:
    """One line for a pydantic error, in the caller's terms."""
    parts = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            parts.append(f"{owner} has no setting {path!r}; {nearest(path, valid)}")
        else:
            parts.append(f"{owner}.{path}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}")
    return "; ".join(parts)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, strict, keyword-only dataclass whose mistakes raise `SettingError`.

    Write each field as `Annotated[type, pydantic.Field(description=..., ge=...)]`: help texts, option tables and the
    recipe's JSON schema are all generated from it.
    """
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))(cls)
    init: Callable[..., None] = made.__init__

    @functools.wraps(init)
    def checked_init(self: T, *args: Any, **kwargs: Any) -> None:
        valid = [field.name for field in dataclasses.fields(made)]
        if args:
            raise SettingError(f"{cls.__name__} takes its settings by name: {', '.join(valid)}")
        try:
            init(self, **kwargs)
        except pydantic.ValidationError as error:
            raise SettingError(explain(error, cls.__name__, valid)) from None
        # pydantic's own strictness would refuse lists for tuples, and plain data for small settings.
        for name, given in kwargs.items():
            made_of = getattr(self, name)
            if (
                isinstance(given, (str, bool))
                and isinstance(made_of, (int, float))
                and type(given) is not type(made_of)
            ):
                raise SettingError(f"{cls.__name__}.{name}: expected {type(made_of).__name__}, found {given!r}")

    made.__init__ = checked_init  # type: ignore[method-assign, assignment]
    return made  # type: ignore[return-value]


def settings_of(step: Any) -> dict[str, Any]:
    """A step's settings as plain JSON data."""
    data: dict[str, Any] = pydantic.TypeAdapter(type(step)).dump_python(step, mode="json")
    return data
