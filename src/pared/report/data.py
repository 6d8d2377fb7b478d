"""The report as plain data, schema version 1: what `report.json` holds. No torch here, so that reading it is quick.

Ratios are 0 to 1, never percent; units are in the names. `render` and `html` turn this into what people read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from pared.errors import ArtifactError

Verdict = Literal["faster", "slower", "no measurable change"]
SCHEMA_VERSION = 1
# JSON has no NaN: a figure that was not finite is written as null, and read back as NaN instead of as a damaged file.
Number = Annotated[float, pydantic.BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one call."""

    p50: float
    p90: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
    """Baseline time over this stage's time, interleaved, with its 95 % interval."""

    value: float
    low: float
    high: float
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close two sets of outputs are. `sqnr_db` is None where they are equal (an infinite ratio), `agreement` where
    outputs are not class scores."""

    sqnr_db: float | None
    max_abs: Number
    agreement: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A candidate that was left as it was."""

    module: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the per-layer table: what a layer became, and its share of the work."""

    module: str
    kind: str
    params: int
    macs: int
    became: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutVnni:
    """What a file will score on x86 without VNNI, where products of 8-bit weights saturate: emulated.

    Attributes:
        metrics: Without VNNI, on `samples` samples of validation data.
        metrics_with: With it, on the same.
        sqnr_db: Of the outputs without VNNI against those with; None where they are equal.
        agreement: Fraction of samples of the same class; None where outputs are not class scores.
        seconds: Time that the emulation took.
    """

    metrics: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    metrics_with: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    sqnr_db: float | None = None
    agreement: float | None = None
    samples: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer alone costs, on `validation` data. `sqnr_db` is None where the output does not change; `drops` has
    each metric's own unit, positive where it gets worse."""

    module: str
    sqnr_db: float | None
    drops: Mapping[str, Number] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunedGroup:
    """Channels that can only leave together, named after the first layer that makes them.

    Attributes:
        kind: What that layer is: "convolution", "fully connected", or "" where it is neither.
        kept: Channels that stay, of the `before` that this stage found.
        approximate: Why the removal is not exact; "" where it is.
        curve: (ratio removed, drop of the first metric in its own unit, positive where it gets worse), of this group
            alone, before any training; empty where not measured.
    """

    name: str
    kind: Literal["convolution", "fully connected", ""] = ""
    kept: int
    before: int
    approximate: str = ""
    curve: tuple[tuple[float, Number], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a stage removed from the network, and how far that is exact.

    Attributes:
        params: Parameters that stay, of the dense network's.
        macs: Multiply-accumulates that stay, of the dense network's.
        difference: Largest relative difference between the outputs and those of the masked network, as checked.
        taken_in: Removed channels whose constants what follows has taken in.
        groups: In the network's order, those that stayed whole too.
        left: Layers where constants of removed channels count as zero, and why.
    """

    params: float
    macs: float
    difference: float
    taken_in: int = 0
    groups: tuple[PrunedGroup, ...] = ()
    left: tuple[Skipped, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured on one exported file. None: not measured; `without_vnni`: nothing can saturate."""

    metrics: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    latency_ms: Latency | None = None
    speedup: Speedup | None = None
    size_bytes: int | None = None
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    peak_memory_bytes: int | None = None
    parity: Agreement | None = None
    fidelity: Agreement | None = None
    without_vnni: WithoutVnni | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Figures):
    """One row of the ledger; the first is the baseline.

    Attributes:
        name: Shown to people: "baseline", "1 QuantizeStatic".
        step: The step's settings with its name under "step", or None for the baseline.
        block: Which block the stage belongs to; the baseline is block 0.
        kept: False where the block was rolled back.
        why: The reason for a roll back, or for `measured` being False; else "".
        measured: False where the runtime cannot run here; the figures are then None.
        seconds: Time that the stage took, without measuring.
        changed: Names of modules that changed.
        skipped: Candidates that did not, with the reason.
        layers: The per-layer table of this stage.
        warnings: What the step's plan warned of, one sentence each.
        sensitivity: What each layer costs when it alone is quantized, the most fragile first; empty where not measured.
        pruned: What was removed from the network; None where the step does no such thing.
    """

    name: str
    step: Mapping[str, Any] | None
    block: int
    kept: bool = True
    why: str = ""
    measured: bool = True
    seconds: float = 0.0
    changed: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    layers: tuple[Layer, ...] = ()
    warnings: tuple[str, ...] = ()
    sensitivity: tuple[LayerCost, ...] = ()
    pruned: Pruned | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Final(Figures):
    """What ships, with `metrics` on `test` data, and the baseline's on the same."""

    stage: str
    baseline_metrics: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    baseline_size_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How latency was taken."""

    batch_size: int
    threads: int
    host: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The ledger: one row a stage, then the verdict.

    Attributes:
        environment: CPU, instruction sets, library versions, seed; may nest.
        timing: How latency was taken.
        target: Name of the runtime.
        task: What the model is for, shown as it is. `higher_is_better` {metric: bool} gives each metric's direction;
            without it a report shows both figures and does not say which is better.
        stages: The ledger's rows; the first is the baseline.
        final: What ships, or None where the run did not reach its end.
        recipe: What `pared run` needs to repeat the run; empty where it cannot be written down.
    """

    environment: Mapping[str, Any]
    timing: Timing
    target: str
    task: Mapping[str, Any]
    stages: tuple[Stage, ...]
    final: Final | None
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data; infinities and NaN become None."""
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`. Raises: ArtifactError for another schema version or missing entries."""
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"report schema version {version}, this pared reads {SCHEMA_VERSION}; use its own version"
            )
        try:
            return pydantic.TypeAdapter(cls).validate_python(dict(data))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ArtifactError(
                f"report.json is damaged at {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file, or in an artifact's folder. Raises: ArtifactError."""
        file = path / "report.json" if path.is_dir() else path
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf8")))
        except FileNotFoundError:
            raise ArtifactError(f"no report at {file}; give an artifact's folder or its report.json") from None
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{file} is not JSON ({error.msg}, line {error.lineno})") from None

    def __str__(self) -> str:
        from pared.report.render import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        from pared.report.html import ledger_html

        return ledger_html(self)


def finite(value: Any) -> Any:
    """The same data with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
