"""What every benchmark shares: rows that survive a kill, claims with their bounds, one JSON a subject."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pared.measure.environment import environment

RESULTS = Path(__file__).parent / "results"
Relation = Literal[">=", "<="]


class Results:
    """The figures of one subject, in `results/NAME.json`, written after every row.

    Args:
        name: The subject.
        fresh: Forget the rows of an earlier run; else those of a run that did not end are kept, and `done` tells which.
        folder: Where the JSON goes.
    """

    def __init__(self, name: str, *, fresh: bool = False, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        self.environment = environment(0)
        if self.path.exists() and not fresh:
            earlier = json.loads(self.path.read_text(encoding="utf8"))
            # A claim is made at the end: a run that made one has ended, and is repeated whole.
            unfinished = not earlier["claims"] and self.environment.items() <= earlier["environment"].items()
            self.rows = earlier["rows"] if unfinished else []

    def done(self, **key: Any) -> dict[str, Any] | None:
        """The row with these entries, where an earlier run has measured it."""
        return next((row for row in self.rows if row.items() >= key.items()), None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, print it and write the file."""
        self.rows.append(dict(row))
        sys.stdout.write("  ".join(f"{name} {shown(value)}" for name, value in row.items()) + "\n")
        sys.stdout.flush()
        self.write()

    def claim(self, issue: int, what: str, value: float, relation: Relation, bound: float) -> None:
        """State a line of an issue's table, held or lost."""
        holds = value >= bound if relation == ">=" else value <= bound
        self.claims.append(
            {"issue": issue, "what": what, "value": value, "relation": relation, "bound": bound, "holds": holds}
        )
        sys.stdout.write(f"{'holds' if holds else 'LOST '}  {what}: {shown(value)} {relation} {shown(bound)}\n")
        self.write()

    def write(self) -> None:
        """Write the file whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"environment": self.environment, "rows": self.rows, "claims": self.claims}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf8")
        part.replace(self.path)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
