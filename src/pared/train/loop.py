"""The one training loop, on Lightning Fabric: a copy of the model, epoch by epoch, with a checkpoint after each.

Techniques join it as callbacks. Which settings there are, and what a plan says, is `step`'s; what the loop runs on is
`hardware`'s.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from pared.errors import DataError, PlanError, TrainError, UsageError
from pared.metrics import MeanOf, Metric
from pared.seeding import isolated, seed_all
from pared.step import Progress, silent
from pared.task import Batch, Inputs, Task, call, evaluate
from pared.train.average import Average
from pared.train.checkpoint import Checkpoint, restore, snapshot
from pared.train.group import Group
from pared.train.hardware import Hardware, make_fabric
from pared.train.job import Job
from pared.train.logs import open_log
from pared.train.objective import loss_of
from pared.train.processes import launch
from pared.train.sharding import load_optimizer_state, optimizer_state, whole


def fit(model: nn.Module, task: Task, *, progress: Progress = silent, **settings: Any) -> nn.Module:
    """A trained copy of `model`, with the modes and on the device that `model` has.

    Args:
        model: Stays as it is.
        task: Gives `train`, the loss, and `validation` where `patience` is set.
        progress: Told steps of the optimizer.
        settings: Those of `Job`. `epochs`, `lr`, `optimizer`, `schedule` as in `Train`, and where wanted:
            patience: Epochs without a better `validation` figure after which to stop. The best epoch's weights are
                returned. None trains all epochs and returns the last.
            clip_norm: Longest gradient, over all parameters together.
            ema: Decay of a moving average of weights and buffers, which is then validated and returned.
            log_dir: Folder for TensorBoard.
            hardware: What to train on. Several devices train in processes of their own.
            callbacks: Techniques that join.
            seed: Of everything random.
            checkpoint: File of this very training; where it exists, training goes on from it and ends with the same
                tensors, bit for bit, as one that was never stopped.

    Raises:
        DataError: Empty data, a label outside the classes, a batch that does not fit the example inputs.
        UsageError: No loss, no data, hardware that is not there, or what cannot be sent to another process.
        PlanError: Nothing to train.
        TrainError: The loss or a weight is not finite, a process died, or a checkpoint cannot be written. The last
            checkpoint is kept.
    """
    job = Job(**settings)
    task.require("train", "Train")
    if task.loss is None:
        raise UsageError("Train needs a loss; give it as Task(loss=...), e.g. loss=nn.CrossEntropyLoss()")
    job.hardware.check()
    if job.hardware.apart:
        return fit_apart(model, task, job, progress)
    with isolated(task):
        seed_all(task, job.seed, 0)
        loop = Loop(model, task, job, progress)
        loop.run()
        return loop.finish(model)


def fit_apart(model: nn.Module, task: Task, job: Job, progress: Progress) -> nn.Module:
    """`fit` in processes of its own. They end with a checkpoint, which this process takes up as if it resumed."""
    with tempfile.TemporaryDirectory() as folder:
        path = job.checkpoint or Path(folder) / "train.pt"

        def kept() -> str:
            saved = Checkpoint.load(path)
            if saved is None:
                return "no epoch was finished yet: run again"
            if job.checkpoint is None:
                return "no checkpoint was asked for: run again"
            return f"the checkpoint of epoch {saved.epoch} is kept: run again with resume"

        apart = dataclasses.replace(job, checkpoint=path, callbacks=())
        saved = Checkpoint.load(path)
        if saved is None or not job.is_over(saved):
            work = {"the model": model, **parts_of(task, job), "job": apart, "during": list(job.callbacks)}
            gpu = job.hardware.on_gpu
            launch(train_part, work, job.hardware.devices, gpu=gpu, progress=progress, kept=kept)
            saved = Checkpoint.load(path)
        if saved is None:
            raise TrainError(f"the checkpoint {path} is gone; run again, and leave the work folder alone")
    with isolated(task):
        seed_all(task, job.seed, 0)
        loop = Loop(model, task, dataclasses.replace(job, hardware=Hardware(accelerator="cpu"), log_dir=None), progress)
        loop.take(saved)
        return loop.finish(model)


def parts_of(task: Task, job: Job) -> dict[str, Any]:
    """What a process needs of a task, by the words of a message that says it cannot be sent."""
    sent = copy.copy(task)
    sent.calibration = sent.test = sent.train = sent.loss = None
    sent.teachers = {}
    if job.patience is None:
        # The first metric is still asked whether targets are labels.
        sent.validation, sent.metrics = None, tuple(metric for metric in task.metrics[:1] if metric.labels)
    return {"Task(loss=...)": task.loss, "the train data": task.train, "the task": sent}


def train_part(work: Mapping[str, Any], progress: Progress) -> None:
    """The part of one process in a training of several."""
    task = work["the task"]
    task.loss, task.train = work["Task(loss=...)"], work["the train data"]
    with isolated(task):
        seed_all(task, work["job"].seed, 0)
        Loop(work["the model"], task, dataclasses.replace(work["job"], callbacks=work["during"]), progress).run()


class Loop:
    """The moving parts of one training, in one process."""

    def __init__(self, model: nn.Module, task: Task, job: Job, progress: Progress) -> None:
        self.task, self.job, self.callbacks, self.progress = task, job, job.callbacks, progress
        loss: Any = task.loss
        # A loss may hold tensors (class weights); the caller's own must not move. Validation is judged on the CPU.
        judge = copy.deepcopy(loss).cpu() if isinstance(loss, nn.Module) else loss
        self.metric = task.metric or Metric("validation loss", False, lambda _: MeanOf(judge))
        self.batches = batch_count(task.require("train", "Train"))
        self.steps = -(-self.batches // job.hardware.accumulate)
        self.fabric = make_fabric(job.hardware, model)
        self.group = Group(self.fabric, sharded=job.hardware.sharded)
        self.model = self.fabric.to_device(copy.deepcopy(model))
        for callback in self.callbacks:
            self.model = callback.on_start(self.model)
        for callback in self.callbacks:
            callback.on_ready(self.model)
        own = [parameter for callback in self.callbacks for parameter in callback.parameters()]
        self.forward = self.fabric.setup_module(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad] + own
        if not self.trained:
            raise PlanError("Train: no parameter requires a gradient; unfreeze some with parameter.requires_grad_()")
        self.optimizer = self.fabric.setup_optimizers(job.optimizer.make(self.trained, job.lr))
        self.criterion = self.fabric.to_device(copy.deepcopy(loss)) if isinstance(loss, nn.Module) else loss
        self.average = None if job.ema is None else Average(self.model, job.ema)
        self.log = open_log(job.log_dir) if job.log_dir is not None and self.group.rank == 0 else None
        self.state = Checkpoint()
        self.started, self.done = time.monotonic(), 0

    def run(self) -> None:
        """Train from the checkpoint, if there is one, to the end."""
        job = self.job
        saved = Checkpoint.load(job.checkpoint) if job.checkpoint is not None else None
        if saved is not None:
            self.take(saved)
            load_optimizer_state(self.forward, self.optimizer, saved.optimizer, sharded=self.group.sharded)
            self.fabric.strategy.precision.load_state_dict(saved.scaler)
        while not job.is_over(self.state):
            seed_all(self.task, job.seed, self.state.epoch)
            self.group.seed(job.seed, self.state.epoch)
            self.train_epoch()
            self.group.agree(self.model, self.callbacks)
            if job.patience is not None:
                self.validate()
            self.save()
        self.progress("Train", job.epochs * self.steps, job.epochs * self.steps, self.outcome())
        if self.log is not None:
            self.log.finalize("success")

    def take(self, saved: Checkpoint) -> None:
        """Take over tensors, callbacks' states and figures of a checkpoint."""
        self.state = saved
        if self.average is not None and saved.average:
            self.restore(saved.average)
            self.average = Average(self.model, self.average.decay)
        self.restore(saved.model)
        for callback, state in zip(self.callbacks, saved.callbacks, strict=True):
            callback.load_state_dict(state)

    def save(self) -> None:
        """Write a checkpoint of the epochs finished."""
        if self.job.checkpoint is None:
            return
        state = self.state
        state.model = self.snapshot()
        with self.averaged():
            state.average = self.snapshot() if self.average is not None else {}
        state.optimizer = optimizer_state(self.forward, self.optimizer, sharded=self.group.sharded)
        if self.group.rank == 0:
            state.callbacks = [callback.state_dict() for callback in self.callbacks]
            state.scaler = self.fabric.strategy.precision.state_dict()
            state.save(self.job.checkpoint)
        state.model, state.average = {}, {}

    def train_epoch(self) -> None:
        """Train on every batch once."""
        epoch, total, samples = self.state.epoch, 0.0, 0
        self.model.train()
        for callback in self.callbacks:
            callback.on_epoch_start(self.model, epoch, self.job.epochs)
        together = self.job.hardware.accumulate
        for index, batches in enumerate(together_at_a_time(self.task.batches("train", "Train"), together)):
            # A source that gives more batches than its length said stays on the epoch's last rate.
            step = epoch * self.steps + min(index, self.steps - 1)
            rate = self.job.lr * self.job.schedule.factor(step, self.steps, self.job.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            where = [f"train data, epoch {epoch + 1}, batch {index * together + i}" for i in range(len(batches))]
            if index == 0:
                self.group.check_same(batches[0], where[0])
            with self.group.own_random():
                value = self.step(batches, where)
            size = sum(batch.inputs.size for batch in batches)
            total += value * size
            samples += size
            self.write({"loss": value, "lr": rate}, step)
            self.tell(step + 1, total / samples)
        for callback in self.callbacks:
            callback.on_epoch_end(self.model, epoch)
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise TrainError(f"{name} is not finite after epoch {epoch + 1}; lower lr. The last checkpoint is kept")
        self.state.epoch += 1
        self.state.losses.append(total / samples)

    def step(self, batches: Sequence[Batch], where: Sequence[str]) -> float:
        """One step of the optimizer, from the mean loss over all samples of some batches; that loss before it."""
        samples = sum(batch.inputs.size for batch in batches)
        self.optimizer.zero_grad()
        value = sum(self.backward(batch, samples, place) for batch, place in zip(batches, where, strict=True))
        value, read = self.group.sum([value, samples])
        if read != samples * self.group.size:
            raise DataError(f"{where[0]}: processes read batches of different sizes; let the data follow set_epoch")
        if not self.group.sharded:
            self.group.sum_gradients(self.trained)
        if self.job.clip_norm is None:
            self.fabric.strategy.precision.unscale_gradients(self.optimizer.optimizer)
        else:
            # Where float16 overflows, the norm is not finite, and the scaler skips the step.
            norm = self.job.clip_norm
            self.fabric.clip_gradients(self.forward, self.optimizer, max_norm=norm, error_if_nonfinite=False)
        for callback in self.callbacks:
            callback.after_backward(self.model)
        self.optimizer.step()
        for callback in self.callbacks:
            callback.after_step(self.model)
        if self.average is not None:
            self.average.update()
        return value

    def backward(self, batch: Batch, samples: int, where: str) -> float:
        """Add a batch's gradients, as a part of the mean over `samples`; its part of the mean loss."""
        batch, own = self.group.part(batch, where)
        batch = Batch(batch.inputs.to(self.fabric.device), self.fabric.to_device(batch.target))
        try:
            outputs = call(self.forward, batch.inputs)
        except ValueError as error:
            if batch.inputs.size > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"{where}: batch norm cannot train on one sample; choose another batch size or drop the last batch"
            ) from error
        with self.fabric.autocast():
            loss = loss_of(self.task, self.criterion, batch, outputs, where)
            for callback in self.callbacks:
                loss = callback.loss(loss, batch, outputs)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainError(
                f"{where}: the loss is {value}; lower lr, or look at that batch. The last checkpoint is kept"
            )
        # Sharded gradients are averaged over the processes, all others added up.
        self.fabric.backward(loss * (own / samples * (self.group.size if self.group.sharded else 1)))
        return value * (own / samples)

    def validate(self) -> None:
        """The deciding figure on `validation`; keep the weights where it is the best so far."""
        state, metric, value = self.state, self.metric, math.nan
        self.model.eval()
        with self.averaged():
            if self.group.rank == 0 or self.group.sharded:
                # Sharded weights stay gathered after a pass without gradients, so none is made: the whole is looked at.
                with torch.no_grad(), whole(self.forward, sharded=self.group.sharded):
                    batches = self.task.batches("validation", "Train(patience=...)")
                    on_cpu = (Batch(inputs, move_data_to_device(target, "cpu")) for inputs, target in batches)
                    value = evaluate(self.predict, on_cpu, [metric])[metric.name]
            value = self.group.broadcast(value)
            if not math.isfinite(value):
                raise TrainError(f"{metric.name} on validation is {value} after epoch {state.epoch}; lower lr")
            if not state.values or metric.drop(state.values[state.best_epoch - 1], value) < 0:
                state.best_epoch, state.best = state.epoch, self.snapshot()
        state.values.append(value)
        self.write({metric.name: value}, state.epoch * self.steps - 1)

    def predict(self, inputs: Inputs) -> Tensor:
        """The output that counts, on the CPU, where targets are."""
        with self.fabric.autocast():
            output = call(self.model if self.group.sharded else self.forward, inputs.to(self.fabric.device))
        picked = self.task.pick(output).cpu()
        return picked.float() if picked.dtype in (torch.float16, torch.bfloat16) else picked

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every tensor, on the CPU; whole also where each process holds a part."""
        with whole(self.forward, sharded=self.group.sharded):
            return snapshot(self.model)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Write whole tensors back."""
        with whole(self.forward, sharded=self.group.sharded, write=True):
            restore(self.model, saved)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the moving averages, where they are kept."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures, where they are wanted."""
        if self.log is not None:
            self.log.log_metrics(dict(figures), step)

    def tell(self, step: int, loss: float) -> None:
        """Report progress: epoch, loss, the last validation figure, time left."""
        total = self.job.epochs * self.steps
        self.done += 1
        left = (time.monotonic() - self.started) / self.done * (total - step)
        parts = [f"epoch {self.state.epoch + 1}/{self.job.epochs}", f"loss {loss:.4f}"]
        if self.state.values:
            parts.append(f"{self.metric.name} {self.state.values[-1]:.4f}")
        self.progress("Train", step, total, ", ".join([*parts, f"{int(left) // 60}:{int(left) % 60:02d} left"]))

    def outcome(self) -> str:
        """What there is to say about a finished training."""
        state = self.state
        if self.job.patience is None:
            return f"loss {state.losses[-1]:.4f}"
        return f"{self.metric.name} {state.values[state.best_epoch - 1]:.4f}, epoch {state.best_epoch} of {state.epoch}"

    def finish(self, original: nn.Module) -> nn.Module:
        """The trained model, with the best weights where they are known, as `original` came."""
        if self.state.best:
            restore(self.model, self.state.best)
        elif self.average is not None:
            restore(self.model, self.average.tensors)
        self.optimizer.zero_grad()
        model: nn.Module = self.model
        for callback in reversed(self.callbacks):
            model = callback.on_end(model)
        model.to(next((parameter.device for parameter in original.parameters()), torch.device("cpu")))
        modes = {name: module.training for name, module in original.named_modules()}
        for name, module in model.named_modules():
            module.training = modes.get(name, original.training)
        return model


def together_at_a_time(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Some batches at a time; the last time perhaps fewer."""
    iterator = iter(batches)
    while found := list(itertools.islice(iterator, count)):
        yield found


def batch_count(source: Any) -> int:
    """Batches in an epoch, at least 1; a source without a length is counted through."""
    try:
        count = len(source)
    except TypeError:
        count = sum(1 for _ in source)
    return max(1, count)
