"""Fills the documentation's markers with tables made from the code and from the benchmarks' JSON: none goes stale.

mkdocs calls `on_page_markdown` for each page. A marker is an HTML comment alone on its line: `<!-- steps -->`,
`<!-- options: Budget -->`, `<!-- commands -->`, `<!-- errors -->`, `<!-- decisions -->`, `<!-- results: demo -->`. An
unknown one stops the build.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = ROOT / "docs" / "decisions"
MARKER = re.compile(r"^<!-- (\w+)(?:: (\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every marker replaced by its table."""
    return MARKER.sub(lambda found: MAKERS[found[1]](*([found[2]] if found[2] else [])), markdown)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def options(name: str) -> str:
    """The settings of a step, or of a part of the recipe."""
    from pared import recipe

    return option_rows(recipe.step_class(name) if name in recipe.STEPS else getattr(recipe, name))


def option_rows(kind: type[Any]) -> str:
    """The settings of a class as a table."""
    from pared.recipe_schema import option_table

    rows = option_table(kind)
    if not rows:
        return "No settings."
    cells = [
        (f"`{row.name}`", row.type, f"`{row.default}`" if row.default else "required", row.description) for row in rows
    ]
    return table(["setting", "type", "default", "what it does"], cells)


def steps() -> str:
    """Every step: what it does, and its settings."""
    from pared.recipe import AROUND, DURING, STEPS, step_class

    parts = []
    for name in (*STEPS, *AROUND, *DURING):
        kind = step_class(name)
        parts.append(f"## {name}\n\n{summary(kind)}\n\n{option_rows(kind)}")
        parts += [f"### {part.__name__}\n\n{summary(part)}\n\n{option_rows(part)}" for part in values_in(kind)]
    return "\n\n".join(parts)


def values_in(kind: Any) -> list[Any]:
    """The small settings classes that the settings of a class are made of, each once."""
    waiting, found = list(get_type_hints(kind).values()), {}
    while waiting:
        hint = waiting.pop(0)
        waiting += get_args(hint)
        if dataclasses.is_dataclass(hint) and hint is not kind:
            found[hint] = None
    return list(found)


def summary(thing: object) -> str:
    """The docstring up to its first section."""
    return re.split(r"\n\s*(?:Attributes|Args|Returns|Raises|Example|Source):", inspect.getdoc(thing) or "")[0].strip()


def commands() -> str:
    """Every command of the command line, with its arguments and options, as its own help has them."""
    import typer

    from pared.cli import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        arguments = [item for item in command.params if item.param_type_name == "argument"]
        usage = " ".join([f"pared {name}", *(f"{item.name.upper()}{' ...' * (item.nargs < 0)}" for item in arguments)])
        parts.append(f"## pared {name}\n\n{inspect.cleandoc(command.help or '')}\n\n```text\n{usage} [options]\n```")
        rows = [parameter(item) for item in command.params]
        parts.append(table(["argument", "default", "what it does"], rows))
    return "\n\n".join(parts)


def parameter(item: Any) -> tuple[str, str, str]:
    """A row for one argument or option of a command."""
    forms = [item.name.upper()] if item.param_type_name == "argument" else [*item.opts, *item.secondary_opts]
    value = f" {item.metavar}" if item.metavar else ""
    default = "required" if item.required else f"`{item.default}`" if item.default not in (None, False, ()) else ""
    return ", ".join(f"`{form}{value}`" for form in forms), default, item.help or ""


def errors() -> str:
    """The tree of errors, as the module draws it."""
    from pared import errors as module

    text = inspect.cleandoc(module.__doc__ or "")
    tree = [line for line in text.splitlines() if re.search(r"[A-Z]\w+Error ", line)]
    return "```text\n" + "\n".join(line.removeprefix("    ") for line in tree) + "\n```"


def results(name: str) -> str:
    """What a benchmark measured, claim by claim, lost ones included, and on which machine."""
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))
    rows = [
        (
            claim["what"],
            figure(claim["value"]),
            f"{claim['relation']} {figure(claim['bound'])}",
            "yes" if claim["holds"] else "**no**",
        )
        for claim in data["claims"]
    ]
    where = data["environment"].get("cpu", "an unnamed machine")
    # A script of two data sets leaves two files, whose names begin with its own.
    scripts = [file.stem for file in (ROOT / "benchmarks").glob("*.py") if name.startswith(file.stem)]
    script = max(scripts, key=len, default=name)
    return (
        f"{table(['what', 'measured', 'must be', 'holds'], rows)}\n\nMeasured on {where} by `make bench NAME={script}`."
    )


def figure(value: object) -> str:
    """A number with four significant digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def decisions() -> str:
    """Every record, by its own heading."""
    records = sorted(RECORDS.glob("[0-9]*.md"))
    titles = [path.read_text(encoding="utf8").splitlines()[0].removeprefix("# ") for path in records]
    return "\n".join(f"- [{title}]({path.name})" for title, path in zip(titles, records, strict=True))


MAKERS: dict[str, Callable[..., str]] = {
    "options": options,
    "steps": steps,
    "commands": commands,
    "decisions": decisions,
    "errors": errors,
    "results": results,
}
