"""One run: steps become stages, stages become blocks, and a block that does not pay is rolled back."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from pared.artifact import MANIFEST, TENSORS, Artifact, open_artifact, read_manifest, write_artifact
from pared.errors import RefusedError
from pared.graph.capture import capture
from pared.graph.counts import LayerCount, count
from pared.measure.environment import environment, usable_cores
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.measure.memory import peak_memory
from pared.pipeline.arguments import told
from pared.pipeline.keys import next_key, run_key, start_key
from pared.pipeline.layers import layer_costs, layer_table, pruned
from pared.pipeline.stage import (
    Stage,
    finish_stage,
    output_index,
    read_facts,
    read_stage,
    test_id,
    test_metrics,
)
from pared.pipeline.workspace import Workspace, write_file
from pared.recipe import Budget, TimingSettings
from pared.report import data as report
from pared.seeding import seed_all
from pared.step import Context, Plan, Progress, Step, Target, settings_of
from pared.surgery import apply_edits
from pared.targets.sessions import summary_of, why_not_here
from pared.targets.worker import worker_command, write_inputs
from pared.task import Task
from pared.train.checkpoint import restore, snapshot

# Part of its size by which a file may be larger and count as no larger: names and numbers as text differ in length.
SIZE_SLACK = 0.001


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
    against: dict[Path, report.Speedup] = dataclasses.field(default_factory=dict)
    inputs: Path | None = None
    dense: nn.Module = dataclasses.field(init=False)

    @functools.cached_property
    def key(self) -> str:
        """Fingerprint of what every stage depends on."""
        return start_key(self.model, self.task, self.target.name, self.seed)

    @functools.cached_property
    def missing(self) -> str:
        """Why the target's files cannot run on this machine, or ""."""
        return why_not_here(self.target.name)

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
        self.dense = self.model
        for block, numbered in enumerate(self.blocks(steps), 1):
            last, plans = good, history
            for number, step in numbered:
                name = f"{number} {type(step).__name__}"
                self.progress("stages", number - 1, len(steps), name)
                with told(number, step):
                    last, plan = self.stage(last, number, steps[number - 1 :], plans, baseline)
                    plans = (*plans, plan)
                    self.rows.append(self.measure(last, name, step, block, [baseline, good], plans))
            kept, why = self.judge(last, good, changes=any(plan.edits for plan in plans[len(history) :]))
            if kept:
                good, history = last, plans
                if not any(plan.edits for plan in history):
                    self.dense = good.model  # trainings alone so far: still the uncompressed model
            self.rows = [
                dataclasses.replace(row, kept=kept, why=why or row.why) if row.block == block else row
                for row in self.rows
            ]
        self.progress("stages", len(steps), len(steps), "measure on test data")
        return self.write(good, history, baseline, recipe, run_key(self.key, steps, self.budget, self.timing))

    def blocks(self, steps: Sequence[Step]) -> Iterator[list[tuple[int, Step]]]:
        """A change with the trainings that follow it; trainings before any change are a block of their own."""
        block: list[tuple[int, Step]] = []
        for number, step in enumerate(steps, 1):
            if block and not step.trains:
                yield block
                block = []
            block.append((number, step))
        yield block

    def finished(self, steps: Sequence[Step]) -> Artifact | None:
        """The artifact that this very run has written already, or None."""
        if not (self.space.out / MANIFEST).exists():
            return None
        manifest = read_manifest(self.space.out)
        # Test data are read again only where the run is over: a change in them shows, and decides nothing else.
        if manifest["run"] != run_key(self.key, steps, self.budget, self.timing):
            return None
        if not self.missing and manifest["test"] != test_id(self.task, self.seed):
            return None
        self.space.clear()
        return open_artifact(self.space.out, trust=True)  # whoever resumes a run trusts what it left

    def baseline(self) -> Stage:
        """The model as it came in, exported."""
        self.progress("stages", 0, 0, "baseline")
        self.task.example_inputs.arrays()  # a dtype that files do not take is told at once
        file = self.space.stage(self.key) / self.target.filename
        self.counts(self.model)  # captures the model first: what cannot be exported says so, with the line of its code
        stage = Stage(
            key=self.key,
            model=self.model,
            floating=self.model,
            plan=None,
            file=file,
            output=output_index(self.model, self.task),
            facts={"seconds": 0.0},
        )
        found = read_facts(file.parent)
        if found is not None:
            stage.facts = found
        else:
            finish_stage(stage, None, file, self.task, self.target, self.threads)
        return stage

    def stage(
        self, before: Stage, number: int, ahead: Sequence[Step], history: tuple[Plan, ...], baseline: Stage
    ) -> tuple[Stage, Plan]:
        """The stage after the first of the steps ahead: from the workspace where it is finished, else planned, applied,
        exported, checked."""
        step, *later = ahead
        key = next_key(before.key, step)
        folder = self.space.stage(key)
        seed_all(self.task, self.seed, number)
        ctx = Context(
            task=self.task,
            target=self.target,
            work=self.space.scratch(),
            dense=self.dense,
            seed=self.seed,
            history=history,
            later=tuple(later),
            progress=self.progress,
            batch_size=self.timing.batch_size,
            threads=self.threads,
            floating=before.floating,
        )
        file = folder / self.target.filename
        found = read_stage(folder)
        # A change may have left all to later steps, which need not be the same ones now: it is planned anew.
        if found is not None and (found[0].edits or step.trains):
            plan, facts = found
            model = self.replay(before.model, step, plan, ctx, folder)
            return after(before, key, model, plan, file, facts, ctx), plan
        start = time.monotonic()
        while True:
            plan = step.plan(before.model, ctx)
            model = step.apply(before.model, plan, ctx)
            stage = after(before, key, model, plan, file, {"seconds": time.monotonic() - start}, ctx)
            if stage.floating is model:
                write_file(folder / TENSORS, save(snapshot(model)))
            try:
                finish_stage(stage, before.model, baseline.file, self.task, self.target, self.threads)
            except RefusedError as error:
                # Once more without the layers that the runtime does not take, unless that has been tried already.
                refused = tuple(layer for layer in error.layers if layer not in ctx.refused)
                if not refused:
                    raise
                ctx = dataclasses.replace(ctx, refused=(*ctx.refused, *refused))
                seed_all(self.task, self.seed, number)
            else:
                return stage, plan

    def replay(self, before: nn.Module, step: Step, plan: Plan, ctx: Context, folder: Path) -> nn.Module:
        """The model of a finished stage: its edits on the model before, then its tensors."""
        if any(edit.kind == "quantize" for edit in plan.edits):
            return step.apply(before, plan, ctx)
        model = apply_edits(before, plan.edits, {})
        restore(model, load_file(folder / TENSORS))
        return model

    def measure(
        self, stage: Stage, name: str, step: Step | None, block: int, others: list[Stage], plans: Sequence[Plan] = ()
    ) -> report.Stage:
        """Time a stage's file in turn with the baseline's and the last good one's, and write its row."""
        files = list(dict.fromkeys([*(other.file for other in others), stage.file]))
        self.progress("measure", 0, 1, name)
        timed = {} if self.missing else self.timed(files, stage)
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
            layers=layer_table(counts, plans, others[0].floating, stage.floating),
            measured=not self.missing,
            why=self.missing and self.missing + ("; accuracy and speed could not be judged" if block else ""),
            warnings=tuple(plan.facts.get("warnings", ())) if plan else (),
            sensitivity=layer_costs(plan),
            pruned=pruned(plan, others[0].floating),
            metrics=stage.facts["metrics"],
            **timed,
            size_bytes=stage.facts["size_bytes"],
            params=stage.facts["params"],
            nonzero_params=stage.facts["nonzero_params"],
            macs=sum(row.macs for row in counts),
            parity=stage.agreement("parity"),
            fidelity=stage.agreement("fidelity"),
            without_vnni=stage.without_vnni,
        )

    def timed(self, files: list[Path], stage: Stage) -> dict[str, Any]:
        """What running a stage's file tells: latency, speed-up against the first of the files, peak memory."""
        commands = [self.command(file) for file in files]
        times = dict(zip(files, time_in_turn(commands, rounds=self.timing.rounds), strict=True))
        self.against = {file: speedup(times[file], times[stage.file], seed=self.seed) for file in files}
        return {
            "latency_ms": percentiles(times[stage.file]),
            "speedup": self.against[files[0]] if stage.file != files[0] else None,
            "peak_memory_bytes": peak_memory(commands[-1]),
        }

    def command(self, file: Path) -> list[str]:
        """The worker that runs a file on one call's inputs."""
        if self.inputs is None:
            # Written by each run anew: a resumed one may have another batch size, or find half a file.
            size, names = self.timing.batch_size, [spec.name for spec in self.target.open(file, threads=1).inputs]
            arrays = [np.concatenate([array] * size)[:size] for array in self.task.example_inputs.arrays(names)]
            self.inputs = self.space.path / "inputs.npz"
            write_inputs(self.inputs, arrays)
        return worker_command(self.target.name, file, threads=self.threads, inputs_file=self.inputs, trust=True)

    def counts(self, model: nn.Module) -> list[LayerCount]:
        """Parameters and multiply-accumulates of each layer; counted once a model."""
        if id(model) not in self.counted:
            self.counted[id(model)] = (model, count(model, self.task.example_inputs, self.task.dynamic))
        return self.counted[id(model)][1]

    def judge(self, last: Stage, good: Stage, *, changes: bool) -> tuple[bool, str]:
        """Whether a block pays, and if not why. A decision in the journal stands: timing does not repeat itself."""
        key = run_key(last.key, (), self.budget, self.timing)
        if key not in self.space.journal():
            why = self.why_not(last, good, changes=changes)
            self.space.decide(key, {"kept": not why, "why": why})
        decision = self.space.journal()[key]
        return decision["kept"], decision["why"]

    def why_not(self, last: Stage, good: Stage, *, changes: bool) -> str:
        """The reason to roll a block back, or "". Trainings alone are judged by the metric: speed and size stay."""
        metric = self.task.metric
        if self.budget.max_drop is not None and metric is not None and metric.name in last.facts["metrics"]:
            before, after = self.rows[0].metrics[metric.name], last.facts["metrics"][metric.name]
            drop = metric.drop(before, after)
            if not drop <= self.budget.max_drop:  # so that NaN is no pass
                return (
                    f"{metric.name} dropped by {drop:.4f} to {after:.4f}, the budget allows {self.budget.max_drop:.4f}"
                )
        if not changes:
            return ""
        against = self.against.get(good.file)  # None where the runtime cannot run here
        if against is not None and against.verdict == "slower" and not self.budget.allow_slower:
            return f"slower than the last good stage: {against.value:.2f}x ({against.low:.2f} to {against.high:.2f})"
        more = last.facts["size_bytes"] - good.facts["size_bytes"]
        if more > SIZE_SLACK * good.facts["size_bytes"] and not self.budget.allow_larger:
            return f"the file is larger: {last.facts['size_bytes']} bytes after {good.facts['size_bytes']}"
        return ""

    def write(
        self, shipped: Stage, history: tuple[Plan, ...], baseline: Stage, recipe: Mapping[str, Any], key: str
    ) -> Artifact:
        """Read `test` once, write the report and the artifact, and swap it in."""
        seed_all(self.task, self.seed, 0)
        (before, after), test = self.judged(baseline, shipped)
        kept = [row for row in self.rows if row.kept]
        figures = {field.name: getattr(kept[-1], field.name) for field in dataclasses.fields(report.Figures)}
        final = report.Final(
            **figures | {"metrics": after},
            stage=kept[-1].name,
            baseline_metrics=before,
            baseline_size_bytes=baseline.facts["size_bytes"],
        )
        ledger = report.Report(
            environment=environment(self.seed) | {"session": self.session(shipped.file)},
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
            run={"run": key, "test": test},
        )
        self.space.finish(folder)
        return open_artifact(self.space.out, trust=True)  # this very run has made it

    def judged(self, baseline: Stage, shipped: Stage) -> tuple[list[dict[str, float]], str]:
        """Metrics on `test` of the baseline's file and of what ships, and the data's fingerprint."""
        if self.missing:
            return [{}, {}], ""
        return test_metrics([baseline.file, shipped.file], shipped.output, self.task, self.target, self.threads)

    def session(self, file: Path) -> dict[str, str]:
        """How the runtime was set up, or why it was not, and what the export's own notes say."""
        if self.missing:
            return {"not_run": self.missing} | summary_of(self.target.name, file)
        return dict(self.target.open(file, threads=self.threads).options)


def after(
    before: Stage, key: str, model: nn.Module, plan: Plan, file: Path, facts: dict[str, Any], ctx: Context
) -> Stage:
    """The stage that a step makes of the one before."""
    quantizes = any(edit.kind == "quantize" for edit in plan.edits)
    floating = ctx.memo.pop("floating", before.floating) if quantizes else model
    return Stage(key=key, model=model, floating=floating, plan=plan, file=file, output=before.output, facts=facts)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a module for safetensors: every tensor once, under its first name."""
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors
