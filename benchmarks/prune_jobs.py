"""What the benchmarks of prunes and trainings share: networks kept beside their plans, jobs of worker processes, rows.

A job is a dictionary: the function that runs it, what its row is called, and what that function reads. Its network is
left in --work, where later jobs find it, in this process or in another.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import distillation
import torch
from distillation import Data
from harness import Results
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pared
from pared.graph.counts import Totals, count, totals
from pared.step import Context, Plan
from pared.surgery import apply_edits
from pared.targets import find_target

CRITERIA = ("l1", "l2", "std", "mean", "gamma", "taylor", "fpgm", "hrank", "activation", "random")
TAUGHT = "taught"
TUNING_SEED = 100
LATENCY = 0.6
KEYS = ("phase", "kind", "setting", "seed")
PLANNING = 4  # batches of 256 images that saliencies look at

OPTIONS: argparse.Namespace


def set_up(options: argparse.Namespace) -> None:
    """What a worker process does once."""
    global OPTIONS
    OPTIONS = options
    distillation.set_up(options)


# --- networks ----------------------------------------------------------------------------------------------------


def counted(model: nn.Module, x: Tensor) -> Totals:
    """Parameters, and multiply-accumulates of one sample."""
    return totals(count(model.eval(), (x[:1],)))


def kept_as(kind: str, seed: int) -> Path:
    return Path(OPTIONS.work) / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"


def load(kind: str, seed: int, build: Callable[[Sequence[int]], nn.Module]) -> nn.Module:
    """A network of an earlier job: the plans beside its weights, replayed."""
    file = kept_as(kind, seed)
    if not file.exists():
        raise FileNotFoundError(f"no network at {file}; run the phase that trains it first")
    beside = json.loads(file.with_suffix(".json").read_text(encoding="utf8"))
    model = build(beside["widths"])
    for plan in plans_of(kind, seed):
        model = apply_edits(model, plan.edits, {})
    model.load_state_dict(load_file(file))
    return model.eval()


def plans_of(kind: str, seed: int) -> list[Plan]:
    """Of the prunes that made a network of an earlier job."""
    beside = json.loads(kept_as(kind, seed).with_suffix(".json").read_text(encoding="utf8"))
    return [Plan.from_json(plan) for plan in beside["plans"]]


def save(model: nn.Module, kind: str, seed: int, plans: Sequence[Plan], widths: Sequence[int]) -> None:
    """A network beside what makes its shape: the widths it was built with, and the plans of its prunes."""
    file = kept_as(kind, seed)
    beside = {"widths": list(widths), "plans": [plan.to_json() for plan in plans]}
    file.with_suffix(".json").write_text(json.dumps(beside), encoding="utf8")
    save_file(model.state_dict(), file)


def batches(data: Data, role: str) -> list[tuple[Tensor, Tensor]]:
    """Some images as they are, on the CPU, in batches of 256."""
    images, labels = (part[: PLANNING * 256].cpu() for part in getattr(data, role))
    mean, deviation = (part.cpu() for part in data.statistics)
    return list(zip(((images.float() / 255 - mean) / deviation).split(256), labels.split(256), strict=True))


def planning_task(data: Data, x: Tensor) -> pared.Task:
    """Some training images for the saliencies that look at data, some of validation for sensitivity."""
    train = batches(data, "train")
    return pared.Task(
        example_inputs=x,
        calibration=[images for images, _ in train],
        train=train,
        validation=batches(data, "validation"),
        loss=nn.CrossEntropyLoss(),
        metrics="accuracy",
    )


def part_way(settings: Mapping[str, Any], number: int, rounds: int) -> pared.PruneChannels:
    """The prune of one round of several."""
    step = pared.PruneChannels(**settings)
    return step if number == rounds else step.at(number / rounds)


def pruned(
    step: pared.PruneChannels,
    model: nn.Module,
    task: pared.Task,
    dense: nn.Module,
    *,
    plans: Sequence[Plan] = (),
    seed: int = 0,
) -> tuple[nn.Module, Plan]:
    """The model after one prune, and its plan.

    Args:
        plans: Of the prunes before.
    """
    rest: dict[str, Any] = {"dense": dense, "seed": seed, "history": tuple(plans), "threads": 1}
    with tempfile.TemporaryDirectory() as work:
        ctx = Context(task=task, target=find_target("onnxruntime"), work=Path(work), **rest)
        plan = step.plan(model, ctx)
        return step.apply(model, plan, ctx).eval(), plan


def channels_of(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


# --- jobs --------------------------------------------------------------------------------------------------------


def job_of(run: Callable[..., Any], phase: str, kind: str, seed: int, lr: float, **rest: Any) -> dict[str, Any]:
    """A job. `source` is the seed of the dense network that it starts from."""
    made = {"run": run, "phase": phase, "kind": kind, "setting": "", "seed": seed, "lr": lr}
    return {**made, "source": seed, **rest}


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """One job: a network made, saved and judged. Returns the row."""
    start = time.perf_counter()
    row = job["run"](job)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    seconds = round(time.perf_counter() - start, 1)
    return {**{key: job[key] for key in (*KEYS, "lr")}, **row, "seconds": seconds, "device": device}


def work_through(jobs: list[dict[str, Any]], results: Results, options: argparse.Namespace) -> None:
    """Run the jobs that no row answers yet, several processes at once."""
    distillation.work_through(jobs, results, options, do=run, start=set_up, keys=KEYS)


def best(results: Results, kind: str, choice: str = "") -> tuple[str, float]:
    """What to prune by, and the learning rate, of the row that is best on validation, among those of a choice."""
    rows = [row for row in results.rows if (row["phase"], row["kind"]) == ("tune", kind)]
    rows = [row for row in rows if row["setting"].startswith(choice)]
    if not rows:
        raise SystemExit("no rows of the phase tune; run --phase tune first")
    row = max(rows, key=lambda row: row["validation"])
    return row["setting"].rpartition("lr")[0].strip(", "), row["lr"]


def go_through(
    phases: Mapping[str, Callable[[Results, argparse.Namespace], None]], results: Results, options: argparse.Namespace
) -> None:
    """The phases that were asked for, one after the other."""
    for phase in phases if "all" in options.phase else options.phase:
        phases[phase](results, options)
    for pool in distillation.POOL:
        pool.shutdown()
