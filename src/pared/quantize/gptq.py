"""GPTQ: rounding of a layer's weights that makes up for each column's error in the columns still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.errors import QuantizeError
from pared.quantize.affine import Grid, QParams, quantize
from pared.quantize.grouping import Grouped, group_qparams, in_groups

BLOCK = 128  # columns whose updates are applied to the rest at once


def gptq(
    weight: Tensor,
    hessian: Tensor,
    numbers: Grid,
    group_size: int,
    *,
    symmetric: bool,
    damping: float = 0.01,
    by_activation: bool = False,
) -> Grouped:
    """A quantized matrix whose error, weighted by the layer's inputs, is far below that of rounding to nearest.

    Column by column: round, then move the columns to come by what makes up best for the error, which is the error
    times a row of the Cholesky factor of the inverse Hessian. A group's scales are taken when its first column is
    reached, from the weights as moved by then; with `by_activation`, where columns come out of order, from the weights
    as they were. Weights that are 0 stay 0, so that pruned layers stay pruned.

    Args:
        weight: Finite, shape (rows, columns): one row an output.
        hessian: Second moments of the inputs, mean of x x^T, shape (columns, columns); any positive factor will do.
        numbers: The integers to use, signed.
        group_size: Neighbours in a row that share a scale.
        symmetric: True puts every zero point at 0.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.
        by_activation: Take columns in the order of the Hessian's diagonal, largest first.

    Returns:
        The quantized matrix. Columns whose input was always 0 are rounded to nearest.

    Raises:
        QuantizeError: The shapes do not fit, or the Hessian is not positive definite even when damped.

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; the order by activation and scales of groups taken as
    they begin are of the authors' published code. Deviation: zeros stay zeros.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise QuantizeError(f"a weight of {columns} columns needs a Hessian of that size, found {tuple(hessian.shape)}")
    qparams = group_qparams(in_groups(weight.double(), group_size), numbers, symmetric=symmetric)
    scale, zero_point = qparams.scale.squeeze(-1), qparams.zero_point.squeeze(-1)
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True) if by_activation else None
    column_of = torch.arange(columns) if order is None else order
    # Columns are rows here, so that what is written at once lies together; in the order that they are rounded in.
    w = weight.double().T[column_of]
    zeros = w == 0
    factor = inverse_factor(hessian.double()[column_of][:, column_of], damping)
    values = torch.zeros(columns, weight.shape[0], dtype=numbers.dtype)
    block = BLOCK if by_activation else max(group_size, BLOCK // group_size * group_size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(stop - start, weight.shape[0], dtype=torch.float64)
        for i in range(start, stop):
            column = int(column_of[i])
            group = column // group_size
            if order is None and column % group_size == 0:
                taken = group_qparams(w[i : i + group_size].T, numbers, symmetric=symmetric)
                scale[:, group], zero_point[:, group] = taken.scale.squeeze(-1), taken.zero_point.squeeze(-1)
            step, zero = scale[:, group].double(), zero_point[:, group]
            q = torch.where(zeros[i], zero, quantize(w[i], QParams(step, zero), numbers).int())
            values[column] = q.to(numbers.dtype)
            errors[i - start] = (w[i] - (q - zero) * step) / factor[i, i]
            w[i + 1 : stop] -= torch.outer(factor[i, i + 1 : stop], errors[i - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    filled = zero_point.repeat_interleave(group_size, 1).to(numbers.dtype)  # real zeros
    filled[:, :columns] = values.T
    return Grouped(filled, scale, zero_point)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1; an input that was always 0 has a row of its own.

    Raises:
        QuantizeError: H + damping is not positive definite.
    """
    h = hessian.clone()
    diagonal = torch.diagonal(h)
    diagonal += damping * diagonal.mean()
    dead = torch.diagonal(hessian) == 0
    diagonal[dead] = 1.0
    factor, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise QuantizeError(
            f"the second moments of its inputs are not positive definite with damping={damping}; raise it"
        )
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper
