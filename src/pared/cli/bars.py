"""Progress bars on the terminal's error stream, so that standard output holds the result alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pared.report.render import text


class Bars:
    """A `step.Progress` that draws one bar for each piece of work, in the order in which they begin.

    A total of 0 is one that nobody knows yet.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(text(what).markup, total=total or None, note="")
        self.progress.update(self.tasks[what], completed=done, total=total or None, note=text(note).markup)


@contextlib.contextmanager
def bars() -> Iterator[Bars]:
    """Draw progress while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(progress)
