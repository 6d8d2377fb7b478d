"""The errors that pared raises, and nothing else.

    ParedError                 the root: catch this to catch everything of ours
    ├── UsageError             what the caller asked for cannot be done; exit status 2
    │   ├── SettingError       a setting of a step is misspelt, of a wrong type or out of range
    │   ├── RecipeError        a recipe cannot be read, with the path of the wrong entry
    │   ├── DataError          a data source is empty, one-shot, of a wrong shape, dtype or label range
    │   ├── ModelError         the model is unusable: NaN weights, does not run, does not match its tensors
    │   │   └── CaptureError   the model cannot be exported; names the line of the caller's code
    │   ├── PlanError          a step has nothing to change, or stands in an order that cannot work
    │   │   └── QuantizeError  a tensor, range or width that cannot be quantized
    │   └── ArtifactError      an artifact or output folder is missing, in use, damaged or not trusted
    ├── PruneError             a pruned model does not compute what the original does without the removed channels
    ├── TrainError             training stopped: the loss is not finite, a process died
    ├── TargetError            a runtime is missing, or refuses the exported file
    │   ├── RefusedError       it does not run certain layers as planned; names them
    │   └── ParityError        the exported file and its own PyTorch model disagree
    └── MeasureError           a measurement failed: the worker process died or timed out

    ParedWarning               the work went on, and its result deserves doubt; a `UserWarning`

A message names the layer, operator or entry, says what was found and expected, and ends with the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParedError(Exception):
    """Root of all errors that pared raises on purpose."""

    exit_status = 1


class UsageError(ParedError):
    """What the caller asked for cannot be done as asked."""

    exit_status = 2


class SettingError(UsageError):
    """A setting is misspelt, of a wrong type or out of range."""


class RecipeError(UsageError):
    """A recipe cannot be read."""


class DataError(UsageError):
    """A data source cannot be used."""


class ModelError(UsageError):
    """A model cannot be used."""


class CaptureError(ModelError):
    """A model cannot be exported."""


class PlanError(UsageError):
    """A step has nothing to change, or stands in an order that cannot work."""


class QuantizeError(PlanError):
    """A tensor, range or width cannot be quantized."""


class ArtifactError(UsageError):
    """An artifact or output folder is missing, in use, damaged or not trusted."""


class PruneError(ParedError):
    """A pruned model and the original without the removed channels disagree."""


class TrainError(ParedError):
    """Training stopped before its end."""


class TargetError(ParedError):
    """A runtime is missing or refuses a file."""


class RefusedError(TargetError):
    """A runtime does not run certain layers as they were planned.

    Attributes:
        layers: Dotted names of their modules; kept as they are, they would not stand in the way.
    """

    def __init__(self, message: str, layers: Iterable[str]) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


class ParityError(TargetError):
    """The exported file and the PyTorch model of the same stage disagree."""


class MeasureError(ParedError):
    """A measurement could not be taken."""


class ParedWarning(UserWarning):
    """The work went on, but its result deserves doubt: the text holds the evidence."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all of them.

    Example:
        >>> nearest("epoch", ["epochs", "lr"])
        "did you mean 'epochs'?"
        >>> nearest("zzz", ["epochs", "lr"])
        'valid: epochs, lr'
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(sorted(names))}" if names else "there are none"
