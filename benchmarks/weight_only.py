"""Weights of MiniLM-L6 in 4 bits, groups of 32: GPTQ beside rounding to nearest, and ONNX Runtime's own quantizer.

    python benchmarks/weight_only.py vaderSentiment-3.3.2.tar.gz

128 snippets calibrate, 512 others judge. ONNX Runtime's tool starts from the float file that pared exports; its GPTQ
wants neural_compressor, which no longer has what it imports, so its round-to-nearest (MatMul alone, and embeddings too)
and HQQ run. Sizes are those of the layers that a file quantizes, in bytes of float32 over bytes in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from harness import RESULTS, Results
from minilm_model import Tokenizer, chosen, embeddings, minilm, minilm_task, ordered, snippets

import pared
from pared.measure.environment import usable_cores, version_of
from pared.measure.fidelity import Comparison
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.step import Context
from pared.targets import find_target
from pared.targets.sessions import open_session
from pared.targets.worker import worker_command, write_inputs

NO_EMBEDDING = ("*embedding*",)
OWN = {
    "gptq": pared.QuantizeWeights(),
    "nearest": pared.QuantizeWeights(method="nearest"),
    "gptq, linear": pared.QuantizeWeights(exclude=NO_EMBEDDING),
    "nearest, linear": pared.QuantizeWeights(method="nearest", exclude=NO_EMBEDDING),
    "gptq by columns, linear": pared.QuantizeWeights(method={"kind": "gptq", "order": "columns"}, exclude=NO_EMBEDDING),
    "8 bits, per channel": pared.QuantizeWeights(bits=8, group_size=None, method="nearest"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """What files are made from."""

    model: Any
    task: pared.Task
    float_file: Path


def make_own(step: pared.QuantizeWeights, source: Source, file: Path) -> None:
    """One of pared's files."""
    target = find_target("onnxruntime")
    ctx = Context(task=source.task, target=target, work=file.parent, dense=source.model)
    target.export(step.apply(source.model, step.plan(source.model, ctx), ctx), source.task, file)


def make_float(source: Source, file: Path) -> None:
    """The float file, where the rival starts."""
    find_target("onnxruntime").export(source.model, source.task, file)


def make_rival(config: str, source: Source, file: Path) -> None:
    """One of ONNX Runtime's own files."""
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    kinds = ("MatMul", "Gather") if config == "embeddings" else ("MatMul",)
    if config == "hqq":
        chosen_config: Any = ort.HQQWeightOnlyQuantConfig(block_size=32, bits=4)
    else:
        chosen_config = ort.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, op_types_to_quantize=kinds)
    quantizer = ort.MatMulNBitsQuantizer(onnx.load(source.float_file), algo_config=chosen_config)
    quantizer.process()
    onnx.save(quantizer.model.model, file)


MAKERS: dict[str, Callable[[Source, Path], None]] = {
    "float": make_float,
    **{f"pared {name}": functools.partial(make_own, step) for name, step in OWN.items()},
    "onnxruntime nearest, linear": functools.partial(make_rival, "linear"),
    "onnxruntime nearest": functools.partial(make_rival, "embeddings"),
    "onnxruntime hqq, linear": functools.partial(make_rival, "hqq"),
}


def quantized_bytes(file: Path) -> tuple[int, int]:
    """Bytes that the quantized layers' weights take in a file, and that they took in float32."""
    graph = onnx.load(file).graph
    sizes = {tensor.name: (len(tensor.raw_data), tuple(tensor.dims)) for tensor in graph.initializer}
    kept: dict[str, int] = {}
    floats: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in {"MatMulNBits", "GatherBlockQuantized"}:
            continue
        given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        inner = node.input[1:4] if node.op_type == "MatMulNBits" else [node.input[0], *node.input[2:4]]
        kept |= {name: sizes[name][0] for name in inner if name}
        if node.op_type == "MatMulNBits":
            floats[node.input[1]] = 4 * given["K"] * given["N"]
        else:
            scale = sizes[node.input[2]][1]
            floats[node.input[0]] = 4 * int(np.prod(scale)) * given["block_size"]
    return sum(kept.values()), sum(floats.values())


def judge(results: Results, tool: str, file: Path, judged: list[Any], reference: np.ndarray, seconds: float) -> None:
    """One row: closeness to the float module on texts that nothing was chosen on, and sizes."""
    session = open_session("onnxruntime", file, threads=usable_cores())
    comparison = Comparison()
    comparison.update(reference, np.concatenate(list(ordered(session, judged))))
    small, floats = quantized_bytes(file)
    results.add(
        {
            "what": "file",
            "tool": tool,
            "sqnr_db": comparison.result().sqnr_db,
            "size_bytes": file.stat().st_size,
            "quantized_bytes": small,
            "float_bytes_of_these": floats,
            "times_smaller": floats / small if small else 1.0,
            "seconds": seconds,
        }
    )


def time_files(results: Results, files: dict[str, Path], tokenizer: Tokenizer, text: list[str], budget: float) -> None:
    """Latency at batch 1 and 64 tokens, one thread; ratios are a file's time over float's."""
    folder = next(iter(files.values())).parent
    names = [spec.name for spec in open_session("onnxruntime", files["float"], threads=1).inputs]
    inputs = tokenizer(text[:1], length=64)
    write_inputs(folder / "inputs.npz", [inputs[name].numpy() for name in names])
    command = functools.partial(worker_command, "onnxruntime", threads=1, inputs_file=folder / "inputs.npz")
    times = dict(zip(files, time_in_turn([command(file) for file in files.values()], budget_s=budget), strict=True))
    for tool, own in times.items():
        ratio = speedup(own, times["float"])
        results.add(
            {
                "what": "latency",
                "tool": tool,
                "p50_ms": percentiles(own).p50,
                "it_over_float": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
            }
        )


def claim(results: Results) -> None:
    """The lines of issue 3."""
    rows = {row["tool"]: row for row in results.rows if row["what"] == "file"}
    gptq, nearest = rows["pared gptq"], rows["pared nearest"]
    linear = rows["pared gptq, linear"]["sqnr_db"]
    results.claim(
        *(3, "MiniLM-L6, int4 groups of 32: SQNR of GPTQ less that of nearest, dB"),
        *(gptq["sqnr_db"] - nearest["sqnr_db"], ">=", 1.0),
    )
    results.claim(3, "float bytes of the quantized layers over those in the file", gptq["times_smaller"], ">=", 6.0)
    rivals = [row["sqnr_db"] for tool, row in rows.items() if tool.startswith("onnxruntime") and "linear" in tool]
    results.claim(
        3,
        "linear layers alone: SQNR of GPTQ less that of ONNX Runtime's best file, dB",
        linear - max(rivals),
        ">=",
        0.0,
    )


def run(sdist: Path, *, quick: bool) -> None:
    """Everything, from the texts to the claims."""
    calibration, judged_texts = chosen(snippets(sdist), 32 if quick else 128, 64 if quick else 512)
    tokenizer, model = Tokenizer(), minilm()
    task = minilm_task(tokenizer.batches(calibration))
    judged = tokenizer.batches(judged_texts)
    reference = embeddings(model, judged)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = Results("weight_only", folder=folder if quick else RESULTS)
        results.environment["rivals"] = {"onnxruntime": version_of("onnxruntime")}
        files = {tool: folder / f"{index}.onnx" for index, tool in enumerate(MAKERS)}
        for tool, maker in MAKERS.items():
            start = time.perf_counter()
            maker(Source(model, task, files["float"]), files[tool])
            seconds = time.perf_counter() - start
            results.rows = [row for row in results.rows if row.get("tool") != tool]
            judge(results, tool, files[tool], judged, reference, seconds)
        time_files(results, files, tokenizer, judged_texts, 2.0 if quick else 60.0)
        claim(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer texts, little time for latency, no JSON")
    options = parser.parse_args()
    run(options.sdist, quick=options.quick)


if __name__ == "__main__":
    main()
