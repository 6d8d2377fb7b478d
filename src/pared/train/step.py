"""The step `Train`: its settings, what it plans, and the loop run with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pydantic
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule

from pared.errors import PlanError, UsageError
from pared.seeding import isolated, seed_all
from pared.step import Context, Need, Plan, Skip, settings, settings_of
from pared.train.callbacks import During, KeepZeros
from pared.train.checkpoint import fingerprint
from pared.train.hardware import Hardware
from pared.train.logs import check_tensorboard
from pared.train.loop import fit
from pared.train.optimizers import SGD, Optimizer
from pared.train.schedules import Cosine, Schedule


def is_during(value: Any) -> During:
    """The same value, if it can run while training."""
    methods = (getattr(value, name, None) for name in ("plan", "callback"))
    if not (hasattr(value, "needs") and hasattr(value, "changes") and all(map(callable, methods))):
        raise ValueError(
            "a technique that runs while training has `changes`, `needs`, `plan(model, ctx)` and `callback(plan, ctx)`"
        )
    return value  # type: ignore[no-any-return]


Technique = Annotated[
    Any,
    pydantic.AfterValidator(is_during),
    pydantic.PlainSerializer(lambda value: {type(value).__name__: settings_of(value)}),
]


@settings
class Train:
    """Train all weights that require a gradient, with the task's loss on its `train` data."""

    epochs: Annotated[int, pydantic.Field(description="Times that every sample is seen.", ge=1)] = 3
    lr: Annotated[
        float | None,
        pydantic.Field(
            description="Highest learning rate. None: the optimizer's own, 0.01 for sgd, 0.001 for adamw.", gt=0
        ),
    ] = None
    optimizer: Annotated[Optimizer, pydantic.Field(description="sgd or adamw, with its settings.")] = SGD()
    schedule: Annotated[
        Schedule, pydantic.Field(description="How the learning rate moves: constant, cosine or step.")
    ] = Cosine()
    patience: Annotated[
        int | None,
        pydantic.Field(
            description="Epochs without a better figure on validation data after which to stop, and return the best "
            "epoch's weights. None: train all epochs and return the last.",
            ge=1,
        ),
    ] = None
    clip_norm: Annotated[
        float | None,
        pydantic.Field(
            description="Longest gradient, over all parameters together; longer ones are scaled down.", gt=0
        ),
    ] = None
    ema: Annotated[
        float | None,
        pydantic.Field(
            description="Decay of a moving average of weights and buffers, one step at a time; validated and returned "
            "in place of the weights themselves. None: no average.",
            gt=0,
            lt=1,
        ),
    ] = None
    log_dir: Annotated[
        str | None,
        pydantic.Field(description="Folder for TensorBoard: loss, lr, and the deciding figure on validation data."),
    ] = None
    hardware: Annotated[
        Hardware, pydantic.Field(description="Accelerator, number of devices, precision, accumulation of gradients.")
    ] = Hardware()
    during: Annotated[tuple[Technique, ...], pydantic.Field(description="Techniques that run while training.")] = ()

    @property
    def trains(self) -> bool:
        """True unless a technique also changes the structure, so that the whole is a change to be judged."""
        return not any(technique.changes for technique in self.during)

    @property
    def needs(self) -> frozenset[Need]:
        """The data that the step reads."""
        own: frozenset[Need] = frozenset({"train"} if self.patience is None else {"train", "validation"})
        return own.union(*(technique.needs for technique in self.during))

    def plan(self, model: nn.Module, ctx: Context) -> Plan:
        """How much there is to train, and what techniques plan to do meanwhile. Raises: PlanError, UsageError."""
        model = self.module(model, ctx)
        ctx.task.require("train", "Train")
        if self.patience is not None:
            ctx.task.require("validation", "Train(patience=...)")
        if ctx.task.loss is None:
            raise UsageError("Train needs a loss; give it as Task(loss=...), e.g. loss=nn.CrossEntropyLoss()")
        self.hardware.check()
        check_each_once(self.during)
        if self.log_dir is not None:
            check_tensorboard()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if trained == 0 and self.trains:  # what changes the structure may bring parameters that are worth training
            raise PlanError("Train: no parameter requires a gradient; unfreeze some with parameter.requires_grad_()")
        kept, gone = masked(model, ctx)
        if self.hardware.sharded and (kept or self.during):
            what = "zeros to keep look" if kept else "techniques in `during` look"
            raise PlanError(
                f"Train: {what} at whole parameters, of which strategy='fsdp' leaves each process a part; use 'ddp'"
            )
        parts = [technique.plan(model, ctx) for technique in self.during]
        lost = (Skip(name, "its masked weights are gone, so no zeros to keep") for name in gone)
        facts = {"epochs": self.epochs, "trained_params": trained, "keep_zeros": kept}
        facts |= {
            name: [item for part in parts for item in part.facts.get(name, ())] for name in ("folded", "warnings")
        }
        return Plan(
            step="Train",
            settings=settings_of(self),
            edits=tuple(edit for part in parts for edit in part.edits),
            skips=(*lost, *(skip for part in parts for skip in part.skips)),
            facts=facts | {"during": [part.to_json() for part in parts]},
            estimate=any(part.estimate for part in parts),
        )

    def module(self, model: nn.Module, ctx: Context) -> nn.Module:
        """What there is to train. Raises: PlanError for a program, unless a technique can start from what it was."""
        quantized = any(edit.kind == "quantize" for plan in ctx.history for edit in plan.edits)
        if not quantized and not is_exported(model):
            return model
        if self.trains or ctx.floating is None or is_exported(ctx.floating):
            raise PlanError(
                "Train: the model is an exported or quantized program; move Train before the step that quantizes"
            )
        return ctx.floating

    def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
        """A trained copy. Raises: TrainError, DataError, UsageError, PlanError."""
        model = self.module(model, ctx)
        parts = zip(self.during, map(Plan.from_json, plan.facts["during"]), strict=True)
        callbacks = [KeepZeros(plan.facts["keep_zeros"]), *(item.callback(part, ctx) for item, part in parts)]
        with isolated(ctx.task):
            # Data that is shuffled or augmented at random shows the same first batches to every fingerprint.
            seed_all(ctx.task, ctx.seed, 0)
            # Where a training is logged says nothing of what it is.
            name = fingerprint(model, ctx.task, {**settings_of(self), **plan.facts, "log_dir": None}, ctx.seed)
        return fit(
            model,
            ctx.task,
            epochs=self.epochs,
            lr=self.optimizer.default_lr if self.lr is None else self.lr,
            optimizer=self.optimizer,
            schedule=self.schedule,
            patience=self.patience,
            clip_norm=self.clip_norm,
            ema=self.ema,
            log_dir=self.log_dir,
            hardware=self.hardware,
            callbacks=callbacks,
            seed=ctx.seed,
            checkpoint=ctx.work / f"train-{name[:16]}.pt",
            progress=ctx.progress,
        )


def check_each_once(during: Sequence[During]) -> None:
    """Raise `PlanError` where a technique that changes the structure stands twice in one training."""
    kinds = [type(technique).__name__ for technique in during if technique.changes]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise PlanError(f"Train: {kind} stands {kinds.count(kind)} times in `during`; keep one of them")


def is_exported(model: nn.Module) -> bool:
    """Whether a model is a graph of low-level operators, in which the modes of dropout and batch norm are fixed. Graph
    modules that call modules train as any other model does."""
    if not isinstance(model, GraphModule):
        return False
    return any(isinstance(node.target, OpOverload) for node in model.graph.nodes)


def masked(model: nn.Module, ctx: Context) -> tuple[list[str], list[str]]:
    """Names of the parameters whose zeros the history wants kept: those that `model` has, and those that are gone."""
    edits = [edit for plan in ctx.history for edit in plan.edits if edit.kind == "mask"]
    names = dict.fromkeys(f"{edit.module}.{edit.detail['tensor']}".removeprefix(".") for edit in edits)
    present = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if name in present], [name for name in names if name not in present]
