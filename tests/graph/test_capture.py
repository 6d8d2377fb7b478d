"""Capture: what it gives back, what it leaves as it was, and how it explains a model that it cannot take."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import CaptureError
from pared.graph.capture import capture, evaluating, has_mutation, operator, owner
from pared.task import Inputs, Task, call
from zoo_models import ZOO


class Forward(nn.Module):
    """A linear layer and a function of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            return x + 1
        return x - 1


class Positional(nn.Module):
    def forward(self, *values: Tensor) -> Tensor:
        return values[0] * 2 - values[1]


class Keywords(nn.Module):
    def forward(
        self, first: Tensor, mask: Tensor, unused: Tensor | None = None, *, bias: Tensor, **others: Any
    ) -> Tensor:
        return first * 2 - mask + 3 * bias


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y * 2
        self.act(y)
        z += y
        z[:, 0] = 1.0
        return z


def line_of(mark: str) -> str:
    """`file:line` of the line of this file with a mark."""
    lines = Path(__file__).read_text(encoding="utf8").splitlines()
    return f"{__file__}:{next(i for i, line in enumerate(lines, 1) if line.endswith(mark))}"


def test_capture_names_the_callers_line_when_control_flow_depends_on_data() -> None:
    with pytest.raises(CaptureError, match="cannot be exported") as caught:
        capture(Branching(), Task(example_inputs=torch.ones(2, 3)))
    assert line_of("# the line to be named") in str(caught.value)
    assert "in forward" in str(caught.value)


def broken(s: Forward, x: Tensor) -> Tensor:
    return s.layer(x.reshape(-1, 7))  # reshapes wrongly


def raising(s: Forward, x: Tensor) -> Tensor:
    raise KeyError("no such table")  # raises by itself


@pytest.mark.parametrize(
    ("function", "mark", "text"),
    [(broken, "# reshapes wrongly", "invalid for input"), (raising, "# raises by itself", "no such table")],
)
def test_capture_names_the_callers_line_when_the_model_does_not_run(
    function: Callable[..., Any], mark: str, text: str
) -> None:
    with pytest.raises(CaptureError, match="does not run on the example inputs") as caught:
        capture(Forward(function), Task(example_inputs=torch.ones(2, 4)))
    assert line_of(mark) in str(caught.value)
    assert text in str(caught.value)


def test_capture_says_so_when_the_example_has_a_wrong_shape_or_too_few_inputs() -> None:
    with pytest.raises(CaptureError, match=r"does not run.*shapes cannot be multiplied \(2x5 and 4x3\)"):
        capture(nn.Linear(4, 3), Task(example_inputs=torch.ones(2, 5)))
    with pytest.raises(CaptureError, match=r"does not run.*missing 1 required positional argument"):
        capture(nn.Bilinear(2, 2, 2), Task(example_inputs=torch.ones(2, 2)))


def test_capture_leaves_model_modes_and_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(inplace=True))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 5, 5)
    kept = x.clone()
    random = torch.get_rng_state()
    program = capture(model, Task(example_inputs=x))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    model.eval()
    torch.testing.assert_close(program.module()(kept), model(kept.clone()))


def test_capture_leaves_modes_when_it_fails() -> None:
    model = Branching().train()
    with pytest.raises(CaptureError):
        capture(model, Task(example_inputs=torch.ones(2, 3)))
    assert model.training


def test_evaluating_gives_every_module_its_own_flag_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1][0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_capture_leaves_the_batch_free_whatever_the_example_holds(size: int) -> None:
    model = nn.Linear(4, 3)
    graph = capture(model, Task(example_inputs=torch.zeros(size, 4))).module(check_guards=False)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(graph(x), model(x))


def test_capture_leaves_named_dimensions_free_and_all_others_fixed() -> None:
    task = Task(example_inputs={"x": torch.zeros(2, 6, 4)}, dynamic={"x": {1: "length"}})
    program = capture(nn.Sequential(nn.Linear(4, 4)), Task(example_inputs=torch.zeros(2, 6, 4), dynamic={0: {1: "n"}}))
    shape = program.graph.output_node().args[0][0].meta["val"].shape
    assert [isinstance(size, int) for size in shape] == [False, False, True]
    model = Forward(lambda s, x: s.layer(x).sum(1))
    graph = capture(model, task).module(check_guards=False)
    for length in (1, 6, 11):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(graph(x=x), model(x))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Positional(), Inputs((torch.randn(2, 3), torch.randn(2, 3)), {})),
        (Keywords(), Inputs((), {k: torch.randn(2, 3) for k in ("first", "mask", "bias")})),
        (Keywords(), Inputs((), {k: torch.randn(2, 3) for k in ("bias", "first", "mask")})),
        (Keywords(), Inputs((torch.randn(2, 3),), {k: torch.randn(2, 3) for k in ("mask", "bias")})),
    ],
    ids=["args", "kwargs", "kwargs_in_another_order", "both"],
)
def test_capture_takes_any_signature(model: nn.Module, inputs: Inputs) -> None:
    graph = capture(model, Task(example_inputs=inputs)).module(check_guards=False)
    torch.testing.assert_close(call(graph, inputs), call(model, inputs))
    larger = Inputs(tuple(x.repeat(3, 1) for x in inputs.args), {k: x.repeat(3, 1) for k, x in inputs.kwargs.items()})
    torch.testing.assert_close(call(graph, larger), call(model, larger))


def test_capture_gives_a_graph_without_mutation_when_operators_work_in_place() -> None:
    model = InPlace().eval()
    x = torch.randn(2, 3, 5, 5)
    program = capture(model, Task(example_inputs=x))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert not any(t._schema.is_mutable for t in targets if isinstance(t, torch._ops.OpOverload))
    torch.testing.assert_close(program.module()(x), model(x))
    assert "aten.conv2d" in {operator(node) for node in program.graph.nodes}


def test_capture_raises_no_warning_when_the_model_has_a_recurrent_layer() -> None:
    model, inputs = ZOO["lstm"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = capture(model, Task(example_inputs=inputs))
    assert "aten.lstm" in {operator(node) for node in program.graph.nodes}


def test_owner_is_the_module_that_ran_when_one_has_two_names() -> None:
    model, inputs = ZOO["module_with_two_names"]()
    program = capture(model, Task(example_inputs=inputs))
    owners = [owner(node) for node in program.graph.nodes if operator(node) == "aten.conv2d"]
    assert owners == ["stem.0", "first.0", "second.0"]


def test_owner_has_no_suffix_when_a_module_runs_twice() -> None:
    model = Forward(lambda s, x: F.relu(s.layer(x)) + s.layer(x * 2) - s.layer(x * 3))
    program = capture(model, Task(example_inputs=torch.randn(2, 4)))
    assert [owner(node) for node in program.graph.nodes if operator(node) == "aten.linear"] == ["layer"] * 3
    [add] = [node for node in program.graph.nodes if operator(node) == "aten.add"]
    assert owner(add) == ""


def test_capture_fixes_the_batch_when_its_limit_is_one() -> None:
    task = Task(example_inputs=(torch.zeros(3, 4),))
    program = capture(nn.Linear(4, 2), task, limits={"batch": 1})
    assert list(program.graph.nodes)[-2].meta["val"].shape == (1, 2)
    limited = capture(nn.Linear(4, 2), task, limits={"batch": 8})
    assert [bound.upper for bound in limited.range_constraints.values()] == [8]


class WritesInPlace(nn.Module):
    """Writes into a tensor that something else also leads to, or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.norm(self.conv(x))
        if self.kind == "view before":
            view = x.flatten(1)
            x.relu_()
            return view + 1
        if self.kind == "part":
            x[:, 0].mul_(2)
            return x * 3
        if self.kind == "output":
            y = x.sigmoid_()
            return x, y * 2
        y = x * 2
        x.relu_().add_(y).clamp_(max=3.0)
        return x - y


@pytest.mark.parametrize("kind", ["alone", "view before", "part", "output"])
def test_capture_computes_the_same_when_operators_work_in_place(kind: str) -> None:
    torch.manual_seed(0)
    model, x = WritesInPlace(kind).eval(), torch.randn(2, 3, 6, 6)
    program = capture(model, Task(example_inputs=(x,)))
    assert not has_mutation(program)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-5)  # its convolution is another kernel's
    # Only where memory has other names is the whole program decomposed.
    assert ("aten.batch_norm" in map(operator, program.graph.nodes)) == (kind in ("alone", "output"))


DROPPED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "result written": lambda s, h: (F.dropout(h, 0.3, s.training).add_(1), h * 2),
    "input written": lambda s, h: (y := F.dropout(h, 0.3, s.training), h.add_(1), y * 2),
    "views": lambda s, h: (v := h[:, 1:], F.dropout1d(h[:, :2], 0.3, s.training).mul_(3), v + 1, h * 2),
    "part written": lambda s, h: (y := s.drop(h), y[:, :1].add_(1), h + y),
    "given out": lambda s, h: (y := s.drop(h), h.add_(1), y)[2],
    "nothing dropped": lambda s, h: (F.dropout(h, 0.0).add_(1), h * 2),
    "in place": lambda s, h: (F.dropout(h, 0.3, s.training, inplace=True).add_(1), h * 2),
    "twice": lambda s, h: (F.alpha_dropout(s.drop(h), 0.3, s.training).add_(1), h * 2),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_capture_computes_the_same_when_something_is_written_behind_a_dropout(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Forward(lambda s, x: DROPPED[kind](s, s.layer(x))), torch.randn(2, 4)
    model.drop = nn.Dropout(0.3)
    program = capture(model.eval(), Task(example_inputs=(x,)))
    assert not has_mutation(program)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-6)


def test_capture_keeps_what_a_dropout_was_when_nobody_reads_its_input_again() -> None:
    model = Forward(lambda s, x: F.dropout(s.layer(x), 0.3, s.training).add_(1) * 2).eval()
    program = capture(model, Task(example_inputs=torch.randn(2, 4)))
    assert [node.meta["custom"]["dropout"] for node in program.graph.nodes if operator(node) == "aten.clone"] == [
        ["aten.dropout", 0.3]
    ]


class Remembers(nn.Module):
    """Computes a table once and keeps it, in eval mode, as attention biases are often kept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.randn(4)), {}

    def train(self, mode: bool = True) -> Remembers:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.kept:
            self.kept["table"] = self.weight.detach() * 2
        return x + self.kept["table"]


def test_capture_reads_what_a_model_computes_ahead_and_leaves_the_models_own_table() -> None:
    model, x = Remembers().eval(), torch.randn(2, 4)
    expected, table = model(x), model.kept["table"]
    program = capture(model, Task(example_inputs=(x,)))
    assert "aten.mul" in map(operator, program.graph.nodes)
    assert model.kept["table"] is table
    assert torch.equal(program.module()(x), expected)
