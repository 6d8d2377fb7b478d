"""The table of the contract suite: a new step joins by one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pared
from pared.prune import Global, Widths
from pared.quantize.search import Sensitivity
from pared.task import Inputs, Task
from pared.train.schedules import Constant
from zoo_models import OUTPUT, make

CLASSES = 5
WIDTHS = Widths(round_to=1)  # the zoo's layers are narrower than what runtimes like


@dataclasses.dataclass(frozen=True)
class Case:
    """A step, or a technique inside a training, and for each of its settings another value that must change the result.

    Attributes:
        step: The step, quick. Where it is a `Train` with a technique, that is what the case is about.
        others: {setting: value}, or {setting: (step to start from, value)} where it matters only beside other settings.
        candidates: Modules that the step must list as changed or skipped.
        on: The model pattern on which settings are tried.
    """

    step: Any
    others: Mapping[str, Any]
    candidates: Callable[[nn.Module], list[str]] = lambda model: []
    on: str = "conv_bn_relu"

    @property
    def name(self) -> str:
        return type(self.part).__name__

    @property
    def part(self) -> Any:
        """The settings that the case is about."""
        during = getattr(self.step, "during", ())
        return during[0] if during else self.step

    def step_of(self, part: Any) -> Any:
        """The step with other settings."""
        return part if self.part is self.step else dataclasses.replace(self.step, during=(part,))


def weighted(model: nn.Module) -> list[str]:
    """Layers with a weight that integer arithmetic could take."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.LSTM, nn.Embedding)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


CASES = [
    Case(
        pared.Train(epochs=1, lr=0.05),
        {
            "epochs": 2,
            "lr": 0.1,
            "optimizer": "adamw",
            "schedule": Constant(),
            "patience": (pared.Train(epochs=4, lr=5.0), 1),
            "clip_norm": 0.1,
            "ema": 0.5,
            "log_dir": "log",
            "hardware": {"precision": "bf16"},
            "during": [pared.Distill()],
        },
    ),
    Case(
        pared.Train(epochs=1, lr=0.05, during=[pared.Distill()]),
        {
            "temperature": 1.0,
            "alpha": 0.5,
            "response": "mse",
            "beta": (pared.Distill(response="decoupled"), 1.0),
            "knowledge": ["similarity"],
            "teacher": "born_again",
        },
    ),
    Case(
        pared.Train(epochs=1, lr=0.05, during=[pared.Slim(strength=0.1)]),
        {"strength": 0.2, "include": ["0.*"], "exclude": ["0.*"]},
    ),
    Case(
        pared.PruneChannels(ratio=0.5, widths=WIDTHS),
        {
            "ratio": 0.25,
            "params": (pared.PruneChannels(params=0.5, widths=WIDTHS), 0.25),
            "macs": (pared.PruneChannels(macs=0.5, widths=WIDTHS), 0.25),
            "latency": (pared.PruneChannels(latency=0.5, widths=WIDTHS), 0.25),
            "saliency": "random",
            "ratios": Global(),
            "widths": Widths(round_to=4, limits={"0.*": (0.75, 1.0)}),
            "include": ["0.*"],
            "exclude": ["0.*"],
        },
        candidates=weighted,
    ),
    Case(
        pared.QuantizeStatic(),
        {
            "ranges": "percentile",
            "include": ["0.*"],
            "exclude": ["0.*"],
            "samples": 3,
            "weights": {"bits": 4},
            "activations": {"bits": 6},
            "repairs": (pared.QuantizeStatic(), ()),
            "max_drop": (pared.QuantizeStatic(weights={"bits": 2}, activations={"bits": 2}), 0.0),
            "sensitivity": Sensitivity(samples=4),
        },
        candidates=weighted,
    ),
    Case(
        pared.QuantizeWeights(),
        {
            "bits": 8,
            "group_size": None,
            "symmetric": True,
            "method": "nearest",
            "include": ["0.*"],
            "exclude": ["0.*"],
        },
        candidates=weighted,
    ),
    Case(
        pared.CastHalf(),
        {
            "dtype": "bfloat16",
            "activations": True,
            "include": ["0.*"],
            "exclude": ["0.*"],
        },
        candidates=weighted,
    ),
    Case(
        pared.QuantizeDynamic(),
        {
            "weights": "per_tensor",
            "activations": "per_tensor",
            "bits": 4,
            "cpu": (pared.QuantizeDynamic(cpu="vnni"), "any"),
            "include": ["0", "2"],
            "exclude": ["4"],
        },
        candidates=weighted,
        on="mlp",
    ),
    Case(
        pared.Train(epochs=2, lr=0.05, during=[pared.QuantizeAware()]),
        {
            "weight_bits": 4,
            "activation_bits": 4,
            "layer_bits": {"0.0": 3},
            "scales": "follow",
            "ranges": "minmax",
            "include": ["0.*"],
            "exclude": ["0.*"],
            "freeze_after": 0,
            "cpu": (pared.QuantizeAware(cpu="vnni"), "any"),
        },
        candidates=weighted,
    ),
]
BY_NAME = {case.name: case for case in CASES}


def batch_of(example: Inputs, size: int, seed: int) -> Inputs:
    """Random inputs in the form of the example's."""
    generator = torch.Generator().manual_seed(seed)

    def like(value: Tensor) -> Tensor:
        return torch.randn(size, *value.shape[1:], generator=generator, dtype=value.dtype)

    return Inputs(tuple(map(like, example.args)), {name: like(value) for name, value in example.kwargs.items()})


def labelled(example: Inputs, size: int, seed: int) -> tuple[Any, Tensor]:
    inputs = batch_of(example, size, seed)
    labels = torch.randint(0, CLASSES, (size,), generator=torch.Generator().manual_seed(seed))
    return (inputs.kwargs or inputs.args), labels


def model_and_task(pattern: str) -> tuple[nn.Module, Task]:
    """A fresh model of the zoo, and a task for it with data for every need: the same at every call."""
    model, example = make(pattern)
    data = [labelled(example, 8, seed) for seed in range(3)]
    task = Task(
        example_inputs=example,
        calibration=data[:2],
        train=data[:2],
        validation=data[2:],
        loss=nn.CrossEntropyLoss(),
        metrics=accuracy,
        output=OUTPUT.get(pattern),
    )
    return model, task


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()
