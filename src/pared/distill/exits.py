"""Be your own teacher: exits at shallower layers learn from the labels and from what the deepest layer says."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pared.distill.callback import Distilling
from pared.distill.terms import full, pool, width
from pared.task import Batch
from pared.train.taps import Taps


class Exit(nn.Module):
    """Features of a layer as wide as the deepest one's, and classes made of them.

    Args:
        shape: Of the layer's output, after the batch.
        features: Channels of the deepest layer.
        classes: Of the model's output.
    """

    def __init__(self, shape: tuple[int, ...], features: int, classes: int) -> None:
        super().__init__()
        wide = width(shape)
        if len(shape) == 3:
            step = nn.Conv2d(wide, features, 3, stride=2, padding=1, bias=False)
            self.body = nn.Sequential(step, nn.BatchNorm2d(features), nn.ReLU())
        else:
            self.body = nn.Sequential(nn.Linear(wide, features), nn.ReLU())
        self.classify = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(classes, features), both with the batch first."""
        found = pool(self.body(x))
        return self.classify(found), found


class Exits(Distilling):
    """The student with exits.

    Each exit adds (1 - alpha) * the task's loss + alpha * the response's loss against the student's own outputs +
    hint * the mean squared difference from its deepest features. No gradient reaches what teaches.

    Source: Zhang et al. 2019, arXiv:1905.08094, equations 2 to 5. Deviation: an exit is one convolution of stride 2
    with batch norm instead of a bottleneck for each size that is left out.
    """

    def on_ready(self, model: nn.Module) -> None:
        deepest, classes = self.facts["deepest"], self.facts["output"][-1]
        features = width(tuple(deepest["shape"]))
        exits = [Exit(tuple(item["shape"]), features, classes) for item in self.facts["exits"]]
        self.own["exits"] = nn.ModuleList(exits).to(self.device)
        self.names = [item["layer"] for item in self.facts["exits"]]
        self.taps = Taps(model, [*self.names, deepest["layer"]])
        self.taps.recording = False
        self.judge = self.criterion()

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        super().on_epoch_start(model, epoch, epochs)
        self.taps.recording = True

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        super().on_epoch_end(model, epoch)
        self.taps.recording = False

    def loss(self, current: Tensor, batch: Batch, outputs: Any) -> Tensor:
        found = self.taps.take()
        taught = self.task.pick(outputs).detach()
        deepest = pool(full(found[self.facts["deepest"]["layer"]])).detach()
        hint = getattr(self.settings.teacher, "hint", 0.0)
        for name, leave in zip(self.names, self.own["exits"], strict=True):  # type: ignore[call-overload]
            said, features = leave(full(found[name]))
            current = current + self.mix(self.judge(said, batch.target), said, taught, batch.target)
            if hint:
                current = current + hint * F.mse_loss(features, deepest)
        return current

    def on_end(self, model: nn.Module) -> nn.Module:
        self.taps.remove()
        self.own = nn.ModuleDict()
        return model
