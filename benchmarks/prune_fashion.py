"""A small residual network on Fashion-MNIST, trained, pruned and timed on the CPU of this machine: accuracy and speed.

    python benchmarks/prune_fashion.py [--data FOLDER] [--work FOLDER] [--seeds 2] [--jobs 2]

What `prune_cifar.py` measures of ResNet-20 where there is a GPU, at a size that two cores train in half an hour: a
ResNet of 8 layers, 10,000 of the official training images, 12 epochs. --data holds the four official idx .gz files, as
Debian's `dataset-fashion-mnist` installs them; --work keeps the networks and their plans, out of git. Phases, each
resumable, rows are kept:

    dense     trains the network, and one with all widths scaled down to the budget's multiply-accumulates
    tune      which layers lose how much, on validation, with the network of seed 0
    final     one-shot and iterative pruning, 3 epochs of fine-tuning in all; the dense and the small network trained on
              for as long
    criteria  every saliency criterion at the same budget, the same ratio in every layer, before and after one epoch
    ratios    the same ratio in every layer, one global ranking, and sensitivity, likewise
    taught    what `final` does, with the dense network as teacher
    latency   a latency budget kept, and the networks of seed 0 in ONNX Runtime, in turn, several rounds
    claims    what the rows say of the issue's lines

Validation is 5,000 further images of the official training data; the 10,000 of test are read for the rows alone, and in
`tune` never. All trainings are `pared.Train`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import distillation
import prune_jobs
import prune_latency
import torch
from distillation import Data, Residual, block
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
    pruned,
    save,
    set_up,
    work_through,
)
from torch import Tensor, nn

import pared

NAME, ISSUE = "prune_fashion", 5
WIDTHS = (32, 64, 128)
TRAIN, SHIFT = 10_000, 1  # images, and the pixels that they move by at most
DENSE_EPOCHS, DENSE_LR = 12, 0.1
LR = 0.05  # of all that trains on from there, pruned or not
ROUNDS = {"one-shot": (3,), "iterative": (1, 2)}  # epochs of fine-tuning after each prune
EPOCHS = 3
SMALL = 0.45  # of the multiply-accumulates
# Multiples of 16, which ONNX Runtime is fast at. 0 makes the channels of the first stage, 4.body.3 those of the second,
# 5.body.3 those of the last; the others are inside one block.
CHOICES: dict[str, dict[str, Any]] = {
    "everywhere": {"macs": SMALL, "widths": {"round_to": 16}},
    "inside": {
        "macs": SMALL,
        "widths": {"round_to": 16, "limits": {"0": (1, 1), "4.body.3": (0.75, 0.75), "5.body.3": (0.75, 0.75)}},
    },
}
BUDGET: dict[str, Any] = {"macs": SMALL, "widths": {"round_to": 8}}  # of the criteria and the ratios
WAYS = ("equal", "global")  # in which a latency budget is kept
TIMED = 3  # rounds of the timing


# --- networks ----------------------------------------------------------------------------------------------------


def resnet8(widths: Sequence[int] = WIDTHS) -> nn.Module:
    """8 layers for images of 28 x 28, of which the first halves the size: 308 thousand parameters, 10 M MACs.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, with n = 1 and projections (their option B).
    """
    a, b, c = widths
    stages = [Residual(a, a, 1), Residual(a, b, 2), Residual(b, c, 2)]
    return nn.Sequential(*block(1, a, 2), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def example() -> Tensor:
    return torch.zeros(2, 1, 28, 28)


def small_widths() -> tuple[int, ...]:
    """The widest network of this shape within the budget, all widths scaled alike, in multiples of 16."""
    most = SMALL * counted(resnet8(), example()).macs
    scaled = ([16 * round(width * part / 1024) for width in WIDTHS] for part in range(64, 0, -1))
    return next(tuple(widths) for widths in scaled if counted(resnet8(widths), example()).macs <= most)


def fresh(seed: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
    torch.manual_seed(seed)
    return resnet8(widths)


def load(kind: str, seed: int) -> nn.Module:
    return prune_jobs.load(kind, seed, resnet8)


# --- jobs of a worker process ------------------------------------------------------------------------------------


@functools.cache
def data() -> Data:
    """Fashion-MNIST, its training images cut to so many."""
    made = distillation.data_of("fashion")
    x, y = made.train
    made.train = x[:TRAIN], y[:TRAIN]
    return made


def trained(model: nn.Module, epochs: int, job: Mapping[str, Any], dense: nn.Module) -> nn.Module:
    """The model after `pared.Train`, taught by the dense network where the job's kind says so."""
    distill = pared.Distill(temperature=2) if TAUGHT in job["kind"] else None
    task = data().task(SHIFT)
    return distillation.trained(model, task, epochs, job["lr"], job["seed"], distill, dense).to("cpu").eval()


def run_dense(job: Mapping[str, Any]) -> dict[str, Any]:
    widths = WIDTHS if job["kind"] == "dense" else small_widths()
    model = trained(fresh(job["seed"], widths), DENSE_EPOCHS, job, nn.Identity())
    save(model, job["kind"], job["seed"], (), widths)
    return {"epochs": DENSE_EPOCHS, **judged(model, job)}


def run_longer(job: Mapping[str, Any]) -> dict[str, Any]:
    """The dense or the small network, trained on; taught by the dense one or not."""
    kind, dense = job["kind"].split(",")[0], load("dense", job["source"])
    model = trained(load(kind, job["source"]), EPOCHS, job, dense)
    if job["phase"] == "final":
        save(model, job["kind"], job["seed"], (), WIDTHS if kind == "dense" else small_widths())
    return {"epochs": EPOCHS, **judged(model, job)}


def run_pruned(job: Mapping[str, Any]) -> dict[str, Any]:
    """The dense network pruned and fine-tuned, in one round or several."""
    dense = load("dense", job["source"])
    model, plans, facts = dense, [], {}
    rounds = job.get("rounds") or ROUNDS[job["kind"].split(",")[0]]
    for number, epochs in enumerate(rounds, 1):
        step = part_way(job["choice"], number, len(rounds))
        task = planning_task(data(), example())
        model, plan = pruned(step, model, task, dense, plans=plans, seed=job["seed"])
        plans.append(plan)
        if job["phase"] in ("criteria", "ratios"):
            facts = {"before": data().accuracy(model, "test")}
        model = trained(model, epochs, job, dense)
    if job["phase"] == "final":
        save(model, job["kind"], job["seed"], plans, WIDTHS)
    return {"epochs": sum(rounds), **facts, **judged(model, job), "widths": channels_of(model)}


def judged(model: nn.Module, job: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy, and what there is to compute: on validation to choose by, else on test, once."""
    role, made = "validation" if job["phase"] == "tune" else "test", counted(model, example())
    return {"params": made.params, "macs": made.macs, role: data().accuracy(model, role)}


# --- phases ------------------------------------------------------------------------------------------------------


def dense(results: Results, options: argparse.Namespace) -> None:
    kinds = ("dense", "small")
    jobs = [job_of(run_dense, kind, kind, seed, DENSE_LR) for kind in kinds for seed in range(options.seeds)]
    work_through(jobs, results, options)


def tune(results: Results, options: argparse.Namespace) -> None:
    rest: dict[str, Any] = {"seed": TUNING_SEED, "lr": LR, "source": 0}
    jobs = [
        job_of(run_pruned, "tune", "one-shot", setting=f"{name}, lr {LR}", choice=choice, **rest)
        for name, choice in CHOICES.items()
    ]
    work_through(jobs, results, options)


def final(ending: str, results: Results, options: argparse.Namespace) -> None:
    name = best(results, "one-shot")[0]
    rest: dict[str, Any] = {"choice": CHOICES[name], "setting": name}
    jobs = []
    for seed in range(options.seeds):
        jobs += [job_of(run_pruned, "final", kind + ending, seed, LR, **rest) for kind in ROUNDS]
        kinds = ("dense", "small")
        jobs += [job_of(run_longer, "final", f"{kind}, trained on{ending}", seed, LR) for kind in kinds]
    work_through(jobs, results, options)


def criteria(results: Results, options: argparse.Namespace) -> None:
    made = {name: {**BUDGET, "saliency": name} for name in CRITERIA}
    work_through([one_shot("criteria", name, choice, 0) for name, choice in made.items()], results, options)


def ratios(results: Results, options: argparse.Namespace) -> None:
    made = {name: {**BUDGET, "saliency": "l2", "ratios": name} for name in ("equal", "global", "sensitivity")}
    jobs = [one_shot("ratios", name, choice, seed) for seed in range(options.seeds) for name, choice in made.items()]
    work_through(jobs, results, options)


def one_shot(phase: str, name: str, choice: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return job_of(run_pruned, phase, "one-shot", seed, LR, setting=name, choice=choice, rounds=(1,))


def latency(results: Results, options: argparse.Namespace) -> None:
    set_up(options)
    kinds = dict.fromkeys(row["kind"] for row in results.rows if row["phase"] in ("dense", "small", "final"))
    results.rows = [row for row in results.rows if row["phase"] not in ("latency", "budget")]
    models = {kind: load(kind, 0) for kind in kinds if TAUGHT not in kind and "trained on" not in kind}
    for way in WAYS:
        start = time.perf_counter()
        step = pared.PruneChannels(latency=LATENCY, widths=BUDGET["widths"], ratios=way)
        kind = f"latency budget, ratios {way}"
        models[kind], plan = pruned(step, models["dense"], planning_task(data(), example()), models["dense"])
        made, facts = counted(models[kind], example()), plan.facts
        row = {"phase": "budget", "kind": kind, "setting": str(LATENCY), "seed": 0, "macs": made.macs}
        row |= {"params": made.params, "measured": facts["measured"], "widths": facts["widths"]}
        results.add(row | {"seconds": round(time.perf_counter() - start, 1)})
    for number in range(TIMED):
        for timed in prune_latency.rows(models, example(), baseline="dense"):
            results.add({"phase": "latency", "setting": f"batch {timed['batch']}", "seed": 0, "round": number} | timed)


# --- claims ------------------------------------------------------------------------------------------------------


def speedup(results: Results, kind: str, batch: int) -> float:
    """The median over the rounds."""
    rows = [row for row in results.rows if (row["phase"], row["kind"], row.get("batch")) == ("latency", kind, batch)]
    return statistics.median(row["speedup"]["value"] for row in rows) if rows else float("nan")


def mean_of(results: Results, kind: str, seeds: set[int]) -> float:
    """Accuracy on test, the mean over the seeds that there are of these."""
    rows = [row for row in results.rows if row["kind"] == kind and row["phase"] in ("dense", "small", "final")]
    found = [row["test"] for row in rows if row["seed"] in seeds]
    return statistics.fmean(found) if found else float("nan")


def claims(results: Results, _options: argparse.Namespace) -> None:
    results.claims = []
    for kind, ending in ((kind, ending) for ending in ("", f", {TAUGHT}") for kind in ROUNDS):
        rows = [row for row in results.rows if (row["phase"], row["kind"]) == ("final", kind + ending)]
        if not rows:
            continue
        seeds = {row["seed"] for row in rows}
        mean = functools.partial(mean_of, results, seeds=seeds)
        name = f"Fashion-MNIST, ResNet-8, {kind + ending}, {len(seeds)} seeds"
        fewer = counted(resnet8(), example()).macs / max(row["macs"] for row in rows)
        results.claim(ISSUE, f"{name}: times fewer multiply-accumulates", fewer, ">=", 2.0)
        whole, longer, small = mean("dense"), mean("dense, trained on" + ending), mean("small, trained on" + ending)
        better = max(whole, longer) if longer == longer else whole
        what = f"{name}, {mean(kind + ending):.2f} %: points below the better of the dense network ({whole:.2f})"
        what += f" and the same trained on ({longer:.2f}); a small dense one {better - small:.2f} below"
        results.claim(ISSUE, what, better - mean(kind + ending), "<=", 0.6)
    for kind in ROUNDS:
        for batch in prune_latency.BATCHES:
            what = f"Fashion-MNIST, ResNet-8, {kind}: measured speed-up in ONNX Runtime, batch {batch}"
            results.claim(ISSUE, what, speedup(results, kind, batch), ">=", 1.5)
    for row in (row for row in results.rows if row["phase"] == "budget"):
        name = f"Fashion-MNIST, ResNet-8, {row['kind']} of {row['setting']}"
        off = abs(1 / speedup(results, row["kind"], 1) / LATENCY - 1)
        results.claim(ISSUE, f"{name}: parts of it that the latency, measured again, is off by", off, "<=", 0.05)
        results.claim(ISSUE, f"{name}: measurements", len(row["measured"]), "<=", 10)


PHASES: dict[str, Callable[[Results, argparse.Namespace], None]] = {
    "dense": dense,
    "tune": tune,
    "final": functools.partial(final, ""),
    "criteria": criteria,
    "ratios": ratios,
    "taught": functools.partial(final, f", {TAUGHT}"),
    "latency": latency,
    "claims": claims,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("all", *PHASES), nargs="+", default=["all"])
    parser.add_argument("--data", type=Path, default=distillation.FOLDER)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / NAME)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    options = parser.parse_args()
    # What `Data` and the workers read.
    options.threads, options.samples, options.precision, options.teachers = 1, 0, "32", options.work
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(NAME, fresh=options.fresh, folder=options.out)
    if results.path.exists() and not options.fresh:
        results.rows = json.loads(results.path.read_text(encoding="utf8"))["rows"]
    go_through(PHASES, results, options)


if __name__ == "__main__":
    main()
