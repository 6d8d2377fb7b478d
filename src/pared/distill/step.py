"""`Distill`: what is asked for, what is planned of it, and which callback does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.distill.cache import teacher_id
from pared.distill.callback import Distilling, Taught
from pared.distill.exits import Exits
from pared.distill.knowledge import Knowledge
from pared.distill.matching import Anatomy, Pair, anatomy, match, matches, named, stages
from pared.distill.peers import Peers
from pared.distill.response import Beta, Temperature
from pared.distill.teachers import BornAgain, Offline, Online, SelfDeep, Teacher, check_fresh, named_teacher
from pared.distill.terms import make_term
from pared.errors import ModelError, PlanError
from pared.seeding import isolated, seed_all
from pared.step import Context, Need, Plan, settings, settings_of
from pared.task import Task
from pared.train.callbacks import Callback

Response = Literal["auto", "kl", "decoupled", "mse", "bernoulli", "none"]
CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
LABELS = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, F.binary_cross_entropy_with_logits)
VALUES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


@settings
class Distill:
    """Let a teacher help the model to learn: `Train(during=[Distill()])`.

    The loss becomes (1 - alpha) * what it was + alpha * the response's + each knowledge's with its weight.
    """

    changes: ClassVar[bool] = False

    temperature: Annotated[
        Temperature | None,
        pydantic.Field(
            description="What both outputs are divided by before they become probabilities. None: 4 for a teacher that "
            "is trained already, 3 for exits, 1 for teachers of the student's own size."
        ),
    ] = None
    alpha: Annotated[
        Annotated[float, pydantic.Field(ge=0, le=1)] | None,
        pydantic.Field(
            description="Share of the response; the rest is the loss on the labels. None: 0.9 for a teacher that is "
            "trained already, 0.5 for peers and for one born again, 0.3 for exits, 0.2 for an average."
        ),
    ] = None
    response: Annotated[
        Response,
        pydantic.Field(
            description="How outputs are compared. auto: kl for classes, mse for regression, bernoulli for several "
            "labels at once, as the task's loss and targets tell. decoupled: kl in two parts. none: knowledge alone."
        ),
    ] = "auto"
    beta: Beta = 8.0
    knowledge: Annotated[
        tuple[Knowledge, ...],
        pydantic.Field(
            description="What else is learned, each with settings: hint, attention, contrastive, flow, relational, "
            "similarity."
        ),
    ] = ()
    teacher: Annotated[
        Teacher,
        pydantic.Field(description="How they meet: offline, born_again, average, online or deep, with settings."),
    ] = Offline()

    def __post_init__(self) -> None:
        kind = self.teacher.kind
        if self.knowledge and isinstance(self.teacher, (Online, SelfDeep)):
            raise ValueError(f"teacher {kind!r} passes on responses only; leave knowledge out, or choose 'offline'")
        if self.knowledge and isinstance(self.teacher, Offline) and self.teacher.cache:
            raise ValueError("a cache holds outputs only, and knowledge compares layers; set cache=False")
        if self.response == "none" and not self.knowledge:
            raise ValueError("response 'none' without knowledge leaves nothing to learn; give one of both")

    @property
    def needs(self) -> frozenset[Need]:
        """No data beside what `Train` reads."""
        return frozenset()

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """Who teaches, what, and between which layers. Raises: PlanError, ModelError."""
        student = anatomy(model, ctx.task)
        facts: dict[str, Any] = {"teacher": self.teacher.kind, "output": list(student.output.shape[1:])}
        facts["response"] = response_for(ctx, student.output) if self.response == "auto" else self.response
        usual = self.teacher.usual
        facts["temperature"] = usual.temperature if self.temperature is None else self.temperature
        facts["alpha"] = usual.alpha if self.alpha is None else self.alpha
        if isinstance(self.teacher, SelfDeep):
            facts |= exits_of(student, self.teacher)
        elif isinstance(self.teacher, Online):
            facts |= peers_of(model, student, self.teacher, ctx)
        else:
            facts |= self.lessons(model, student, ctx)
        return Plan("Distill", settings_of(self), facts=facts | {"notes": self.notes(facts)})

    def notes(self, facts: Mapping[str, Any]) -> list[str]:
        """What a plan's facts say, in words."""
        name = f" {self.teacher.name!r}" if isinstance(self.teacher, Offline) else ""
        share = (
            "" if facts["response"] == "none" else f", alpha {facts['alpha']:g}, temperature {facts['temperature']:g}"
        )
        lines = [f"teacher {self.teacher.kind}{name}, response {facts['response']}{share}"]
        for item, pairs in zip(self.knowledge, facts.get("pairs", ()), strict=True):
            found = ", ".join(f"{pair['student']} with the teacher's {pair['teacher']}" for pair in pairs)
            lines.append(f"{item.kind} compares {found}")
        if "exits" in facts:
            exits = ", ".join(item["layer"] for item in facts["exits"])
            lines.append(f"exits at {exits}, taught by {facts['deepest']['layer']}")
        return [f"Distill: {line}" for line in lines]

    def lessons(self, model: nn.Module, student: Anatomy, ctx: Context) -> dict[str, Any]:
        """The teacher, and the pairs of layers of each knowledge. Raises: PlanError, ModelError."""
        facts: dict[str, Any] = {}
        teacher = student
        if isinstance(self.teacher, BornAgain):
            check_fresh(model)
        if isinstance(self.teacher, Offline):
            live = named_teacher(self.teacher.name, ctx.dense, ctx.task.teachers)
            teacher = taught_by(live, self.teacher.name, student, ctx.task)
            facts["teacher_id"] = teacher_id(live, ctx.task.output)
        pairs = [pairs_for(item, student, teacher) for item in self.knowledge]
        with torch.random.fork_rng(devices=[]):  # adapters are made to see that they can be
            for item, found in zip(self.knowledge, pairs, strict=True):
                make_term(item, found)
        return facts | {"pairs": [[pair.to_json() for pair in found] for found in pairs]}

    def callback(self, plan: Plan, ctx: Context) -> Callback:
        """What runs in the training."""
        kinds: dict[type[Any], type[Distilling]] = {Online: Peers, SelfDeep: Exits}
        return kinds.get(type(self.teacher), Taught)(self, plan, ctx)


def taught_by(teacher: nn.Module, name: str, student: Anatomy, task: Task) -> Anatomy:
    """The anatomy of a teacher that suits a student. Raises: PlanError, ModelError."""
    try:
        found = anatomy(teacher, task)
    except ModelError as error:
        raise ModelError(f"teacher {name!r}: {error}") from error
    if found.output.shape != student.output.shape:
        raise PlanError(
            f"the student's outputs have shape {tuple(student.output.shape)}, those of teacher {name!r} "
            f"{tuple(found.output.shape)}; both must have the same classes: take a teacher of this task, or pick the "
            "part of its output that counts with Task(output=...)"
        )
    if not bool(torch.isfinite(found.output).all()):
        raise ModelError(f"teacher {name!r} gives NaN or infinity for the example inputs; look at its weights")
    return found


def pairs_for(item: Any, student: Anatomy, teacher: Anatomy) -> list[Pair]:
    """The layers that a kind of knowledge compares."""
    if item.layers:
        return named(student, teacher, item.layers)
    return match(student, teacher, deepest=item.deepest)


def peers_of(model: nn.Module, student: Anatomy, online: Online, ctx: Context) -> dict[str, Any]:
    """Check that the peers can train. Raises: PlanError, ModelError."""
    if isinstance(online.peers, int):
        check_fresh(model)
        return {"peers": online.peers}
    teachers = {name: named_teacher(name, ctx.dense, ctx.task.teachers) for name in online.peers}
    for name, teacher in teachers.items():
        taught_by(teacher, name, student, ctx.task)
    return {"peers": list(teachers), "teacher_id": [teacher_id(teacher) for teacher in teachers.values()]}


def exits_of(student: Anatomy, deep: SelfDeep) -> dict[str, Any]:
    """Where the exits go. Raises: PlanError."""
    if student.output.ndim != 2 or not student.inner:
        raise PlanError(
            f"teacher 'deep' needs outputs (samples, classes) with layers before them, found "
            f"{tuple(student.output.shape)} and {len(student.inner)} layers; choose another teacher"
        )
    # Not the last layer of all: images that are made one long vector there would ask for exits as wide.
    *auto, deepest = stages(student)
    chosen = [name for pattern in deep.exits for name in matches(student, pattern, "student")] if deep.exits else auto
    if not chosen:
        raise PlanError(
            "teacher 'deep' finds no layer shallower than the last to put an exit on; name some with exits="
        )
    exits = [{"layer": name, "shape": list(student.layers[name])} for name in dict.fromkeys(chosen)]
    return {"exits": exits, "deepest": {"layer": deepest, "shape": list(student.layers[deepest])}}


def response_for(ctx: Context, output: Tensor) -> str:
    """How outputs compare, by the task's loss; where it is the caller's own, by the first target of the train data."""
    loss = ctx.task.loss
    for kinds, name in ((CLASSES, "kl"), (LABELS, "bernoulli"), (VALUES, "mse")):
        classes = tuple(kind for kind in kinds if isinstance(kind, type))
        if isinstance(loss, classes) or any(loss is kind for kind in kinds):
            return name
    target = first_target(ctx)
    if not isinstance(target, Tensor) or output.ndim < 2:
        return "mse" if output.ndim < 2 else "kl"
    if target.dtype == torch.bool or (
        target.shape[1:] == output.shape[1:] and bool(((target == 0) | (target == 1)).all())
    ):
        return "bernoulli"
    return "mse" if target.is_floating_point() else "kl"


def first_target(ctx: Context) -> Any:
    """The target of the first batch of train data; what it draws from is as before afterwards."""
    if ctx.task.train is None:
        return None
    with isolated(ctx.task):
        seed_all(ctx.task, ctx.seed, 0)
        return next(ctx.task.batches("train", "Distill")).target
