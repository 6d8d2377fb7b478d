"""Pruning: which channels matter least, how many may stay, and how they leave a model exactly.

`PruneChannels` is a step of a recipe, `Slim` joins a training; `channels` serves the caller's own loop.
"""

from pared.prune.loop import channels
from pared.prune.ratios import Equal, Global, Sensitivity, Widths
from pared.prune.slimming import Slim
from pared.prune.step import PruneChannels

__all__ = ["Equal", "Global", "PruneChannels", "Sensitivity", "Slim", "Widths", "channels"]
