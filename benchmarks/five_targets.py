"""One classifier, trained on Fashion-MNIST and quantized to int8 for all five targets: what each exported file scores.

The demo's network and training. Accuracy is that of the exported file in its own runtime, on the 10,000 test images,
where the runtime can run here; an engine that cannot is built, looked into, and not given a figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from itertools import islice
from pathlib import Path

import torch
from harness import Results
from torch import nn

import pared
from pared.data.tasks import fashion_mnist
from pared.errors import ParedError
from pared.pipeline.stage import runner
from pared.recipe import Budget, TimingSettings
from pared.seeding import isolated, seed_all
from pared.step import Context
from pared.targets import TARGETS, find_target
from pared.targets.sessions import why_not_here
from pared.task import Batch, Task
from pared.train.step import Train
from pared.zoo import MODELS

ORDER = ("onnxruntime", "openvino", "executorch", "torch", "tensorrt")
ARCHITECTURES = (75, 86, 89, 120)


@dataclasses.dataclass
class Part:
    """The first batches of some data."""

    data: object
    batches: int

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(islice(iter(self.data), self.batches))  # type: ignore[call-overload]


def trained(task: Task, epochs: int) -> nn.Module:
    """The demo's network, trained as the demo does."""
    with isolated(task), tempfile.TemporaryDirectory() as work:
        seed_all(task, 0, 0)
        torch.manual_seed(0)
        model = MODELS["fashion_cnn"]()
        step = Train(epochs=epochs, lr=0.05)
        ctx = Context(task=task, target=find_target("onnxruntime"), work=Path(work), dense=model, seed=0)
        return step.apply(model, step.plan(model, ctx), ctx).eval()


def accuracy_of(artifact: pared.Artifact, test: list[Batch]) -> float:
    """The share of test images that an exported file puts into their class."""
    target = find_target(artifact.report.target)
    predict = runner(target.open(artifact.file, threads=artifact.report.timing.threads), artifact.manifest["output"])
    right = sum(int((predict(batch.inputs).argmax(1) == batch.target).sum()) for batch in test)
    return right / sum(batch.inputs.size for batch in test)


def measure(name: str, model: nn.Module, task: Task, test: list[Batch]) -> dict[str, object]:
    """The row of one target."""
    # No roll back: all five are to be compared, whatever this machine thinks of their speed.
    budget = Budget(allow_slower=True, allow_larger=True)
    with tempfile.TemporaryDirectory() as folder:
        artifact = pared.compress(
            model,
            [pared.QuantizeStatic()],
            dataclasses.replace(task, test=None),
            target=name,
            out=Path(folder) / name,
            budget=budget,
            timing=TimingSettings(rounds=16),
        )
        last = artifact.report.stages[-1]
        row: dict[str, object] = {"target": name, "measured": last.measured, "size_bytes": last.size_bytes}
        if last.measured:
            assert last.parity is not None and last.latency_ms is not None and last.speedup is not None
            row |= {
                "accuracy": accuracy_of(artifact, test),
                "parity_db": last.parity.sqnr_db,
                "p50_ms": last.latency_ms.p50,
                "speedup": last.speedup.value,
                "low": last.speedup.low,
                "high": last.speedup.high,
            }
        else:
            row |= {"why": last.why}
        notes = artifact.path / "model.json"
        engines = json.loads(notes.read_text(encoding="utf8")).get("engines", {}) if notes.is_file() else {}
        for engine in engines.values():
            for number in engine["architectures"]:
                row[f"sm_{number}"] = engine.get("refused", "built")
                row[f"sm_{number}_int8_layers"] = engine.get("int8_layers", 0)
        row["layers"] = len(last.changed)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: does it run?")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as scratch:
        run(Results("five_targets", folder=Path(scratch)) if quick else Results("five_targets"), quick)


def run(results: Results, quick: bool) -> None:
    """Every target that is there, then the claims."""
    # Trained on the embedded images, which takes a minute; judged on all 10,000 test images of the full set.
    task = fashion_mnist()
    if quick:
        # Trained enough that its outputs differ from sample to sample: else every sample rounds to the same side.
        sizes = {"calibration": 4, "train": 60, "validation": 4, "test": 4}
        small = {role: Part(getattr(task, role), size) for role, size in sizes.items()}
        task = dataclasses.replace(task, **small)
    test = list((task if quick else fashion_mnist(full=True)).batches("test"))
    model = trained(task, epochs=1 if quick else 2)
    for name in ORDER:
        if results.done(target=name) or name not in TARGETS:
            continue
        try:
            results.add(measure(name, model, task, test))
        except ParedError as error:
            results.add({"target": name, "measured": False, "error": str(error)})
    claims(results)


def claims(results: Results) -> None:
    """The lines of the issue that this subject answers."""
    rows = {str(row["target"]): row for row in results.rows}
    here = [name for name in ORDER if name in rows and "accuracy" in rows[name]]
    scores = [float(rows[name]["accuracy"]) for name in here]
    wanted = [name for name in ORDER if name not in TARGETS or not why_not_here(name)]
    results.claim(3, "five targets: runtimes that run here and gave a figure", len(here), ">=", len(wanted))
    results.claim(3, "five targets: largest difference in accuracy", max(scores) - min(scores), "<=", 0.003)
    gates = sum("error" not in row for row in rows.values())
    results.claim(3, "five targets: exports that passed the parity gate or cannot run here", gates, ">=", len(ORDER))
    engine = rows.get("tensorrt", {})
    built = sum(engine.get(f"sm_{number}") == "built" for number in ARCHITECTURES)
    results.claim(3, "TensorRT engines built for sm_75, sm_86, sm_89, sm_120", built, ">=", len(ARCHITECTURES))
    layers = int(engine.get("layers", 0) or 1)
    for number in ARCHITECTURES:
        share = int(engine.get(f"sm_{number}_int8_layers", 0)) / layers
        results.claim(3, f"TensorRT, sm_{number}: share of quantized layers that take int8", share, ">=", 1.0)


if __name__ == "__main__":
    main()
