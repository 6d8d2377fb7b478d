"""Labels through normalizations, pooling, reductions, and operators that run along a dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from pared.graph.capture import operator, owner
from pared.graph.macs import shape_of
from pared.graph.reading import Labels, Reading, Rule, Value, argument, dims_of, results


def batch_norm(reading: Reading, node: fx.Node) -> Value:
    """Scale, shift and statistics go with the channel."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    channel = labels.get(1)
    held = [arg for arg in node.args[1:5] if isinstance(arg, fx.Node)]
    if shape[1] > 1:
        channel = reading.join([channel, *(reading.labels(arg).get(0) for arg in held)])
    # With the statistics of its input, as where weights are standardized; an instance norm has them for each channel.
    if any(arg is True for arg in node.args[3:6]) and operator(node) != "aten.instance_norm":
        for label in [labels.get(dim) for dim in range(len(shape)) if dim != 1]:
            reading.blur(label, "the statistics of a batch norm")
    return results(node, with_dim(labels, 1, channel))


def layer_norm(reading: Reading, node: fx.Node) -> Value:
    """Mean and variance run over the last dimensions, so that they change where one of these gets smaller."""
    labels, shape = dict(reading.labels(node.args[0])), shape_of(node.args[0])
    sized = node.args[1]
    count = len(sized) if isinstance(sized, (list, tuple)) else 1
    held = [arg for arg in node.args[2:4] if isinstance(arg, fx.Node)]
    for dim in range(len(shape) - count, len(shape)):
        if shape[dim] == 1:
            continue
        local = dim - len(shape) + count
        joined = reading.join([labels.get(dim), *(reading.labels(arg).get(local) for arg in held)])
        reading.blur(joined, "a mean" if operator(node) == "aten.rms_norm" else "the mean of a layer norm")
        labels = with_dim(labels, dim, joined)
    return results(node, labels)


def group_norm(reading: Reading, node: fx.Node) -> Labels:
    """Whole groups leave, which is exact; with one group, as in a layer norm."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    groups = int(str(node.args[1]))
    held = [arg for arg in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(arg, fx.Node)]
    channel = labels.get(1)
    if shape[1] > 1:
        channel = reading.join([channel, *(reading.labels(arg).get(0) for arg in held)])
    if channel is None:
        return with_dim(labels, 1, None)
    if groups == 1:
        reading.blur(channel, "the mean of a group norm")
        return with_dim(labels, 1, channel)
    whole = reading.tie_along(channel.reshape(groups, -1), 1)
    reading.counts.append((owner(node), "num_groups", whole))
    return with_dim(labels, 1, np.repeat(whole, shape[1] // groups))


def weight_norm(reading: Reading, node: fx.Node) -> Labels:
    """_weight_norm(v, g, dim): a length for each filter, over what it reads."""
    labels, shape = dict(reading.labels(node.args[0])), shape_of(node.args[0])
    kept = int(argument(node, 2, "dim", 0)) % len(shape)
    for dim, label in labels.items():
        if dim == kept:
            reading.tie(label, reading.labels(node.args[1]).get(dim))
        else:
            reading.blur(label, "the length of a weight")
    return labels


def slopes(reading: Reading, node: fx.Node) -> Labels:
    """prelu: one slope a channel, or one for all."""
    labels, shape, slope = reading.labels(node.args[0]), shape_of(node.args[0]), node.args[1]
    if len(shape) < 2 or shape_of(slope) != (shape[1],) or shape[1] == 1:
        return labels
    return with_dim(labels, 1, reading.join([labels.get(1), reading.labels(slope).get(0)]))


def with_dim(labels: Labels, dim: int, label: Any) -> Labels:
    """Labels with that of one dimension replaced; None leaves it out."""
    rest = {key: value for key, value in labels.items() if key != dim}
    return rest if label is None else {**rest, dim: label}


def pooling(reading: Reading, node: fx.Node) -> Value:
    """Channels pass, the dimensions that are pooled or resampled do not."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    name = operator(node).removeprefix("aten.")
    spatial = next(n for key, n in {"1d": 1, "2d": 2, "3d": 3}.items() if key in name)
    first = len(shape) - spatial
    for dim, label in labels.items():
        if dim >= first:
            reading.pin(label, "it is pooled or resampled along its channels")
    kept = {dim: label for dim, label in labels.items() if dim < first}
    return results(node, kept)


def reduction(reading: Reading, node: fx.Node) -> Value:
    """Sums and norms may run over fewer channels, for a removed one adds nothing; means and maxima change a little."""
    name = operator(node).removeprefix("aten.")
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    position = 2 if name == "linalg_vector_norm" or (name == "norm" and len(node.args) > 1) else 1
    given = argument(node, position, "dim")
    if isinstance(given, bool):  # var(x, unbiased)
        given = None
    dims = dims_of(list(given) if isinstance(given, (list, tuple)) else given, len(shape))
    for dim in dims:
        if name in MEANS:
            reading.blur(labels.get(dim), "a mean")
        elif name in LARGEST and not asks_which(node):
            reading.blur(labels.get(dim), "a maximum or minimum")
        elif name not in SUMS:
            reading.pin(labels.get(dim), "it tells its channels apart")
    held = node.meta.get("val")
    first = held[0] if isinstance(held, (list, tuple)) else held
    keepdim = isinstance(first, torch.Tensor) and first.ndim == len(shape)
    order = [dim for dim in range(len(shape)) if keepdim or dim not in dims]
    kept = {place: labels[dim] for place, dim in enumerate(order) if dim in labels and dim not in dims}
    return [kept for _ in held] if isinstance(held, (list, tuple)) else kept


def asks_which(node: fx.Node) -> bool:
    """True where a forward also takes the second result: the indices of what was found."""
    several = isinstance(node.meta.get("val"), (list, tuple))
    return several and any(user.args[1] != 0 and user.users for user in node.users)


def running(reading: Reading, node: fx.Node) -> Value:
    """What mixes all indices of one dimension: they stay, the other dimensions pass."""
    labels, shape = reading.labels(node.args[0]), shape_of(node.args[0])
    position = 2 if operator(node) == "aten.topk" else 1
    default = -1 if operator(node) in ("aten.sort", "aten.argsort", "aten.topk") else None
    given = argument(node, position, "dim", default)
    dim = given % len(shape) if isinstance(given, int) and shape else None
    if dim is None:
        reading.pin_all(labels, "it runs along its channels")
        return {}
    reading.pin(labels.get(dim), "it runs along its channels")
    kept = with_dim(labels, dim, None)
    return results(node, kept)


SUMS = ("sum", "linalg_vector_norm", "norm", "any", "count_nonzero", "nansum")
MEANS = ("mean", "var", "std", "var_mean", "std_mean")
LARGEST = ("max", "min", "amax", "amin")
OTHER = ("argmax", "argmin", "prod", "all", "median", "logsumexp", "mode", "aminmax")
SAMPLED = (
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa"),
    "_upsample_bicubic2d_aa",
)
ALONG = ("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "argsort", "topk")
RULES: Mapping[str, Rule] = {
    "aten.batch_norm": batch_norm,
    "aten.instance_norm": batch_norm,
    "aten._native_batch_norm_legit": batch_norm,
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten.layer_norm": layer_norm,
    "aten.native_layer_norm": layer_norm,
    "aten.rms_norm": layer_norm,
    "aten.group_norm": group_norm,
    "aten._weight_norm": weight_norm,
    "aten.prelu": slopes,
    "aten._prelu_kernel": slopes,
    **dict.fromkeys([f"aten.{name}" for name in SUMS + MEANS + LARGEST + OTHER], reduction),
    **dict.fromkeys([f"aten.{name}" for name in SAMPLED], pooling),
    **dict.fromkeys([f"aten.{name}" for name in ALONG], running),
}
