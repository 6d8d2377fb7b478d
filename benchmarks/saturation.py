"""Int8 on x86 without VNNI: the emulation against ONNX Runtime on an emulated Haswell, and what the safe weights cost.

    python benchmarks/saturation.py [--images IMAGES] [--quick]

Needs qemu-x86_64 (Debian: qemu-user). The network that the emulation is held against is torchvision's ResNet-18 with
evenly spread weights, of which many are large, so that it saturates visibly; its last layer is fitted to Fashion-MNIST
by least squares. Safe weights are judged by a trained network on Fashion-MNIST and, with IMAGES (see
`efficientnet_lite0.py`), by EfficientNet-Lite0. "With VNNI" is ONNX Runtime's option for exact sums, which gives the
integers that VNNI gives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from harness import RESULTS, Results
from torch import Tensor, fx, nn

import pared
from pared.data.tasks import fashion_mnist
from pared.measure.fidelity import Comparison
from pared.quantize.emulation import Emulation, layers_at_risk
from pared.step import Context
from pared.targets import find_target
from pared.task import Inputs
from pared.train.step import Train
from pared.zoo import MODELS

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("tests", "examples/efficientnet_lite0")]
import saturating  # noqa: E402 - the tests' oracle
from torchvision_models import torchvision_model  # noqa: E402

IMAGES, CHUNK, FITTED, CALIBRATION = 100, 5, 320, 32
NO_VNNI, WITH, SAFE = "8 bits, without VNNI", "8 bits, with VNNI", "safe weights"


def quantized(model: nn.Module, calibration: Sequence[Tensor], cpu: Any, file: Path) -> fx.GraphModule:
    """The program as a processor with VNNI makes it, and its file."""
    task = pared.Task(example_inputs=(calibration[0][:1],), calibration=list(calibration))
    target, step = find_target("onnxruntime"), pared.QuantizeStatic(weights={"cpu": cpu})
    ctx = Context(task=task, target=target, work=file.parent, dense=model)
    with mock.patch("pared.quantize.static.saturates_here", lambda: False):
        program = step.apply(model, step.plan(model, ctx), ctx)
    target.export(program, task, file)
    assert isinstance(program, fx.GraphModule)
    return program


def images(batches: Any, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a source of the task, and their labels."""
    x, labels = zip(*((batch.inputs.args[0], batch.target) for batch in batches), strict=True)
    return torch.cat(x)[:count], torch.cat(labels)[:count]


def large(x: Tensor) -> Tensor:
    """Images of 28 x 28 as ResNet-18 takes them."""
    return F.interpolate(x, size=224, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()


def even_resnet() -> nn.Module:
    """ResNet-18 with evenly spread weights, batch-norm statistics of Fashion-MNIST, and a fitted last layer."""
    torch.manual_seed(0)
    model = torchvision_model("resnet18")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    x, labels = images(fashion_mnist().batches("train"), FITTED)
    with torch.no_grad():
        model.train()
        for part in x[:32].split(8):
            model(large(part))
        model.eval().fc = nn.Identity()
        features = torch.cat([model(large(part)) for part in x.split(8)])
        model.fc = nn.Linear(512, 10)
        fitted = torch.cat([features, torch.ones(len(x), 1)], 1).double()
        wanted = F.one_hot(labels.long(), 10).double()
        gram = fitted.T @ fitted + 0.1 * len(x) ** 0.5 * torch.eye(513, dtype=torch.double)
        solved = torch.linalg.solve(gram, fitted.T @ wanted).float()
        model.fc.weight.copy_(solved[:-1].T)
        model.fc.bias.copy_(solved[-1])
    return model.requires_grad_(False)


def hold_against_qemu(results: Results, folder: Path, count: int) -> None:
    """Rows of a few images each: the emulated program, and the file on an emulated Haswell."""
    if results.done(what="resnet18", first=count - CHUNK):
        return
    model, file = even_resnet(), folder / "resnet18.onnx"
    task = fashion_mnist()
    calibration = large(images(task.batches("calibration"), CALIBRATION)[0])
    program = quantized(model, calibration.split(8), "here", file)
    x, labels = images(task.batches("validation"), count)
    emulation, exact = Emulation(program, saturate=True), Emulation(program, saturate=False)
    for first in range(0, count, CHUNK):
        if results.done(what="resnet18", first=first):
            continue
        part, expected = large(x[first : first + CHUNK]), labels[first : first + CHUNK].numpy()
        found = emulation(Inputs((part,), {})).numpy()
        real = saturating.on_haswell("run_file", part.numpy(), folder=folder, path=str(file))
        vnni = saturating.run_file(part.numpy(), path=str(file), exact=True)
        results.add(
            {
                "what": "resnet18",
                "first": first,
                "images": len(part),
                "signal": float(np.square(real, dtype=np.float64).sum()),
                "noise": float(np.square(real.astype(np.float64) - found).sum()),
                "same_top1": int((found.argmax(1) == real.argmax(1)).sum()),
                "vnni_signal": float(np.square(vnni, dtype=np.float64).sum()),
                "vnni_noise": float(np.square(vnni.astype(np.float64) - real).sum()),
                "vnni_same_top1": int((vnni.argmax(1) == real.argmax(1)).sum()),
                "right": int((real.argmax(1) == expected).sum()),
                "vnni_right": int((vnni.argmax(1) == expected).sum()),
                "exact_max_abs": float(np.abs(exact(Inputs((part,), {})).numpy() - vnni).max()),
            }
        )


def judge(results: Results, name: str, model: nn.Module, data: dict[str, Tensor], folder: Path) -> None:
    """Accuracy of a network's files with VNNI, without it, and with weights that are safe without it."""
    x, labels = data["x"], data["labels"].numpy()
    with torch.no_grad():
        float_output = torch.cat([model(part) for part in x.split(16)]).numpy()
    results.add({"what": "safe", "network": name, "file": "float", "accuracy": right(float_output, labels)})
    for cpu, kinds in (("here", (WITH, NO_VNNI)), ("any", (SAFE,))):
        file = folder / f"{name}_{cpu}.onnx"
        program = quantized(model, data["calibration"].split(16), cpu, file)
        for kind in kinds:
            if kind == NO_VNNI:
                run = Emulation(program, saturate=True)
                output = torch.cat([run(Inputs((part,), {})) for part in x.split(4)]).numpy()
            else:
                output = saturating.run_file(x.numpy(), path=str(file), exact=kind == WITH)
            compared = Comparison()
            compared.update(float_output, output)
            results.add(
                {
                    "what": "safe",
                    "network": name,
                    "file": kind,
                    "accuracy": right(output, labels),
                    "sqnr_db": compared.result().sqnr_db,
                    "agreement": compared.result().agreement,
                    "samples": len(x),
                    "layers_at_risk": len(layers_at_risk(program)),
                }
            )


def right(output: np.ndarray, labels: np.ndarray) -> float:
    return float((output.argmax(1) == labels).mean())


def trained_cnn(epochs: int) -> nn.Module:
    """The demo's network, trained."""
    task, model, step = fashion_mnist(), MODELS["fashion_cnn"](), Train(epochs=epochs, lr=0.05)
    with tempfile.TemporaryDirectory() as name:
        ctx = Context(task=task, target=find_target("onnxruntime"), work=Path(name), dense=model)
        return step.apply(model, step.plan(model, ctx), ctx).eval()


def claim(results: Results) -> None:
    """The lines of issue 3."""
    rows = [row for row in results.rows if row["what"] == "resnet18"]
    total = {key: sum(row[key] for row in rows) for key in rows[0] if isinstance(rows[0][key], (int, float))}

    def decibels(signal: float, noise: float) -> float:
        return 200.0 if noise == 0 else float(min(10 * np.log10(signal / noise), 200.0))

    visible = decibels(total["vnni_signal"], total["vnni_noise"])
    results.add({"what": "visible", "sqnr_db_without_vnni": visible, **{k: total[k] for k in total if k != "first"}})
    held = decibels(total["signal"], total["noise"])
    results.claim(3, "saturation: emulation against ONNX Runtime on Haswell, SQNR, dB (200: equal)", held, ">=", 35)
    results.claim(
        3, "the same, images of the same top-1, of 100", 100 * total["same_top1"] / total["images"], ">=", 100
    )
    results.claim(3, "it saturates visibly: SQNR without VNNI against with, dB", visible, "<=", 30)
    found = {(row["network"], row["file"]): row["accuracy"] for row in results.rows if row["what"] == "safe"}
    for network in dict.fromkeys(name for name, _ in found):
        loss = 100 * (found[network, WITH] - found[network, SAFE])
        results.claim(3, f"{network}: safe weights' loss against VNNI, points", loss, "<=", 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="parquet file of ImageNet photographs")
    parser.add_argument("--quick", action="store_true", help="5 images, one epoch, no JSON")
    options = parser.parse_args()
    if saturating.QEMU is None:
        parser.exit(2, "qemu-x86_64 is not installed; on Debian: apt-get install qemu-user\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = Results("saturation", folder=folder if options.quick else RESULTS)
        if not results.done(what="safe", network="fashion_cnn", file=SAFE):
            results.rows = [row for row in results.rows if row.get("network") != "fashion_cnn"]
            task = fashion_mnist()
            x, labels = images(task.batches("test"), 200 if options.quick else 2000)
            data = {"x": x, "labels": labels, "calibration": images(task.batches("calibration"), 512)[0]}
            judge(results, "fashion_cnn", trained_cnn(1 if options.quick else 4), data, folder)
        hold_against_qemu(results, folder, CHUNK if options.quick else IMAGES)
        if options.images and not results.done(what="safe", network="efficientnet_lite0", file=SAFE):
            from efficientnet_lite0 import CALIBRATION as GIVEN
            from efficientnet_lite0 import prepared
            from network import efficientnet_lite0

            results.rows = [row for row in results.rows if row.get("network") != "efficientnet_lite0"]
            x, labels = map(torch.from_numpy, prepared(options.images))
            data = {"x": x[GIVEN:], "labels": labels[GIVEN:], "calibration": x[:GIVEN]}
            judge(results, "efficientnet_lite0", efficientnet_lite0(), data, folder)
        claim(results)


if __name__ == "__main__":
    main()
