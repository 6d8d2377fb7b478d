"""Training on a GPU, in each precision and strategy, beside the same training on the CPU. Needs one GPU, and nothing
but what pared itself is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from harness import Results
from torch import nn

from pared.data import fashion_mnist
from pared.task import Task
from pared.train.callbacks import Callback
from pared.train.checkpoint import Checkpoint
from pared.train.hardware import Hardware
from pared.train.loop import fit
from pared.train.optimizers import AdamW
from pared.train.schedules import Cosine

EPOCHS, BATCH = 6, 126  # an even batch, whose parts are equal
SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS,
    "patience": EPOCHS,
    "lr": 1e-3,
    "optimizer": AdamW(),
    "schedule": Cosine(),
    "clip_norm": 5.0,
    "ema": 0.9,
}
CPU = Hardware(accelerator="cpu")
# How far the losses may lie from the CPU's: float32 differs in the order of sums; halves by 2^-9 and 2^-12 a number.
KINDS = {
    "float32": (Hardware(accelerator="cuda"), 1e-3),
    "bf16": (Hardware(accelerator="cuda", precision="bf16"), 3e-2),
    "fp16": (Hardware(accelerator="cuda", precision="fp16"), 1e-2),
    "accumulated": (Hardware(accelerator="cuda", accumulate=2), 1e-3),
    "ddp, one process": (Hardware(accelerator="cuda", strategy="ddp"), 1e-3),
    "ddp, one process, fp16": (Hardware(accelerator="cuda", strategy="ddp", precision="fp16"), 1e-2),
    "fsdp, one process": (Hardware(accelerator="cuda", strategy="fsdp"), 1e-3),
    "fsdp, one process, bf16": (Hardware(accelerator="cuda", strategy="fsdp", precision="bf16"), 3e-2),
}
# Only on a machine that has them.
SEVERAL = {
    "ddp, two processes": (Hardware(accelerator="cuda", devices=2), 1e-3),
    "fsdp, two processes": (Hardware(accelerator="cuda", devices=2, strategy="fsdp"), 1e-3),
}


def net() -> nn.Module:
    """Linear layers and a norm: on no device are their products rounded to fewer bits unasked."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10)).eval()


def task(device: str = "cpu", size: int = BATCH) -> Task:
    """Some of the embedded images, in batches, on a device."""
    splits = fashion_mnist.load()
    parts: dict[str, Any] = {}
    for role, pair in (("train", splits.train), ("validation", splits.validation)):
        images, labels = (torch.from_numpy(array[: 16 * BATCH].copy()).to(device) for array in pair)
        parts[role] = list(zip(images.split(size), labels.split(size), strict=True))
    return Task(example_inputs=parts["train"][0][0][:1], loss=nn.CrossEntropyLoss(), **parts)


class Stop(Callback):
    """Ends a training before an epoch is whole, as its user might."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if epoch == self.at:
            raise InterruptedError("stopped on purpose")


def trained(file: Path, hardware: Hardware, data: Task, stop: int | None = None) -> Checkpoint:
    """The checkpoint that a training leaves, whole or stopped in an epoch."""
    with contextlib.suppress(InterruptedError):
        fit(net(), data, hardware=hardware, checkpoint=file, callbacks=[Stop(stop)], **SETTINGS)
    saved = Checkpoint.load(file)
    if saved is None:
        raise SystemExit(f"{file.name} was not written")
    return saved


def apart(one: Checkpoint, other: Checkpoint) -> float:
    """The largest difference of losses and validation figures of two trainings."""
    pairs = [*zip(one.losses, other.losses, strict=True), *zip(one.values, other.values, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def measure(results: Results, folder: Path, cpu: Checkpoint, name: str, hardware: Hardware, most: float) -> None:
    """One kind of training: its losses, and whether it goes on exactly after a stop."""
    data = task(size=BATCH // hardware.accumulate)
    row: dict[str, Any] = {"kind": name, "most": most, "error": "", "apart": None, "resumed_apart": None}
    try:
        whole = trained(folder / f"{name}, whole.pt", hardware, data)
        stopped = trained(folder / f"{name}, cut.pt", hardware, data, EPOCHS // 2)
        resumed = trained(folder / f"{name}, cut.pt", hardware, data)
    except Exception as error:  # noqa: BLE001 - a kind that fails is a row, and the others are still tried
        results.add(row | {"error": f"{type(error).__name__}: {error}"[:500]})
        sys.stderr.write("".join(traceback.format_exception(error)))
        return
    row |= {"apart": apart(cpu, whole), "resumed_apart": apart(whole, resumed), "stopped_at": stopped.epoch}
    results.add(row | {"losses": whole.losses, "values": whole.values})


def places(results: Results, device: str) -> None:
    """Models and data that lie on the GPU: where they train, and where they come back to."""
    for where_model, where_data in ((device, "cpu"), (device, device), ("cpu", device)):
        model = fit(net().to(where_model), task(where_data), **SETTINGS)
        found = {tensor.device.type for tensor in model.state_dict().values()}
        results.add({"model_on": where_model, "data_on": where_data, "came_back_to": ", ".join(sorted(found))})


def main() -> None:
    rehearsal = "--rehearse" in sys.argv  # the script itself, tried where there is no GPU
    if not rehearsal and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --rehearse tries this script on the CPU and keeps nothing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = Results("gpu_checks", fresh=True, **({"folder": folder} if rehearsal else {}))
        results.add({"gpu": "none" if rehearsal else torch.cuda.get_device_name(), "torch": torch.__version__})
        cpu = trained(folder / "cpu.pt", CPU, task())
        results.add({"kind": "cpu", "losses": cpu.losses, "values": cpu.values})
        several = SEVERAL if torch.cuda.device_count() > 1 else {}
        for kind, (hardware, most) in (KINDS | several).items():
            used = dataclasses.replace(hardware, accelerator="cpu") if rehearsal and not hardware.sharded else hardware
            measure(results, folder, cpu, kind, used, most)
        places(results, "cpu" if rehearsal else "cuda")
    rows = [row for row in results.rows if row.get("kind", "cpu") != "cpu"]
    done = [row for row in rows if not row["error"]]
    results.claim(4, "kinds of training on a GPU that ran, of those tried", len(done), ">=", len(rows))
    close = sum(row["apart"] <= row["most"] for row in done)
    results.claim(4, "of these, as close to the CPU's losses as their precision allows", close, ">=", len(rows))
    exact = sum(row["resumed_apart"] == 0 for row in done)
    results.claim(4, "of these, ended with the same losses after a stop and a resumption", exact, ">=", len(rows))
    back = sum(row["came_back_to"] == row["model_on"] for row in results.rows if "model_on" in row)
    results.claim(4, "models that came back to where they were given, of 3", back, ">=", 3)


if __name__ == "__main__":
    main()
