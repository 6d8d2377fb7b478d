"""How distillation joins a training: a teacher that is asked beside the student's own forward."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pared.distill.cache import CachedOutputs, OutputCache, keys_of
from pared.distill.matching import Pair
from pared.distill.response import ResponseLoss
from pared.distill.teachers import AverageTeacher, BornAgain, Offline, frozen, named_teacher, reset
from pared.distill.terms import Features, Term, make_term
from pared.errors import DataError, PlanError, TrainError, UsageError
from pared.step import Context, Plan
from pared.task import Batch, Inputs, Task, call
from pared.train.callbacks import Callback
from pared.train.checkpoint import restore, tensors_of
from pared.train.step import is_exported
from pared.train.taps import Taps

if TYPE_CHECKING:
    from pared.distill.step import Distill


class Distilling(Callback):
    """What every way of meeting shares: the response's loss, its share, and what is checked of a teacher's outputs.

    Args:
        settings: What the user asked for.
        plan: What `Distill.plan` found out.
        ctx: The run.
    """

    def __init__(self, settings: Distill, plan: Plan, ctx: Context) -> None:
        self.settings, self.facts, self.work = settings, plan.facts, ctx.work
        # Of the task only what is asked of it, so that this callback can be sent to other processes.
        given = ctx.task
        self.task = Task(example_inputs=given.example_inputs, loss=given.loss, output=given.output)
        self.own = nn.ModuleDict()  # what trains beside the student, and goes when the training ends
        self.device = torch.device("cpu")
        self.flaws: Tensor | None = None
        kind: Any = self.facts["response"]
        self.alpha: float = self.facts["alpha"]
        self.respond: ResponseLoss | None = None
        if kind != "none":
            self.respond = ResponseLoss(kind=kind, temperature=self.facts["temperature"], beta=settings.beta)

    def on_start(self, model: nn.Module) -> nn.Module:
        self.device = next((tensor.device for tensor in model.parameters()), self.device)
        return model

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        self.own.train()

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if self.flaws is not None and bool(self.flaws):
            raise TrainError(
                f"the teacher's outputs were not finite for some batch of epoch {epoch + 1}; look at the teacher"
            )

    def parameters(self) -> Iterable[nn.Parameter]:
        return [parameter for parameter in self.own.parameters() if parameter.requires_grad]

    def state_dict(self) -> Mapping[str, Any]:
        return {"own": dict(self.own.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.own.load_state_dict(state["own"])

    def mix(self, current: Tensor, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        """(1 - alpha) * the loss so far + alpha * the response's loss."""
        if self.respond is None:
            return current
        return (1 - self.alpha) * current + self.alpha * self.response(student, teacher, target)

    def response(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        """The response's loss. Raises: DataError where it needs labels and there are none."""
        if self.respond is None:
            return student.new_zeros(())
        labels = target if isinstance(target, Tensor) else None
        return self.respond(student, teacher, labels, ignore_index=getattr(self.task.loss, "ignore_index", -100))

    def sound(self, outputs: Tensor) -> Tensor:
        """A teacher's outputs, without NaN and infinities, which are an error: at once on a CPU, and at the end of the
        epoch on a GPU, which would have to be waited for at every batch. Raises: TrainError."""
        flaws = ~torch.isfinite(outputs).all()
        if outputs.device.type != "cpu":
            self.flaws = flaws if self.flaws is None else self.flaws | flaws
            return torch.nan_to_num(outputs)
        if bool(flaws):
            raise TrainError("the teacher's outputs are NaN or infinite for a batch of train data; look at the teacher")
        return outputs

    def criterion(self) -> Any:
        """The task's loss, for outputs other than the student's; tensors that it holds are on the right device."""
        loss = self.task.loss
        if loss is None:
            raise UsageError("Distill needs a loss; give it as Task(loss=...), e.g. loss=nn.CrossEntropyLoss()")
        return copy.deepcopy(loss).to(self.device) if isinstance(loss, nn.Module) else loss


class Taught(Distilling):
    """A student beside one teacher that no gradient reaches: fixed, or the average of the student itself."""

    def __init__(self, settings: Distill, plan: Plan, ctx: Context) -> None:
        super().__init__(settings, plan, ctx)
        self.pairs = [[Pair.from_json(pair) for pair in pairs] for pairs in self.facts["pairs"]]
        fixed, self.live = settings.teacher, nn.Module()
        if isinstance(fixed, Offline):
            self.live = named_teacher(fixed.name, ctx.dense, ctx.task.teachers)
        self.teacher: nn.Module = nn.Identity()
        self.taps: Taps | None = None
        self.teacher_taps: Taps | None = None
        self.cached: CachedOutputs | None = None
        self.terms: list[Term] = []
        self.steps = 0

    def on_start(self, model: nn.Module) -> nn.Module:
        super().on_start(model)
        kind = self.settings.teacher
        if isinstance(kind, Offline):
            self.teacher = frozen(self.live, self.device)
            self.cached = self.open_cache() if kind.cache else None
        elif isinstance(kind, BornAgain):
            if is_exported(model):
                raise PlanError(
                    "Distill: put it before QuantizeAware in `during`, where there are still layers to renew"
                )
            self.teacher = frozen(model, self.device)
            reset(model)
        return model

    def on_ready(self, model: nn.Module) -> None:
        if isinstance(self.settings.teacher, AverageTeacher):
            if is_exported(model):
                raise PlanError("Distill: an average teacher cannot follow a quantized student; choose 'offline'")
            self.teacher = frozen(model, self.device)
        self.terms = [make_term(*both) for both in zip(self.settings.knowledge, self.pairs, strict=True)]
        self.own["terms"] = nn.ModuleList(self.terms).to(self.device)
        if self.terms:
            self.taps = Taps(model, [pair.student for pairs in self.pairs for pair in pairs])
            self.taps.recording = False
            self.teacher_taps = Taps(self.teacher, [pair.teacher for pairs in self.pairs for pair in pairs])

    def open_cache(self) -> CachedOutputs:
        """The teacher's outputs on disk. Raises: ArtifactError, UsageError."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UsageError("Offline(cache=True): several processes cannot fill one cache; set cache=False")
        name = self.facts["teacher_id"]
        path = self.work / f"teacher-{name[:16]}.rows"
        return CachedOutputs(OutputCache(path, name, tuple(self.facts["output"])))

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        super().on_epoch_start(model, epoch, epochs)
        self.record(True)
        if self.cached is not None:
            self.cached.begin()

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        super().on_epoch_end(model, epoch)
        self.record(False)
        if self.cached is not None:
            self.cached.end()

    def record(self, on: bool) -> None:
        """Whether forwards of the student are training's, which alone are recorded."""
        if self.taps is not None:
            self.taps.recording = on

    def loss(self, current: Tensor, batch: Batch, outputs: Any) -> Tensor:
        student = self.task.pick(outputs)
        taught, features = self.teach(batch.inputs)
        if taught.shape != student.shape:
            raise DataError(f"the student's outputs are {tuple(student.shape)}, the teacher's {tuple(taught.shape)}")
        total = self.mix(current, student, self.sound(taught), batch.target)
        own = self.taps.take() if self.taps is not None else {}
        with torch.autocast(student.device.type, enabled=False):  # products of samples need all their digits
            for term in self.terms:
                total = total + term(own, features, batch.target)
        return total

    @torch.no_grad()
    def teach(self, inputs: Inputs) -> tuple[Tensor, Features]:
        """The teacher's outputs, and those of its layers that are compared. Raises: DataError."""
        if self.cached is None:
            outputs = self.task.pick(call(self.teacher, inputs))
            return outputs, self.teacher_taps.take() if self.teacher_taps is not None else {}
        keys = keys_of(inputs)
        found = self.cached.find(keys)
        if found is None:
            found = self.task.pick(call(self.teacher, inputs))
            self.cached.cache.add(keys, self.sound(found))
        return found.to(self.device), {}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if not isinstance(self.settings.teacher, AverageTeacher):
            return
        self.steps += 1
        # In the first steps the average would be the start's weights for the most part.
        keep = min(self.settings.teacher.decay, 1 - 1 / (self.steps + 1))
        ours: list[Tensor] = list(model.parameters())
        theirs: list[Tensor] = list(self.teacher.parameters())
        torch._foreach_lerp_(theirs, ours, 1 - keep)
        for mine, its in zip(model.buffers(), self.teacher.buffers(), strict=True):
            its.copy_(mine)

    def on_end(self, model: nn.Module) -> nn.Module:
        for taps in (self.taps, self.teacher_taps):
            if taps is not None:
                taps.remove()
        self.teacher, self.taps, self.teacher_taps = nn.Identity(), None, None
        self.own, self.terms = nn.ModuleDict(), []
        return model

    def state_dict(self) -> Mapping[str, Any]:
        moving = isinstance(self.settings.teacher, AverageTeacher)
        filled = self.cached.filled if self.cached is not None else 0
        teacher = tensors_of(self.teacher) if moving else {}
        return {**super().state_dict(), "steps": self.steps, "filled": filled, "teacher": teacher}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]
        if self.cached is not None:
            self.cached.filled = state["filled"]
        if state["teacher"]:
            restore(self.teacher, state["teacher"])
