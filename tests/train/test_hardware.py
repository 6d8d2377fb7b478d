"""Accumulation, clipping and precision against plain PyTorch; what hardware is refused; GPUs where there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pared.errors import PlanError, SettingError, TrainError, UsageError
from pared.step import Context, Edit, Plan
from pared.task import Task
from pared.train.callbacks import Callback
from pared.train.checkpoint import Checkpoint
from pared.train.hardware import Hardware
from pared.train.loop import fit
from pared.train.optimizers import SGD
from pared.train.schedules import Constant, Cosine
from pared.train.step import Train

MakeTask = Callable[..., Task]
MakeContext = Callable[..., Context]
USUAL: dict[str, Any] = {"lr": 0.1, "optimizer": SGD(), "schedule": Constant()}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in model.state_dict().items()}


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def uneven(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 2, (n,), generator=generator)) for n in sizes]


def test_accumulated_batches_equal_one_big_batch_when_sizes_differ(make_task: MakeTask) -> None:
    small = uneven((16, 4, 7, 16, 1, 9, 5))
    big = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 3], strict=True)) for i in (0, 3, 6)]
    told: list[tuple[int, int]] = []
    settings = USUAL | {"schedule": Cosine(warmup_epochs=1), "epochs": 4, "clip_norm": 0.5}
    found = fit(
        plain_net(),
        make_task(train=small),
        hardware=Hardware(accumulate=3),
        progress=lambda what, done, total, note="": told.append((done, total)),
        **settings,
    )
    expected = fit(plain_net(), make_task(train=big), **settings)
    for here, there in zip(found.parameters(), expected.parameters(), strict=True):
        # Sums of a batch in another order: a few units in the last place of float32, over 12 steps.
        assert torch.allclose(here, there, atol=1e-6)
    assert told == [*((step, 12) for step in range(1, 13)), (12, 12)]


def test_clipping_equals_pytorchs_bitwise_when_gradients_are_long(make_task: MakeTask) -> None:
    task, model = make_task(), plain_net()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in task.train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.01) > 0.01
        optimizer.step()
    assert bits(fit(model, task, epochs=1, clip_norm=0.01, **USUAL)) == bits(plain)


def test_bf16_equals_plain_autocast_bitwise_when_on_the_cpu(make_task: MakeTask) -> None:
    task, model, dtypes = make_task(), plain_net(), []

    class Inside(Callback):
        def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
            dtypes.append((outputs @ outputs.T).dtype)
            return current

    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in task.train:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
    hardware = Hardware(precision="bf16", accelerator="cpu")
    trained = fit(model, task, epochs=1, hardware=hardware, callbacks=[Inside()], **USUAL)
    assert bits(trained) == bits(plain)
    assert set(dtypes) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


class Overflow(Callback):
    """Makes the loss so large, once, that its gradient leaves the range of float16."""

    def __init__(self, at: int, by: float) -> None:
        self.at, self.by, self.calls = at, by, 0
        self.moved: list[bool] = []

    def loss(self, current: Tensor, batch: Any, outputs: Any) -> Tensor:
        self.calls += 1
        return current * self.by if self.calls - 1 == self.at else current

    def on_ready(self, model: nn.Module) -> None:
        self.last = model.get_parameter("0.weight").detach().clone()

    def after_step(self, model: nn.Module) -> None:
        weight = model.get_parameter("0.weight").detach()
        self.moved.append(not torch.equal(weight, self.last))
        self.last = weight.clone()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_fp16_leaves_a_step_out_when_a_gradient_overflows(
    clip_norm: float | None, make_task: MakeTask, tmp_path: Path
) -> None:
    overflow, file = Overflow(at=2, by=1e4), tmp_path / "a.pt"
    hardware = Hardware(precision="fp16", accelerator="cpu")
    trained = fit(
        plain_net(),
        make_task(),
        epochs=1,
        hardware=hardware,
        callbacks=[overflow],
        checkpoint=file,
        clip_norm=clip_norm,
        **USUAL,
    )
    assert overflow.moved == [True, True, False, True, True]
    saved = Checkpoint.load(file)
    assert saved is not None
    assert saved.scaler["scale"] == 2**15  # starts at 2^16, and is halved by an overflow
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trained.parameters())


def test_fp16_stops_when_the_loss_itself_is_not_finite(make_task: MakeTask) -> None:
    hardware = Hardware(precision="fp16", accelerator="cpu")
    with pytest.raises(TrainError, match="epoch 1, batch 1: the loss is inf"):
        fit(plain_net(), make_task(), epochs=1, hardware=hardware, callbacks=[Overflow(1, float("inf"))], **USUAL)


@pytest.mark.parametrize("precision", ["32", "fp16"])
def test_resumed_training_ends_with_the_same_bits_when_everything_is_asked_for(
    precision: str, model: nn.Module, make_task: MakeTask, tmp_path: Path
) -> None:
    class Stop(Overflow):
        def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
            if self.by == 0 and epoch == 1:
                raise RuntimeError("stopped by the test")

    def run(file: str, by: float, at: int = 1) -> dict[str, bytes]:
        hardware = Hardware(precision=precision, accelerator="cpu", accumulate=2)
        settings = USUAL | {"epochs": 3, "ema": 0.9, "clip_norm": 1.0, "hardware": hardware}
        checkpoint = tmp_path / file
        return bits(fit(model, make_task(), callbacks=[Stop(at, by)], checkpoint=checkpoint, **settings))

    expected = run("whole.pt", 1.0)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run("cut.pt", 0.0, at=99)
    assert run("cut.pt", 1.0) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"devices": 0}, "devices"),
        ({"accumulate": 0}, "accumulate"),
        ({"precision": "16"}, "precision"),
        ({"strategy": "dp"}, "strategy"),
        ({"strategy": "fsdp", "accelerator": "cpu"}, "fsdp needs GPUs"),
        ({"device": 2}, "did you mean 'devices'"),
    ],
)
def test_hardware_is_refused_when_it_makes_no_sense(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Hardware(**given)


@pytest.mark.parametrize("given", [{"ema": 1.0}, {"ema": 0.0}, {"clip_norm": 0.0}, {"hardware": {"devices": 0}}])
def test_settings_are_refused_when_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(given))):
        Train(**given)


def test_hardware_reads_from_plain_data_when_a_recipe_gives_it() -> None:
    assert Train(hardware={"devices": 2, "precision": "bf16"}).hardware == Hardware(devices=2, precision="bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("hardware", [Hardware(accelerator="cuda"), Hardware(strategy="fsdp")], ids=["cuda", "fsdp"])
def test_plan_refuses_when_there_is_no_gpu(hardware: Hardware, model: nn.Module, make_context: MakeContext) -> None:
    with pytest.raises(UsageError, match="needs a GPU, and PyTorch finds none"):
        Train(hardware=hardware).plan(model, make_context())


def test_plan_refuses_when_there_are_too_few_gpus(
    model: nn.Module, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="more GPUs than the 1 of this machine"):
        Train(hardware=Hardware(devices=2)).plan(model, make_context())


def test_plan_refuses_what_looks_at_whole_parameters_when_they_are_sharded(
    model: nn.Module, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    step = Train(hardware=Hardware(strategy="fsdp"))
    assert step.plan(model, make_context()).facts["keep_zeros"] == []
    history = (Plan(step="PruneWeights", edits=(Edit("mask", "0", {"tensor": "weight"}),)),)
    with pytest.raises(PlanError, match="zeros to keep look at whole parameters"):
        step.plan(model, make_context(history=history))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("data_on_gpu", [False, True])
@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_model_comes_back_to_its_gpu_when_it_was_given_there(
    accelerator: str, data_on_gpu: bool, model: nn.Module, make_context: MakeContext
) -> None:
    def placed(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(x.cuda(), y.cuda()) for x, y in batches] if data_on_gpu else batches

    given = make_context().task
    ctx = make_context(train=placed(given.train), validation=placed(given.validation))
    step = Train(epochs=2, lr=0.1, patience=2, ema=0.5, hardware=Hardware(accelerator=accelerator))
    model = model.cuda()
    trained = step.apply(model, step.plan(model, ctx), ctx)
    assert {tensor.device.type for tensor in trained.state_dict().values()} == {"cuda"}
    assert bits(trained) != bits(model)
