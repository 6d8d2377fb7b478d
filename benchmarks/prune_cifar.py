"""ResNet-20 on CIFAR-10, its channels pruned to less than half the multiply-accumulates: accuracy, and measured speed.

    python benchmarks/prune_cifar.py --data FOLDER --work FOLDER [--seeds 2] [--jobs 4]

--data holds train.parquet and test.parquet (Hugging Face layout, read with PIL and pyarrow) or cifar10.npz, which is
left in --work by the first process that decodes them. --work keeps the networks, out of git. Phases, each resumable,
rows are kept:

    dense     trains the network, one of each seed
    all       every phase

Validation is 5,000 images split off the official training data; test is read once for each row. All trainings are
`pared.Train`, with the data whole on the device. `--device cpu` hides the GPU; jobs share one.
`--samples 1000 --epochs 1 --quick` is a trial of the whole script on a CPU, whose rows go to a folder of their own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import distillation
import torch
from distillation import Data, Residual, block
from harness import RESULTS, Results
from safetensors.torch import save_file
from torch import Tensor, nn

import pared
from pared.graph.counts import count, totals
from pared.step import Context
from pared.train.hardware import Hardware
from pared.train.optimizers import SGD
from pared.train.schedules import Cosine

NAME, ISSUE = "prune_cifar", 5
WIDTHS = (16, 32, 64)
DENSE_EPOCHS, DENSE_LR = 100, 0.1
KEYS = ("phase", "kind", "setting", "seed")


def resnet20(widths: Sequence[int] = WIDTHS) -> nn.Module:
    """20 layers for images of 32 x 32, with projections where the width changes: 272 thousand parameters, 41 M MACs.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2. Deviation: projections (their option B), not zeros.
    """
    a, b, c = widths
    forms = [(a, a, 1)] * 3 + [(a, b, 2), (b, b, 1), (b, b, 1)] + [(b, c, 2), (c, c, 1), (c, c, 1)]
    stages = [Residual(*form) for form in forms]
    return nn.Sequential(*block(3, a), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def example() -> Tensor:
    return torch.zeros(2, 3, 32, 32)


# --- trainings, each a job of a worker process -------------------------------------------------------------------

OPTIONS: argparse.Namespace
LOADED: list[Data] = []
POOL: list[concurrent.futures.ProcessPoolExecutor] = []


def set_up(options: argparse.Namespace) -> None:
    """What a worker process does once."""
    global OPTIONS
    OPTIONS = options
    distillation.set_up(options)


def data() -> Data:
    if not LOADED:
        LOADED.append(Data("cifar", OPTIONS))
    return LOADED[0]


def trained(model: nn.Module, epochs: int, lr: float, seed: int, during: tuple[Any, ...] = ()) -> nn.Module:
    """The model after `pared.Train`: images moved by up to 4 pixels and mirrored, half a cosine down to 0."""
    optimizer = SGD(momentum=0.9, nesterov=True, weight_decay=5e-4)
    hardware = Hardware(precision=OPTIONS.precision)
    schedule = Cosine(warmup_epochs=0.5)
    step = pared.Train(epochs=epochs, lr=lr, optimizer=optimizer, schedule=schedule, hardware=hardware, during=during)
    with tempfile.TemporaryDirectory() as work:
        ctx = Context(task=data().task(4), target=None, work=Path(work), dense=model, seed=seed)  # type: ignore[arg-type]
        return step.apply(model, step.plan(model, ctx), ctx)


def weights_file(kind: str, seed: int) -> Path:
    return Path(OPTIONS.work) / f"{kind}-{seed}.safetensors"


def fresh(seed: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
    torch.manual_seed(seed)
    return resnet20(widths)


def run_dense(job: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    epochs = OPTIONS.epochs or OPTIONS.dense_epochs
    return trained(fresh(job["seed"]), epochs, job["lr"], job["seed"]), {"epochs": epochs}


KINDS = {"dense": run_dense}


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """One job: a network made, saved and judged. Returns the row."""
    start = time.perf_counter()
    model, facts = KINDS[job["phase"]](job)
    model = model.to("cpu").eval()
    save_file(model.state_dict(), weights_file(job["kind"], job["seed"]))
    counted = totals(count(model, (example()[:1],)))
    accuracy = {role: data().accuracy(model, role) for role in ("validation", "test")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **{key: job[key] for key in (*KEYS, "lr")},
        "params": counted.params,
        "macs": counted.macs,
        **accuracy,
        **facts,
        "seconds": round(time.perf_counter() - start, 1),
        "device": device,
    }


def work_through(jobs: list[dict[str, Any]], results: Results, options: argparse.Namespace) -> None:
    """Run the jobs that no row answers yet, several processes at once."""
    left = [job for job in jobs if results.done(**{key: job[key] for key in KEYS}) is None]
    if not left:
        return
    if options.jobs == 1:
        set_up(options)
        for job in left:
            results.add(run(job))
        return
    if not POOL:
        spawn = multiprocessing.get_context("spawn")
        rest: dict[str, Any] = {"mp_context": spawn, "initializer": set_up, "initargs": (options,)}
        POOL.append(concurrent.futures.ProcessPoolExecutor(options.jobs, **rest))
    for done in concurrent.futures.as_completed([POOL[0].submit(run, job) for job in left]):
        results.add(done.result())


# --- phases ------------------------------------------------------------------------------------------------------


def job_of(phase: str, kind: str, seed: int, lr: float, setting: str = "") -> dict[str, Any]:
    return {"phase": phase, "kind": kind, "setting": setting, "seed": seed, "lr": lr}


def dense(results: Results, options: argparse.Namespace) -> None:
    jobs = [job_of("dense", "dense", seed, options.dense_lr) for seed in range(options.seeds)]
    work_through(jobs, results, options)


PHASES = {"dense": dense}


def read(options: argparse.Namespace) -> Results:
    """The rows so far, whatever machine they came from: a row says its device, and claims are made of rows."""
    folder = options.out / "trial" if options.quick else options.out
    results = Results(NAME, fresh=options.fresh, folder=folder)
    if results.path.exists() and not options.fresh:
        stored = json.loads(results.path.read_text(encoding="utf8"))
        results.rows, results.environment = stored["rows"], stored["environment"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("all", *PHASES), default="all")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "prune_cifar")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--dense-epochs", type=int, default=DENSE_EPOCHS)
    parser.add_argument("--dense-lr", type=float, default=DENSE_LR)
    parser.add_argument("--samples", type=int, default=0, help="only so many of each part")
    parser.add_argument("--epochs", type=int, default=0, help="instead of the usual ones, in every training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="rows go to trial/")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.teachers = options.work  # where `Data` leaves the decoded images
    options.work.mkdir(parents=True, exist_ok=True)
    results = read(options)
    for phase in PHASES if options.phase == "all" else (options.phase,):
        PHASES[phase](results, options)
    for pool in POOL:
        pool.shutdown()


if __name__ == "__main__":
    main()
