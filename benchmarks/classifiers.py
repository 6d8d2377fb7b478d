"""Every torchvision classifier that fits in memory to int8: pared beside NNCF and ONNX Runtime's `quantize_static`.

    python benchmarks/classifiers.py IMAGES NAMES [--tool pared] [--only resnet18 vgg11] [--quick]

IMAGES is a parquet file of ImageNet photographs in the Hugging Face layout, NAMES a text file, one torchvision model a
line. The weights are random, the batch-norm statistics those of 16 photographs. Each tool gets 8 others for
calibration and makes its file in a fresh process, within a time limit. How much of a file's work is in integers is
read off what ONNX Runtime's profiler says of the operators that it ran. Rows are kept from run to run.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Results
from torch import Tensor, nn

from pared.data.images import parquet_images
from pared.errors import ParedError
from pared.measure.environment import version_of
from pared.measure.fidelity import Comparison
from pared.measure.processor import saturates_here
from pared.measure.worker import peak_bytes

FOLDERS = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]
sys.path[:0] = FOLDERS

# Each model gets a fresh process, copied from one that has imported what all of them need.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["classifiers", "onnxruntime", "onnxscript", "pared.quantize.static", "pared.targets.onnxruntime"]
STATISTICS, CALIBRATION, JUDGED = 16, 8, 4
OWN, ORT, NNCF = "pared", "onnxruntime", "nncf"
LIMIT_S = {OWN: 1200, ORT: 900, NNCF: 900}
QUICK = ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5")
# Means and deviations of ImageNet, in 8-bit pixels.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHARE = 0.8


def input_size(name: str) -> int:
    """Height and width of the images that the architecture is evaluated on with torchvision's default weights."""
    from torchvision.models import get_model_weights

    if name.startswith(("vit_", "maxvit_")):
        return 224  # what the architecture itself is built for
    return int(get_model_weights(name).DEFAULT.transforms().crop_size[0])


def with_statistics(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Batch norms get the statistics of some batches; a head of zeros gets weights that tell classes apart."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with torch.no_grad():
        for x in batches if norms else []:
            model(x)
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def make_pared(model: nn.Module, x: Tensor, file: Path) -> dict[str, Any]:
    """Static quantization with default settings, through the pipeline's parity gates."""
    import pared
    from pared.pipeline.stage import Stage, output_index, parity
    from pared.step import Context
    from pared.targets import find_target

    start = time.perf_counter()
    task = pared.Task(example_inputs=(x[:1],), calibration=list(x[:CALIBRATION].split(4)))
    target = find_target("onnxruntime")
    ctx = Context(task=task, target=target, work=file.parent, dense=model)
    step = pared.QuantizeStatic()
    plan = step.plan(model, ctx)
    program = step.apply(model, plan, ctx)
    target.export(program, task, file)
    seconds = time.perf_counter() - start
    shown = pared.Task(example_inputs=(x[:1],), validation=[x[-2:]])
    stage = Stage(
        key="", model=program, floating=model, plan=plan, file=file, output=output_index(model, task), facts={}
    )
    agreement = parity(target.open(file, threads=1), stage, model, shown, target)
    return {
        "seconds": seconds,
        "changed": len(plan.edits),
        "skipped": len(plan.skips),
        "reasons": dict(collections.Counter(skip.reason for skip in plan.skips)),
        "macs": plan.facts["macs"],
        "planned_share": plan.facts["integer_macs"] / plan.facts["macs"],
        "warnings": plan.facts["warnings"],
        "parity_db": agreement.sqnr_db,
    }


def make_float(model: nn.Module, x: Tensor, file: Path) -> None:
    """The float ONNX file, as PyTorch exports it: where the rivals start."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    if program is None:
        raise SystemExit("the exporter returned nothing")
    program.save(str(file))


def make_onnxruntime(model: nn.Module, x: Tensor, file: Path) -> dict[str, Any]:
    """Export, pre-process, MinMax: per channel, signed weights, of 7 bits without VNNI, as it advises for x86."""
    import onnxruntime
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):
        """One image a call, as in ONNX Runtime's own examples."""

        def __init__(self, name: str) -> None:
            self.left = ({name: image[None]} for image in x[:CALIBRATION].numpy())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    start = time.perf_counter()
    exported, prepared = file.with_name("float.onnx"), file.with_name("prepared.onnx")
    make_float(model, x, exported)
    quant_pre_process(str(exported), str(prepared))
    ort.quantize_static(
        str(prepared),
        str(file),
        Reader(onnxruntime.InferenceSession(str(exported)).get_inputs()[0].name),
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
        calibrate_method=ort.CalibrationMethod.MinMax,
        reduce_range=saturates_here() is not False,
    )
    return {"seconds": time.perf_counter() - start}


def make_nncf(model: nn.Module, x: Tensor, file: Path) -> dict[str, Any]:
    """Export, then `nncf.quantize` on the ONNX file with its defaults."""
    import nncf
    import onnx

    start = time.perf_counter()
    exported = file.with_name("float.onnx")
    make_float(model, x, exported)
    proto = onnx.load(exported)
    data = nncf.Dataset([{proto.graph.input[0].name: image[None]} for image in x[:CALIBRATION].numpy()])
    onnx.save(nncf.quantize(proto, data, subset_size=CALIBRATION), file)
    return {"seconds": time.perf_counter() - start}


MAKERS: Mapping[str, Callable[[nn.Module, Tensor, Path], dict[str, Any]]] = {
    OWN: make_pared,
    ORT: make_onnxruntime,
    NNCF: make_nncf,
}


def shapes(entry: Mapping[str, Any], side: str) -> list[list[int]]:
    return [next(iter(item.values())) for item in entry["args"][f"{side}_type_shape"] if item]


def convolution(entry: Mapping[str, Any], weight: int) -> int:
    inside = math.prod(shapes(entry, "input")[weight][1:])
    # One weight a channel is a batch norm, written as a convolution: no work that the float model has.
    return math.prod(shapes(entry, "output")[0]) * inside if inside > 1 else 0


def product(entry: Mapping[str, Any], operand: int) -> int:
    """Of matrices: the first operand's last dimension is summed over (the second's first, where that is transposed)."""
    return math.prod(shapes(entry, "output")[0]) * shapes(entry, "input")[operand][-1]


# Operators of ONNX Runtime that compute in integers -> multiply-accumulates of one call, from the shapes it took.
INTEGER: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "QLinearConv": functools.partial(convolution, weight=3),
    "ConvInteger": functools.partial(convolution, weight=1),
    **dict.fromkeys(
        ["QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"],
        functools.partial(product, operand=0),
    ),
}
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


def profile(file: Path, x: np.ndarray) -> dict[str, Any]:
    """What ONNX Runtime runs for one image: multiply-accumulates in integers, integer layers, conversions."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(file.with_name("profile"))
    options.log_severity_level = 4
    # The runtime forgets the shapes of weights that it has packed.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: x[:1]})
    ran = [entry for entry in json.loads(Path(session.end_profiling()).read_text()) if entry.get("cat") == "Node"]
    counted = collections.Counter(entry["args"]["op_name"] for entry in ran)
    integer = [entry for entry in ran if entry["args"]["op_name"] in INTEGER]
    return {
        "integer_macs": sum(INTEGER[entry["args"]["op_name"]](entry) for entry in integer),
        "integer_layers": len(integer),
        "conversions": sum(counted[name] for name in CONVERSIONS),
        "operators": dict(counted.most_common()),
    }


def judge(model: nn.Module, x: Tensor, file: Path, macs: int | None) -> dict[str, Any]:
    """Closeness to the float module, on images that no range was chosen on, and the work done in integers."""
    from pared.graph.counts import count, totals
    from pared.targets.sessions import open_session
    from pared.task import as_inputs

    comparison = Comparison()
    session = open_session("onnxruntime", file, threads=1)
    with torch.no_grad():
        for image in x[-JUDGED:].split(1):
            comparison.update(model(image).numpy(), session.run([image.numpy()])[0])
    found = comparison.result()
    macs = macs or totals(count(model, as_inputs(x[:1]))).macs
    ran = profile(file, x.numpy())
    return {
        "size_bytes": sum(item.stat().st_size for item in file.parent.glob(f"{file.name}*")),
        "sqnr_db": found.sqnr_db,
        "agreement": found.agreement,
        "macs": macs,
        **ran,
        "integer_share": ran["integer_macs"] / macs,
    }


def make(name: str, tool: str, images: Path, file: Path, macs: int | None) -> None:
    """One model and one tool, in this process; the row goes into a JSON beside the file."""
    from torchvision_models import torchvision_model

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # others may run beside it
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    try:
        model = torchvision_model(name)
        size = input_size(name)
        rows = STATISTICS + CALIBRATION + JUDGED
        batches = parquet_images(images, size=size, mean=MEAN, std=STD, batch_size=4, limit=rows)
        x = torch.cat([images for images, _ in batches])
        with_statistics(model, list(x[:STATISTICS].split(4)))
        row = {"input_size": size, **MAKERS[tool](model, x[STATISTICS:], file), "peak_memory_bytes": peak_bytes()}
        row |= judge(model, x[STATISTICS:], file, row.get("macs") or macs)
    except Exception as error:  # noqa: BLE001 - whatever a tool raises is its row
        row["error"] = f"{type(error).__name__}: {str(error).strip()}".replace(str(file.parent), "")[:300]
    file.with_suffix(".json").write_text(json.dumps(row), encoding="utf8")


def made(name: str, tool: str, images: Path, macs: int | None) -> dict[str, Any]:
    """The row of a fresh process; one with `error` where it failed or took too long."""
    key = {"model": name, "tool": tool}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        process = PROCESSES.Process(target=make, args=(name, tool, images, file, macs))
        process.start()
        process.join(LIMIT_S[tool])
        if process.is_alive():
            process.kill()
            process.join()
            return {**key, "error": f"took longer than {LIMIT_S[tool]} s"}
        if process.exitcode:
            return {**key, "error": f"the process ended with status {process.exitcode}"}
        return {**key, **json.loads(file.with_suffix(".json").read_text(encoding="utf8"))}


def parameters(name: str) -> int:
    """How many parameters torchvision states: the smallest models come first."""
    from torchvision.models import get_model_weights

    return int(get_model_weights(name).DEFAULT.meta["num_params"])


def claim(results: Results, names: list[str]) -> None:
    """The line of issue 3, over all models; a model without a row of ours counts as failed."""
    own = {row["model"]: row for row in results.rows if row["tool"] == OWN and "error" not in row}
    good = [row for row in own.values() if row["integer_share"] >= SHARE]
    results.claims = []
    results.claim(3, "classifiers that export, pass parity and run in ONNX Runtime", len(own), ">=", len(names))
    what = "of these, with 80 % of their multiply-accumulates in int8"
    results.claim(3, what, len(good), ">=", len(names))


def run(options: argparse.Namespace) -> None:
    """All models that have no row yet."""
    from torchvision_models import schemas

    schemas()
    names = sorted(options.names.read_text(encoding="utf8").split(), key=parameters)
    with tempfile.TemporaryDirectory() as scratch:
        results = Results("classifiers", folder=Path(scratch) if options.quick else RESULTS)
        if (
            results.path.exists() and not options.fresh
        ):  # a finished run goes on too: with another tool, or other models
            results.rows = json.loads(results.path.read_text(encoding="utf8"))["rows"]
        results.environment["rivals"] = {package: version_of(package) for package in ("nncf", "onnxruntime")}
        chosen = options.only or (QUICK if options.quick else names)
        for tool in [options.tool] if options.tool else [OWN, ORT, NNCF]:
            for name in names:
                if name in chosen and (options.again or results.done(model=name, tool=tool) is None):
                    own = results.done(model=name, tool=OWN) or {}
                    row = made(name, tool, options.images.resolve(), own.get("macs"))
                    results.rows = [r for r in results.rows if (r["model"], r["tool"]) != (name, tool)]
                    results.add(row)
        claim(results, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("names", type=Path)
    parser.add_argument("--tool", choices=MAKERS, help="this one alone; all by default, pared first")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models alone")
    parser.add_argument("--again", action="store_true", help="repeat rows that are there already")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--quick", action="store_true", help="a handful of small models, no JSON")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [*FOLDERS, *filter(None, sys.path)]))
    PROCESSES.set_forkserver_preload(PRELOADED)
    try:
        run(options)
    except ParedError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
