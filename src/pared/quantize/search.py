"""What each layer costs when it alone is quantized, and which layers to keep in float so that the metric holds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor, fx

from pared.errors import PlanError
from pared.metrics import Metric
from pared.quantize.simulate import Numbers, Simulation
from pared.sensitivity import Override, costs, flat
from pared.step import Context, settings
from pared.task import Inputs, Task, evaluate

BATCH = 8  # samples that are simulated at once


@settings
class Sensitivity:
    """Measure on `validation` data what each layer costs when it alone is quantized."""

    samples: Annotated[int, pydantic.Field(ge=1, description="Look at this many validation samples at most.")] = 64
    seconds: Annotated[
        float, pydantic.Field(gt=0, description="Time for this and for the search that `max_drop` asks for.")
    ] = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile:
    """A layer and what it costs alone.

    Attributes:
        module: Its name.
        sqnr_db: Of the network's output; None where nothing changed.
        drops: Of each metric, in its own unit.
    """

    module: str
    sqnr_db: float | None
    drops: Mapping[str, float]


def measure(
    graph: fx.GraphModule, numbers: Numbers, ctx: Context, setting: Sensitivity, deadline: float
) -> tuple[list[Fragile], int]:
    """Every layer with what it costs alone, the most fragile first, and the number of samples looked at.

    A module that runs several times has them all quantized at once.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    changes: dict[str, dict[str, Override]] = {"": {}}
    for anchor in numbers.placement.anchors:
        changes.setdefault(anchor.module, {})[anchor.node] = numbers.alone(nodes[anchor.node])
    task = ctx.task
    metrics = task.metrics if task.validation is not None else ()
    found = costs(
        graph,
        task.batches("validation", "QuantizeStatic"),
        changes,
        task.pick,
        metrics=metrics,
        samples=setting.samples,
        deadline=deadline,
    )
    base = found.pop("")
    rows = [
        Fragile(
            module=name,
            sqnr_db=cost.agreement.sqnr_db,
            drops={
                metric.name: metric.drop(base.metrics[metric.name], cost.metrics[metric.name]) for metric in metrics
            },
        )
        for name, cost in found.items()
    ]
    return sorted(rows, key=lambda row: float("inf") if row.sqnr_db is None else row.sqnr_db), base.samples


def metric_of(task: Task, metric: Metric, predict: Callable[[Inputs], Tensor]) -> float:
    """The deciding metric of a prediction function on validation data."""
    with torch.no_grad():
        return evaluate(predict, task.batches("validation", "QuantizeStatic"), [metric])[metric.name]


def predictor(runner: Callable[[], fx.Interpreter], graph: fx.GraphModule, task: Task) -> Callable[[Inputs], Tensor]:
    """A prediction function that takes batches of any size a few samples at a time."""
    return lambda inputs: torch.cat([task.pick(runner().run(*flat(graph, part))) for part in inputs.chunks(BATCH)])


@dataclasses.dataclass
class Trial:
    """So many of the most fragile layers kept in float, and the drop that is left."""

    kept: int
    drop: float


def keep_fragile(
    graph: fx.GraphModule,
    ctx: Context,
    fragile: Sequence[Fragile],
    numbers: Callable[[Sequence[str]], Numbers],
    *,
    max_drop: float,
    deadline: float,
) -> tuple[list[str], dict[str, Any]]:
    """The fewest of the most fragile layers to keep in float for the metric to hold on validation data.

    The number kept is doubled until the drop is met, then halved back. What meets it with the fewest layers in float is
    returned; where nothing does in time, what came nearest.

    Args:
        graph: Prepared. Not changed.
        ctx: Its task judges.
        fragile: Layers, the most fragile first.
        numbers: What becomes integers when these modules stay in float.
        max_drop: Largest drop of the first metric, in its own unit.
        deadline: `time.monotonic()` at which to stop searching.

    Returns:
        The modules to keep in float, and facts for the plan.

    Raises:
        PlanError: The task has no metric.
    """
    metric = ctx.task.metric
    if metric is None:
        raise PlanError("QuantizeStatic: max_drop is judged by the first metric; give Task(metrics=...)")
    before = metric_of(ctx.task, metric, predictor(lambda: fx.Interpreter(graph), graph, ctx.task))
    names = [row.module for row in fragile]
    trials: dict[int, Trial] = {}

    def met(kept: int) -> bool:
        """Try so many, unless that was done."""
        if kept not in trials:
            ctx.progress("search", len(trials), 0, f"{kept} layers in float")
            used = numbers(names[:kept])
            after = metric_of(ctx.task, metric, predictor(lambda: Simulation(graph, used), graph, ctx.task))
            trials[kept] = Trial(kept, metric.drop(before, after))
        return trials[kept].drop <= max_drop

    low, high = -1, 0
    # Every layer in float is no quantization: at least one stays.
    while not met(high) and high < len(names) - 1 and time.monotonic() < deadline:
        low, high = high, min(max(1, 2 * high), len(names) - 1)
    while trials[high].drop <= max_drop and high - low > 1 and time.monotonic() < deadline:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    good = [trial for trial in trials.values() if trial.drop <= max_drop]
    best = min(good, key=lambda t: t.kept) if good else min(trials.values(), key=lambda t: (t.drop, t.kept))
    return names[: best.kept], {
        "metric": metric.name,
        "before": before,
        "max_drop": max_drop,
        "met": bool(good),
        "trials": [dataclasses.asdict(trials[kept]) for kept in sorted(trials)],
    }
