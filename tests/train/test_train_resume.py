"""Checkpoints: a training that was stopped, at any epoch or moment, ends with the bits of one that was not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pared.errors import ArtifactError, TrainError
from pared.step import Context
from pared.task import Task
from pared.train.callbacks import Callback
from pared.train.checkpoint import Checkpoint, fingerprint
from pared.train.loop import fit
from pared.train.optimizers import SGD, AdamW, Optimizer
from pared.train.schedules import Cosine
from pared.train.step import Train

MakeTask = Callable[..., Task]
MakeContext = Callable[..., Context]


def bits(model: nn.Module) -> dict[str, bytes]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors}


class Hidden(nn.Module):
    """Keeps a count that `state_dict` leaves out, and shares one weight between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.98).add_(0.04)
        return self.last(self.dropout(self.norm(self.second(self.first(x).relu()))) * self.scale)


class Learned(Callback):
    """Has a parameter and a counter of its own."""

    def __init__(self, stop_after: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.scale = nn.Parameter(torch.zeros(()))
        self.steps = 0
        self.stop_after, self.error = stop_after, error

    def parameters(self) -> list[nn.Parameter]:
        return [self.scale]

    def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
        self.steps += 1
        return current * (self.scale + self.steps / 100).exp()

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if epoch == self.stop_after:
            raise self.error("stopped by the test")

    def state_dict(self) -> Mapping[str, Any]:
        return {"scale": self.scale.detach(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale.detach().copy_(state["scale"])
        self.steps = state["steps"]


def shuffled() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(50, 6, generator=generator), torch.randint(0, 2, (50,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("stop_after", range(4))
def test_resumed_training_ends_with_the_same_bits_when_cut_after_any_epoch(
    stop_after: int, optimizer: Optimizer, make_task: MakeTask, tmp_path: Path
) -> None:
    model, task = Hidden().eval(), make_task(train=shuffled(), validation=shuffled())

    def run(callback: Learned, file: str) -> dict[str, bytes]:
        torch.manual_seed(random.randrange(10**6))
        rest: dict[str, Any] = {"optimizer": optimizer, "schedule": Cosine(warmup_epochs=1), "patience": 9}
        trained = fit(model, task, epochs=4, lr=0.05, callbacks=[callback], checkpoint=tmp_path / file, seed=11, **rest)
        return bits(trained)

    whole = Learned()
    expected = run(whole, "whole.pt")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run(Learned(stop_after), "cut.pt")
    found = (tmp_path / "cut.pt").exists()
    assert found == (stop_after > 0)
    resumed = Learned()
    assert run(resumed, "cut.pt") == expected
    assert (resumed.steps, resumed.scale.item()) == (whole.steps, whole.scale.item())
    assert not list(tmp_path.glob("*.part"))


def test_early_stop_holds_when_a_stopped_training_is_resumed(make_task: MakeTask, tmp_path: Path) -> None:
    model = nn.Linear(6, 2)
    task = make_task(metrics=lambda output, target: 0.0)

    def run(callback: Learned) -> dict[str, bytes]:
        return bits(
            fit(
                model,
                task,
                epochs=9,
                lr=0.05,
                optimizer=SGD(),
                schedule=Cosine(),
                patience=2,
                callbacks=[callback],
                checkpoint=tmp_path / "a.pt",
            )
        )

    first, again = Learned(), Learned()
    assert run(first) == run(again)
    assert first.steps == again.steps == 3 * 5


def test_checkpoint_is_kept_when_the_user_presses_ctrl_c(make_task: MakeTask, tmp_path: Path) -> None:
    rest: dict[str, Any] = {"epochs": 3, "lr": 0.05, "optimizer": SGD(), "schedule": Cosine()}
    file, task, model = tmp_path / "a.pt", make_task(), nn.Linear(6, 2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, task, callbacks=[Learned(1, KeyboardInterrupt)], checkpoint=file, **rest)
    saved = Checkpoint.load(file)
    assert saved is not None
    assert saved.epoch == 1
    assert len(saved.losses) == 1
    resumed = fit(model, task, callbacks=[Learned()], checkpoint=file, **rest)
    assert bits(resumed) == bits(fit(model, task, callbacks=[Learned()], **rest))


def test_finished_training_is_not_repeated_when_asked_again(model: nn.Module, make_context: MakeContext) -> None:
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(output, target)

    ctx, step = make_context(loss=loss), Train(epochs=2)
    plan = step.plan(model, ctx)
    assert bits(step.apply(model, plan, ctx)) == bits(step.apply(model, plan, ctx))
    assert len(calls) == 2 * 5


@pytest.mark.parametrize(
    "other",
    [
        {"step": Train(epochs=1, lr=0.02)},
        {"seed": 1},
        {"model": 1},
        {"train": 9},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_checkpoint_of_another_training_is_not_taken_up_when_something_differs(
    other: dict[str, Any], model: nn.Module, make_context: MakeContext, tmp_path: Path
) -> None:
    first = make_context()
    step = Train(epochs=1, lr=0.01)
    step.apply(model, step.plan(model, first), first)
    changes: dict[str, Any] = {name: other[name] for name in ("seed", "loss") if name in other}
    if "train" in other:
        changes["train"] = [(x + 1, y) for x, y in first.task.train]
    if "model" in other:
        model[0].weight.detach().mul_(2)  # type: ignore[index,operator,union-attr]
    step = other.get("step", step)

    def run(work: Path) -> dict[str, bytes]:
        ctx = make_context(work=work, **changes)
        return bits(step.apply(model, step.plan(model, ctx), ctx))

    assert run(first.work) == run(tmp_path / "fresh")
    assert len(list(first.work.glob("train-*.pt"))) == 2


def test_fingerprint_stays_when_only_random_state_differs(make_context: MakeContext, model: nn.Module) -> None:
    ctx = make_context(train=shuffled())
    step = Train(epochs=1)
    for seed in range(2):
        torch.manual_seed(seed)
        step.apply(model, step.plan(model, ctx), ctx)
    assert len(list(ctx.work.glob("train-*.pt"))) == 1


def test_fingerprint_sees_every_tensor_when_one_bit_changes(make_task: MakeTask) -> None:
    model, task = Hidden(), make_task()
    names = [fingerprint(model, task, {}, 0)]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(-1)[-1] += 1
        names.append(fingerprint(model, task, {}, 0))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"not a checkpoint"], ids=["empty", "cut", "text"])
def test_a_damaged_checkpoint_is_named_when_read(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.pt cannot be read .*; delete it to train anew"):
        Checkpoint.load(file)


def test_a_checkpoint_is_refused_when_it_carries_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    file = tmp_path / "a.pt"
    torch.save({"format": 1, "model": Trap()}, file)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Checkpoint.load(file)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_format_is_refused_when_read(tmp_path: Path) -> None:
    torch.save({"format": 0}, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="is not of format 1"):
        Checkpoint.load(tmp_path / "a.pt")


def test_the_last_checkpoint_is_kept_when_the_disk_is_full(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    Checkpoint(epoch=1).save(file)
    before = file.read_bytes()
    (tmp_path / "a.pt.part").symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"epoch 2 cannot be written .*the last checkpoint is kept"):
        Checkpoint(epoch=2, model={"x": torch.zeros(10)}).save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_is_written_whole_when_ctrl_c_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.pt"
    monkeypatch.setattr(os, "fsync", lambda number: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background runs ignore Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            Checkpoint(epoch=2, model={"x": torch.zeros(10)}).save(file)
    finally:
        signal.signal(signal.SIGINT, before)
    found = Checkpoint.load(file)
    assert found is not None
    assert found.epoch == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def train_many_epochs(work: Path) -> dict[str, bytes]:
    """A training of 200 quick epochs; run in a process of its own too."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Hidden().eval()
    task = Task(example_inputs=torch.zeros(1, 6), train=shuffled(), validation=shuffled(), loss=nn.CrossEntropyLoss())
    ctx = Context(task=task, target=None, work=work, dense=model, seed=4)  # type: ignore[arg-type]
    step = Train(epochs=200, lr=0.05, patience=200)
    return bits(step.apply(model, step.plan(model, ctx), ctx))


@pytest.mark.slow
def test_resumed_training_ends_with_the_same_bits_when_killed_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(time.time_ns())
    delays = [moments.uniform(0, 0.4) for _ in range(2)]
    program = "import pathlib, runpy, sys; runpy.run_path(sys.argv[1])['train_many_epochs'](pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", program, __file__, str(tmp_path / "cut")]
    reached = []
    for delay in delays:
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        start = time.monotonic()
        before = newest(tmp_path / "cut")
        while newest(tmp_path / "cut") == before and process.poll() is None:
            assert time.monotonic() - start < 120, "the training never wrote a checkpoint"
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        (file,) = (tmp_path / "cut").glob("train-*.pt")
        saved = Checkpoint.load(file)
        assert saved is not None
        reached.append(saved.epoch)
    assert 0 < reached[0] < reached[1] < 200, (delays, reached)
    assert train_many_epochs(tmp_path / "cut") == train_many_epochs(tmp_path / "whole"), (delays, reached)


def newest(folder: Path) -> int:
    """When a checkpoint was last replaced, in nanoseconds; 0 where there is none."""
    times = [0]
    for file in folder.glob("train-*.pt"):
        with contextlib.suppress(FileNotFoundError):
            times.append(file.stat().st_mtime_ns)
    return max(times)
