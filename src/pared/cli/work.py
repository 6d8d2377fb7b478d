"""What the commands do with a recipe: load what it names, plan, run, inspect."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file
from torch import nn

from pared.cli import show
from pared.cli.bars import bars
from pared.errors import UsageError
from pared.graph.counts import count
from pared.loading import load_model, load_task
from pared.recipe import Recipe
from pared.step import Context
from pared.targets import find_target
from pared.task import Inputs, Task, as_inputs
from pared.train.step import Train

RECIPES = {".yaml", ".yml", ".json"}


def load(recipe: Recipe, folder: Path) -> tuple[nn.Module, Task]:
    """The model and the task that a recipe names; the task first, for it fails sooner."""
    task = load_task(recipe.task, full=recipe.data == "full", folder=folder)
    return load_model(recipe.model, weights=recipe.weights, folder=folder, seed=recipe.seed), task


def plan(recipe: Recipe, *, folder: Path) -> None:
    """Print what every step would change, and what it would not."""
    from pared.pipeline import dry_run

    model, task = load(recipe, folder)
    with bars() as progress:
        plans = dry_run(
            model,
            recipe.steps,
            task,
            target=recipe.target,
            budget=recipe.budget,
            seed=recipe.seed,
            progress=progress,
        )
    show.print_plans(plans)


def run(recipe: Recipe, *, folder: Path, out: Path, resume: bool, overwrite: bool) -> None:
    """Compress by a recipe, then print the ledger and where the report is."""
    from pared.pipeline import compress

    model, task = load(recipe, folder)
    with bars() as progress:
        artifact = compress(
            model,
            recipe.steps,
            task,
            target=recipe.target,
            out=out,
            budget=recipe.budget,
            timing=recipe.timing,
            seed=recipe.seed,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            recipe=recipe.to_json(),
        )
    show.print_report(artifact.report)
    typer.echo(f"\nreport: {artifact.path / 'report.html'}")


def demo(recipe: Recipe, *, out: Path) -> None:
    """Train the recipe's model, keep its weights beside `out`, and compress what was trained."""
    model, task = load(recipe, Path())
    weights = out.with_name(f"{out.name}-weights.safetensors")
    step = Train(epochs=4, lr=0.05)
    with bars() as progress, tempfile.TemporaryDirectory(prefix="pared-") as work:
        target = find_target(recipe.target)
        ctx = Context(task=task, target=target, work=Path(work), dense=model, seed=recipe.seed, progress=progress)
        trained = step.apply(model, step.plan(model, ctx), ctx)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(trained.state_dict(), weights)
    run(dataclasses.replace(recipe, weights=str(weights)), folder=Path(), out=out, resume=False, overwrite=True)


def inspect(model: str, *, weights: Path | None, shapes: list[str], task: str | None) -> None:
    """Print a model's layers. Raises: UsageError where no inputs are given."""
    inputs = inputs_of(shapes)
    if inputs is None and task is not None:
        inputs = load_task(task).example_inputs
    if Path(model).suffix in RECIPES:
        recipe, folder = Recipe.read(model), Path(model).parent
        # Weights from the command line are relative to the current folder, those of the recipe to its own.
        own = recipe.weights if weights is None else weights.resolve()
        found = load_model(recipe.model, weights=own, folder=folder, seed=recipe.seed)
        inputs = inputs or load_task(recipe.task, folder=folder).example_inputs
    else:
        found = load_model(model, weights=weights)
    if inputs is None:
        raise UsageError("pared inspect needs inputs; give --shape 1,3,224,224, or --task")
    show.print_counts(count(found.eval(), inputs))


def inputs_of(shapes: list[str]) -> Inputs | None:
    """Inputs of zeros, one for each shape, or None. Raises: UsageError for a shape that is none."""
    tensors = []
    for text in shapes:
        sizes = text.replace("x", ",").split(",")
        if not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UsageError(f"--shape {text}: write the sizes with commas, batch first, e.g. 1,3,224,224")
        tensors.append(torch.zeros([int(size) for size in sizes]))
    return as_inputs(tuple(tensors)) if tensors else None
