"""The one training loop, on Lightning Fabric: a copy of the model, epoch by epoch, with a checkpoint after each.

Techniques join it as callbacks. Which settings there are, and what a plan says, is `step`'s.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pared.errors import DataError, ModelError, PlanError, TrainError, UsageError
from pared.metrics import MeanOf, Metric, check_labels
from pared.seeding import isolated, seed_all
from pared.step import Progress, silent
from pared.task import Batch, Inputs, Task, call, evaluate
from pared.train.callbacks import Callback
from pared.train.checkpoint import Checkpoint, restore, snapshot
from pared.train.optimizers import SGD, AdamW
from pared.train.schedules import Constant, Cosine, StepDecay


def fit(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    lr: float,
    optimizer: SGD | AdamW,
    schedule: Constant | Cosine | StepDecay,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """A trained copy of `model`, with the modes and on the device that `model` has.

    Args:
        model: Stays as it is.
        task: Gives `train`, the loss, and `validation` where `patience` is set.
        patience: Epochs without a better `validation` figure after which to stop. The best epoch's weights are
            returned. None trains all epochs and returns the last.
        checkpoint: File of this very training; where it exists, training goes on from it and ends with the same
            tensors, bit for bit, as one that was never stopped.

    Raises:
        DataError: Empty data, a label outside the classes, a batch that does not fit the example inputs.
        UsageError: No loss, no data.
        PlanError: Nothing to train.
        TrainError: The loss or a weight is not finite, or a checkpoint cannot be written. The last checkpoint is kept.
    """
    task.require("train", "Train")
    with isolated(task):
        seed_all(task, seed, 0)
        loop = Loop(model, task, lr=lr, optimizer=optimizer, callbacks=callbacks, progress=progress)
        loop.resume(checkpoint)
        while loop.state.epoch < epochs and not loop.exhausted(patience):
            seed_all(task, seed, loop.state.epoch)
            loop.train_epoch(epochs, schedule)
            if patience is not None:
                loop.validate()
            loop.save(checkpoint)
        progress("Train", epochs * loop.batches, epochs * loop.batches, loop.outcome(patience))
        return loop.finish(model)


class Loop:
    """The moving parts of one training."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        lr: float,
        optimizer: SGD | AdamW,
        callbacks: Sequence[Callback],
        progress: Progress,
    ) -> None:
        if task.loss is None:
            raise UsageError("Train needs a loss; give it as Task(loss=...), e.g. loss=nn.CrossEntropyLoss()")
        self.task, self.lr, self.callbacks, self.progress = task, lr, callbacks, progress
        loss = task.loss
        self.metric = task.metric or Metric("validation loss", False, lambda _: MeanOf(loss))
        self.batches = batch_count(task.require("train", "Train"))
        self.fabric = Fabric(accelerator="auto", devices=1)
        self.model = self.fabric.to_device(copy.deepcopy(model))
        for callback in callbacks:
            self.model = callback.on_start(self.model)
        for callback in callbacks:
            callback.on_ready(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        trained += [parameter for callback in callbacks for parameter in callback.parameters()]
        if not trained:
            raise PlanError("Train: no parameter requires a gradient; unfreeze some with parameter.requires_grad_()")
        self.forward, self.optimizer = self.fabric.setup(self.model, optimizer.make(trained, lr))
        # A loss may hold tensors (class weights); the caller's own must not move to a GPU.
        self.criterion = self.fabric.to_device(copy.deepcopy(loss)) if isinstance(loss, nn.Module) else loss
        self.state = Checkpoint()
        self.started, self.done = time.monotonic(), 0

    def resume(self, path: Path | None) -> None:
        """Go back to where a checkpoint stands, if there is one."""
        saved = Checkpoint.load(path) if path is not None else None
        if saved is None:
            return
        self.state = saved
        restore(self.model, saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        for callback, state in zip(self.callbacks, saved.callbacks, strict=True):
            callback.load_state_dict(state)

    def save(self, path: Path | None) -> None:
        """Write a checkpoint of the epochs finished."""
        if path is None:
            return
        self.state.model = snapshot(self.model)
        self.state.optimizer = self.optimizer.optimizer.state_dict()
        self.state.callbacks = [callback.state_dict() for callback in self.callbacks]
        self.state.save(path)
        self.state.model = {}

    def exhausted(self, patience: int | None) -> bool:
        """Whether `validation` has not improved for `patience` epochs."""
        return patience is not None and self.state.epoch - self.state.best_epoch >= patience

    def train_epoch(self, epochs: int, schedule: Constant | Cosine | StepDecay) -> None:
        """Train on every batch once."""
        epoch, total, samples = self.state.epoch, 0.0, 0
        self.model.train()
        for callback in self.callbacks:
            callback.on_epoch_start(self.model, epoch)
        for index, batch in enumerate(self.task.batches("train", "Train")):
            # A source that gives more batches than its length said stays on the epoch's last rate.
            step = epoch * self.batches + min(index, self.batches - 1)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * schedule.factor(step, self.batches, epochs)
            total += self.train_batch(batch, f"train data, epoch {epoch + 1}, batch {index}") * batch.inputs.size
            samples += batch.inputs.size
            self.tell(step + 1, epochs, total / samples)
        for callback in self.callbacks:
            callback.on_epoch_end(self.model, epoch)
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise TrainError(f"{name} is not finite after epoch {epoch + 1}; lower lr. The last checkpoint is kept")
        self.state.epoch += 1
        self.state.losses.append(total / samples)

    def train_batch(self, batch: Batch, where: str) -> float:
        """One step of the optimizer; the loss before it."""
        batch = Batch(batch.inputs.to(self.fabric.device), self.fabric.to_device(batch.target))
        try:
            outputs = call(self.forward, batch.inputs)
        except ValueError as error:
            if batch.inputs.size > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"{where}: batch norm cannot train on one sample; choose another batch size or drop the last batch"
            ) from error
        loss = self.loss_of(batch, outputs, where)
        for callback in self.callbacks:
            loss = callback.loss(loss, batch, outputs)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainError(
                f"{where}: the loss is {value}; lower lr, or look at that batch. The last checkpoint is kept"
            )
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        for callback in self.callbacks:
            callback.after_backward(self.model)
        self.optimizer.step()
        for callback in self.callbacks:
            callback.after_step(self.model)
        return value

    def loss_of(self, batch: Batch, outputs: Any, where: str) -> Tensor:
        """The task's loss of one batch, with the mistakes in a batch's target explained."""
        if batch.target is None:
            raise DataError(f"{where}: the loss needs a target; give batches of train data as (inputs, target)")
        output = self.task.pick(outputs)
        try:
            self.check_target(output, batch.target)
            loss = self.criterion(output, batch.target)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except IndexError as error:
            raise DataError(
                f"{where}: the loss finds no place for a label ({error}); the model's output is {tuple(output.shape)}"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"the loss must return one number as a tensor, found {found}; reduce it, e.g. by its mean")
        if not loss.requires_grad:
            raise ModelError(
                f"{where}: the loss does not depend on any weight that is trained; look for detach() or no_grad()"
            )
        return loss

    def check_target(self, output: Tensor, target: Any) -> None:
        """Check class indices before the loss does: on a GPU its own check kills the process."""
        indices = isinstance(target, Tensor) and not target.is_floating_point() and output.ndim > 1
        labels = isinstance(self.criterion, (nn.CrossEntropyLoss, nn.NLLLoss))
        if not indices or not (labels or self.metric.labels):
            return
        counted = target[target != getattr(self.criterion, "ignore_index", -100)]
        if counted.numel() > 0:
            check_labels(output, counted)

    def validate(self) -> None:
        """The deciding figure on `validation`; keep the weights where it is the best so far."""
        state, metric = self.state, self.metric
        self.model.eval()
        with torch.no_grad():
            batches = self.task.batches("validation", "Train(patience=...)")
            value = evaluate(self.predict, batches, [metric])[metric.name]
        if not math.isfinite(value):
            raise TrainError(f"{metric.name} on validation is {value} after epoch {state.epoch}; lower lr")
        if not state.values or metric.drop(state.values[state.best_epoch - 1], value) < 0:
            state.best_epoch, state.best = state.epoch, snapshot(self.model)
        state.values.append(value)

    def predict(self, inputs: Inputs) -> Tensor:
        """The output that counts, on the CPU, where targets are."""
        return self.task.pick(call(self.forward, inputs.to(self.fabric.device))).cpu()

    def tell(self, step: int, epochs: int, loss: float) -> None:
        """Report progress: epoch, loss, the last validation figure, time left."""
        total = epochs * self.batches
        self.done += 1
        left = (time.monotonic() - self.started) / self.done * (total - step)
        parts = [f"epoch {self.state.epoch + 1}/{epochs}", f"loss {loss:.4f}"]
        if self.state.values:
            parts.append(f"{self.metric.name} {self.state.values[-1]:.4f}")
        self.progress("Train", step, total, ", ".join([*parts, f"{int(left) // 60}:{int(left) % 60:02d} left"]))

    def outcome(self, patience: int | None) -> str:
        """What there is to say about a finished training."""
        state = self.state
        if patience is None:
            return f"loss {state.losses[-1]:.4f}"
        return f"{self.metric.name} {state.values[state.best_epoch - 1]:.4f}, epoch {state.best_epoch} of {state.epoch}"

    def finish(self, original: nn.Module) -> nn.Module:
        """The trained model, with the best weights where they are known, as `original` came."""
        if self.state.best:
            restore(self.model, self.state.best)
        self.optimizer.zero_grad()
        model: nn.Module = self.model
        for callback in reversed(self.callbacks):
            model = callback.on_end(model)
        model.to(next((parameter.device for parameter in original.parameters()), torch.device("cpu")))
        modes = {name: module.training for name, module in original.named_modules()}
        for name, module in model.named_modules():
            module.training = modes.get(name, original.training)
        return model


def batch_count(source: Any) -> int:
    """Batches in an epoch, at least 1; a source without a length is counted through."""
    try:
        count = len(source)
    except TypeError:
        count = sum(1 for _ in source)
    return max(1, count)
