"""Distillation: a small network learns from a larger one, from its peers or from itself.

`Distill` joins a training; the losses here also serve the caller's own loop.
"""

from pared.distill.knowledge import Attention, Contrastive, Flow, Hint, Relational, Similarity
from pared.distill.response import ResponseLoss
from pared.distill.step import Distill
from pared.distill.teachers import AverageTeacher, BornAgain, Offline, Online, SelfDeep

__all__ = [
    "Attention",
    "AverageTeacher",
    "BornAgain",
    "Contrastive",
    "Distill",
    "Flow",
    "Hint",
    "Offline",
    "Online",
    "Relational",
    "ResponseLoss",
    "SelfDeep",
    "Similarity",
]
