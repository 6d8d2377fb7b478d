"""What the commands print, as tables. Every name comes from a model or a file, so none is read as markup."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import Box
from rich.console import Console
from rich.table import Table

from pared.report import words
from pared.report.data import Report
from pared.report.render import print_ledger, text

if TYPE_CHECKING:
    from pared.graph.counts import LayerCount
    from pared.step import Plan
    from pared.targets.bench import BenchRow

# ASCII only, so that a pipe or a log file in any encoding takes it.
LINES = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


def table(rows: Iterable[Sequence[object]], **columns: str) -> Table:
    """A table of plain text. `columns` gives the name of each column and its side: left or right."""
    made = Table(box=LINES, pad_edge=False, header_style="bold")
    for name, side in columns.items():
        made.add_column(name.replace("_", " "), justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        made.add_row(*(text(cell) for cell in row))
    return made


def say(*lines: object) -> None:
    """Print lines of plain text, or tables."""
    console = Console()
    for line in lines:
        console.print(line if isinstance(line, Table) else text(line), soft_wrap=not isinstance(line, Table))


def print_report(report: Report) -> None:
    """The ledger."""
    print_ledger(report, Console())


def print_plans(plans: Sequence[Plan]) -> None:
    """For each step, every layer that would change and every one that would not, with the reason."""
    for number, plan in enumerate(plans, 1):
        estimate = ", as far as can be told without running the steps before" if plan.estimate else ""
        whole = [skip for skip in plan.skips if skip.module not in plan.changed]
        counted = f"{len(plan.changed)} layers would change, {len(whole)} would not{estimate}"
        kinds: dict[str, dict[str, None]] = {}
        for edit in plan.edits:
            kinds.setdefault(edit.module, {})[edit.kind] = None
        widths = plan.facts.get("widths", {})
        rows = [(module, ", ".join(what(kind, widths.get(module)) for kind in made)) for module, made in kinds.items()]
        # A layer that reads fewer channels may itself make as many as before.
        stay = {True: "its own channels stay", False: "stays"}
        rows += [(skip.module, f"{stay[skip.module in kinds]}: {skip.reason}") for skip in plan.skips]
        say(f"{number} {plan.step}: {counted}")
        say(table(rows, layer="left", what="left") if rows else "  it changes weights only, or nothing")
        notes = [note for part in plan.facts.get("during", ()) for note in part["facts"].get("notes", ())]
        say(*(f"  {note}" for note in notes))
        if widths:
            shares = words.what_stays(plan.facts["params"], plan.facts["macs"])
            say(f"  {shares}, of the dense network's")
        say(*(f"  {warning}" for warning in plan.facts.get("warnings", ())), "")


def what(kind: str, width: Sequence[int] | None) -> str:
    """A kind of edit in words: a layer that makes channels says how many stay."""
    if kind != "slice":
        return kind
    return (
        "cut to fit its neighbours" if width is None or width[0] == width[1] else f"{width[0]} of {width[1]} channels"
    )


def print_counts(rows: Sequence[LayerCount]) -> None:
    """A model's layers and their sums."""
    cells = [
        (
            row.module,
            row.kind,
            "x".join(map(str, row.shape)),
            words.count(row.params),
            words.count(row.macs),
            words.size(row.bytes),
            ", ".join(row.techniques),
        )
        for row in rows
    ]
    say(
        table(
            cells,
            layer="left",
            kind="left",
            output="left",
            params="right",
            MACs="right",
            size="right",
            techniques="left",
        )
    )
    params, macs, size = (sum(getattr(row, name) for row in rows) for name in ("params", "macs", "bytes"))
    say("", f"{words.count(params)} parameters, {words.count(macs)} multiply-accumulates, {words.size(size)}")


def print_bench(rows: Sequence[BenchRow]) -> None:
    """Files timed in turn."""
    cells = [
        (
            row.file,
            words.milliseconds(row.latency_ms.p50),
            words.milliseconds(row.latency_ms.p90),
            "baseline" if row.speedup is None else f"{words.times(row.speedup.value)} ({words.interval(row.speedup)})",
            "" if row.speedup is None else row.speedup.verdict,
            words.size(row.size_bytes),
            words.size(row.peak_memory_bytes),
        )
        for row in rows
    ]
    say(table(cells, file="left", p50="right", p90="right", speed="left", verdict="left", size="right", memory="right"))
    say(*(f"warning: {row.warning}" for row in rows if row.warning))


def first_line(value: Any) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


def print_named(rows: Mapping[str, Any]) -> None:
    """Names with the first line of what they stand for."""
    say(table([(name, first_line(value)) for name, value in rows.items()], name="left", what_it_is="left"))


def list_steps() -> None:
    """Every step, what holds steps and what runs while training, with all settings, also of the values in them."""
    from pared.recipe import AROUND, DURING, STEPS, step_class
    from pared.recipe_schema import option_table, value_tables

    for name in (*STEPS, *AROUND, *DURING):
        kind = step_class(name)
        say(f"{name}{', in Train(during=[...])' if name in DURING else ''}: {first_line(kind)}")
        for title, options in {"": option_table(kind), **value_tables(kind)}.items():
            rows = [(row.name, row.type, row.default or "required", row.description) for row in options]
            say(*([f"  {title} in {name}:"] if title else []))
            say(
                table(rows, setting="left", type="left", default="left", description="left")
                if rows
                else "  no settings"
            )
        say("")


def list_targets() -> None:
    """Every runtime that models can ship on."""
    from pared.measure.environment import version_of
    from pared.targets.sessions import RUNTIMES, how_to_install

    rows = [
        (name, runtime.filename, runtime.about, version_of(runtime.packages[-1]) or how_to_install(name))
        for name, runtime in RUNTIMES.items()
    ]
    say(table(rows, name="left", file="left", what_it_is="left", installed="left"))


def list_models() -> None:
    """Every model of the zoo."""
    from pared.zoo import MODELS

    print_named(MODELS)


def list_data() -> None:
    """Every embedded task."""
    from pared.data.tasks import TASKS

    print_named(TASKS)


LISTS: Mapping[str, Callable[[], None]] = {
    "steps": list_steps,
    "targets": list_targets,
    "models": list_models,
    "data": list_data,
}
