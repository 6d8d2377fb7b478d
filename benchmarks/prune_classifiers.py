"""Half of the channels of every torchvision classifier that fits in memory: pared beside Torch-Pruning.

    python benchmarks/prune_classifiers.py NAMES [--tool pared] [--only resnet18 vgg11] [--quick]

NAMES is a text file, one torchvision model a line. The weights are random. Each tool prunes by a ratio of 0.5, layer by
layer, in a fresh process of one thread, in 120 seconds of its processor time (so that nobody else on the machine
decides); then the pruned model must run, be written as ONNX, and agree with its file in ONNX Runtime. pared is told
nothing of a model. Torch-Pruning gets what its own examples find in any model by looking (the classifier, and how many
heads a `qkv` has), and for VisionTransformer the hint of its own script. Rows are kept from run to run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from classifiers import input_size, parameters, with_statistics
from harness import RESULTS, Results
from torch import Tensor, nn

import pared
from pared.errors import ParedError
from pared.measure.environment import version_of
from pared.measure.fidelity import Comparison
from pared.measure.worker import peak_bytes

FOLDERS = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]
sys.path[:0] = FOLDERS

# Each model gets a fresh process, copied from one that has imported what all of them need.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["prune_classifiers", "onnxruntime", "onnxscript", "pared.targets.onnxruntime"]
OWN, RIVAL = "pared", "torch-pruning"
RATIO, SHARE = 0.5, 0.6
# Processor time of one prune, in seconds. The issue sets 120 for the classifiers and none for timm, whose vision
# encoders of language models see images of 768 pixels.
LIMITS_S = {"torchvision": 120, "timm": 600}
EXPORT_LIMIT_S, PATIENCE_S = 600, 6 * 3600
LEAST_SQNR_DB = 60.0  # float32 against float32
QUICK = ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5")
AUXILIARY = ("googlenet", "inception_v3")
ISSUE = 5


class OverLimitError(BaseException):
    """Processor time is used up. No `Exception`, so that no tool takes it for a failure of its own to go on from."""


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Raise `OverLimitError` once this process has computed for so long."""

    def stop(*_: Any) -> None:
        raise OverLimitError(f"{what} took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again each second: a callback may have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- subjects ----------------------------------------------------------------------------------------------------


def torchvision_subject(name: str) -> tuple[nn.Module, int]:
    """The model, without auxiliary classifiers, as published weights load, and the side of its images."""
    from torchvision_models import schemas

    schemas()
    from torchvision.models import get_model

    settings = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    return get_model(name, **settings).eval(), input_size(name)


def timm_subject(name: str) -> tuple[nn.Module, int]:
    """The same of timm, which lies beside torchvision and imports it."""
    from torchvision_models import schemas

    schemas()
    import timm

    model = timm.create_model(name).eval()
    return model, timm.data.resolve_model_data_config(model)["input_size"][-1]


SUBJECTS: Mapping[str, Callable[[str], tuple[nn.Module, int]]] = {
    "torchvision": torchvision_subject,
    "timm": timm_subject,
}


# --- tools -------------------------------------------------------------------------------------------------------


def prune_pared(model: nn.Module, x: Tensor, work: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The step alone, default settings but for the ratio."""
    from pared.step import Context
    from pared.targets import find_target

    task = pared.Task(example_inputs=(x[:1],))
    ctx = Context(task=task, target=find_target("onnxruntime"), work=work, dense=model)
    step = pared.PruneChannels(ratio=RATIO)
    plan = step.plan(model, ctx)
    pruned = step.apply(model, plan, ctx)
    reasons = collections.Counter(skip.reason for skip in plan.skips)
    facts = {name: plan.facts[name] for name in ("difference", "exact") if name in plan.facts}
    return pruned, {"changed": len(plan.changed), "reasons": dict(reasons.most_common(8)), **facts}


def last_layers(model: nn.Module, output: torch.Size) -> list[nn.Module]:
    """Every layer that gives as many numbers as there are classes; of a model that gives features, the last."""
    width = output[1] if len(output) in (2, 4) else output[-1]
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    found = [
        layer for layer in layers if width in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    ]
    return found if len(output) == 2 else found[-1:]


def prune_rival(model: nn.Module, x: Tensor, _work: Path) -> tuple[nn.Module, dict[str, Any]]:
    """As its README does with any model: magnitudes, every group by the same ratio, all layers but the classifier.

    torchvision's VisionTransformer alone gets what its own script of torchvision's models has for it: widths that are
    multiples of the number of heads, and the new width written into `hidden_dim`.
    """
    import torch_pruning as tp

    kept = last_layers(model, model(x[:1]).shape)
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            kept.append(module)  # of nn.MultiheadAttention; also its script's
        elif not isinstance(module, nn.MultiheadAttention) and hasattr(module, "num_heads"):
            found = (getattr(module, name, None) for name in ("qkv", "qkv_proj"))
            heads |= {part: module.num_heads for part in found if isinstance(part, nn.Module)}
    hinted = hasattr(model, "hidden_dim") and hasattr(model, "conv_proj")
    pruner = tp.pruner.BasePruner(
        model,
        x[:1],
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=RATIO,
        global_pruning=False,
        ignored_layers=kept,
        num_heads=heads,
        round_to=model.encoder.layers[0].num_heads if hinted else None,
    )
    pruner.step()
    if hinted:
        model.hidden_dim = model.conv_proj.out_channels
    return model, {"hinted": True} if hinted else {}


TOOLS: Mapping[str, Callable[[nn.Module, Tensor, Path], tuple[nn.Module, dict[str, Any]]]] = {
    OWN: prune_pared,
    RIVAL: prune_rival,
}


# --- one row -----------------------------------------------------------------------------------------------------


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def exported(pruned: nn.Module, x: Tensor, work: Path) -> dict[str, Any]:
    """The pruned model as an ONNX file, and how far ONNX Runtime's outputs are from its own."""
    from pared.targets import find_target

    start, target, file = time.perf_counter(), find_target("onnxruntime"), work / "model.onnx"
    target.export(pruned, pared.Task(example_inputs=(x[:1],)), file)
    comparison = Comparison()
    with torch.no_grad():
        comparison.update(pruned(x).numpy(), target.open(file, threads=1).run([x.numpy()])[0])
    found = comparison.result().sqnr_db
    row = {"export_seconds": time.perf_counter() - start, "sqnr_db": found, "file_bytes": file.stat().st_size}
    return row | {"exported_ok": found is None or found >= LEAST_SQNR_DB}


def attempt(family: str, name: str, tool: str, work: Path) -> None:
    """One model and one tool, in this process; the row goes into a JSON, stage by stage."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["TIMM_FUSED_ATTN"] = "0" if tool == RIVAL else "1"  # as in its own examples of timm's models
    row: dict[str, Any] = {"forward_ok": False, "exported_ok": False}
    stage = "build"

    def write() -> None:
        (work / "row.json").write_text(json.dumps(row), encoding="utf8")

    try:
        write()
        model, side = SUBJECTS[family](name)
        x = torch.randn(2, 3, side, side)
        model = with_statistics(model, [x])
        with torch.no_grad():
            expected = model(x).shape
        row |= {"input_size": side, "params_before": size(model)}
        stage = "prune"
        start, used = time.perf_counter(), time.process_time()
        with limited(LIMITS_S[family], "pruning"):
            pruned, facts = TOOLS[tool](model, x, work)
        row |= {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
        row |= {"params_after": size(pruned), "share": size(pruned) / row["params_before"], **facts}
        write()
        stage = "forward"
        with torch.no_grad():
            y = pruned.eval()(x)
        row["forward_ok"] = y.shape == expected and bool(y.isfinite().all())
        write()
        stage = "export"
        with limited(EXPORT_LIMIT_S, "the export"):
            row |= exported(pruned, x, work)
    except (Exception, OverLimitError) as error:  # noqa: BLE001 - whatever a tool raises is its row
        row["error"] = f"{stage}: {type(error).__name__}: {str(error).strip()}".replace(str(work), "")[:300]
        # pared's own are sentences that say what to do; the others are what Python or PyTorch said.
        row["named"] = isinstance(error, ParedError)
    row["peak_memory_bytes"] = peak_bytes()
    write()


def attempted(family: str, name: str, tool: str) -> dict[str, Any]:
    """The row of a fresh process; one with `error` where it failed or took too long."""
    with tempfile.TemporaryDirectory() as folder:
        process = PROCESSES.Process(target=attempt, args=(family, name, tool, Path(folder)))
        process.start()
        process.join(PATIENCE_S)
        ended = not process.is_alive()
        if not ended:
            process.kill()
            process.join()
        file = Path(folder) / "row.json"
        row = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
        if not ended or process.exitcode:
            why = f"ended with status {process.exitcode}" if ended else f"was still busy after {PATIENCE_S} s"
            row["error"] = f"the process {why}"
        return {"model": name, "tool": tool, **row}


# --- all of them -------------------------------------------------------------------------------------------------


def succeeded(row: Mapping[str, Any], share: float) -> bool:
    """Whether the pruned model runs, exports, and has become small enough."""
    return bool(row["forward_ok"] and row["exported_ok"] and row["share"] <= share)


def counts(results: Results, tool: str, share: float) -> dict[str, int]:
    """How many of a tool's models came how far."""
    rows = [row for row in results.rows if row.get("tool") == tool]
    runs = [row for row in rows if row["forward_ok"]]
    return {
        "succeeded": sum(succeeded(row, share) for row in rows),
        "ran": len(runs),
        "exported": sum(row["exported_ok"] for row in runs),
        "small": sum(row["share"] <= share for row in runs),
        "too large": sum(row["share"] > share for row in runs),
        "unnamed": sum(not row.get("named", False) for row in rows if "error" in row),
    }


def claim(results: Results, names: list[str]) -> None:
    """The line of issue 5, over all models; a model without a row of ours counts as failed."""
    results.claims = []
    own, rival = (counts(results, tool, SHARE) for tool in (OWN, RIVAL))
    total, failed = len(names), len(names) - own["ran"]
    results.claim(ISSUE, "classifiers that run with half of their channels", own["ran"], ">=", total)
    results.claim(ISSUE, "of these, exported to ONNX and in agreement with the file", own["exported"], ">=", total)
    what = "classifiers that failed, or have more than 60 % of their parameters left"
    results.claim(ISSUE, what, own["too large"] + failed, "<=", 3)
    if rival["ran"]:
        what = f"classifiers that run, export and have at most 60 % left; Torch-Pruning {rival['succeeded']}"
        results.claim(ISSUE, what, own["succeeded"], ">=", rival["succeeded"])


def open_rows(name: str, options: argparse.Namespace, scratch: str) -> Results:
    """The rows so far; a finished run goes on too, with another tool, or other models."""
    results = Results(name, folder=Path(scratch) if options.quick else RESULTS)
    if results.path.exists() and not options.fresh:
        results.rows = json.loads(results.path.read_text(encoding="utf8"))["rows"]
    for file in options.join:
        for row in json.loads(file.read_text(encoding="utf8"))["rows"]:
            if results.done(**{name: row[name] for name in ("module", "model", "tool") if name in row}) is None:
                results.rows.append(row)
    results.environment["rivals"] = {package: version_of(package) for package in ("torch-pruning", "onnxruntime")}
    return results


def fill(results: Results, family: str, names: list[str], options: argparse.Namespace) -> None:
    """The rows that are missing, of the models and the tools that were asked for."""
    chosen = names if options.only is None else options.only
    for tool in [options.tool] if options.tool else list(TOOLS):
        for name in names:
            if name in chosen and (options.again or results.done(model=name, tool=tool) is None):
                row = attempted(family, name, tool)
                results.rows = [r for r in results.rows if (r["model"], r.get("tool")) != (name, tool)]
                results.add(row)


def run(options: argparse.Namespace) -> None:
    from torchvision_models import schemas

    schemas()
    names = sorted(options.names.read_text(encoding="utf8").split(), key=parameters)
    with tempfile.TemporaryDirectory() as scratch:
        results = open_rows("prune_classifiers", options, scratch)
        options.only = QUICK if options.quick and options.only is None else options.only
        fill(results, "torchvision", names, options)
        claim(results, names)


def arguments(text: str | None) -> argparse.ArgumentParser:
    """What both coverage tables take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=TOOLS, help="this one alone; both by default, pared first")
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="these models alone; none: only the claims")
    parser.add_argument("--join", nargs="+", type=Path, default=[], help="rows of other runs, where they are missing")
    parser.add_argument("--again", action="store_true", help="repeat rows that are there already")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--quick", action="store_true", help="a handful of small models, no JSON")
    return parser


def start(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Run with what the processes need in place."""
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [*FOLDERS, *filter(None, sys.path)]))
    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(PRELOADED)
    try:
        work(options)
    except ParedError as error:
        parser.exit(error.exit_status, f"{error}\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("names", type=Path)
    start(parser, run)


if __name__ == "__main__":
    main()
