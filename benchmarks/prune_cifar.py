"""ResNet-20 on CIFAR-10, its channels pruned to less than half the multiply-accumulates: accuracy, and measured speed.

    python benchmarks/prune_cifar.py --data FOLDER --work FOLDER [--seeds 4] [--jobs 8]

--data holds train.parquet and test.parquet (Hugging Face layout, read with PIL and pyarrow) or cifar10.npz, which is
left in --work by the first process that decodes them. --work keeps the networks and their plans, out of git. Phases,
each resumable, rows are kept:

    dense     trains the network, one of each seed
    tune      what to prune by, and the learning rate of fine-tuning, on validation, with the network of seed 0
    final     one-shot and iterative pruning, 15 epochs of fine-tuning in all, with and without the dense network as
              teacher; the dense network trained on for as long, in the same ways; the pruned network's widths
              trained anew, as long as the dense network and its fine-tuning (Liu et al. 2019, arXiv:1810.05270)
    criteria  every saliency criterion at the same budget, the same ratio in every layer, before and after fine-tuning
    latency   the networks of seed 0 in ONNX Runtime, in turn, and a latency budget kept; on the CPU of this machine
    claims    what the rows say of the issue's lines

Validation is 5,000 images split off the official training data; test is read once for each row, and in `tune` never.
All trainings are `pared.Train`, with the data whole on the device. `--device cpu` hides the GPU; jobs share one.
`--samples 1000 --epochs 1 --quick` is a trial of the whole script on a CPU, whose rows go to a folder of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import prune_jobs
import torch
from distillation import Data, resnet20
from harness import RESULTS, Results
from prune_jobs import (
    CRITERIA,
    LATENCY,
    TAUGHT,
    TUNING_SEED,
    best,
    channels_of,
    counted,
    go_through,
    job_of,
    part_way,
    planning_task,
    plans_of,
    pruned,
    save,
    set_up,
    work_through,
)
from torch import Tensor, nn

import pared
from pared.step import Context
from pared.targets import find_target
from pared.train.hardware import Hardware
from pared.train.optimizers import SGD
from pared.train.schedules import Cosine

NAME, ISSUE = "prune_cifar", 5
WIDTHS = (16, 32, 64)
DENSE_EPOCHS, DENSE_LR = 100, 0.1
# Which layers lose how much. ONNX Runtime pads channels to 8 or 16: a network with 0.7 of every width ran slower than
# the whole one, so widths are multiples of 8, and those of the second stage of 16. 0 makes the channels of the first
# stage, 6.body.3 those of the second, 9.body.3 those of the last; the others are inside one block.
SHAPES: dict[str, dict[str, Any]] = {
    "second stage": {
        "macs": 0.43,
        "widths": {"round_to": 8, "limits": {"0": (1, 1), "[678].body.[03]": (0.5, 0.5), "9.body.3": (1, 1)}},
    },
    "inside blocks": {
        "macs": 0.43,
        "widths": {
            "round_to": 8,
            "limits": {
                "0": (1, 1),
                "6.body.3": (1, 1),
                "9.body.3": (1, 1),
                "[345].body.0": (0.5, 0.5),
                "[678].body.0": (0.5, 0.5),
            },
        },
    },
}
BUDGET: dict[str, Any] = {"macs": 0.45, "widths": {"round_to": 8}}  # the criteria's, the same ratio everywhere
CHOICES: dict[str, dict[str, Any]] = {
    f"{shape}, {saliency}": {**settings, "saliency": saliency}
    for shape, settings in SHAPES.items()
    for saliency in ("l1", "taylor")
}
ROUNDS = {"one-shot": (15,), "iterative": (3, 3, 9)}  # epochs of fine-tuning after each prune
EPOCHS = 15


# --- networks ----------------------------------------------------------------------------------------------------


def example() -> Tensor:
    return torch.zeros(2, 3, 32, 32)


def fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet20(WIDTHS)


def load(kind: str, seed: int) -> nn.Module:
    return prune_jobs.load(kind, seed, resnet20)


# --- jobs of a worker process ------------------------------------------------------------------------------------


@functools.cache
def data() -> Data:
    return Data("cifar", prune_jobs.OPTIONS)


def trained(model: nn.Module, epochs: int, job: Mapping[str, Any], dense: nn.Module | None = None) -> nn.Module:
    """The model after `pared.Train`: images moved by up to 4 pixels and mirrored, half a cosine down to 0.

    Args:
        dense: The teacher, where the job's kind is a taught one.
    """
    taught = dense is not None and TAUGHT in job["kind"]
    step = pared.Train(
        epochs=prune_jobs.OPTIONS.epochs or epochs,
        lr=job["lr"],
        optimizer=SGD(momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=Cosine(warmup_epochs=0.5),
        hardware=Hardware(precision=prune_jobs.OPTIONS.precision),
        during=(pared.Distill(temperature=4, alpha=0.9),) if taught else (),
    )
    work = prune_jobs.OPTIONS.work / "trainings"  # a training that was cut off goes on from its last epoch
    work.mkdir(exist_ok=True)
    ctx = Context(
        task=data().task(4), target=find_target("onnxruntime"), work=work, dense=dense or model, seed=job["seed"]
    )
    model = model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU with bf16
    return step.apply(model, step.plan(model, ctx), ctx).to("cpu", memory_format=torch.contiguous_format).eval()


def run_dense(job: Mapping[str, Any]) -> dict[str, Any]:
    model = trained(fresh(job["seed"]), prune_jobs.OPTIONS.dense_epochs, job)
    save(model, job["kind"], job["seed"], (), WIDTHS)
    return {"epochs": spent([prune_jobs.OPTIONS.dense_epochs]), **judged(model)}


def spent(rounds: Sequence[int]) -> int:
    """Epochs of several trainings."""
    return sum(prune_jobs.OPTIONS.epochs or epochs for epochs in rounds)


def run_longer(job: Mapping[str, Any]) -> dict[str, Any]:
    """The dense network, trained on; taught by itself or not."""
    dense = load("dense", job["source"])
    epochs = prune_jobs.OPTIONS.tune_epochs if job["phase"] == "tune" else EPOCHS
    model = trained(dense, epochs, job, dense)
    if job["phase"] == "final":
        save(model, job["kind"], job["seed"], (), WIDTHS)
    return {"epochs": spent([epochs]), **judged(model, job)}


def run_small(job: Mapping[str, Any]) -> dict[str, Any]:
    """The one-shot network's widths with fresh weights: trained as the dense one was, then as a pruned one is."""
    dense, ending = load("dense", job["source"]), job["kind"].removeprefix("small")
    model = load("one-shot" + ending, job["seed"])
    torch.manual_seed(job["seed"])
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = trained(model, prune_jobs.OPTIONS.dense_epochs, {**job, "kind": "small", "lr": prune_jobs.OPTIONS.dense_lr})
    model = trained(model, EPOCHS, job, dense)
    save(model, job["kind"], job["seed"], plans_of("one-shot" + ending, job["seed"]), WIDTHS)
    return {"epochs": spent([prune_jobs.OPTIONS.dense_epochs, EPOCHS]), **judged(model, job)}


def run_pruned(job: Mapping[str, Any]) -> dict[str, Any]:
    """The dense network pruned and fine-tuned, in one round or several."""
    dense = load("dense", job["source"])
    model, plans, facts = dense, [], {}
    rounds = ROUNDS[job["kind"].split(",")[0]] if job["phase"] != "tune" else (prune_jobs.OPTIONS.tune_epochs,)
    for number, epochs in enumerate(rounds, 1):
        step = part_way(job["choice"], number, len(rounds))
        task = planning_task(data(), example())
        model, plan = pruned(step, model, task, dense, plans=plans, seed=job["seed"])
        plans.append(plan)
        if job["phase"] == "criteria":
            facts = {"before": data().accuracy(model, "test")}
        model = trained(model, epochs, job, dense)
    if job["phase"] == "final":
        save(model, job["kind"], job["seed"], plans, WIDTHS)
    return {
        "epochs": spent(rounds),
        **facts,
        **judged(model, job),
        "widths": channels_of(model),
    }


def judged(model: nn.Module, job: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Accuracy, and what there is to compute."""
    roles = ("validation",) if job and job["phase"] == "tune" else ("validation", "test")
    made = counted(model, example())
    return {"params": made.params, "macs": made.macs, **{role: data().accuracy(model, role) for role in roles}}


# --- phases ------------------------------------------------------------------------------------------------------


def train_dense(results: Results, options: argparse.Namespace) -> None:
    jobs = [job_of(run_dense, "dense", "dense", seed, options.dense_lr) for seed in range(options.dense_seeds)]
    work_through(jobs, results, options)


def tune(results: Results, options: argparse.Namespace) -> None:
    jobs = []
    for lr in options.rates:
        rest: dict[str, Any] = {"seed": TUNING_SEED, "lr": lr, "source": 0}
        if len(options.rates) > 1:
            jobs.append(job_of(run_longer, "tune", "dense, trained on", setting=f"lr {lr}", **rest))
        jobs += [
            job_of(run_pruned, "tune", "one-shot", setting=f"{name}, lr {lr}", choice=choice, **rest)
            for name, choice in CHOICES.items()
        ]
    work_through(jobs, results, options)


def final(results: Results, options: argparse.Namespace) -> None:
    name, lr = best(results, "one-shot", options.choice)
    rate = best(results, "dense, trained on")[1] if len(options.rates) > 1 else lr
    jobs = []
    for seed in range(options.seeds):
        source = seed % options.dense_seeds
        for ending in ("", f", {TAUGHT}"):
            jobs += [
                job_of(run_pruned, "final", kind + ending, seed, lr, choice=CHOICES[name], setting=name, source=source)
                for kind in ROUNDS
            ]
            jobs += [
                job_of(run_longer, "final", "dense, trained on" + ending, seed, rate, source=source),
                job_of(run_small, "final", "small" + ending, seed, rate, source=source),
            ]
    wanted = [job for job in jobs if not options.only or job["kind"] in options.only]
    small = [job for job in wanted if job["run"] is run_small]  # these take the widths of the others
    work_through([job for job in wanted if job not in small], results, options)
    work_through(small, results, options)


def criteria(results: Results, options: argparse.Namespace) -> None:
    lr = best(results, "one-shot")[1]
    jobs = [
        job_of(
            run_pruned,
            "criteria",
            "one-shot",
            seed,
            lr,
            setting=name,
            choice={**BUDGET, "saliency": name},
            source=seed % options.dense_seeds,
        )
        for seed in range(options.seeds)
        for name in CRITERIA
    ]
    work_through(jobs, results, options)


def latency(results: Results, options: argparse.Namespace) -> None:
    import prune_latency

    set_up(options)
    kinds = dict.fromkeys(row["kind"] for row in results.rows if row["phase"] in ("dense", "final"))
    results.rows = [row for row in results.rows if row["phase"] not in ("latency", "budget")]
    models = {kind: load(kind, 0) for kind in kinds}
    start = time.perf_counter()
    dense = models["dense"]
    step = pared.PruneChannels(latency=LATENCY, widths=BUDGET["widths"])
    model, plan = pruned(step, dense, planning_task(data(), example()), dense)
    made = counted(model, example())
    row = {"phase": "budget", "kind": "latency budget", "setting": str(LATENCY), "seed": 0, "latency": LATENCY}
    row |= {"facts": plan.facts.get("measured"), "macs": made.macs, "params": made.params}
    results.add(row | {"seconds": round(time.perf_counter() - start, 1)})
    models["latency budget"] = model
    for row in prune_latency.rows(models, example(), baseline="dense"):
        results.add({"phase": "latency", "setting": f"batch {row['batch']}", "seed": 0, **row})


# --- claims ------------------------------------------------------------------------------------------------------


def mean_of(results: Results, kind: str, column: str = "test") -> float:
    """The mean over the seeds."""
    rows = [row for row in results.rows if row["kind"] == kind and row["phase"] in ("dense", "final")]
    return statistics.fmean(row[column] for row in rows) if rows else float("nan")


def claims(results: Results, _options: argparse.Namespace) -> None:
    results.claims = []
    claim = functools.partial(results.claim, ISSUE)
    whole = mean_of(results, "dense")
    claim("accuracy of the dense ResNet-20, test, %, mean of the seeds", whole, ">=", 90.5)
    longer = [mean_of(results, f"dense, trained on{ending}") for ending in ("", f", {TAUGHT}")]
    better = max(whole, *(value for value in longer if value == value), whole)
    for ending in ("", f", {TAUGHT}"):
        for kind in (kind + ending for kind in ROUNDS):
            reached = mean_of(results, kind)
            if reached != reached:
                continue
            fewer = mean_of(results, "dense", "macs") / worst_macs(results, kind)
            claim(f"{kind}: times fewer multiply-accumulates", fewer, ">=", 2.0)
            small = mean_of(results, "small" + ending)
            beside = f"; its widths trained anew {better - small:.2f} below" if small == small else ""
            what = f"{kind}: points below the better of the dense network ({whole:.2f}) and the same trained on"
            claim(f"{what} ({better:.2f}){beside}", better - reached, "<=", 0.6)
            for row in results.rows:
                if row["phase"] == "latency" and row["kind"] == kind:
                    claim(f"{kind}: measured speed-up, {row['setting']} (high end)", row["speedup"]["high"], ">=", 1.5)
    for row in results.rows:
        if row["phase"] == "latency" and row["kind"] == "latency budget" and row["batch"] == 1:
            reached = 1 / row["speedup"]["value"]
            claim(
                "latency budget: parts of it that the measured latency is off by",
                abs(reached / LATENCY - 1),
                "<=",
                0.05,
            )
        if row["phase"] == "budget" and row["facts"]:
            claim("latency budget: measurements", len(row["facts"]), "<=", 10)


def worst_macs(results: Results, kind: str) -> int:
    return max(row["macs"] for row in results.rows if row["kind"] == kind and row["phase"] == "final")


PHASES: dict[str, Callable[[Results, argparse.Namespace], None]] = {
    "dense": train_dense,
    "tune": tune,
    "final": final,
    "criteria": criteria,
    "latency": latency,
    "claims": claims,
}


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
    parser.add_argument("--phase", choices=("all", *PHASES), nargs="+", default=["all"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "prune_cifar")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--dense-epochs", type=int, default=DENSE_EPOCHS)
    parser.add_argument(
        "--dense-seeds", type=int, default=2, help="networks to prune; seeds beyond them start from these"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1], help="of fine-tuning, to choose from")
    parser.add_argument("--tune-epochs", type=int, default=EPOCHS, help="of each choice in the phase tune")
    parser.add_argument("--only", nargs="*", default=(), help="kinds of the phase final")
    parser.add_argument("--dense-lr", type=float, default=DENSE_LR)
    parser.add_argument("--choice", default="", choices=("", *CHOICES), help="to prune by, not the best on validation")
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
    go_through(PHASES, results, options)


if __name__ == "__main__":
    main()
