"""Labels through operators that work on every element alone, and through constants."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from pared.graph.macs import shape_of
from pared.graph.reading import Labels, Reading, Rule, result_shape, tensors_of


def pointwise(reading: Reading, node: fx.Node) -> Labels:
    """Broadcasting: dimensions are aligned from the right, and those of size 1 follow the others."""
    shape = shape_of(node)
    result: Labels = {}
    operands = [(reading.labels(arg), shape_of(arg)) for arg in tensors_of(node)]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        found = []
        for labels, other in operands:
            local = dim - len(shape) + len(other)
            if local >= 0 and other[local] == size:
                found.append(labels.get(local))
        joined = reading.join(found)
        if joined is not None:
            result[dim] = joined
    return result


def constant(reading: Reading, node: fx.Node) -> Labels:
    """The same number everywhere: a smaller one would do as well, except along a dynamic dimension."""
    held = node.meta["val"]
    return {dim: reading.loose(size) for dim, size in enumerate(held.shape) if isinstance(size, int) and size > 1}


def like(reading: Reading, node: fx.Node) -> Labels:
    """A constant of the shape of another value."""
    return dict(reading.labels(node.args[0])) if result_shape(node) == shape_of(node.args[0]) else {}


def numbered(_reading: Reading, _node: fx.Node) -> Labels:
    """A constant whose values depend on where they stand."""
    return {}


def named(words: str) -> list[str]:
    """Full names of operators."""
    return [f"aten.{word}" for word in words.split()]


UNARY = (
    "abs neg sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sigmoid tanh sin cos tan asin "
    "acos atan sinh cosh erf erfc floor ceil round trunc frac relu relu6 leaky_relu elu selu celu gelu silu mish "
    "softplus softsign softshrink hardshrink hardtanh hardsigmoid hardswish threshold log_sigmoid clamp clamp_min "
    "clamp_max clip nan_to_num logical_not bitwise_not isnan isinf isfinite dropout feature_dropout alpha_dropout "
    "feature_alpha_dropout rrelu clone contiguous detach alias to _to_copy type_as lift_fresh lift_fresh_copy "
    "fill positive float half double logit polygamma lgamma digamma erfinv tanhshrink _conj conj real view_dtype"
)
BINARY = (
    "add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum max_other min_other eq ne "
    "lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor where masked_fill addcmul "
    "addcdiv lerp atan2 copysign hypot logaddexp logaddexp2 xlogy heaviside fmax fmin copy subtract multiply "
    "divide ldexp"
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(named(UNARY) + named(BINARY), pointwise),
    **dict.fromkeys(
        named("zeros ones full new_zeros new_ones new_full scalar_tensor"),
        constant,
    ),
    **dict.fromkeys(named("zeros_like ones_like full_like empty_like zero fill"), like),
    **dict.fromkeys(named("arange linspace eye empty new_empty tril_indices"), numbered),
}
