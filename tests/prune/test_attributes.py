from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pared.errors import CaptureError
from pared.prune.attributes import Rehearsal
from pared.step import Edit
from pared.task import as_inputs


class Reading(nn.Module):
    """Reads an integer, a list of them, and a flag; holds another integer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.parts, self.unread, self.flag = 8, [4, 4], 8, True
        self.layer = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).reshape(-1, self.width)
        first, second = torch.split(x, self.parts, dim=1)
        return first + second if self.flag else first


class Looking(Reading):
    """Its code looks at data, which a run without data cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if float(x.sum()) > 0 else 3)


@pytest.mark.parametrize("kind", [Reading, Looking])
def test_reads_are_the_integers_that_a_forward_asks_for(kind: type[nn.Module]) -> None:
    model = kind()
    rehearsal = Rehearsal(model, as_inputs(torch.ones(2, 3)))
    assert rehearsal.reads == {"": {"width": 8, "parts": (4, 4)}}
    assert rehearsal.device.type == ("cpu" if kind is Looking else "meta")
    assert type(model) is kind
    assert not hasattr(model, "_pared_reads")


def test_rehearsal_runs_edited_copies_and_names_the_line_that_fails() -> None:
    rehearsal = Rehearsal(Reading(), as_inputs(torch.ones(2, 3)))
    shrink = Edit("slice", "layer", {"tensor": "weight", "dim": 0, "keep": [0, 1, 2, 4]})
    bias = Edit("slice", "layer", {"tensor": "bias", "dim": 0, "keep": [0, 1, 2, 4]})
    wide = rehearsal.edited([shrink, bias])
    # Two rows of four are one row of eight, which then splits: only the shape of the output tells.
    assert rehearsal.run(wide) == [(1, 4)]
    assert rehearsal.shapes == [(2, 4)]
    narrow = rehearsal.edited([shrink, bias, Edit("set_attribute", "", {"name": "width", "value": 4})])
    with pytest.raises(CaptureError, match=r"test_attributes\.py:\d+, in forward: first, second = torch\.split"):
        rehearsal.run(narrow)


def test_rehearsal_of_a_batch_norm_still_checks_its_width() -> None:
    rehearsal = Rehearsal(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), as_inputs(torch.ones(2, 3, 4, 4)))
    narrow = [Edit("slice", "0", {"tensor": name, "dim": 0, "keep": [0, 1]}) for name in ("weight", "bias")]
    with pytest.raises(CaptureError):
        rehearsal.run(rehearsal.edited(narrow))
    names = ("weight", "bias", "running_mean", "running_var")
    norm = [Edit("slice", "1", {"tensor": name, "dim": 0, "keep": [0, 1]}) for name in names]
    assert rehearsal.run(rehearsal.edited([*narrow, *norm])) == [(2, 2, 4, 4)]
