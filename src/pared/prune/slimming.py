"""`Slim`: training that drives scales of batch norms towards zero, so that few channels matter when they are pruned.

What the training leaves is for `PruneChannels` with `saliency="gamma"` to read; nothing is removed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pared.errors import PlanError, nearest
from pared.step import Context, Need, Plan, Skip, settings, settings_of
from pared.train.callbacks import Callback


@settings
class Slim:
    """Network slimming: an L1 penalty on the scales of batch norms, in `Train(during=[Slim()])`.

    Source: Liu et al. 2017, arXiv:1708.06519, eq. 1, by subgradient descent.
    """

    changes: ClassVar[bool] = False

    strength: Annotated[
        float,
        pydantic.Field(description="Weight of the sum of absolute scales in what is minimized.", gt=0),
    ] = 1e-4
    include: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the batch norms to slim.")] = (
        "*",
    )
    exclude: Annotated[tuple[str, ...], pydantic.Field(description="Glob patterns of the batch norms to leave.")] = ()

    @property
    def needs(self) -> frozenset[Need]:
        """No data beside what `Train` reads."""
        return frozenset()

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Which batch norms are slimmed, and which not and why. Raises: PlanError where none is."""
        norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        for setting, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if norms and pattern != "*" and not any(fnmatchcase(name, pattern) for name in norms):
                    raise PlanError(f"Slim: {setting}={pattern!r} matches no batch norm; {nearest(pattern, norms)}")
        reasons = {name: self.why_not(name, norm) for name, norm in norms.items()}
        slimmed = [name for name, reason in reasons.items() if not reason]
        if not slimmed:
            told = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(reasons.items())[:3])
            raise PlanError(
                f"Slim: no batch norm to slim ({told or 'the model has none'}); take Slim out of `during`, and prune "
                "by another saliency than gamma"
            )
        scales = sum(norms[name].num_features for name in slimmed)
        return Plan(
            "Slim",
            settings_of(self),
            skips=tuple(Skip(name, f"not slimmed: {reason}") for name, reason in reasons.items() if reason),
            facts={
                "slimmed": slimmed,
                "notes": [f"Slim: {scales} scales of {len(slimmed)} batch norms: {', '.join(slimmed)}"],
            },
        )

    def why_not(self, name: str, norm: _BatchNorm) -> str:
        """Why a batch norm is left as it is, or ""."""
        if norm.weight is None:
            return "it has no scale (affine=False)"
        if not norm.weight.requires_grad:
            return "its scale is frozen"
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "not in include"
        excluded = next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)
        return "" if excluded is None else f"excluded by {excluded!r}"

    def callback(self, plan: Plan, ctx: Context) -> Callback:
        """What runs in the training."""
        return Slimming(plan.facts["slimmed"], self.strength)


class Slimming(Callback):
    """Adds the subgradient of `strength` times the sum of absolute scales to their gradients.

    Not to the loss: the penalty then counts once for one step of the optimizer, whatever batches, processes and
    precision made the gradient and however long a gradient may be, and the loss that is logged and judged stays the
    task's. At 0 the subgradient is 0.

    Args:
        names: Dotted names of the batch norms.
        strength: As in `Slim`.
    """

    def __init__(self, names: Iterable[str], strength: float) -> None:
        self.names, self.strength = tuple(names), strength
        self.scales: dict[nn.Parameter, str] = {}

    def on_start(self, model: nn.Module) -> nn.Module:
        # The parameters themselves: a model that is captured has no batch norms any more, and may have other names.
        found = dict(model.named_parameters(remove_duplicate=False))
        named = {name: found.get(f"{name}.weight".removeprefix(".")) for name in self.names}
        missing = [name for name, scale in named.items() if scale is None]
        if missing:
            raise PlanError(f"Slim: the model that trains has no {missing[0]}; put Slim first in `during`")
        # One that several norms share counts once.
        self.scales = {scale: name for name, scale in named.items() if scale is not None}
        return model

    def on_ready(self, model: nn.Module) -> None:
        trained = {id(parameter) for parameter in model.parameters()}
        lost = [name for scale, name in self.scales.items() if id(scale) not in trained]
        if lost:
            raise PlanError(
                f"Slim: another technique in `during` replaced the scale of {lost[0]}; train with Slim alone"
            )

    def after_backward(self, model: nn.Module) -> None:
        for scale in self.scales:
            if scale.grad is not None:  # None where the loss does not depend on it
                scale.grad.add_(torch.sign(scale.detach()), alpha=self.strength)
