"""`compress`: steps become stages, stages become blocks, and a block that does not pay is rolled back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pared.artifact import MANIFEST, Artifact, open_artifact, write_artifact
from pared.errors import ModelError, ParedError, UsageError
from pared.graph.capture import capture
from pared.graph.counts import LayerCount, count
from pared.measure.environment import environment, usable_cores, version_of
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.measure.memory import peak_memory
from pared.pipeline.stage import Stage, finish_stage, layer_table, output_index, read_stage, test_metrics
from pared.pipeline.workspace import Workspace
from pared.recipe import Budget, TimingSettings
from pared.report import data as report
from pared.step import Context, Plan, Progress, Step, Target, settings_of, silent
from pared.surgery import apply_edits
from pared.targets import find_target
from pared.targets.worker import worker_command, write_inputs
from pared.task import Task
from pared.train.checkpoint import fingerprint
from pared.seeding import isolated, seed_all


def compress(
    model: nn.Module,
    steps: Sequence[Step],
    task: Task,
    *,
    target: str = "onnxruntime",
    out: str | Path | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen
    timing: TimingSettings = TimingSettings(),  # noqa: B008 - frozen
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    recipe: Mapping[str, Any] | None = None,
) -> Artifact:
    """Apply steps to a copy of a model, export and measure after each, and keep what pays.

    Args:
        model: A trained model. It is not changed.
        steps: In order. Each opens a block; trainings that follow a change belong to its block.
        task: What the model is for.
        target: The runtime that it ships on: a name that `pared list targets` shows.
        out: Folder of the artifact; a temporary one by default, which `Artifact.save` moves.
        budget: When a block is rolled back.
        timing: How latency is taken.
        seed: Of everything random.
        resume: Go on with a run that was stopped.
        overwrite: Replace the artifact in `out`.
        progress: Told how far the run is.
        recipe: What to print as "how to repeat it"; what can be told from the arguments by default.

    Returns:
        The artifact, with its report.

    Raises:
        UsageError: An argument, the data or the model cannot be used.
        ParityError: An exported file disagrees with its own PyTorch model.
        ParedError: Anything else that went wrong, with the step's number and name as a note.
    """
    folder = Path(tempfile.mkdtemp(prefix="pared-")) / "artifact" if out is None else Path(out)
    check_arguments(model, steps, task)
    with Workspace(folder, resume=resume, overwrite=overwrite) as space, isolated(task):
        run = Run(task, find_target(target), space, budget, timing, seed, progress, model)
        if resume and (done := run.finished(steps)) is not None:
            return done
        return run.all(steps, recipe or described(steps, target, budget, timing, seed))


def dry_run(
    model: nn.Module,
    steps: Sequence[Step],
    task: Task,
    *,
    target: str = "onnxruntime",
    budget: Budget = Budget(),  # noqa: B008, ARG001 - frozen; part of every run's arguments
    seed: int = 0,
    progress: Progress = silent,
) -> list[Plan]:
    """What each step would change and skip, without training or calibrating. Plans that are estimates say so."""
    check_arguments(model, steps, task)
    plans: list[Plan] = []
    with tempfile.TemporaryDirectory(prefix="pared-") as folder, isolated(task):
        for number, step in enumerate(steps, 1):
            ctx = Context(
                task=task,
                target=find_target(target),
                work=Path(folder),
                dense=model,
                seed=seed,
                history=tuple(plans),
                dry=True,
                progress=progress,
            )
            with told(number, step):
                plan = step.plan(model, ctx)
            plans.append(plan)
            structural = [edit for edit in plan.edits if edit.kind != "quantize"]
            model = apply_edits(model, structural, {}) if structural else model
    return plans


def check_arguments(model: nn.Module, steps: Sequence[Step], task: Task) -> None:
    """Raise `UsageError` for what can be told before any work: no steps, missing data, weights that are not finite."""
    if not steps:
        raise UsageError("no steps; give at least one, e.g. [pared.QuantizeStatic()]")
    for number, step in enumerate(steps, 1):
        with told(number, step):
            for need in sorted(step.needs):
                task.require(need, type(step).__name__)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} holds NaN or infinity; give a model with finite weights")


def described(steps: Sequence[Step], target: str, budget: Budget, timing: TimingSettings, seed: int) -> dict[str, Any]:
    """The part of a recipe that can be told from live objects."""
    return {
        "target": target,
        "seed": seed,
        "budget": settings_of(budget),
        "timing": settings_of(timing),
        "steps": [{type(step).__name__: settings_of(step)} for step in steps],
    }


@contextlib.contextmanager
def told(number: int, step: Step) -> Iterator[None]:
    """Add the step's number and name to an error that comes out of it."""
    try:
        yield
    except ParedError as error:
        error.add_note(f"in step {number}, {type(step).__name__}")
        raise


@dataclasses.dataclass
class Run:
    """One run: what stays the same from stage to stage, and the ledger as it grows."""

    task: Task
    target: Target
    space: Workspace
    budget: Budget
    timing: TimingSettings
    seed: int
    progress: Progress
    model: nn.Module
    rows: list[report.Stage] = dataclasses.field(default_factory=list)
    counted: dict[int, tuple[nn.Module, list[LayerCount]]] = dataclasses.field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Threads that files are run and timed with."""
        return self.timing.threads or usable_cores()

    def all(self, steps: Sequence[Step], recipe: Mapping[str, Any]) -> Artifact:
        """Baseline, every block, then the final figures and the artifact."""
        baseline = self.baseline()
        self.rows.append(self.measure(baseline, "baseline", None, 0, [baseline]))
        good: Stage = baseline
        history: tuple[Plan, ...] = ()
        for block, numbered in enumerate(self.blocks(steps), 1):
            last, plans = good, history
            for number, step in numbered:
                self.progress("stages", number - 1, len(steps), f"{number} {type(step).__name__}")
                with told(number, step):
                    last = self.stage(last, number, step, plans, baseline)
                plans = (*plans, last.plan) if last.plan else plans
                name = f"{number} {type(step).__name__}"
                self.rows.append(self.measure(last, name, step, block, [baseline, good], plans))
            kept, why = self.judge(last, good, changes=any(plan.edits for plan in plans[len(history) :]))
            if kept:
                good, history = last, plans
            self.rows = [
                dataclasses.replace(row, kept=kept, why=why) if row.block == block else row for row in self.rows
            ]
        self.progress("stages", len(steps), len(steps), "measure on test data")
        return self.write(good, history, baseline, recipe, self.run_key(steps))

    def blocks(self, steps: Sequence[Step]) -> Iterator[list[tuple[int, Step]]]:
        """A change with the trainings that follow it; trainings before any change are a block of their own."""
        block: list[tuple[int, Step]] = []
        for number, step in enumerate(steps, 1):
            if block and not step.trains:
                yield block
                block = []
            block.append((number, step))
        yield block

    def start_key(self) -> str:
        """Fingerprint of what every stage depends on: model and its code, task, target, seed, versions."""
        versions = {name: version_of(name) for name in ("pared", "torch", "onnx", "onnxscript", "onnxruntime")}
        sources = {type(m).__qualname__: source_of(type(m)) for m in self.model.modules()}
        names = {
            "structure": repr(self.model),
            "sources": sources,
            "versions": versions,
            "target": self.target.name,
            "loss": source_of(self.task.loss),
            "metrics": [metric.name for metric in self.task.metrics],
        }
        seed_all(self.task, self.seed, 0)
        return fingerprint(self.model, self.task, names, self.seed)

    def next_key(self, key: str, step: Step) -> str:
        """Fingerprint of a stage: the one before it, and the step."""
        text = json.dumps([key, type(step).__name__, settings_of(step)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def run_key(self, steps: Sequence[Step]) -> str:
        """Fingerprint of a whole run."""
        budget = json.dumps([settings_of(self.budget), settings_of(self.timing)], sort_keys=True)
        key = hashlib.sha256((self.start_key() + budget).encode()).hexdigest()
        for step in steps:
            key = self.next_key(key, step)
        return key

    def finished(self, steps: Sequence[Step]) -> Artifact | None:
        """The artifact that this very run has written already, or None."""
        manifest = self.space.out / MANIFEST
        if not manifest.exists() or json.loads(manifest.read_text(encoding="utf8")).get("run") != self.run_key(steps):
            return None
        return open_artifact(self.space.out)

    def baseline(self) -> Stage:
        """The model as it came in, exported."""
        self.progress("stages", 0, 0, "baseline")
        key = self.start_key()
        file = self.space.stage(key) / self.target.filename
        stage = Stage(
            key=key,
            model=self.model,
            floating=self.model,
            plan=None,
            file=file,
            output=output_index(self.model, self.task),
            facts={"seconds": 0.0},
        )
        facts = file.parent / "stage.json"
        if facts.exists():
            stage.facts = json.loads(facts.read_text(encoding="utf8"))
        else:
            finish_stage(stage, None, file, self.task, self.target, self.threads)
        return stage

    def stage(self, before: Stage, number: int, step: Step, history: tuple[Plan, ...], baseline: Stage) -> Stage:
        """The stage after a step: from the workspace where it is finished, else planned, applied, exported, checked."""
        key = self.next_key(before.key, step)
        folder = self.space.stage(key)
        ctx = Context(
            task=self.task,
            target=self.target,
            work=self.space.scratch(),
            dense=self.model,
            seed=self.seed,
            history=history,
            progress=self.progress,
        )
        seed_all(self.task, self.seed, number)
        found = read_stage(folder)
        start = time.monotonic()
        if found is None:
            plan = step.plan(before.model, ctx)
            model = step.apply(before.model, plan, ctx)
        else:
            plan = found[0]
            model = self.replay(before.model, step, plan, ctx, folder)
        quantizes = any(edit.kind == "quantize" for edit in plan.edits)
        stage = Stage(
            key=key,
            model=model,
            floating=before.floating if quantizes else model,
            plan=plan,
            file=folder / self.target.filename,
            output=before.output,
            facts={"seconds": time.monotonic() - start} if found is None else found[1],
        )
        if found is None:
            if not quantizes:
                save_file(named_tensors(model), folder / "tensors.safetensors")
            finish_stage(stage, before.model, baseline.file, self.task, self.target, self.threads)
        return stage

    def replay(self, before: nn.Module, step: Step, plan: Plan, ctx: Context, folder: Path) -> nn.Module:
        """The model of a finished stage: its edits on the model before, then its tensors."""
        if not (folder / "tensors.safetensors").exists():
            return step.apply(before, plan, ctx)
        model = apply_edits(before, plan.edits, {})
        model.load_state_dict(load_file(folder / "tensors.safetensors"), strict=False)
        return model

    def measure(
        self, stage: Stage, name: str, step: Step | None, block: int, others: list[Stage], plans: Sequence[Plan] = ()
    ) -> report.Stage:
        """Time a stage's file in turn with the baseline's and the last good one's, and write its row."""
        files = list(dict.fromkeys([*(other.file for other in others), stage.file]))
        self.progress("measure", 0, 1, name)
        commands = [self.command(file) for file in files]
        times = dict(zip(files, time_in_turn(commands, rounds=self.timing.rounds), strict=True))
        self.against = {file: speedup(times[file], times[stage.file], seed=self.seed) for file in files}
        counts = self.counts(stage.floating)
        plan = stage.plan
        self.progress("measure", 1, 1, name)
        return report.Stage(
            name=name,
            step={"step": type(step).__name__, **settings_of(step)} if step is not None else None,
            block=block,
            seconds=stage.facts["seconds"],
            changed=plan.changed if plan else (),
            skipped=tuple(report.Skipped(module=s.module, reason=s.reason) for s in plan.skips) if plan else (),
            layers=layer_table(counts, plans),
            metrics=stage.facts["metrics"],
            latency_ms=percentiles(times[stage.file]),
            speedup=self.against[files[0]] if stage.file != files[0] else None,
            size_bytes=stage.facts["size_bytes"],
            params=stage.facts["params"],
            nonzero_params=stage.facts["nonzero_params"],
            macs=sum(row.macs for row in counts),
            peak_memory_bytes=peak_memory(commands[-1]),
            parity=stage.agreement("parity"),
            fidelity=stage.agreement("fidelity"),
        )

    def command(self, file: Path) -> list[str]:
        """The worker that runs a file on one call's inputs."""
        inputs = self.space.path / "inputs.npz"
        if not inputs.exists():
            arrays = [
                torch.from_numpy(array).repeat(self.timing.batch_size, *[1] * (array.ndim - 1))[
                    : self.timing.batch_size
                ]
                for array in self.task.example_inputs.arrays()
            ]
            write_inputs(inputs, [array.numpy() for array in arrays])
        return worker_command(self.target.name, file, threads=self.threads, inputs_file=inputs)

    def counts(self, model: nn.Module) -> list[LayerCount]:
        """Parameters and multiply-accumulates of each layer; counted once a model."""
        if id(model) not in self.counted:
            self.counted[id(model)] = (model, count(model, self.task.example_inputs, self.task.dynamic))
        return self.counted[id(model)][1]

    def judge(self, last: Stage, good: Stage, *, changes: bool) -> tuple[bool, str]:
        """Whether a block pays, and if not why. A decision in the journal stands: timing does not repeat itself."""
        journal = self.space.journal()
        if last.key not in journal:
            why = self.why_not(last, good, changes=changes)
            self.space.decide(last.key, {"kept": not why, "why": why})
        decision = self.space.journal()[last.key]
        return decision["kept"], decision["why"]

    def why_not(self, last: Stage, good: Stage, *, changes: bool) -> str:
        """The reason to roll a block back, or "". Trainings alone are judged by the metric: speed and size stay."""
        metric = self.task.metric
        if self.budget.max_drop is not None and metric is not None and metric.name in last.facts["metrics"]:
            before, after = self.rows[0].metrics[metric.name], last.facts["metrics"][metric.name]
            drop = metric.drop(before, after)
            if drop > self.budget.max_drop:
                return (
                    f"{metric.name} dropped by {drop:.4f} to {after:.4f}, the budget allows {self.budget.max_drop:.4f}"
                )
        if not changes:
            return ""
        against = self.against[good.file]
        if against.verdict == "slower" and not self.budget.allow_slower:
            return f"slower than the last good stage: {against.value:.2f}x ({against.low:.2f} to {against.high:.2f})"
        if last.facts["size_bytes"] > good.facts["size_bytes"] and not self.budget.allow_larger:
            return f"the file is larger: {last.facts['size_bytes']} bytes after {good.facts['size_bytes']}"
        return ""

    def write(
        self, shipped: Stage, history: tuple[Plan, ...], baseline: Stage, recipe: Mapping[str, Any], key: str
    ) -> Artifact:
        """Read `test` once, write the report and the artifact, and swap it in."""
        files = [baseline.file, shipped.file]
        before, after = test_metrics(files, shipped.output, self.task, self.target, self.threads)
        kept = [row for row in self.rows if row.kept]
        figures = {field.name: getattr(kept[-1], field.name) for field in dataclasses.fields(report.Figures)}
        final = report.Final(
            **figures | {"metrics": after},
            stage=kept[-1].name,
            baseline_metrics=before,
            baseline_size_bytes=baseline.facts["size_bytes"],
        )
        ledger = report.Report(
            environment=environment(self.seed) | {"target": self.target.environment()},
            timing=report.Timing(batch_size=self.timing.batch_size, threads=self.threads, host=environment(0)["cpu"]),
            target=self.target.name,
            task={
                "metrics": [metric.name for metric in self.task.metrics],
                "higher_is_better": {metric.name: metric.higher_is_better for metric in self.task.metrics},
            },
            stages=tuple(self.rows),
            final=final,
            recipe=recipe,
        )
        folder = self.space.path / "artifact"
        program = capture(shipped.model, self.task) if shipped.quantized else None
        write_artifact(
            folder,
            target=self.target,
            file=shipped.file,
            tensors=named_tensors(shipped.floating),
            plans=history,
            report=ledger,
            program=program,
            output=shipped.output,
            run=key,
        )
        self.space.finish(folder)
        return open_artifact(self.space.out)


def source_of(item: Any) -> str:
    """The source of a class or function, or its name where there is none to read."""
    kind = item if inspect.isclass(item) or inspect.isfunction(item) else type(item)
    if kind.__module__.startswith("torch."):
        return f"{kind.__module__}.{kind.__qualname__}"
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a module for safetensors: every tensor once, under its first name."""
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors
