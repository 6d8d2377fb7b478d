"""What each layer costs in parameters, bytes and multiply-accumulates, read from the captured graph; what may touch it.

Only convolutions, matrix products, attention and recurrent layers count as work, as fvcore does it: batch norms,
activations and other element-wise operators count zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pared.graph.capture import capture, operator, owner
from pared.task import Inputs, Task

WINOGRAD_KERNEL = (3, 3)
TECHNIQUES: Mapping[str, tuple[str, ...]] = {
    "aten.conv1d": ("quantize", "prune", "factorize"),
    "aten.conv2d": ("quantize", "prune", "factorize", "winograd"),
    "aten.conv3d": ("quantize", "prune", "factorize"),
    "aten.conv_transpose1d": ("prune",),
    "aten.conv_transpose2d": ("prune",),
    "aten.conv_transpose3d": ("prune",),
    "aten.linear": ("quantize", "prune", "factorize"),
}


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """One module that holds tensors or does work.

    Attributes:
        module: Its first name in `named_modules()`; "" is the model itself.
        kind: Name of its class.
        shape: Shape of its last output that is counted, for a batch of 1; () where it never ran.
        params: Numbers in the parameters that it holds itself; a shared one counts at its first holder.
        bytes: Size of the parameters and buffers that it holds itself.
        macs: Multiply-accumulates of every use, for a batch of 1.
        techniques: What could touch it, judged by operator and shape alone: quantize, prune, factorize, winograd.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    params: int
    bytes: int
    macs: int
    techniques: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Totals:
    """The sums over all layers of a model."""

    params: int
    bytes: int
    macs: int


@dataclasses.dataclass
class Work:
    """What the graph says of one module; grows while the graph is walked."""

    shape: tuple[int, ...] = ()
    macs: int = 0
    techniques: dict[str, None] = dataclasses.field(default_factory=dict)


def count(
    model: nn.Module, inputs: Inputs, dynamic: Mapping[str | int, Mapping[int, str]] | None = None
) -> list[LayerCount]:
    """Every module of a model that holds tensors or does work, in the order of `named_modules()`.

    Args:
        model: Any module that `torch.export` takes.
        inputs: Example inputs, batch first; counted for one sample of them.
        dynamic: Further dynamic dimensions, as in `Task.dynamic`.

    Raises:
        CaptureError: The model cannot be exported.

    Example:
        >>> from pared.task import as_inputs
        >>> [(row.kind, row.params, row.macs) for row in count(nn.Linear(4, 3), as_inputs(torch.ones(1, 4)))]
        [('Linear', 15, 12)]
    """
    task = Task(example_inputs=inputs, dynamic=dynamic or {})
    program = capture(model, task)
    work = Walk(program, model).work_of(task.example_inputs)
    return list(rows(model, work))


def totals(layers: Iterable[LayerCount]) -> Totals:
    """The sums over rows of `count`."""
    kept = list(layers)
    return Totals(sum(r.params for r in kept), sum(r.bytes for r in kept), sum(r.macs for r in kept))


def nonzero_params(model: nn.Module) -> int:
    """How many numbers in the model's parameters are not zero, each shared parameter once.

    Example:
        >>> nonzero_params(nn.BatchNorm1d(4))
        4
    """
    return sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())


def rows(model: nn.Module, work: Mapping[str, Work]) -> Iterator[LayerCount]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        tensors = [*parameters, *(b for b in module.buffers(recurse=False) if id(b) not in seen)]
        seen.update(id(tensor) for tensor in tensors)
        done = work.get(name, Work())
        if tensors or done.macs:
            yield LayerCount(
                module=name,
                kind=type(module).__name__,
                shape=done.shape,
                params=sum(p.numel() for p in parameters),
                bytes=sum(t.numel() * t.element_size() for t in tensors),
                macs=done.macs,
                techniques=tuple(done.techniques),
            )


class Walk(fx.Interpreter):
    """Runs a captured graph on tensors without data, and books each operator's work on a module."""

    def __init__(self, program: ExportedProgram, model: nn.Module) -> None:
        super().__init__(program.graph_module)
        self.program = program
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        first = {id(module): name for name, module in model.named_modules()}
        self.canonical = {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
        self.held = {name: {id(p) for p in module.parameters(recurse=False)} for name, module in model.named_modules()}
        by_name = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        specs = program.graph_signature.input_specs
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        self.parameters = {
            node: by_name[str(spec.target)]
            for node, spec in zip(placeholders, specs, strict=True)
            if spec.kind is InputKind.PARAMETER
        }
        self.counter = FlopCounterMode(display=False)
        self.work: dict[str, Work] = {}

    def work_of(self, inputs: Inputs) -> dict[str, Work]:
        """The work of every module, for the first sample of `inputs`."""
        with torch.no_grad(), self.fake, self.counter:
            self.run(*self.arguments(inputs))
        return self.work

    def arguments(self, inputs: Inputs) -> list[Any]:
        """What the graph's placeholders stand for: stored tensors, and one sample of the inputs."""
        given = iter(tree_leaves((inputs.args, inputs.kwargs)))
        stored = {**self.program.state_dict, **self.program.constants}
        values: list[Any] = []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                value = next(given)
                values.append(value[:1] if isinstance(value, Tensor) and value.ndim else value)
            else:
                values.append(stored[str(spec.target)])
        return [self.fake.from_tensor(value) if isinstance(value, Tensor) else value for value in values]

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        name = operator(n)
        # The counter misses the fused kernels of some devices, so attention and recurrence have formulas of their own;
        # it counts a multiplication and an addition apart.
        macs = FORMULAS[name](*args) if name in FORMULAS else (self.counter.get_total_flops() - before) // 2
        done = self.work.setdefault(self.module_of(n), Work())
        done.macs += macs
        done.techniques.update(dict.fromkeys(techniques(name, args)))
        if isinstance(result, Tensor) and not (name == "getitem" and n.args[1] != 0):
            done.shape = tuple(result.shape)
        return result

    def module_of(self, node: fx.Node) -> str:
        """The innermost module that ran a node; where it borrows another's weight, the first module that holds that."""
        runner: str = self.canonical.get(owner(node), "")
        borrowed = [self.parameters[source] for source in node.all_input_nodes if source in self.parameters]
        if not borrowed or self.held[runner].intersection(borrowed):
            return runner
        holder: str = next(name for name, held in self.held.items() if borrowed[0] in held)
        return holder


def attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Scores and their product with the values: (..., L, E), (..., S, E), (..., S, V) -> L * S * (E + V) a head.

    A causal mask saves nothing here, as elsewhere in the literature.
    """
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def recurrent_macs(sequence: Tensor, _state: Any, weights: list[Tensor], *_: Any) -> int:
    """Every weight matrix once for each step of each sequence: (time, batch, features) in either order."""
    return sequence.shape[:-1].numel() * sum(weight.numel() for weight in weights if weight.ndim == 2)


FORMULAS: Mapping[str, Callable[..., int]] = {
    "aten.scaled_dot_product_attention": attention_macs,
    "aten.lstm": recurrent_macs,
    "aten.gru": recurrent_macs,
    "aten.rnn_tanh": recurrent_macs,
    "aten.rnn_relu": recurrent_macs,
}


def techniques(name: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """What could touch an operator: factorizing wants dense convolutions, Winograd also 3x3, stride and dilation 1."""
    found = TECHNIQUES.get(name, ())
    if not name.startswith("aten.conv") or "transpose" in name:
        return found
    stride, dilation, groups = (args[i] if len(args) > i else 1 for i in (3, 5, 6))
    plain = all(step == 1 for step in tree_leaves((stride, dilation)))
    unfit = set() if groups == 1 else {"factorize", "winograd"}
    if args[1].shape[2:] != WINOGRAD_KERNEL or not plain:
        unfit.add("winograd")
    return tuple(technique for technique in found if technique not in unfit)
