"""Calibrators on EfficientNet-Lite0: pared's beside ONNX Runtime's, time and memory; thresholds beside a slow search.

    python benchmarks/calibrators.py IMAGES [--quick]

IMAGES is a parquet file of 500 ImageNet photographs in the Hugging Face layout. Every run has a fresh process, and the
tools take turns. pared's clock runs from the float `nn.Module` to the ranges in the plan, ONNX Runtime's from a float
ONNX file on the disk, exported and pre-processed before, to its ranges. Images are read from a file a few at a time, so
that memory is that of calibration; for 512 of them the first 12 come twice.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0 import make_float, prepared
from harness import RESULTS, Results
from torch import nn

from pared.activations import Histogram
from pared.errors import ParedError
from pared.measure.worker import peak_bytes
from pared.quantize import divergence
from pared.quantize.affine import grid

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CALIBRATION = 128
REPEATS = 3
FEW, MANY = 32, 512
OWN = ("minmax", "moving_average", "percentile", "mse", "kl", "symmetric_kl", "js")
SEARCHING = ("percentile", "mse", "kl")  # what issue 3 counts as histogram calibrators
MEASURED = ("mse", "percentile", "moving_average", "minmax")  # one for each kind of statistic, and two readers of one
ORT = ("MinMax", "Percentile", "Entropy")
SCORES = {"kl": divergence.kl, "symmetric_kl": divergence.symmetric_kl, "js": divergence.js}


class FromFile:
    """Images of an .npy file, a few at a time."""

    def __init__(self, file: Path, count: int, size: int) -> None:
        self.file, self.count, self.size = file, count, size

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, self.count, self.size):
            # Mapped anew for every batch, so that pages of the file do not count as memory of the process.
            yield np.load(self.file, mmap_mode="r")[start : min(start + self.size, self.count)].copy()


def calibrate_pared(kind: str, model: nn.Module, images: FromFile, folder: Path) -> int:
    """Number of ranges, from the module and the images."""
    import pared
    from pared.step import Context
    from pared.targets import find_target

    example = torch.from_numpy(next(iter(images))[:1])
    task = pared.Task(example_inputs=(example,), calibration=Tensors(images))
    ctx = Context(task=task, target=find_target("onnxruntime"), work=folder, dense=model)
    step = pared.QuantizeStatic(ranges=kind, repairs=["fold_batch_norms"], samples=None)
    return len(step.plan(model, ctx).facts["ranges"])


class Tensors:
    """The same batches as tensors."""

    def __init__(self, images: FromFile) -> None:
        self.images = images

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(torch.from_numpy, self.images)


def calibrate_onnxruntime(kind: str, file: Path, images: FromFile, folder: Path) -> int:
    """Number of ranges, from the float file and the images, one image a call as in ONNX Runtime's own examples."""
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = ({"inputs": image[None]} for batch in images for image in batch)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    calibrator = create_calibrator(
        str(file),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=getattr(ort.CalibrationMethod, kind),
    )
    calibrator.collect_data(Reader())
    return len(calibrator.compute_data().keys())


def float_file(images: Path, file: Path) -> None:
    """The float ONNX file, pre-processed: where ONNX Runtime's calibrators start."""
    from network import efficientnet_lite0
    from onnxruntime.quantization.shape_inference import quant_pre_process

    make_float(efficientnet_lite0(), np.load(images, mmap_mode="r")[:2].copy(), file.with_suffix(".raw.onnx"))
    quant_pre_process(str(file.with_suffix(".raw.onnx")), str(file))


def work(tool: str, kind: str, count: int, images: Path, folder: Path) -> None:
    """One run in this process; prints its figures."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout, printed = sys.stderr, sys.stdout  # the network's package prints
    if tool == "float":
        float_file(images, folder / "float.onnx")
        return
    source = FromFile(images, count, 16)
    if tool == "pared":
        from network import efficientnet_lite0

        # Both tools are imported before the clock starts, with what the first export of a process would import.
        for module in (
            "torch.export._trace",
            "torch._dynamo",
            "onnx",
            "pared.quantize.static",
            "pared.targets.onnxruntime",
        ):
            importlib.import_module(module)
        run = functools.partial(calibrate_pared, kind, efficientnet_lite0(), source, folder)
    else:
        importlib.import_module("onnxruntime.quantization")
        run = functools.partial(calibrate_onnxruntime, kind, folder / "float.onnx", source, folder)
    start, cpu = time.perf_counter(), time.process_time()
    ranges = run()
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_bytes": peak_bytes(),
        "ranges": ranges,
    }
    printed.write(json.dumps(figures))


def worked(tool: str, kind: str, count: int, images: Path, folder: Path) -> dict[str, Any]:
    """The figures of a run in a fresh process."""
    command = [sys.executable, __file__, str(images), "--work", tool, kind, str(count), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} {kind} failed: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout) if done.stdout else {}


def time_all(results: Results, images: Path, folder: Path, repeats: int, count: int) -> None:
    """All calibrators in turn; who goes first alternates."""
    for repeat in range(repeats):
        runs = [*(("pared", kind) for kind in OWN), *(("onnxruntime", kind) for kind in ORT)]
        for tool, kind in runs if repeat % 2 == 0 else reversed(runs):
            row = {"what": "time", "tool": tool, "kind": kind, "images": count, "repeat": repeat}
            if results.done(**row) is None:
                results.add(row | worked(tool, kind, count, images, folder))


def memory_of_all(results: Results, images: Path, folder: Path, repeats: int, many: int) -> None:
    """Peak memory with few and with many images."""
    for repeat in range(repeats):
        for kind in MEASURED if repeats > 1 else MEASURED[:1]:
            for count in (FEW, many):
                row = {"what": "memory", "tool": "pared", "kind": kind, "images": count, "repeat": repeat}
                if results.done(**row) is None:
                    results.add(row | worked("pared", kind, count, images, folder))


def same_bins(results: Results) -> None:
    """Each threshold search beside the one written out in the tests, on twenty distributions, affine and symmetric."""
    from slow_divergence import DISTRIBUTIONS, search, values_of

    numbers = {
        False: grid(bits=8, signed=False, symmetric=False),
        True: grid(bits=8, signed=True, symmetric=True),
    }
    for name in DISTRIBUTIONS:
        if results.done(what="bins", distribution=name) is not None:
            continue
        values, row = values_of(name), {"what": "bins", "distribution": name}
        histogram = Histogram()
        histogram.update(torch.from_numpy(values))
        bins = divergence.bins_of(histogram, 2048)
        for kind, score in SCORES.items():
            for symmetric, grid_of in numbers.items():
                first, last, _ = search(
                    values, kind, lowest=grid_of.low, highest=grid_of.high, symmetric=symmetric, bins=2048
                )
                found = divergence.best_range(bins, score, grid_of, symmetric=symmetric)
                own = (found[0] - bins.zero, found[1] - bins.zero)
                row[f"{kind} {'symmetric' if symmetric else 'affine'}"] = own == (first, last)
        results.add(row)


def claim(results: Results, many: int) -> None:
    """The lines of issue 3."""

    def figures(what: str, key: str, **wanted: Any) -> np.ndarray:
        return np.array([row[key] for row in results.rows if row.items() >= {"what": what, **wanted}.items()])

    rival = figures("time", "seconds", tool="onnxruntime", kind="Percentile")
    for kind in SEARCHING:
        own = figures("time", "seconds", tool="pared", kind=kind)
        # Rows of one repeat were timed one after the other, in either order: repeats pair.
        ratio = float(np.exp(np.mean(np.log(own / rival))))
        results.claim(3, f"{kind}: seconds to ranges over those of ONNX Runtime's Percentile", ratio, "<=", 1 / 3)
    growth = {
        kind: float(
            np.median(figures("memory", "peak_memory_bytes", kind=kind, images=many))
            - np.median(figures("memory", "peak_memory_bytes", kind=kind, images=FEW))
        )
        for kind in dict.fromkeys(row["kind"] for row in results.rows if row["what"] == "memory")
    }
    worst = max(growth, key=lambda kind: growth[kind])
    what = f"peak memory, growth from {FEW} to {many} images, bytes, most of {', '.join(growth)} ({worst})"
    results.claim(3, what, growth[worst], "<=", 50_000_000)
    for kind in SCORES:
        same = [
            all(row[f"{kind} {side}"] for side in ("affine", "symmetric"))
            for row in results.rows
            if row["what"] == "bins"
        ]
        results.claim(3, f"{kind}: distributions with the threshold bin of the slow search", sum(same), ">=", 20)


def run(images: Path, *, quick: bool) -> None:
    """Everything, from the photographs to the claims."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = Results("calibrators", folder=folder if quick else RESULTS)
        same_bins(results)
        x, _ = prepared(images)
        many = 64 if quick else MANY
        np.save(folder / "images.npy", np.concatenate([x, x[: MANY - len(x)]]))
        del x
        worked("float", "", 0, folder / "images.npy", folder)
        time_all(results, folder / "images.npy", folder, 1 if quick else REPEATS, 16 if quick else CALIBRATION)
        memory_of_all(results, folder / "images.npy", folder, 1 if quick else 2, many)
        claim(results, many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--quick", action="store_true", help="each calibrator once on 16 images, no JSON")
    parser.add_argument("--work", nargs=3, metavar=("TOOL", "KIND", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.work:
            tool, kind, count = options.work
            work(tool, kind, int(count), options.images, options.folder)
        else:
            run(options.images, quick=options.quick)
    except ParedError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
