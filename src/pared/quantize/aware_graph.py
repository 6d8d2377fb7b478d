"""The graph that trains with fake quantization: captured from a model, whose own parameters it goes on using."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from pared.errors import PlanError
from pared.graph.capture import DROPOUTS, capture, operator
from pared.quantize.affine import Grid
from pared.quantize.aware_layers import Activation, BatchNorm, Call, Layer
from pared.quantize.folding import FUNCTIONAL_BATCH_NORM, normalization
from pared.quantize.placement import Placement
from pared.task import Task

MODULES: Mapping[str, type[nn.Module]] = dict(
    zip(DROPOUTS, (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout), strict=True)
)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a placed graph trains.

    Attributes:
        placement: What becomes integers.
        groups: Root tensor -> the one whose range and integers it shares, often itself.
        ranges: To start with, of the latter.
        activations: Their integers.
        weights: The integers of every anchor's weight, by node.
        folded: Weight of every anchor, by node, with the batch norm behind it folded in.
        takes_in: Layers with a batch norm folded in -> the node whose value theirs has become.
        learned: Whether scales are trained.
        symmetric: Whether activations have a fixed zero point.
    """

    placement: Placement
    groups: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    activations: Mapping[str, Grid]
    weights: Mapping[str, Grid]
    folded: Mapping[str, Tensor]
    takes_in: Mapping[str, str]
    learned: bool
    symmetric: bool


def check_norms(model: nn.Module) -> None:
    """Raise `PlanError` for a batch norm whose statistics a captured graph would leave as they are."""
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.momentum is None and module.track_running_stats:
            raise PlanError(
                f"QuantizeAware: {name!r} has momentum=None, the mean over all batches, which a captured graph does "
                "not know; give it a momentum, such as 0.1"
            )


@contextlib.contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """For a while modules like `ReLU(inplace=True)` write a tensor of their own: capture then keeps operators whole,
    dropouts among them."""
    changed = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    for module in changed:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]


@dataclasses.dataclass
class Aware:
    """A graph that trains, and its scales by the nodes of the graph that is exported.

    Attributes:
        graph: An ordinary module, with modes; its parameters are the model's own, and the scales.
        activations: By root tensor; several share one where the runtime wants it.
        layers: By anchor.
    """

    graph: fx.GraphModule
    activations: dict[str, Activation]
    layers: dict[str, Layer]


def aware_graph(model: nn.Module, task: Task, form: Form) -> Aware:
    """The graph of a model with fake quantization in it.

    Args:
        model: On the CPU. Its parameters become those of the graph; its modes stay.
        task: Gives the example inputs.
        form: Found out on a graph of the same model with batch norms folded; nodes keep their names from capture.

    Raises:
        CaptureError: The model cannot be captured.
        PlanError: The plan belongs to another model.
    """
    with out_of_place(model):
        root = capture(model, task).module(check_guards=False)
    if not isinstance(root, fx.GraphModule):
        raise PlanError(f"QuantizeAware: the captured program is a {type(root).__name__}, not a graph")
    nodes = {node.name: node for node in root.graph.nodes}
    missing = sorted({*form.placement.tensors, *(a.node for a in form.placement.anchors)} - nodes.keys())
    if missing:
        raise PlanError(f"QuantizeAware: the model has no {missing[0]}; the plan belongs to another model: plan again")
    layers = put_layers(root, nodes, form)
    free_modes(root, nodes)
    activations = put_activations(root, nodes, form)
    root.graph.eliminate_dead_code()
    root.graph.lint()
    graph = fx.GraphModule(root, root.graph, "AwareGraph")
    return Aware(graph, activations, layers)


def put_layers(root: fx.GraphModule, nodes: dict[str, fx.Node], form: Form) -> dict[str, Layer]:
    """Replace every anchor, and the norm that it takes in, by a `Layer`; one for all uses of the same tensors.

    `nodes` then has the new node under the anchor's name.
    """
    found: dict[str, Layer] = {}
    made: dict[tuple[Any, ...], str] = {}
    for anchor in form.placement.anchors:
        node = nodes[anchor.node]
        result = nodes[form.takes_in.get(anchor.node, anchor.node)]
        source = normalization(result) if result is not node else None
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        tensors = [weight, bias, *(norm_arguments(source)[:4] if source else ())]
        call = Call(node.target, tuple(node.args[3:]), dict(node.kwargs))
        key = (*map(str, tensors), str(node.target), call.rest, repr(call.named))
        if key not in made:
            norm = BatchNorm(*norm_arguments(source)[4:]) if source else None
            layer = Layer(call, form.folded[anchor.node], form.weights[anchor.node], learned=form.learned, norm=norm)
            made[key] = add(root, f"quantized_{anchor.node}", layer)
        with root.graph.inserting_before(result):
            new = root.graph.call_module(made[key], (node.args[0], *tensors))
        replace(result, new)
        nodes[anchor.node] = nodes[result.name] = new
        found[anchor.node] = root.get_submodule(made[key])  # type: ignore[assignment]
    return found


def norm_arguments(norm: fx.Node) -> tuple[Any, ...]:
    """Gamma, beta, mean, variance, momentum and eps of a batch norm's node."""
    functional = operator(norm) == FUNCTIONAL_BATCH_NORM
    return (*norm.args[1:5], *(norm.args[5:7] if functional else norm.args[6:8]))


def free_modes(root: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    """Give the batch norms that stand alone, and dropouts, back the modes that capture took from them."""
    for node in list(root.graph.nodes):
        norm = normalization(node)
        module: nn.Module
        if norm is not None and node.users:
            tensors = norm_arguments(norm)
            module, args = BatchNorm(*tensors[4:]), (norm.args[0], *tensors[:4])
        elif (dropout := dropout_of(node)) is not None:
            module, args = dropout, (node.args[0],)
        else:
            continue
        with root.graph.inserting_before(node):
            new = root.graph.call_module(add(root, f"free_{node.name}", module), args)
        replace(node, new)
        nodes[node.name] = new


def dropout_of(node: fx.Node) -> nn.Module | None:
    """The dropout that a node is, or was before in-place operators around it were taken apart."""
    if operator(node) == "aten.clone" and "dropout" in node.meta.get("custom", {}):
        name, share = node.meta["custom"]["dropout"]
        return MODULES[name](share)
    return MODULES[operator(node)](node.args[1]) if operator(node) in DROPOUTS else None


def put_activations(root: fx.GraphModule, nodes: Mapping[str, fx.Node], form: Form) -> dict[str, Activation]:
    """Fake quantize every tensor of the placement, for all its users."""
    made: dict[str, str] = {}
    found: dict[str, Activation] = {}
    for tensor, source in form.placement.tensors.items():
        first = form.groups[source]
        if first not in made:
            numbers = form.activations[first]
            module = Activation(*form.ranges[first], numbers, symmetric=form.symmetric, learned=form.learned)
            made[first] = add(root, f"fake_quantize_{first}", module)
        node = nodes[tensor]
        users = list(node.users)
        with root.graph.inserting_after(node):
            new = root.graph.call_module(made[first], (node,))
        new.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, new)
        found[source] = root.get_submodule(made[first])  # type: ignore[assignment]
    return found


def add(root: fx.GraphModule, name: str, module: nn.Module) -> str:
    """A new submodule's name."""
    root.add_submodule(name, module)
    return name


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let `new` stand for `old`, also for whoever looks for the module that made it."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
