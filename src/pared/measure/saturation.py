"""Which products of an integer layer overflow on x86 processors without VNNI. Needs no torch.

Before VNNI an x86 processor multiplies unsigned by signed bytes with `pmaddubsw`: it adds the products of two
neighbours in 16 bits and saturates: 255 * 127 + 255 * 127 becomes 32767. From there on sums are exact, in 32 bits.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, PMADDUBSW.

Neighbours are two values next to each other in the order in which a kernel reads them. ONNX Runtime's kernels read a
window position by position, the channels of each in turn; an odd last one meets a zero. A depthwise layer, of one
channel in and one out a group, is summed in 32 bits. All of this was found by experiment; the tests repeat it.
"""

from __future__ import annotations

import numpy as np

LOWEST, HIGHEST = -(2**15), 2**15 - 1
TOP = 255  # of an unsigned activation


def neighbours(weight: np.ndarray) -> np.ndarray:
    """A layer's weights, in the pairs that are summed in 16 bits.

    Args:
        weight: (out, in / groups, *kernel) of a convolution, (out, in) of a linear layer.

    Returns:
        (out, pairs, 2), zeros where a last one has no neighbour.

    Example:
        >>> neighbours(np.array([[[1, 2], [3, 4], [5, 6]]])).tolist()  # three channels, a kernel of two
        [[[1, 3], [5, 2], [4, 6]]]
    """
    rows = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return rows.reshape(len(weight), -1, 2)


def reach(weight: np.ndarray, *, any_pair: bool = False) -> np.ndarray:
    """The largest size that two weights have together, for each output channel: neighbours of one sign, or one alone.

    Some of OpenVINO's kernels let an odd last channel meet a zero at each position, where its others and ONNX
    Runtime's let it meet the next position's first. Either counts, so that a safe file is safe in both.

    Args:
        weight: As for `neighbours`; real or integer.
        any_pair: True where it is not known which weights are neighbours: any two of a channel may be.

    Returns:
        (out,), in the weight's type, integers as int32.

    Example:
        >>> reach(np.array([[100, 27, -90, 5]])).tolist(), reach(np.array([[100, 1, 2, 27]]), any_pair=True).tolist()
        ([127], [127])
    """
    wide = weight.astype(np.int32) if np.issubdtype(weight.dtype, np.integer) else weight
    if any_pair:
        flat = np.sort(np.pad(wide.reshape(len(wide), -1), ((0, 0), (0, 1))))
        pairs = np.stack([flat[:, :2], flat[:, -2:]], axis=1)
    else:
        apart = np.pad(wide, ((0, 0), (0, wide.shape[1] % 2), *[(0, 0)] * (wide.ndim - 2)))
        pairs = np.concatenate([neighbours(wide), neighbours(apart)], axis=1)
    above = np.maximum(pairs, 0).sum(axis=-1)
    below = np.maximum(-pairs, 0).sum(axis=-1)
    largest: np.ndarray = np.maximum(above, below).max(axis=1, initial=0)
    return largest


def is_depthwise(weight: np.ndarray, groups: int) -> bool:
    """True for a layer of one channel in and one out a group, whose products are summed in 32 bits."""
    return groups > 1 and weight.shape[1] == 1 and len(weight) == groups


def can_saturate(weight: np.ndarray, groups: int = 1) -> bool:
    """True where some unsigned activations would make a pair of an integer layer's products saturate.

    Example:
        >>> [can_saturate(np.array([pair])) for pair in ([64, 64], [127, 2], [127, -127])]
        [False, True, False]
    """
    return not is_depthwise(weight, groups) and bool((TOP * reach(weight) > HIGHEST).any())
