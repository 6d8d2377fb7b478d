"""What a training runs on: the settings, and the Fabric that they stand for.

How several processes are started and watched is `processes`'s, how they share batches and gradients is `group`'s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from pared.errors import UsageError
from pared.step import settings

MIXED: dict[str, Literal["bf16-mixed", "16-mixed"]] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


@settings
class Hardware:
    """Where and how exactly a training computes."""

    accelerator: Annotated[
        Literal["auto", "cpu", "cuda"], pydantic.Field(description="auto: a GPU where there is one.")
    ] = "auto"
    devices: Annotated[
        int, pydantic.Field(description="GPUs, or processes on the CPU; each trains on its part of every batch.", ge=1)
    ] = 1
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp"],
        pydantic.Field(
            description="ddp: processes that each hold the whole model. fsdp: each GPU holds a part of it. "
            "auto: ddp where there are several devices, else no process of its own."
        ),
    ] = "auto"
    precision: Annotated[
        Literal["32", "bf16", "fp16"],
        pydantic.Field(description="What layers compute in, by PyTorch's autocast. Weights stay as they are."),
    ] = "32"
    accumulate: Annotated[
        int, pydantic.Field(description="Batches whose gradients make one step of the optimizer.", ge=1)
    ] = 1

    def __post_init__(self) -> None:
        if self.strategy == "fsdp" and self.accelerator == "cpu":
            raise ValueError("fsdp needs GPUs; use ddp on the CPU")

    @property
    def apart(self) -> bool:
        """Whether the training runs in processes of its own."""
        return self.devices > 1 or self.strategy != "auto"

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.strategy == "fsdp"

    @property
    def on_gpu(self) -> bool:
        """Whether an NVIDIA or AMD GPU does the work."""
        return self.accelerator != "cpu" and torch.cuda.is_available()

    def check(self) -> None:
        """Raise `UsageError` where this machine lacks what is asked for."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (self.accelerator == "cuda" or self.sharded) and gpus == 0:
            what = "strategy='fsdp'" if self.sharded else "accelerator='cuda'"
            raise UsageError(f"Hardware({what}) needs a GPU, and PyTorch finds none; use accelerator='cpu'")
        if self.on_gpu and self.devices > gpus:
            raise UsageError(
                f"Hardware(devices={self.devices}) asks for more GPUs than the {gpus} of this machine; "
                "take fewer, or accelerator='cpu'"
            )


class Processes(DDPStrategy):  # type: ignore[misc]
    """Fabric's strategy of one process a device, without its wrapper around the model: gradients are averaged by
    `group`, which also sees parts of unequal size and the parameters of callbacks."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module


def make_fabric(hardware: Hardware, model: nn.Module) -> Fabric:
    """The Fabric of this process. With `apart`, the process group and LOCAL_RANK are there already.

    Args:
        model: Where it lies on a GPU and one device is to train, it trains there.
    """
    if hardware.apart:
        accelerator = "cuda" if hardware.on_gpu else "cpu"
        fabric = Fabric(accelerator=accelerator, devices=hardware.devices, **apart(hardware, accelerator))
        fabric.launch()
        return fabric
    place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    here = hardware.accelerator != "cpu" and place.type == "cuda"
    devices: int | list[int] = [place.index] if here else 1
    accelerator = "cuda" if here else hardware.accelerator
    on_mac = hardware.accelerator == "auto" and torch.backends.mps.is_available()
    kind = "cuda" if hardware.on_gpu else "mps" if on_mac else "cpu"
    return Fabric(accelerator=accelerator, devices=devices, plugins=plugins(hardware.precision, kind))


def apart(hardware: Hardware, device: str) -> dict[str, Any]:
    """Fabric's further arguments in a process of its own."""
    environment = LightningEnvironment()
    if not hardware.sharded:
        strategy = Processes(cluster_environment=environment)
        return {"strategy": strategy, "plugins": plugins(hardware.precision, device)}
    precision = MIXED.get(hardware.precision, "32-true")
    return {"strategy": FSDPStrategy(cluster_environment=environment), "precision": precision}


def plugins(precision: str, device: str) -> list[Precision]:
    """Fabric's plugin for a precision. Given by name, float16 on a CPU would silently become bfloat16."""
    return [MixedPrecision(MIXED[precision], device=device)] if precision in MIXED else []
