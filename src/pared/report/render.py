"""The ledger for terminals: one row a stage, then what was refused and why, then the verdict on test data."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pared.report import words
from pared.report.data import Figures, Report, Speedup, Stage

# ASCII only, so that the ledger survives a log file or a pipe in any encoding.
LINES = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
VERDICT_STYLE = {"faster": "green", "slower": "red", "no measurable change": "yellow"}


def to_text(report: Report, *, width: int = 80) -> str:
    """The ledger as plain text, without colours or terminal codes, at most `width` columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None, legacy_windows=False)
    print_ledger(report, console)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def print_ledger(report: Report, console: Console) -> None:
    """Write the ledger to a console, in colour where it has any."""
    if words.metric_names(report):
        console.print(text("Metrics on validation data; the verdict below is on test data.", "dim"))
        console.print()
    console.print(ledger_table(report, narrow=console.width < 96))
    console.print()
    for note in [*notes(report), Text("")]:
        console.print(note)
    for line in verdict(report):
        console.print(line)


def text(value: object, style: str = "") -> Text:
    """Text without markup; control characters in foreign names (escapes, line breaks) are shown, not obeyed."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return Text(shown, style=style)


def lines(*parts: Text) -> Text:
    """Texts below one another, without empty ones."""
    return Text("\n").join([part for part in parts if part.plain])


def cell(value: str) -> Text:
    """A figure; one that is missing takes two short lines, so that the table still fits 80 columns."""
    return Text(value.replace(" ", "\n")) if value == words.NOT_MEASURED else text(value)


def ledger_table(report: Report, *, narrow: bool) -> Table:
    """One row a stage."""
    names = words.metric_names(report)
    table = Table(box=LINES, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("stage", overflow="fold")
    if names:
        table.add_column(lines(*map(text, names)), justify="right", overflow="fold")
    table.add_column("p50", justify="right", no_wrap=True)
    table.add_column("speed-up", max_width=13 if narrow else None)
    for title in ("size", "parity", "fidelity\nagreement"):
        table.add_column(title, justify="right", no_wrap=True)
    for i, stage in enumerate(report.stages):
        after = report.stages[i + 1 : i + 2]
        table.add_row(
            *row(stage, names, first=i == 0),
            style="" if stage.kept else "dim",
            end_section=bool(after) and after[0].block != stage.block,
        )
    return table


def row(stage: Stage, names: list[str], *, first: bool) -> Iterable[RenderableType]:
    """The cells of one stage."""
    yield lines(text(stage.name, "bold" if stage.kept else ""), text("" if stage.kept else "rolled back", "red"))
    if names:
        yield metrics_cell(stage, names)
    yield cell(words.milliseconds(stage.latency_ms.p50 if stage.latency_ms else None))
    # The baseline is what the others are compared with, so it has nothing to miss here.
    reference = words.REFERENCE if first and stage.measured else words.NOT_MEASURED
    yield cell(reference) if stage.speedup is None else speed_cell(stage.speedup)
    yield cell(words.size(stage.size_bytes))
    yield cell(words.decibels(stage.parity))
    if stage.fidelity is None:
        yield cell(reference)
    else:
        yield lines(text(words.decibels(stage.fidelity)), text(words.share(stage.fidelity.agreement)))


def metrics_cell(figures: Figures, names: list[str]) -> Text:
    """The metrics of one stage, a line each, in the header's order."""
    if not figures.metrics:
        return cell(words.NOT_MEASURED)
    return lines(*(text(words.metric_value(name, figures.metrics.get(name))) for name in names))


def speed_cell(speedup: Speedup) -> Text:
    """Verdict, ratio and interval of one stage."""
    head: str = speedup.verdict
    if head != "no measurable change":
        head = f"{words.times(speedup.value)} {head}"
    return lines(text(head, VERDICT_STYLE[speedup.verdict]), text(f"{speedup.low:.2f} to {speedup.high:.2f}", "dim"))


def notes(report: Report) -> Iterable[Text]:
    """Reasons: what was warned of, what was rolled back, and what was not measured."""
    for stage in report.stages:
        yield from (text(f"{stage.name}: {warning}") for warning in stage.warnings)
        if not stage.kept:
            yield text(f"{stage.name} was rolled back: {stage.why or 'no reason was recorded'}")
        elif not stage.measured:
            yield text(f"{stage.name} was not measured: {words.why_missing(stage, '')}")
    for sentence in words.without_vnni(report):
        yield text(sentence, "yellow" if sentence.startswith("Warning") else "")
    if not words.metric_names(report):
        yield text(f"No metric was measured: {words.why_no_metric(report)}")


def verdict(report: Report) -> Iterable[RenderableType]:
    """What ships, judged on test data."""
    final, first = report.final, words.baseline(report)
    yield text(words.headline(report), "bold")
    if final is None:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_row(text("ships"), text(final.stage))
    for name in dict.fromkeys([*final.baseline_metrics, *final.metrics]):
        before, after = final.baseline_metrics.get(name), final.metrics.get(name)
        change = ""
        if before is not None and after is not None:
            change = f" ({words.drop(report, name, before, after)[1]})"
        shown = f"{words.metric_value(name, before)} -> {words.metric_value(name, after)}{change}"
        table.add_row(text(f"{name} on test"), text(shown))
    if not final.metrics:
        why = words.why_not_final(report, words.NO_TEST_METRIC)
        table.add_row(text("metrics on test"), text(f"{words.NOT_MEASURED}: {why}"))
    before_ms = first.latency_ms.p50 if first and first.latency_ms else None
    after_ms = final.latency_ms.p50 if final.latency_ms else None
    taken = "" if final.speedup is None else f" ({words.speed(final.speedup)[1]}, {words.interval(final.speedup)})"
    table.add_row(text("latency p50"), text(moved(words.milliseconds(before_ms), words.milliseconds(after_ms)) + taken))
    _, ratio = words.shrink(final.baseline_size_bytes, final.size_bytes)
    sizes = moved(words.size(final.baseline_size_bytes), words.size(final.size_bytes))
    table.add_row(text("file"), text(sizes if words.NOT_MEASURED in sizes else f"{sizes} ({ratio})"))
    cores = words.plural(report.timing.threads, "thread")
    table.add_row("timed", text(f"{report.target}, batch {report.timing.batch_size}, {cores}, {report.timing.host}"))
    yield table


def moved(before: str, after: str) -> str:
    """'a -> b', or one word where neither was measured."""
    return before if before == after == words.NOT_MEASURED else f"{before} -> {after}"
