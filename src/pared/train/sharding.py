"""What differs where each process holds a part of the model only, by PyTorch's FSDP.

The model is one unit: its parameters are gathered for each pass over it, and between passes each process holds its
share of them, of the gradients and of the optimizer's state. Checkpoints hold whole tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer


def whole(forward: _FabricModule, *, sharded: bool, write: bool = False) -> AbstractContextManager[Any]:
    """Inside, the model has whole tensors; what is written to them is kept where `write` says so."""
    if not sharded:
        return contextlib.nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: AbstractContextManager[Any] = FullyShardedDataParallel.summon_full_params(
        forward._forward_module, writeback=write
    )
    return found


def optimizer_state(forward: _FabricModule, optimizer: _FabricOptimizer, *, sharded: bool) -> dict[str, Any]:
    """The optimizer's state, whole."""
    if not sharded:
        state: dict[str, Any] = optimizer.optimizer.state_dict()
        return state
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(forward._forward_module, optimizer.optimizer, options=options))


def load_optimizer_state(
    forward: _FabricModule, optimizer: _FabricOptimizer, state: Mapping[str, Any], *, sharded: bool
) -> None:
    """The inverse of `optimizer_state`."""
    if not sharded:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(forward._forward_module, optimizer.optimizer, dict(state), options=options)
