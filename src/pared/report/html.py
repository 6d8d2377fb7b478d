"""The report as one offline HTML page, and its ledger as a fragment for notebooks.

Everything is inline, and the page's own content security policy forbids every request and every script but ours;
foreign text (layer names, metrics, reasons) only ever enters through the template engine's escaping.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pared.report import words
from pared.report.curves import Cost, CurvePlot, cost_cells, curve_plot, ratios
from pared.report.data import Layer, PrunedGroup, Report, Stage, finite
from pared.report.plots import better_where, plots

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("pared.report", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclasses.dataclass(frozen=True)
class Card:
    """One figure of what ships, beside the baseline's."""

    title: str
    value: str
    before: str
    change: str
    sign: int


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """A layer, its share of the MACs (None where none were counted), and its bar's length: 1 for the largest share."""

    layer: Layer
    share: float | None
    bar: float


@dataclasses.dataclass(frozen=True)
class SkipRow:
    """Layers that one stage left as they were for one reason."""

    stage: str
    reason: str
    modules: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Prune:
    """What one stage removed.

    Attributes:
        stage: That did.
        summary: How much stays, in words.
        proof: How far the removal is exact, in words.
        plot: The sensitivity curves, where they were measured.
        ratios: Columns of the table: ratios that were measured.
        unit: Of the drops in these columns, in words.
        rows: A group, and its drop at each ratio.
        left: Layers where constants count as zero, by reason.
    """

    stage: Stage
    summary: str
    proof: str
    plot: CurvePlot | None
    ratios: list[float]
    unit: str
    rows: list[tuple[PrunedGroup, list[Cost]]]
    left: list[tuple[str, list[str]]]


def write_html(report: Report, path: Path) -> None:
    """Write the page to a file."""
    path.write_text(page(report), encoding="utf8")


def page(report: Report) -> str:
    """The whole report as one HTML page that needs nothing else."""
    style, script = source("page.css"), source("page.js")
    return ENVIRONMENT.get_template("page.html").render(
        report=report,
        w=words,
        style=style,
        script=script,
        style_hash=digest(style),
        script_hash=digest(script),
        headline=words.headline(report),
        metrics=words.metric_names(report),
        blocks=blocks(report),
        cards=cards(report),
        plots=plots(report),
        better_where=better_where(report),
        layer_tables=layer_tables(report),
        prunes=prunes(report),
        skips=skips(report),
        task=words.facts({key: value for key, value in report.task.items() if key != "higher_is_better"}),
        recipe=recipe_text(report.recipe),
    )


def ledger_html(report: Report) -> str:
    """The verdict and the ledger as a fragment with its own style, for notebooks."""
    return ENVIRONMENT.get_template("fragment.html").render(
        report=report,
        w=words,
        style=source("fragment.css"),
        headline=words.headline(report),
        metrics=words.metric_names(report),
        blocks=blocks(report),
    )


def source(name: str) -> str:
    """The text of a file beside this one."""
    loader = ENVIRONMENT.loader
    return "" if loader is None else loader.get_source(ENVIRONMENT, name)[0]


def digest(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def blocks(report: Report) -> list[list[Stage]]:
    """The stages, grouped by block, in order."""
    groups: list[list[Stage]] = []
    for stage in report.stages:
        if groups and groups[-1][0].block == stage.block:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def cards(report: Report) -> list[Card]:
    """The figures that decide, of what ships: metrics on test data, latency, size, memory."""
    final, first = report.final, words.baseline(report)
    if final is None or first is None:
        return []
    found: list[Card] = []
    for name in list(dict.fromkeys([*final.baseline_metrics, *final.metrics])):
        before, after = final.baseline_metrics.get(name), final.metrics.get(name)
        sign, change = (0, "") if before is None or after is None else words.drop(report, name, before, after)
        value = words.metric_value(name, after)
        found.append(Card(f"{name}, test data", value, words.metric_value(name, before), change, sign))
    if not found:
        found.append(
            Card("quality, test data", words.NOT_MEASURED, "", words.why_not_final(report, words.NO_TEST_METRIC), 0)
        )
    after_ms = words.milliseconds(final.latency_ms.p50 if final.latency_ms else None)
    before_ms = words.milliseconds(first.latency_ms.p50 if first.latency_ms else None)
    sign, change = words.speed(final.speedup)
    if final.speedup is not None:
        change += f" ({words.interval(final.speedup)})"
    found.append(Card("latency p50", after_ms, before_ms, change, sign))
    for title, before_bytes, after_bytes in (
        ("exported file", final.baseline_size_bytes, final.size_bytes),
        ("peak memory", first.peak_memory_bytes, final.peak_memory_bytes),
    ):
        sign, change = words.shrink(before_bytes, after_bytes)
        found.append(Card(title, words.size(after_bytes), words.size(before_bytes), change, sign))
    why = words.why_not_final(report, words.NOT_TAKEN)
    return [
        dataclasses.replace(card, change=why) if card.value == words.NOT_MEASURED and card.before else card
        for card in found
    ]


def layer_tables(report: Report) -> list[tuple[Stage, list[LayerRow]]]:
    """Per-layer tables, what ships first."""
    ships = report.final.stage if report.final else ""
    tables = []
    for stage in sorted((s for s in report.stages if s.layers), key=lambda s: s.name != ships):
        total, most = sum(layer.macs for layer in stage.layers), max(layer.macs for layer in stage.layers)
        rows = [
            LayerRow(layer, layer.macs / total, layer.macs / most) if total else LayerRow(layer, None, 0)
            for layer in stage.layers
        ]
        tables.append((stage, rows))
    return tables


def prunes(report: Report) -> list[Prune]:
    """What each stage that prunes removed, in order."""
    metric = next(iter(words.metric_names(report)), "the metric")
    found = []
    for stage in report.stages:
        if stage.pruned is None:
            continue
        left: dict[str, list[str]] = {}
        for skip in stage.pruned.left:
            # The size of the constant differs from layer to layer, the reason does not.
            left.setdefault(skip.reason.partition(" (up to ")[0], []).append(skip.module)
        found.append(
            Prune(
                stage=stage,
                summary=words.what_stays(stage.pruned.params, stage.pruned.macs),
                proof=words.proof(stage.pruned),
                plot=curve_plot(report, stage),
                ratios=ratios(stage),
                unit=f"{metric} in points" if words.is_ratio(metric) else metric,
                rows=[(group, cost_cells(report, stage, group)) for group in stage.pruned.groups],
                left=list(left.items()),
            )
        )
    return found


def skips(report: Report) -> list[SkipRow]:
    """Every skipped candidate, grouped by stage and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for stage in report.stages:
        for skip in stage.skipped:
            groups.setdefault((stage.name, skip.reason), []).append(skip.module)
    return [SkipRow(stage, reason, tuple(modules)) for (stage, reason), modules in groups.items()]


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML, or "" where the run had none that can be written down."""
    return yaml.safe_dump(finite(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
