"""ResNet-18's shape at batch 1 in ONNX Runtime: what int8 gains over float where the processor has VNNI."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from harness import Results
from torch import nn

import pared
from pared.measure.environment import usable_cores
from pared.measure.latency import percentiles, speedup, time_in_turn
from pared.step import Context
from pared.targets import find_target
from pared.targets.worker import worker_command, write_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def with_statistics(model: nn.Module, batches: int = 4) -> nn.Module:
    """Random weights with the batch-norm statistics of some batches, so that activations have sane ranges."""
    model.train()
    with torch.no_grad():
        for _ in range(batches):
            model(torch.randn(8, 3, 224, 224))
    return model.eval()


def main() -> None:
    from torchvision_models import torchvision_model

    results = Results("resnet18", fresh=True)
    torch.manual_seed(0)
    model = with_statistics(torchvision_model("resnet18"))
    x = torch.randn(32, 3, 224, 224)
    task = pared.Task(example_inputs=(x[:1],), calibration=[x[:16], x[16:]])
    target = find_target("onnxruntime")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ctx = Context(task=task, target=target, work=folder, dense=model)
        step = pared.QuantizeStatic()
        target.export(model, task, folder / "float.onnx")
        target.export(step.apply(model, step.plan(model, ctx), ctx), task, folder / "int8.onnx")
        write_inputs(folder / "inputs.npz", [x[:1].numpy()])
        for threads in sorted({1, usable_cores()}):
            files = [folder / "float.onnx", folder / "int8.onnx"]
            commands = [
                worker_command("onnxruntime", file, threads=threads, inputs_file=folder / "inputs.npz")
                for file in files
            ]
            times = time_in_turn(commands, budget_s=20)
            gain = speedup(*times)
            results.add(
                {
                    "threads": threads,
                    "float_p50_ms": percentiles(times[0]).p50,
                    "int8_p50_ms": percentiles(times[1]).p50,
                    "speedup": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                    "float_bytes": files[0].stat().st_size,
                    "int8_bytes": files[1].stat().st_size,
                }
            )
    # The end of the interval that favours the bound, as everywhere in these benchmarks.
    results.claim(2, "ResNet-18, batch 1: int8 over float, all cores", results.rows[-1]["high"], ">=", 2.5)


if __name__ == "__main__":
    main()
