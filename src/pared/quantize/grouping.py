"""Weights in groups of neighbours, each with a scale of its own. Tensors in, tensors out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pared.errors import QuantizeError
from pared.quantize.affine import Grid, QParams, dequantize, qparams_of_range, quantize


class Grouped(NamedTuple):
    """A quantized matrix.

    Attributes:
        values: int8, shape (rows, groups * group_size): columns padded with real zeros to whole groups.
        scale: float32, shape (rows, groups).
        zero_point: int32, shape (rows, groups).
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> (rows, groups, group_size), the last group filled up with zeros.

    Example:
        >>> in_groups(torch.tensor([[1.0, 2.0, 3.0]]), 2).tolist()
        [[[1.0, 2.0], [3.0, 0.0]]]
    """
    if weight.ndim != 2 or not group_size >= 1:
        raise QuantizeError(f"expected a matrix and a group size of 1 or more, found {weight.ndim}-D and {group_size}")
    missing = -weight.shape[1] % group_size
    return torch.nn.functional.pad(weight, (0, missing)).reshape(weight.shape[0], -1, group_size)


def group_qparams(groups: Tensor, numbers: Grid, *, symmetric: bool) -> QParams:
    """Scale and zero point that cover each group.

    Args:
        groups: Finite, shape (..., group_size).
        numbers: The integers to use.
        symmetric: True puts every zero point at 0.

    Returns:
        Shape (..., 1): one pair a group.
    """
    return qparams_of_range(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), numbers, symmetric=symmetric)


def nearest(weight: Tensor, numbers: Grid, group_size: int, *, symmetric: bool) -> Grouped:
    """A matrix with every weight rounded to the nearest integer of its group.

    Args:
        weight: Finite, shape (rows, columns).
        numbers: The integers to use, signed.
        group_size: Neighbours in a row that share a scale.
        symmetric: True puts every zero point at 0.

    Raises:
        QuantizeError: `weight` is not a matrix, or not finite.

    Example:
        >>> from pared.quantize.affine import grid
        >>> numbers = grid(bits=4, signed=True, symmetric=True)
        >>> q = nearest(torch.tensor([[0.7, -0.1, 7.0]]), numbers, 2, symmetric=True)
        >>> q.values.tolist(), q.scale.shape
        ([[7, -1, 7, 0]], torch.Size([1, 2]))
    """
    groups = in_groups(weight.double(), group_size)
    qparams = group_qparams(groups, numbers, symmetric=symmetric)
    values = quantize(groups, QParams(qparams.scale.double(), qparams.zero_point), numbers)
    return Grouped(values.flatten(1), qparams.scale.squeeze(-1), qparams.zero_point.squeeze(-1))


def restored(grouped: Grouped, columns: int) -> Tensor:
    """The real numbers of a quantized matrix, float32, without what filled up its last group."""
    values = grouped.values.reshape(*grouped.scale.shape, -1)
    qparams = QParams(grouped.scale.unsqueeze(-1), grouped.zero_point.unsqueeze(-1))
    return dequantize(values, qparams).flatten(1)[:, :columns]
