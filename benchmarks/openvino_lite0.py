"""EfficientNet-Lite0 to int8 for OpenVINO: pared beside ONNX Runtime's `quantize_static` and NNCF, all run in OpenVINO.

    python benchmarks/openvino_lite0.py IMAGES [--quick]

IMAGES is a parquet file of 500 ImageNet photographs, as for `efficientnet_lite0.py`. All calibrate on its first 128.
Each tool makes its file in a fresh process; files are timed in turn at batch 1 and judged on the images that no range
was chosen on. `measure(results, x, folder, seconds=...)` does it all for a benchmark that has prepared the images.
"""

from __future__ import annotations

import argparse
import functools
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0 import CALIBRATION, make_float, make_onnxruntime, prepared
from harness import RESULTS, Results
from torch import nn

from pared.errors import ParedError
from pared.measure.environment import usable_cores, version_of
from pared.measure.fidelity import Comparison
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.targets.sessions import open_session, size_of
from pared.targets.worker import worker_command, write_inputs

OWN, OWN_ONNX, ORT, NNCF, FLOAT = "pared", "pared, ONNX Runtime's file", "onnxruntime", "nncf", "float"


def make_pared(model: nn.Module, images: np.ndarray, file: Path, target: str = "openvino") -> None:
    """Static quantization with default settings."""
    import pared
    from pared.step import Context
    from pared.targets import find_target

    x = torch.from_numpy(images)
    task = pared.Task(example_inputs=(x[:1],), calibration=list(x.split(16)))
    ctx = Context(task=task, target=find_target(target), work=file.parent, dense=model)
    step = pared.QuantizeStatic()
    ctx.target.export(step.apply(model, step.plan(model, ctx), ctx), task, file)


def make_nncf(model: nn.Module, images: np.ndarray, file: Path) -> None:
    """OpenVINO's own reading of the float ONNX file, then `nncf.quantize` with its defaults."""
    import nncf
    import openvino

    exported = file.with_suffix(".float.onnx")
    make_float(model, images, exported)
    data = nncf.Dataset([{"inputs": image[None]} for image in images])
    made = nncf.quantize(openvino.Core().read_model(str(exported)), data, subset_size=len(images))
    openvino.save_model(made, str(file), compress_to_fp16=False)


# Tool -> how it makes its file, and the file's name.
MAKERS: dict[str, tuple[Callable[[nn.Module, np.ndarray, Path], None], str]] = {
    OWN: (make_pared, "model.xml"),
    OWN_ONNX: (functools.partial(make_pared, target="onnxruntime"), "model.onnx"),
    ORT: (make_onnxruntime, "model.onnx"),
    NNCF: (make_nncf, "model.xml"),
    FLOAT: (make_float, "model.onnx"),
}


def make(tool: str, images: Path, file: Path) -> None:
    """One run of one tool, in this process."""
    from network import efficientnet_lite0

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    MAKERS[tool][0](efficientnet_lite0(), np.load(images), file)


def files_of_all(folder: Path) -> dict[str, Path]:
    """Every tool's file, made where it is missing."""
    files = {tool: folder / f"openvino-{index}" / name for index, (tool, (_, name)) in enumerate(MAKERS.items())}
    for tool, file in files.items():
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            command = [sys.executable, __file__, str(folder / "calibration.npy"), "--make", tool, "--file", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{tool} failed: {done.stderr.strip()[-1500:]}")
    return files


def measure(results: Results, x: np.ndarray, folder: Path, *, seconds: float) -> None:
    """Size, closeness to the float module and latency of every tool's file in OpenVINO.

    Args:
        results: Gets rows of the kinds "openvino file" and "openvino latency".
        x: All images, prepared; the first `CALIBRATION` choose ranges, the others judge.
        folder: Where files are kept, to be taken up again.
        seconds: Most time for the timing of all files, at each number of threads.
    """
    from network import efficientnet_lite0

    np.save(folder / "calibration.npy", x[:CALIBRATION])
    files, judged, model = files_of_all(folder), x[CALIBRATION:], efficientnet_lite0()
    with torch.no_grad():
        reference = torch.cat([model(batch) for batch in torch.from_numpy(judged).split(16)]).numpy()
    for tool, file in files.items():
        if results.done(what="openvino file", tool=tool) is None:
            session = open_session("openvino", file, threads=usable_cores())
            comparison = Comparison()
            for start in range(0, len(judged), 16):
                comparison.update(reference[start : start + 16], session.run([judged[start : start + 16]])[0])
            found = comparison.result()
            row = {"size_bytes": size_of("openvino", file), "sqnr_db": found.sqnr_db, "agreement": found.agreement}
            results.add({"what": "openvino file", "tool": tool, **row})
    write_inputs(folder / "inputs.npz", [x[:1]])
    for threads in sorted({1, usable_cores()}):
        if results.done(what="openvino latency", threads=threads) is not None:
            continue
        command = functools.partial(worker_command, "openvino", threads=threads, inputs_file=folder / "inputs.npz")
        times = dict(
            zip(files, time_in_turn([command(file) for file in files.values()], budget_s=seconds), strict=True)
        )
        for tool, own in times.items():
            ratio = speedup(times[OWN], own)
            row = {"p50_ms": percentiles(own).p50, "pared_over_it": ratio.value, "low": ratio.low, "high": ratio.high}
            results.add({"what": "openvino latency", "tool": tool, "threads": threads, **row})


def claim(results: Results) -> None:
    """At most 1.02 times the latency of the fastest rival's file, by the end of the interval that favours us."""
    rows: list[dict[str, Any]] = [row for row in results.rows if row["what"] == "openvino latency"]
    slowest = max((row for row in rows if row["tool"] in {ORT, NNCF}), key=lambda row: row["low"])
    what = f"EfficientNet-Lite0 in OpenVINO: latency over that of {slowest['tool']}'s file, low end"
    results.claim(3, f"{what}, {slowest['threads']} threads", slowest["low"], "<=", 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer images, little time for latency, no JSON")
    parser.add_argument("--make", choices=MAKERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.make:
            make(options.make, options.images, options.file)
            return
        x = prepared(options.images)[0][: CALIBRATION + 32 if options.quick else None]
        with tempfile.TemporaryDirectory() as name:
            results = Results("openvino_lite0", folder=Path(name) if options.quick else RESULTS)
            results.environment["rivals"] = {tool: version_of(tool) for tool in ("openvino", "nncf", "onnxruntime")}
            measure(results, x, Path(name), seconds=5.0 if options.quick else 60.0)
            claim(results)
    except ParedError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
