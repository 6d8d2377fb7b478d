"""How long half of the channels of a ResNet take to choose and cut: pared beside Torch-Pruning, in turn.

    python benchmarks/prune_planning.py [--rounds 5] [--tool pared] [--plot]

pared's time is that of what both do: capture, groups, scores by L1, the choice, and the edits, found and tried on
shapes. Beside it stand what `plan` takes with the proof in float64 and the constants of removed channels, of which
Torch-Pruning has neither, and what `torch.export` takes, which is a part of both. Torch-Pruning plans as it prunes: the
time of its pruner's construction and one step, on a copy made before the clock starts. All run in this process on one
thread, A B C D D C B A, after a round that is not counted. The interval is that of the mean of the logarithms of the
rounds' ratios, by Student's t. At the end `docs/prune_planning.svg` is drawn; `--plot` draws it again from the JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from depth_plot import depth_plot
from harness import RESULTS, Results
from prune_classifiers import FOLDERS, ISSUE, OWN, RATIO, RIVAL, prune_rival
from torch import Tensor, nn

import pared
from pared.graph.capture import capture
from pared.graph.labels import find_channels
from pared.measure.environment import version_of
from pared.prune.budgets import choose
from pared.prune.edits import edits_of
from pared.prune.evidence import Evidence
from pared.prune.saliency import score
from pared.step import Context
from pared.targets import find_target

sys.path[:0] = FOLDERS
DEPTHS = {"resnet18": 18, "resnet50": 50, "resnet152": 152}
SIZE = 224
# Two-sided 95 % of Student's t, by degrees of freedom.
STUDENT = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def choose_pared(model: nn.Module, x: Tensor) -> None:
    """From the model to edits whose shapes fit."""
    task = pared.Task(example_inputs=(x,))
    channels = find_channels(capture(model, task), model)
    scores = score(Evidence(channels=channels, model=model, task=task, seed=0), "l1", channels.groups)[0]
    edits_of(model, channels, choose(channels, scores, RATIO).keep, task, prove=False)


def plan_pared(model: nn.Module, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as work:
        task = pared.Task(example_inputs=(x,))
        ctx = Context(task=task, target=find_target("onnxruntime"), work=Path(work), dense=model)
        pared.PruneChannels(ratio=RATIO, saliency="l1").plan(model, ctx)


def plan_rival(model: nn.Module, x: Tensor) -> None:
    prune_rival(model, x, Path())


def export_alone(model: nn.Module, x: Tensor) -> None:
    """The export as `pared.graph.capture` asks for it."""
    with torch.no_grad():
        torch.export.export(model, (torch.cat([x, x]),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)


PROVED, EXPORT = "pared, plan and proof", "torch.export alone"
TOOLS = {OWN: choose_pared, RIVAL: plan_rival, PROVED: plan_pared, EXPORT: export_alone}
PLOT = Path(__file__).parents[1] / "docs" / "prune_planning.svg"


def timed(tool: str, model: nn.Module, x: Tensor) -> float:
    """Seconds of one plan, of a model of its own."""
    own = copy.deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    TOOLS[tool](own, x)
    return time.perf_counter() - start


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Times over times, paired by round, with a 95 % interval."""
    logs = [math.log(a / b) for a, b in zip(above, below, strict=True)]
    middle = statistics.fmean(logs)
    half = STUDENT[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"value": math.exp(middle), "low": math.exp(middle - half), "high": math.exp(middle + half)}


def measure(name: str, tools: list[str], rounds: int) -> dict[str, Any]:
    """All rounds of one network."""
    from torchvision_models import torchvision_model

    torch.manual_seed(0)
    model, x = torchvision_model(name), torch.randn(1, 3, SIZE, SIZE)
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    for number in range(rounds + 1):
        for tool in tools if number % 2 == 0 else tools[::-1]:
            taken = timed(tool, model, x)
            if number:
                seconds[tool].append(taken)
    row: dict[str, Any] = {"model": name, "depth": DEPTHS[name], "rounds": rounds}
    row |= {"seconds": {tool: statistics.median(taken) for tool, taken in seconds.items()}, "all": seconds}
    if len(tools) > 1:
        row["ratio"] = ratio(seconds[OWN], seconds[RIVAL])
        row["export_ratio"] = ratio(seconds[EXPORT], seconds[RIVAL])
    return row


def claim(results: Results) -> None:
    """The line of issue 5. Ratios count by the end of their interval that favours the bound."""
    results.claims = []
    rows = {row["model"]: row for row in results.rows}
    found, export = rows["resnet50"]["ratio"], rows["resnet50"]["export_ratio"]
    shown = f"{found['value']:.2f} to {found['high']:.2f}; torch.export alone {export['value']:.2f}"
    what = f"planning of ResNet-50, time over Torch-Pruning's ({shown}), low end"
    results.claim(ISSUE, what, found["low"], "<=", 1.0)
    shallow, deep = (rows[name] for name in ("resnet50", "resnet152"))
    grown = ratio(deep["all"][OWN], shallow["all"][OWN])
    longer = deep["depth"] / shallow["depth"]
    what = f"ResNet-152's time over ResNet-50's ({grown['value']:.2f}), over the ratio of their depths, low end"
    results.claim(ISSUE, what, grown["low"] / longer, "<=", 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, choices=range(3, 11))
    parser.add_argument("--tool", choices=TOOLS, help="this one alone; no claims, no JSON")
    parser.add_argument("--plot", action="store_true", help="draw the plot again, from the JSON")
    options = parser.parse_args()
    if options.plot:
        rows = json.loads((RESULTS / "prune_planning.json").read_text(encoding="utf8"))["rows"]
        PLOT.write_text(depth_plot(rows), encoding="utf8")
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tools = [options.tool] if options.tool else list(TOOLS)
    if options.tool:
        for name in DEPTHS:
            sys.stdout.write(f"{measure(name, tools, options.rounds)}\n")
        return
    results = Results("prune_planning", fresh=True)
    results.environment["rivals"] = {"torch-pruning": version_of("torch-pruning")}
    for name in DEPTHS:
        results.add(measure(name, tools, options.rounds))
    claim(results)
    PLOT.write_text(depth_plot(results.rows), encoding="utf8")


if __name__ == "__main__":
    main()
