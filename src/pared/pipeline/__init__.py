"""From a trained model and steps to an artifact with its ledger: stages, blocks and budgets, roll back, resume."""

from pared.pipeline.entry import compress, dry_run

__all__ = ["compress", "dry_run"]
