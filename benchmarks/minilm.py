"""MiniLM-L6 to int8, at run time and static: pared beside ONNX Runtime's `quantize_dynamic`.

    python benchmarks/minilm.py SDIST [--quick]

SDIST is the source distribution of vaderSentiment (see `minilm_model.py`). Judged on movie snippets that nothing was
chosen on: Spearman's correlation of all pairwise similarities with those of the float module. Latency in turn, batch 1.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Results
from minilm_model import LENGTH, Tokenizer, chosen, embeddings, minilm, minilm_task, ordered, snippets
from torch import nn

import pared
from pared.errors import ParedError
from pared.measure.environment import version_of
from pared.measure.fidelity import Comparison
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.quantize.correction import CorrectBias
from pared.quantize.smooth import Migrate
from pared.step import Context, Step
from pared.targets import find_target
from pared.targets.sessions import open_session
from pared.targets.worker import worker_command, write_inputs
from pared.task import Task

CALIBRATION, SEEN, JUDGED = 128, 250, 250
LENGTHS, THREADS = (16, 64, 128), (1, 2)
DYNAMIC, STATIC, RIVAL = "pared dynamic", "pared static", "quantize_dynamic"

STEPS: dict[str, Step] = {
    DYNAMIC: pared.QuantizeDynamic(),
    "pared dynamic, per tensor": pared.QuantizeDynamic(activations="per_tensor"),
    # Chosen on the SEEN snippets, which are not judged on.
    STATIC: pared.QuantizeStatic(repairs=[Migrate(alpha=0.7), CorrectBias()], ranges="mse"),
    f"{STATIC}, defaults": pared.QuantizeStatic(),
}


def make_pared(step: Step, model: nn.Module, task: Task, file: Path) -> None:
    target = find_target("onnxruntime")
    ctx = Context(task=task, target=target, work=file.parent, dense=model)
    target.export(step.apply(model, step.plan(model, ctx), ctx), task, file)


def make_float(model: nn.Module, task: Task, file: Path) -> None:
    """The float file, as PyTorch exports it: where the rival starts."""
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = task.example_inputs.kwargs
    shapes = dict.fromkeys(inputs, free)
    program = torch.onnx.export(model, (), kwargs=dict(inputs), dynamo=True, dynamic_shapes=shapes, verbose=False)
    if program is None:
        raise SystemExit("the exporter returned nothing")
    program.save(str(file))


def make_rival(model: nn.Module, task: Task, file: Path, **settings: Any) -> None:
    """Export, then ONNX Runtime's own tool."""
    from onnxruntime.quantization import quantize_dynamic

    exported = file.with_name("float.onnx")
    make_float(model, task, exported)
    quantize_dynamic(exported, file, **settings)


MAKERS: dict[str, Callable[[nn.Module, Task, Path], None]] = {
    **{name: functools.partial(make_pared, step) for name, step in STEPS.items()},
    RIVAL: make_rival,
    f"{RIVAL}, per channel": functools.partial(make_rival, per_channel=True),
    "float": make_float,
}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of values without ties to speak of: Pearson's of their ranks."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def similarities(vectors: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of unit vectors."""
    product = vectors.astype(np.float64) @ vectors.T
    found: np.ndarray = product[np.triu_indices(len(vectors), 1)]
    return found


def judge(results: Results, tool: str, file: Path, batches: list[dict[str, torch.Tensor]], vectors: np.ndarray) -> None:
    """Size, and closeness to the float module."""
    found = np.concatenate(list(ordered(open_session("onnxruntime", file, threads=2), batches)))
    comparison = Comparison()
    comparison.update(vectors, found)
    results.add(
        {
            "what": "file",
            "tool": tool,
            "size_bytes": file.stat().st_size,
            "spearman": spearman(similarities(vectors), similarities(found)),
            "sqnr_db": comparison.result().sqnr_db,
        }
    )


def time_files(results: Results, files: dict[str, Path], folder: Path, seconds: float) -> None:
    """Latency of all files in turn; ratios are each file's time over the rival's."""
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for threads in THREADS:
            if results.done(what="latency", length=length, threads=threads, tool="float") is not None:
                continue
            example = {
                "input_ids": rng.integers(1000, 29000, (1, length)),
                "attention_mask": np.ones((1, length), np.int64),
            }
            commands = []
            for tool, file in files.items():
                names = [spec.name for spec in open_session("onnxruntime", file, threads=1).inputs]
                inputs = folder / f"{list(files).index(tool)}.npz"
                write_inputs(inputs, [example[name] for name in names])
                commands.append(worker_command("onnxruntime", file, threads=threads, inputs_file=inputs))
            times = dict(zip(files, time_in_turn(commands, budget_s=seconds), strict=True))
            for tool, own in times.items():
                ratio = speedup(own, times[RIVAL])
                results.add(
                    {
                        "what": "latency",
                        "tool": tool,
                        "length": length,
                        "threads": threads,
                        "p50_ms": percentiles(own).p50,
                        "over_rival": ratio.value,
                        "low": ratio.low,
                        "high": ratio.high,
                    }
                )


def claim(results: Results) -> None:
    """The lines of issue 3. A ratio of times counts by the end of its interval that favours the bound."""
    for tool in (DYNAMIC, STATIC):
        row = results.done(what="file", tool=tool)
        if row is not None:
            what = f"MiniLM-L6, {tool}: Spearman's correlation of similarities with float"
            results.claim(3, what, row["spearman"], ">=", 0.995)
        for length in LENGTHS:
            timed = [row for row in results.rows if row["what"] == "latency" and row["tool"] == tool]
            slowest = max((row for row in timed if row["length"] == length), key=lambda row: row["low"])
            what = f"{tool}, length {length}: latency over {RIVAL}'s, low end, {slowest['threads']} threads"
            results.claim(3, what, slowest["low"], "<=", 1.0)


def run(sdist: Path, *, quick: bool) -> None:
    """Everything, from the snippets to the claims."""
    calibration, others = chosen(snippets(sdist), CALIBRATION, SEEN + JUDGED)
    judged = others[SEEN:][: 64 if quick else JUDGED]
    tokenizer, model = Tokenizer(), minilm()
    task = minilm_task(tokenizer.batches(calibration))
    batches = tokenizer.batches(judged)
    vectors = embeddings(model, batches)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = Results("minilm", folder=folder if quick else RESULTS)
        results.environment["rivals"] = {name: version_of(name) for name in ("onnxruntime", "transformers")}
        results.environment["tokens_at_most"] = LENGTH
        files = {}
        for index, (tool, maker) in enumerate(MAKERS.items()):
            files[tool] = folder / str(index) / "model.onnx"
            files[tool].parent.mkdir()
            maker(model, task, files[tool])
            if results.done(what="file", tool=tool) is None:
                judge(results, tool, files[tool], batches, vectors)
        time_files(results, files, folder, 2.0 if quick else 24.0)
        claim(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--quick", action="store_true", help="few snippets, little time for latency, no JSON")
    options = parser.parse_args()
    try:
        run(options.sdist, quick=options.quick)
    except ParedError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
