"""Which layers of a student learn from which of a teacher: by name, or found from the shapes of their outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import ModelError, PlanError, nearest
from pared.graph.capture import evaluating
from pared.task import Task, call
from pared.train.step import is_exported
from pared.train.taps import first_tensor

# They leave values out or as they are, at random or not: what stands before them says more.
PASSIVE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
DEPTHS = 3  # layers that are matched in networks without spatial sizes


@dataclasses.dataclass(frozen=True)
class Pair:
    """A layer of the student and one of the teacher, with the shapes of their outputs after the batch."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        shapes = {"student_shape": list(self.student_shape), "teacher_shape": list(self.teacher_shape)}
        return {"student": self.student, "teacher": self.teacher, **shapes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pair:
        shapes = tuple(data["student_shape"]), tuple(data["teacher_shape"])
        return cls(data["student"], data["teacher"], *shapes)


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What a model does with the example inputs.

    Attributes:
        output: The output that counts, on the CPU.
        layers: Shape after the batch of every layer's output, in the order in which they finish.
        inner: Names of those that lie before the output, and neither repeat it nor have its shape.
    """

    output: Tensor
    layers: Mapping[str, tuple[int, ...]]
    inner: tuple[str, ...]


def anatomy(model: nn.Module, task: Task) -> Anatomy:
    """Run a model once on the example inputs, in eval mode and without gradients; it stays as it is.

    Raises:
        ModelError: It does not run, or gives no tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    passive = {name for name, module in model.named_modules() if isinstance(module, PASSIVE)}

    def record(name: str, *call: Any) -> None:
        value = first_tensor(call[-1])
        if value is not None and value.ndim >= 2:
            shapes.pop(name, None)  # of several calls the last one counts
            shapes[name] = tuple(value.shape[1:])

    named = [] if is_exported(model) else [item for item in model.named_modules() if item[0]]
    handles = [module.register_forward_hook(partial(record, name)) for name, module in named]
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model), torch.no_grad():
            output = task.pick(call(model, task.example_inputs.to(device))).cpu()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{type(model).__name__} does not run on the example inputs: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    names = list(shapes)
    while names and shapes[names[-1]] == tuple(output.shape[1:]):
        names.pop()
    return Anatomy(output, shapes, tuple(name for name in names if name not in passive))


def is_spatial(shape: tuple[int, ...]) -> bool:
    """Whether an output after the batch is (channels, height, width) with more than one place."""
    return len(shape) == 3 and max(shape[1:]) > 1


def stages(model: Anatomy) -> list[str]:
    """The last layer of each spatial size, in order; in a network without, layers at equal steps of depth."""
    last: dict[tuple[int, ...], str] = {}
    for name in model.inner:
        shape = model.layers[name]
        if is_spatial(shape):
            last.pop(shape[1:], None)
            last[shape[1:]] = name
    if last:
        return list(last.values())
    return [model.inner[-1 - (len(model.inner) * i) // DEPTHS] for i in reversed(range(min(DEPTHS, len(model.inner))))]


def match(student: Anatomy, teacher: Anatomy, *, deepest: bool = False) -> list[Pair]:
    """Pairs of layers at equal spatial sizes, or, where sizes do not agree, at the same depth counted from the end.

    Args:
        student: The network that learns.
        teacher: The network that it learns from.
        deepest: Only the last layer before the output of each.

    Raises:
        PlanError: There are no layers before the output.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> body = anatomy(net, Task(example_inputs=torch.ones(1, 2)))
        >>> [(pair.student, pair.teacher) for pair in match(body, body, deepest=True)]
        [('1', '1')]
    """
    for side, model in (("student", student), ("teacher", teacher)):
        if not model.inner:
            raise PlanError(
                f"the {side} has no layer before its output to be matched automatically; "
                "name layers=[(student's, teacher's)], or distill responses only"
            )
    if deepest:
        return [pair_of(student, teacher, student.inner[-1], teacher.inner[-1])]
    ours, theirs = stages(student), stages(teacher)
    sizes = {teacher.layers[name][1:]: name for name in theirs if is_spatial(teacher.layers[name])}
    same = [(name, sizes[student.layers[name][1:]]) for name in ours if student.layers[name][1:] in sizes]
    if not same:
        count = min(len(ours), len(theirs))
        same = list(zip(ours[-count:], theirs[-count:], strict=True))
    return [pair_of(student, teacher, one, other) for one, other in same]


def named(student: Anatomy, teacher: Anatomy, layers: Sequence[tuple[str, str]]) -> list[Pair]:
    """The pairs that (student's glob, teacher's glob) name; several matches of both pair up in their order.

    Raises:
        PlanError: A glob that matches nothing, or the two of a pair match different numbers of layers.
    """
    pairs = []
    for one, other in layers:
        ours, theirs = list(matches(student, one, "student")), list(matches(teacher, other, "teacher"))
        if len(ours) != len(theirs):
            raise PlanError(
                f"layers ({one!r}, {other!r}): {len(ours)} of the student's match ({', '.join(ours)}) and "
                f"{len(theirs)} of the teacher's ({', '.join(theirs)}); name as many on both sides"
            )
        pairs += [pair_of(student, teacher, a, b) for a, b in zip(ours, theirs, strict=True)]
    return pairs


def matches(model: Anatomy, pattern: str, side: str) -> Iterator[str]:
    """Layers that a glob names. Raises: PlanError where there are none."""
    found = [name for name in model.layers if fnmatchcase(name, pattern)]
    if not found:
        raise PlanError(f"no layer {pattern!r} in the {side}; {nearest(pattern, model.layers)}")
    yield from found


def pair_of(student: Anatomy, teacher: Anatomy, one: str, other: str) -> Pair:
    return Pair(one, other, student.layers[one], teacher.layers[other])
