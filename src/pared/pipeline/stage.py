"""One stage of a run: the model after a step, exported, checked against its PyTorch model, and measured as a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import ModelError
from pared.graph.capture import evaluating
from pared.graph.counts import nonzero_params
from pared.identity import identity
from pared.measure.fidelity import Comparison
from pared.measure.parity import FLOAT_FLOOR_DB, QUANTUM_FLOOR_DB, SLACK_DB, check_parity
from pared.metrics import Metric
from pared.pipeline.parting import where_they_part
from pared.pipeline.without_vnni import emulate_without_vnni
from pared.pipeline.workspace import write_json
from pared.report.data import Agreement, WithoutVnni, finite
from pared.seeding import seed_all
from pared.step import Plan, Session, Target
from pared.targets.sessions import size_of, why_not_here
from pared.task import FIRST, Batch, Inputs, Role, Task, call, content_of, evaluate, evaluate_all

PARITY_SAMPLES = 256


@dataclasses.dataclass(kw_only=True)
class Stage:
    """A model on its way, with its exported file.

    Attributes:
        key: Fingerprint of all that went into it.
        model: After the step; a quantized program where `quantized`.
        floating: The last module before activation quantization: what can be trained on and reloaded.
        plan: What the step changed; None for the baseline.
        file: The exported file.
        output: Which of the file's outputs `Task.output` picks.
        facts: What `stage.json` holds: parity, fidelity, metrics, size, seconds.
    """

    key: str
    model: nn.Module
    floating: nn.Module
    plan: Plan | None
    file: Path
    output: int
    facts: dict[str, Any]

    @property
    def quantized(self) -> bool:
        """True where activations are quantized: the model is an exported program."""
        return self.model is not self.floating

    def agreement(self, name: str) -> Agreement | None:
        """Parity or fidelity, as measured; None where the runtime cannot run here."""
        return pydantic.TypeAdapter(Agreement | None).validate_python(self.facts[name])

    @property
    def without_vnni(self) -> WithoutVnni | None:
        """What the file scores without VNNI, where that differs."""
        return pydantic.TypeAdapter(WithoutVnni | None).validate_python(self.facts.get("without_vnni"))


def output_index(model: nn.Module, task: Task) -> int:
    """Which of the outputs, flattened as in the exported file, the task looks at. Raises: ModelError."""
    with torch.no_grad(), evaluating(model):
        raw = call(model, task.example_inputs)
    picked = task.pick(raw)
    leaves = [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor)]
    for index, leaf in enumerate(leaves):
        if leaf is picked:
            return index
    raise ModelError(
        "Task(output=...) must pick one of the model's outputs as it is, not compute a new tensor from them"
    )


def runner(session: Session, output: int) -> Any:
    """A prediction function of an exported file."""
    names = [spec.name for spec in session.inputs]
    return lambda inputs: torch.from_numpy(session.run(inputs.arrays(names))[output])


def judging_data(task: Task) -> tuple[Role | None, Iterator[Batch]]:
    """What fidelity and parity are taken on: validation, else calibration, else the example inputs; never test."""
    roles: tuple[Role, ...] = ("validation", "calibration", "train")
    for role in roles:
        if getattr(task, role) is not None:
            return role, task.batches(role, "measuring")
    return None, iter([Batch(task.example_inputs, None)])


def fidelity_and_metrics(
    session: Session, baseline: Session, task: Task, output: int, metrics: Sequence[Metric]
) -> tuple[Agreement, dict[str, float]]:
    """How far a file's outputs are from the baseline file's, and its metrics on `validation`, in one pass."""
    comparison = Comparison()
    predict, reference = runner(session, output), runner(baseline, output)
    role, batches = judging_data(task)

    def compared(inputs: Inputs) -> Tensor:
        found: Tensor = predict(inputs)
        comparison.update(reference(inputs).numpy(), found.numpy())
        return found

    measured: dict[str, float] = {}
    if role == "validation" and metrics:
        measured = evaluate(compared, batches, metrics)
    else:
        for batch in batches:
            compared(batch.inputs)
    return comparison.result(), measured


def parity(session: Session, stage: Stage, before: nn.Module | None, task: Task, target: Target) -> Agreement:
    """The file against its own PyTorch model, judged.

    A float file must reach FLOAT_FLOOR_DB. Rounding to integers is chaotic: a difference in the last bit of an
    accumulator flips a whole quantum somewhere, and the flip spreads, so that two faithful runs of one integer network
    differ by almost as much as quantization itself costs. So a quantized file may be no further from its PyTorch model
    than that model is from its float original, give or take SLACK_DB, and need be no nearer than QUANTUM_FLOOR_DB:
    beyond that, something else than rounding is at work.

    Raises:
        ParityError: The file is further off; names the layer where the two part.
    """
    own, cost = Comparison(), Comparison()
    predict = runner(session, stage.output)
    seen = 0
    with torch.no_grad(), evaluating(stage.model):
        for batch in judging_data(task)[1]:
            model_output = task.pick(call(stage.model, batch.inputs)).numpy()
            own.update(model_output, predict(batch.inputs).numpy())
            if stage.quantized and before is not None:
                with evaluating(before):
                    cost.update(task.pick(call(before, batch.inputs)).numpy(), model_output)
            seen += batch.inputs.size
            if seen >= PARITY_SAMPLES:
                break
    floor = FLOAT_FLOOR_DB
    if stage.quantized and before is not None:
        own_cost = cost.result().sqnr_db
        floor = min(math.inf if own_cost is None else own_cost - SLACK_DB, QUANTUM_FLOOR_DB)
    found = own.result()
    name = stage.plan.step if stage.plan else "baseline"
    parted = functools.partial(where_they_part, stage.model, task, target, batch.inputs, floor)
    check_parity(found, floor_db=floor, where=name, parted=parted)
    return found


def finish_stage(
    stage: Stage, before: nn.Module | None, baseline: Path, task: Task, target: Target, threads: int
) -> None:
    """Export a stage, pass it through the parity gate, take what does not depend on time, and write it all down.

    Where the runtime cannot run here, the file is written all the same, and what running it would tell stays unknown.
    """
    folder = stage.file.parent
    target.export(stage.model, task, stage.file)
    facts: dict[str, Any] = {"parity": None, "fidelity": None, "metrics": {}, "without_vnni": None}
    if not why_not_here(target.name):
        session = target.open(stage.file, threads=threads)
        facts["parity"] = dataclasses.asdict(parity(session, stage, before, task, target))
        reference = target.open(baseline, threads=threads)
        fidelity, facts["metrics"] = fidelity_and_metrics(session, reference, task, stage.output, task.metrics)
        facts["fidelity"] = dataclasses.asdict(fidelity)
        role, batches = judging_data(task)
        judged = tuple(task.metrics) if role == "validation" else ()
        if stage.quantized:
            facts["without_vnni"] = emulate_without_vnni(stage.model, target, task, batches, judged)
    parameters = {id(p): p for p in stage.floating.parameters()}.values()
    stage.facts |= facts | {
        "size_bytes": size_of(target.name, stage.file),
        "params": sum(parameter.numel() for parameter in parameters),
        "nonzero_params": nonzero_params(stage.floating),
    }
    if stage.plan is not None:
        write_json(folder / "plan.json", stage.plan.to_json())
    write_json(folder / "stage.json", finite(stage.facts))


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Facts of a finished stage, or None. A metric that was NaN, which JSON has not, is NaN again."""
    if not (folder / "stage.json").exists():
        return None
    facts: dict[str, Any] = json.loads((folder / "stage.json").read_text(encoding="utf8"))
    metrics = {name: math.nan if value is None else value for name, value in facts["metrics"].items()}
    return facts | {"metrics": metrics}


def read_stage(folder: Path) -> tuple[Plan, dict[str, Any]] | None:
    """Plan and facts of a finished stage, or None."""
    facts = read_facts(folder)
    if facts is None:
        return None
    plan = json.loads((folder / "plan.json").read_text(encoding="utf8"))
    return Plan.from_json(plan), facts


def test_metrics(
    files: Sequence[Path], output: int, task: Task, target: Target, threads: int
) -> tuple[list[dict[str, float]], str]:
    """Metrics of exported files on `test` data, and the data's fingerprint. All files see one and the same reading."""
    if task.test is None or not task.metrics:
        return [{} for _ in files], ""
    predictors = {file: runner(target.open(file, threads=threads), output) for file in files}
    first: list[Batch] = []
    found = evaluate_all(list(predictors.values()), noted(task.batches("test"), first), task.metrics)
    by_file = dict(zip(predictors, found, strict=True))
    return [by_file[file] for file in files], digest_of(first)


def noted(batches: Iterable[Batch], first: list[Batch]) -> Iterator[Batch]:
    """The same batches, the first of them kept."""
    for batch in batches:
        if len(first) < FIRST:
            first.append(batch)
        yield batch


def digest_of(batches: Iterable[Batch]) -> str:
    return identity([content_of(batch) for batch in batches])


def test_id(task: Task, seed: int) -> str:
    """The fingerprint that `test_metrics` gives, from the first batches alone."""
    if task.test is None or not task.metrics:
        return ""
    seed_all(task, seed, 0)
    return digest_of(task.batches("test", limit=FIRST))
