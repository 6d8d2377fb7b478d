"""The command line: `pared run`, `demo`, `inspect`, `bench`, `report`, `list`. Help texts need no torch."""

from pared.cli.app import app, main

__all__ = ["app", "main"]
