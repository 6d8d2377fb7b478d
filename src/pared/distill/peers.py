"""Deep mutual learning: networks that train together, each from the labels and from what all others say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pared.distill.callback import Distilling
from pared.distill.teachers import Online, fresh, named_teacher
from pared.errors import PlanError
from pared.step import Context, Plan
from pared.surgery import duplicate
from pared.task import Batch, call
from pared.train.checkpoint import restore, tensors_of
from pared.train.step import is_exported

if TYPE_CHECKING:
    from pared.distill.step import Distill


class Peers(Distilling):
    """The student beside its peers.

    The loss of each network is (1 - alpha) * the task's + alpha * the mean of its divergences from the others.

    Source: Zhang et al. 2018, arXiv:1706.00384, equations 5 and 8. Deviations: all networks step at once on one
    batch, instead of each in turn; the two parts have the shares above and the response its temperature, instead of 1.
    """

    def __init__(self, settings: Distill, plan: Plan, ctx: Context) -> None:
        super().__init__(settings, plan, ctx)
        wanted = settings.teacher.peers if isinstance(settings.teacher, Online) else ()
        self.fresh = wanted if isinstance(wanted, int) else 0
        names = () if isinstance(wanted, int) else wanted
        self.live = [named_teacher(name, ctx.dense, ctx.task.teachers) for name in names]

    def on_start(self, model: nn.Module) -> nn.Module:
        super().on_start(model)
        if self.fresh and is_exported(model):
            raise PlanError("Distill: put it before QuantizeAware in `during`, where there are still layers to copy")
        peers = [fresh(model) for _ in range(self.fresh)] or [duplicate(peer) for peer in self.live]
        self.own["peers"] = nn.ModuleList(peer.requires_grad_(True) for peer in peers).to(self.device)
        self.judge = self.criterion()
        return model

    def loss(self, current: Tensor, batch: Batch, outputs: Any) -> Tensor:
        said = [self.task.pick(outputs)]
        said += [self.task.pick(call(peer, batch.inputs)) for peer in self.own["peers"]]  # type: ignore[attr-defined]
        for found in said[1:]:
            self.sound(found.detach())
        total = self.mixed(current, 0, said, batch.target)
        for i in range(1, len(said)):
            own = self.mixed(self.judge(said[i], batch.target), i, said, batch.target)
            total = total + (own - own.detach())  # its gradients alone: the figure that is shown is the student's
        return total

    def mixed(self, own: Tensor, i: int, said: list[Tensor], target: Any) -> Tensor:
        """The loss of network `i`, from its loss on the labels and what all of them said."""
        others = [self.response(said[i], said[j].detach(), target) for j in range(len(said)) if j != i]
        return (1 - self.alpha) * own + self.alpha * sum(others) / len(others)

    def on_end(self, model: nn.Module) -> nn.Module:
        self.own = nn.ModuleDict()
        return model

    def state_dict(self) -> Mapping[str, Any]:
        return {"own": tensors_of(self.own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        restore(self.own, state["own"])
