"""Tensors as plain data, for the facts of a plan: exact, and some five characters a number instead of twenty."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pared.errors import QuantizeError

DTYPES = {"float32": torch.float32, "bool": torch.bool}


def to_fact(tensor: Tensor) -> dict[str, Any]:
    """A tensor of float32 or bool as JSON data; eight booleans go into a byte.

    Example:
        >>> to_fact(torch.tensor([True, False, True]))
        {'dtype': 'bool', 'shape': [3], 'base64': 'oA=='}
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise QuantizeError(f"a plan holds tensors of {' or '.join(DTYPES)}, found {dtype}")
    array = tensor.detach().cpu().contiguous().numpy()
    raw = np.packbits(array) if dtype == "bool" else array.astype("<f4")
    return {"dtype": dtype, "shape": list(tensor.shape), "base64": base64.b64encode(raw.tobytes()).decode("ascii")}


def from_fact(fact: Mapping[str, Any]) -> Tensor:
    """The inverse of `to_fact`. Raises: QuantizeError where the data are damaged.

    Example:
        >>> from_fact(to_fact(torch.tensor([[1.5, -2.0]]))).tolist()
        [[1.5, -2.0]]
    """
    try:
        raw = np.frombuffer(base64.b64decode(fact["base64"], validate=True), np.uint8)
        shape = tuple(fact["shape"])
        size = int(np.prod(shape, dtype=np.int64))
        if fact["dtype"] == "bool":
            values = np.unpackbits(raw, count=size).astype(np.bool_)
        else:
            values = raw.view("<f4").astype(np.float32)
        return torch.from_numpy(values.reshape(shape).copy())
    except (KeyError, TypeError, ValueError) as error:
        raise QuantizeError(f"a tensor in the plan is damaged ({error}); plan again") from None
