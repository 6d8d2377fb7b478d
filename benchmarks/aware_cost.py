"""What training with quantization costs: steps of float, of pared and of torchao's `prepare_qat_pt2e`, in turn; and the
exported file against that of post-training quantization in ONNX Runtime.

    python benchmarks/aware_cost.py [--rounds 15] [--threads 2]

The same networks, batches and optimizer for all, in one process. pared's statistics of batch norm are not frozen yet,
which is its slower half of a training. The file is made and measured by `pared.compress`, on the embedded images.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import distillation as base
import numpy as np
import torch
import torch.nn.functional as F
from harness import Results
from torch import Tensor, nn

import pared
from pared.data.tasks import fashion_mnist
from pared.measure.latency import speedup, time_in_turn
from pared.step import Context
from pared.targets import find_target
from pared.targets.worker import worker_command, write_inputs
from pared.zoo.fashion_cnn import fashion_cnn

ISSUE = 4
BATCH = 64
STEPS = 4  # of the optimizer, in one turn
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fashion_cnn": (fashion_cnn, (1, 28, 28)),
    "ResNet-20 x2": (functools.partial(base.resnet20, (32, 64, 128)), (3, 32, 32)),
    "MobileNetV2 0.35": (base.cifar_student, (3, 32, 32)),
}


def of_pared(model: nn.Module, x: Tensor) -> nn.Module:
    """The graph that `Train(during=[QuantizeAware()])` trains, in its first epoch."""
    task = pared.Task(example_inputs=(x[:2],), calibration=[x])
    with tempfile.TemporaryDirectory() as work:
        ctx = Context(task=task, target=find_target("onnxruntime"), work=Path(work), dense=model)
        aware = pared.QuantizeAware()
        training = aware.callback(aware.plan(model, ctx), ctx)
        graph = training.on_start(model)
        training.on_epoch_start(graph, 0, 4)
    return graph.train()


def of_torchao(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao's graph for x86, in training mode."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(model.train(), (x,)).module()
    prepared = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(prepared)
    found: nn.Module = prepared
    return found


def stepper(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """Some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    return steps


def in_turn(steppers: Sequence[Callable[[], None]], rounds: int) -> np.ndarray:
    """Seconds of each turn, shape (rounds, steppers); every round has another order."""
    times = np.zeros((rounds, len(steppers)))
    for round_ in range(-1, rounds):  # one to warm up
        for i in np.random.default_rng(round_ + 1).permutation(len(steppers)):
            start = time.perf_counter()
            steppers[i]()
            times[max(round_, 0), i] = time.perf_counter() - start
    return times


def ratio(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and its 95 % interval by resampling rounds."""
    ratios = one / other
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def measure_steps(results: Results, rounds: int) -> None:
    """Every network's steps."""
    worst, nearest = 0.0, 0.0
    for name, (build, shape) in NETWORKS.items():
        torch.manual_seed(0)
        model = build()
        x, labels = torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))
        graphs = [model.train(), of_pared(copy.deepcopy(model).eval(), x), of_torchao(copy.deepcopy(model), x)]
        times = in_turn([stepper(graph, x, labels) for graph in graphs], rounds)
        to_float, to_torchao = ratio(times[:, 1], times[:, 0]), ratio(times[:, 1], times[:, 2])
        row = {"network": name, "batch": BATCH, "threads": torch.get_num_threads(), "rounds": rounds}
        for tool, column in zip(("float", "pared", "torchao"), times.T, strict=True):
            row[f"{tool}_step_ms"] = round(statistics.median(column) / STEPS * 1e3, 2)
        results.add(row | {"pared_to_float": to_float, "pared_to_torchao": to_torchao})
        worst, nearest = max(worst, to_float[1]), max(nearest, to_torchao[1])
    results.claim(ISSUE, "a step of training with quantization to one in float, the worst network", worst, "<=", 2.0)
    results.claim(ISSUE, "the same to torchao's, the worst network", nearest, "<=", 1.0)


def measure_file(results: Results) -> None:
    """The file after a training with quantization, and that after post-training quantization, timed in turn."""
    task = fashion_mnist()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        keep = pared.Budget(allow_slower=True, allow_larger=True)
        first = pared.compress(fashion_cnn(), [pared.Train(epochs=3, lr=0.1)], task, out=out / "float", budget=keep)
        model = pared.load(first.path, model=fashion_cnn())
        aware = pared.Train(epochs=1, lr=0.01, during=[pared.QuantizeAware()])
        made = {
            "post-training": pared.compress(model, [pared.QuantizeStatic()], task, out=out / "post", budget=keep),
            "aware": pared.compress(model, [aware], task, out=out / "aware", budget=keep),
        }
        write_inputs(out / "inputs.npz", task.example_inputs.arrays())
        commands = [
            worker_command("onnxruntime", artifact.path / "model.onnx", threads=1, inputs_file=out / "inputs.npz")
            for artifact in made.values()
        ]
        times = time_in_turn(commands)
        change = speedup(times[0], times[1])
        for name, artifact in made.items():
            row = artifact.report.stages[-1]
            results.add(
                {
                    "file": name,
                    "parity_sqnr_db": row.parity.sqnr_db,
                    "parity_agreement": row.parity.agreement,
                    "test_accuracy": artifact.report.final.metrics["accuracy"],
                    "size_bytes": row.size_bytes,
                }
            )
    results.add(
        {"file": "aware against post-training, speed", "value": change.value, "interval": [change.low, change.high]}
    )
    # compress() ends with an error where a file and its PyTorch model disagree, so a report means a green gate.
    results.claim(ISSUE, "files of trained programs whose parity gate is green", 1, ">=", 1)
    what = "latency of the file in ONNX Runtime to that of post-training quantization"
    results.claim(ISSUE, what, 1 / change.high, "<=", 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    results = Results("aware_cost", fresh=True)
    measure_steps(results, options.rounds)
    measure_file(results)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
