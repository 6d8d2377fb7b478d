"""The proof of a prune: what the pruned model computes is what the original computes without the removed units.

The original runs as its captured graph, blind to the removed units: they are zero wherever something sums over them,
and statistics that run over channels run over the kept ones alone. That *masked original* knows nothing of sliced
tensors, so it finds every index that was cut wrongly.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pared.graph.capture import doubled, evaluating, forgetful, operator
from pared.graph.channels import Channels
from pared.prune.attributes import changed
from pared.surgery import duplicate
from pared.task import Inputs, Task

# In float64 a thousand layers of a thousand terms each round to about 1e-12 of the largest result: three digits are
# left for networks that magnify their own rounding. In float32 the same sum gives 1e-4.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-3}

# Operators that sum over a dimension of an argument: there a removed unit must give nothing.
SUMMING = (
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear addmm mm bmm "
    "baddbmm matmul mv addmv dot einsum tensordot bilinear scaled_dot_product_attention "
    "_scaled_dot_product_flash_attention_for_cpu lstm gru rnn_tanh rnn_relu sum linalg_vector_norm norm"
)
SUMS = frozenset(SUMMING.split())
# Of these, the ones whose second argument makes channels; and the norms whose second argument scales them.
MAKERS = frozenset(name for name in SUMS if name.startswith("conv") or name == "linear")
SCALES = frozenset(["batch_norm", "_native_batch_norm_legit_no_training", "instance_norm"])
NORMS = frozenset(["layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"])
GROUP_NORMS = frozenset(["group_norm", "native_group_norm"])
MEANS = frozenset(["mean", "var", "std", "var_mean", "std_mean"])
# Norms that may take the statistics of their input, as where weights are standardized.
STANDARDS = frozenset(["batch_norm", "_native_batch_norm_legit"])
VIEWS = frozenset(["view", "_unsafe_view"])
# What export adds to check dtypes and sizes, which another dtype would fail.
CHECKS = frozenset(["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "_guards_fn"])


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a pruned model is from the masked original.

    Attributes:
        relative: Largest absolute difference of an output over that output's largest absolute value; NaN where either
            holds NaN, infinite where shapes differ.
        tolerance: What rounding may explain in the dtype that both ran in.
        dtype: That dtype, as "float64".
    """

    relative: float
    tolerance: float
    dtype: str

    @property
    def exact(self) -> bool:
        """True where the two are the same function but for rounding."""
        return self.relative <= self.tolerance


def difference(
    model: nn.Module,
    pruned: nn.Module,
    channels: Channels,
    keep: Tensor,
    task: Task,
    *,
    folded: Tensor | None = None,
    seed: int = 0,
) -> Difference:
    """Compare a pruned model with the masked original, on random inputs of the example's shapes.

    Both run in float64; in float32 where the pruned model's own code refuses other dtypes. Inputs that are not floating
    point stay as the example has them, since not every integer is a valid index.

    Args:
        model: What `channels` was read off.
        pruned: The model without the units.
        channels: Its groups.
        keep: bool (channels.units,), True = stays.
        task: Gives the example inputs.
        folded: bool (channels.units,): removed units that are not zero but the constant that their bias or batch norm
            makes of a zero scale, since what reads them has taken that constant in.
        seed: Of the inputs.

    Source: the masked original as an oracle is Torch-Pruning's and NNI's definition of structured pruning; that
        layer norms take statistics over the kept channels is our own choice, and stated wherever it matters.
    """
    inputs = random_inputs(doubled(task.example_inputs), seed)
    try:
        found = outputs_of(pruned, inputs, torch.float64)
        dtype = torch.float64
    except RuntimeError:
        found, dtype = outputs_of(pruned, inputs, torch.float32), torch.float32
    masked = Masked(model, channels, keep, folded=folded, dtype=dtype)
    return Difference(relative(masked.outputs(inputs), found), TOLERANCES[dtype], str(dtype).removeprefix("torch."))


def relative(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference of any output, over the largest value of the expected one."""
    if [tuple(value.shape) for value in expected] != [tuple(value.shape) for value in found]:
        return float("inf")
    worst = torch.zeros((), dtype=torch.float64)
    for a, b in zip(expected, found, strict=True):
        if a.numel():
            apart, size = (a.double() - b.double()).abs().max(), a.double().abs().max()
            # Where all is zero, any other value is infinitely far, and 0 / 0 is no difference.
            worst = torch.maximum(worst, apart if apart == 0 else apart / size)
    return float(worst)


def random_inputs(inputs: Inputs, seed: int) -> Inputs:
    """Normal numbers with the mean and spread of each floating-point input; others as they are."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        spread = value.double().std() if value.numel() > 1 else torch.ones((), dtype=torch.float64)
        spread = spread if spread > 0 else torch.ones_like(spread)
        return (drawn.to(value.device) * spread + value.double().mean()).to(value.dtype)

    return changed(inputs, one)


def outputs_of(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Every tensor that a copy of the model in another dtype gives."""
    copied = forgetful(duplicate(model)).to(dtype)
    given = changed(inputs, as_dtype(dtype))
    with evaluating(copied), torch.no_grad(), Uniform(dtype):
        result = copied(*given.args, **given.kwargs)
    return [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]


def as_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A change of floating-point tensors to a dtype."""
    return lambda value: value.to(dtype) if value.is_floating_point() else value


class Uniform(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes code that names a floating-point type compute in another one, as a default of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Any:
        self.stack.enter_context(default_dtype(self.dtype))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def one(value: Any) -> Any:
            return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

        # No operator takes several in a list.
        return func(*map(one, args), **{name: one(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Masked(fx.Interpreter):
    """The captured original, blind to removed units.

    Args:
        model: What `channels` was read off; its tensors are used as they are now.
        channels: Its groups.
        keep: bool (channels.units,), True = stays.
        folded: bool (channels.units,): removed units that stay as constants: the weights and scales that make them are
            zero, and what follows reads what is left of them.
        dtype: What everything is computed in.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        keep: Tensor,
        *,
        folded: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(channels.program.graph_module)
        self.model, self.channels, self.dtype = model, channels, dtype
        folded = torch.zeros_like(keep) if folded is None else folded & ~keep
        # One entry more than there are units: NO_UNIT, -1, finds it, and it is never gone.
        false = torch.zeros(1, dtype=torch.bool)
        self.gone = torch.cat([~keep, false])
        self.zero = torch.cat([~keep & ~folded, false])
        self.folded = torch.cat([folded, false])
        self.held = held_by(model, channels)
        self.known: dict[tuple[int, int], Tensor | None] = {}

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """Every tensor that the masked original gives for these inputs."""
        signature = self.channels.program.graph_signature
        given = changed(inputs, as_dtype(self.dtype))
        flat = dict(zip(signature.user_inputs, tree_flatten((given.args, given.kwargs))[0], strict=True))
        names = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        with torch.no_grad(), Uniform(self.dtype):
            results = self.run(*[flat.get(name) for name in names], enable_io_processing=False)
        users = [spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs]
        return [value for value, wanted in zip(results, users, strict=True) if wanted and isinstance(value, Tensor)]

    def labels(self, node: fx.Node) -> Mapping[int, Tensor]:
        """The units along each dimension of a node's value."""
        return self.channels.values.get(node.name, {})

    def removed(self, node: fx.Node, among: Tensor) -> dict[int, Tensor]:
        """Along each dimension that any of these units stands at: where they stand."""
        found = {dim: self.where(labels, among) for dim, labels in self.labels(node).items()}
        return {dim: where for dim, where in found.items() if where is not None}

    def where(self, labels: Tensor, among: Tensor) -> Tensor | None:
        """Where any of these units stands along a dimension; None where none does. Many share their labels."""
        key = (id(labels), id(among))
        if key not in self.known:
            found = among[labels]
            self.known[key] = found if bool(found.any()) else None
        return self.known[key]

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter, buffer or constant of the model, or what the caller gave."""
        given = next(self.args_iter)
        value = self.held.get(target)
        return given if value is None else as_dtype(self.dtype)(value.detach())

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, with removed units out of every sum and every statistic."""
        name = operator(n).removeprefix("aten.")
        if name in CHECKS:
            return None
        if name in STANDARDS and named_arguments(n).get("training"):
            return self.over_kept(n, name)
        if name in SUMS or name in SCALES:
            read = self.without if name in SUMS else self.env.__getitem__
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), read)
            if name in MAKERS or name in SCALES:
                args = tuple(self.silent(n, place, value) for place, value in enumerate(args))
            if name == "scaled_dot_product_attention":
                kwargs = {**kwargs, **self.scale_of_kept(n)}
            return self.call_function(n.target, args, kwargs)
        if name in VIEWS and isinstance(n.args[1], (list, tuple)):
            # Kernels of another dtype may lay their results out otherwise than those that the graph was made with.
            args = fx.node.map_arg(n.args, self.env.__getitem__)
            return torch.ops.aten.reshape.default(*args)
        if name in NORMS or name in GROUP_NORMS or name in MEANS:
            return self.over_kept(n, name)
        return super().run_node(n)

    def without(self, node: fx.Node) -> Any:
        """A node's value with zeros for the removed units."""
        value = self.env[node]
        return zeroed(value, self.removed(node, self.zero)) if isinstance(value, Tensor) else value

    def silent(self, node: fx.Node, place: int, value: Any) -> Any:
        """A weight or a scale with zeros for the units that stay as constants."""
        held = node.args[place]
        if place != 1 or not isinstance(held, fx.Node):
            return value
        out = 1 if "transpose" in operator(node) else 0
        return zeroed(value, {dim: where for dim, where in self.removed(held, self.folded).items() if dim == out})

    def scale_of_kept(self, node: fx.Node) -> dict[str, float]:
        """The scale of an attention that takes it from the width of its heads: that of the kept channels."""
        query: Any = node.args[0]
        where = self.removed(query, self.gone).get(query.meta["val"].ndim - 1)
        if where is None or node.kwargs.get("scale") is not None:
            return {}
        return {"scale": float((~where).sum()) ** -0.5}

    def over_kept(self, node: fx.Node, name: str) -> Any:
        """A norm or a mean whose statistics run over kept channels alone."""
        named = named_arguments(node)
        first_name, source = next(iter(named.items()))
        given = dict(fx.node.map_arg(named, lambda held: self.env[held]))
        x = self.env[source]
        dims = self.statistics(name, x, given)
        gone = {dim: where for dim, where in self.removed(source, self.gone).items() if dim in dims}
        if name in STANDARDS:
            given["weight"] = self.silent(node, 1, given["weight"])
        if not gone:
            return node.target(**given)  # type: ignore[operator]
        index = {dim: (~where).nonzero().flatten().to(x.device) for dim, where in gone.items()}
        given[first_name] = taken(x, index)
        if name in NORMS or name in GROUP_NORMS:
            first = x.ndim - len(given["normalized_shape"]) if name in NORMS else 1
            inner = {dim - first: kept for dim, kept in index.items()}
            for key in ("weight", "bias"):
                if given.get(key) is not None:
                    given[key] = taken(given[key], inner)
            if name in NORMS:
                given["normalized_shape"] = list(given[first_name].shape[first:])
            if "C" in given:
                given["C"] = given[first_name].shape[1]
        result = node.target(**given)  # type: ignore[operator]
        if name in MEANS:
            return result
        if isinstance(result, Tensor):
            return scattered(result, index, x.shape)
        return (scattered(result[0], index, x.shape), *result[1:])

    def statistics(self, name: str, x: Tensor, given: Mapping[str, Any]) -> set[int]:
        """The dimensions that an operator's statistics run over, of those that may be channels."""
        if name in NORMS:
            return set(range(x.ndim - len(given["normalized_shape"]), x.ndim))
        if name in GROUP_NORMS:
            # Of several groups only whole ones leave, and the others do not notice.
            return {1} if given.get("num_groups", given.get("group")) == 1 else set()
        if name in STANDARDS:
            return set(range(x.ndim)) - {1}
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        return {dim % x.ndim for dim in dims} if dims else set(range(x.ndim))


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, those that are given."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def held_by(model: nn.Module, channels: Channels) -> dict[str, Tensor]:
    """The tensors of the model behind the placeholders of the graph; what the caller gives is not among them."""
    signature = channels.program.graph_signature
    found: dict[str, Any] = {}
    for placeholder, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        owner, _, held = name.rpartition(".")
        found[placeholder] = getattr(model.get_submodule(owner), held)
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        found[placeholder] = channels.program.constants.get(name)
    return {placeholder: value for placeholder, value in found.items() if isinstance(value, Tensor)}


def zeroed(value: Tensor, where: Mapping[int, Tensor]) -> Tensor:
    """Zeros at some indices of some dimensions; a new tensor where that changes anything."""
    made = None
    for dim, gone in where.items():
        shape = [1] * value.ndim
        shape[dim] = -1
        there = gone.to(value.device).reshape(shape)
        made = value.masked_fill(there, 0) if made is None else made.masked_fill_(there, 0)
    return value if made is None else made


def taken(value: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """Some indices of some dimensions."""
    for dim, kept in index.items():
        value = value.index_select(dim, kept)
    return value


def scattered(value: Tensor, index: Mapping[int, Tensor], shape: torch.Size) -> Tensor:
    """The inverse of `taken`, with zeros in the gaps."""
    for dim, kept in index.items():
        wide = list(value.shape)
        wide[dim] = shape[dim]
        value = value.new_zeros(wide).index_copy(dim, kept, value)
    return value
