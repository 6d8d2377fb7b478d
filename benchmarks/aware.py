"""Quantization-aware training against post-training quantization, at 8 and 4 bits, on Fashion-MNIST and CIFAR-10.

    python benchmarks/aware.py [--set fashion | cifar] [--data FOLDER] --teachers FOLDER [--jobs 8] [--device cuda]

The data are those of `distillation.py`, whose CIFAR-10 teacher, in --teachers, is the float network there; that of
Fashion-MNIST is the zoo's `fashion_cnn`, trained here, one for each seed. Settings are chosen on validation, with a
seed of their own; accuracy on test is of the quantized program. Rows are kept, so a stopped run goes on.
`--samples 500 --epochs 1 --quick` is a trial of the whole script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distillation as base
import torch
from harness import RESULTS, Results
from safetensors.torch import load_file, save_file
from torch import nn

import pared
from pared.quantize.formats import Activations, Weights
from pared.step import Context
from pared.targets import find_target
from pared.train.optimizers import SGD
from pared.train.schedules import Cosine
from pared.zoo.fashion_cnn import fashion_cnn

ISSUE = 4
EPOCHS = {"fashion": 4, "cifar": 4}
FLOAT_EPOCHS = 8
BITS = (8, 4)
TUNING_SEED = 100
KEYS = ("phase", "set", "bits", "method", "seed", "setting")
GRID: dict[str, list[dict[str, Any]]] = {
    "fashion": [
        {"lr": lr, "scales": scales, "freeze_after": after}
        for lr, after in ((0.003, 0.25), (0.01, 0.25), (0.03, 0.25), (0.03, 0.75))
        for scales in ("learned", "follow")
    ],
    "cifar": [
        {"lr": lr, "scales": scales, "freeze_after": 0.75}
        for lr, scales in ((0.01, "learned"), (0.03, "learned"), (0.01, "follow"))
    ],
}


def float_file(name: str, seed: int) -> Path:
    folder = base.OPTIONS.teachers
    return folder / ("distillation-cifar.safetensors" if name == "cifar" else f"aware-fashion-{seed}.safetensors")


def float_model(name: str, seed: int) -> nn.Module:
    """The trained float network of a seed."""
    model = base.cifar_teacher() if name == "cifar" else fashion_cnn()
    model.load_state_dict(load_file(float_file(name, seed)))
    return model.eval()


def train_float(data: base.Data, seed: int) -> nn.Module:
    """Train `fashion_cnn`, and keep it."""
    epochs = base.OPTIONS.epochs or FLOAT_EPOCHS
    fresh = base.fresh_of(fashion_cnn, seed)
    model = base.trained(fresh, data.task(data.form["shift"]), epochs, 0.2, seed, None, nn.Identity())
    float_file("fashion", seed).parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), float_file("fashion", seed))
    return model


def step_of(job: Mapping[str, Any], epochs: int) -> Any:
    """The step that makes the program of a job."""
    bits, setting = job["bits"], json.loads(job["setting"])
    if job["method"] == "post-training":
        ranges = "minmax" if bits == 8 else "mse"
        return pared.QuantizeStatic(
            ranges=ranges, weights=Weights(bits=bits, cpu="vnni"), activations=Activations(bits=bits)
        )
    aware = pared.QuantizeAware(
        weight_bits=bits,
        activation_bits=bits,
        scales=setting["scales"],
        freeze_after=setting["freeze_after"],
        cpu="vnni",
    )
    optimizer = SGD(momentum=0.9, nesterov=True, weight_decay=1e-4)
    return pared.Train(epochs=epochs, lr=setting["lr"], optimizer=optimizer, schedule=Cosine(), during=[aware])


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """One job: make a program and judge it. Returns the row."""
    start = time.perf_counter()
    name, seed = job["set"], job["seed"]
    data = base.data_of(name)
    if job["method"] == "float":
        model = train_float(data, seed) if name == "fashion" else float_model(name, seed)
    else:
        model = float_model(name, seed)
        task = data.task(data.form["shift"])
        images = data.train[0][:512].float().cpu() / 255
        mean, deviation = (part.cpu() for part in data.statistics)
        task = pared.Task(
            example_inputs=task.example_inputs,
            train=task.train,
            loss=task.loss,
            calibration=list(((images - mean) / deviation).split(64)),
        )
        step = step_of(job, base.OPTIONS.epochs or EPOCHS[name])
        with tempfile.TemporaryDirectory() as work:
            ctx = Context(task=task, target=find_target("onnxruntime"), work=Path(work), dense=model, seed=seed)
            model = step.apply(model, step.plan(model, ctx), ctx)
    row = {key: job[key] for key in KEYS}
    row |= {"accuracy": accuracy(model, data, job["role"]), "role": job["role"]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return row | {"seconds": round(time.perf_counter() - start, 1), "device": device}


@torch.no_grad()
def accuracy(model: nn.Module, data: base.Data, role: str) -> float:
    """Percent of right answers; of a program, whose modes are fixed, too."""
    if not isinstance(model, torch.fx.GraphModule):
        return data.accuracy(model, role)
    images, labels = getattr(data, role)
    mean, deviation = data.statistics
    model.to(images.device)
    hits = sum(
        int((model((x.float() / 255 - mean) / deviation).argmax(1) == y).sum())
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return 100 * hits / len(labels)


def job_of(phase: str, name: str, method: str, bits: int, seed: int, setting: Mapping[str, Any]) -> dict[str, Any]:
    role = "validation" if phase == "tune" else "test"
    given = {"phase": phase, "set": name, "method": method, "bits": bits, "seed": seed}
    return given | {"setting": json.dumps(setting), "role": role}


def best(results: Results, name: str, bits: int) -> dict[str, Any]:
    """The setting that is best on validation."""
    rows = [row for row in results.rows if (row["phase"], row["set"], row["bits"]) == ("tune", name, bits)]
    found: dict[str, Any] = json.loads(max(rows, key=lambda row: row["accuracy"])["setting"])
    return found


def values(results: Results, name: str, method: str, bits: int) -> list[float]:
    """Test accuracies, by seed."""
    rows = [
        row
        for row in results.rows
        if (row["phase"], row["set"], row["method"], row["bits"]) == ("final", name, method, bits)
    ]
    return [row["accuracy"] for row in sorted(rows, key=lambda row: row["seed"])]


def claims(results: Results, names: list[str]) -> None:
    """What the rows say of the issue's lines."""
    results.claims = []
    for name in names:
        exact = statistics.fmean(values(results, name, "float", 32))
        eight, after = (statistics.fmean(values(results, name, kind, 8)) for kind in ("aware", "post-training"))
        what = f"{name}, 8 bits: points that training with quantization is below post-training quantization"
        results.claim(ISSUE, what, after - eight, "<=", 0.1)
        four, lost = (statistics.fmean(values(results, name, kind, 4)) for kind in ("aware", "post-training"))
        results.claim(ISSUE, f"{name}, 4 bits: points lost after post-training quantization", exact - lost, ">=", 3.0)
        results.claim(ISSUE, f"{name}, 4 bits: points lost after training with quantization", exact - four, "<=", 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("fashion", "cifar"), default="fashion")
    parser.add_argument("--data", type=Path, default=base.FOLDER)
    parser.add_argument("--batch", type=int, default=base.BATCH)
    parser.add_argument("--teachers", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=0, help="only so many of each part")
    parser.add_argument("--epochs", type=int, default=0, help="instead of the usual ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two settings; rows go to trial/")
    parser.add_argument("--claims", action="store_true", help="only say what the rows are worth")
    options = parser.parse_args()
    options.precision, options.teacher_width = "32", 0  # what `distillation` reads
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    results = Results("aware", folder=options.out / "trial" if options.quick else options.out)
    if results.path.exists():
        # The rows so far, whatever machine they came from: a row says its device.
        results.rows = json.loads(results.path.read_text(encoding="utf8"))["rows"]
    name, seeds = options.set, range(options.seeds)
    if not options.claims:
        floats = [job_of("tune", name, "float", 32, TUNING_SEED, {})] if name == "fashion" else []
        floats += [job_of("final", name, "float", 32, seed, {}) for seed in seeds]
        base.work_through(floats, results, options, do=run, keys=KEYS)
        grid = GRID[name][: 2 if options.quick else None]
        tuned = [job_of("tune", name, "aware", bits, TUNING_SEED, setting) for bits in BITS for setting in grid]
        base.work_through(tuned, results, options, do=run, keys=KEYS)
        last = [job_of("final", name, "aware", b, s, best(results, name, b)) for b in BITS for s in seeds]
        last += [job_of("final", name, "post-training", b, s, {}) for b in BITS for s in seeds]
        base.work_through(last, results, options, do=run, keys=KEYS)
    claims(results, [n for n in ("fashion", "cifar") if values(results, n, "post-training", 4)])


if __name__ == "__main__":
    main()
