"""How teacher and student meet, as settings; and what makes a network ready to teach or to start anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
import torch
from torch import nn

from pared.distill.knowledge import by_kind
from pared.errors import PlanError, nearest
from pared.step import settings
from pared.surgery import duplicate
from pared.train.step import is_exported

DENSE = "dense"


class Usual(NamedTuple):
    """What a way of meeting takes where the user names neither."""

    temperature: float
    alpha: float


@settings
class Offline:
    """A teacher that is trained already, and stays as it is."""

    usual: ClassVar[Usual] = Usual(4.0, 0.9)

    kind: Annotated[Literal["offline"], pydantic.Field(description="Name in recipes.")] = "offline"
    name: Annotated[
        str, pydantic.Field(description="dense: the model before any compression. Else a name in Task.teachers.")
    ] = DENSE
    cache: Annotated[
        bool,
        pydantic.Field(
            description="Keep the teacher's outputs on disk, by the content of each sample, so that it runs once. Not "
            "for samples that differ from epoch to epoch, nor with knowledge beside the response."
        ),
    ] = False


@settings
class BornAgain:
    """The model as this training finds it teaches one of the same kind that starts from fresh weights."""

    # Furlanello et al. 2018, arXiv:1805.04770, equation 5: the labels' loss and the teacher's, as they are.
    usual: ClassVar[Usual] = Usual(1.0, 0.5)

    kind: Annotated[Literal["born_again"], pydantic.Field(description="Name in recipes.")] = "born_again"


@settings
class AverageTeacher:
    """The moving average of the student's own weights (mean teacher)."""

    # By trial: an average is hardly ahead of its student, and holds it back where it weighs much.
    usual: ClassVar[Usual] = Usual(1.0, 0.2)

    kind: Annotated[Literal["average"], pydantic.Field(description="Name in recipes.")] = "average"
    decay: Annotated[
        float,
        pydantic.Field(description="Share of the average kept at each step; less in the first steps.", ge=0, lt=1),
    ] = 0.999


@settings
class Online:
    """Peers that learn together, each from the labels and from all others (deep mutual learning)."""

    # Zhang et al. 2018, arXiv:1706.00384: both losses alike. A high temperature lets new networks agree on nothing.
    usual: ClassVar[Usual] = Usual(1.0, 0.5)

    kind: Annotated[Literal["online"], pydantic.Field(description="Name in recipes.")] = "online"
    peers: Annotated[
        int | tuple[str, ...],
        pydantic.Field(
            description="How many further networks, like the student with fresh weights; or names in Task.teachers, of "
            "which copies are trained."
        ),
    ] = 1

    def __post_init__(self) -> None:
        if (self.peers if isinstance(self.peers, int) else len(self.peers)) < 1:
            raise ValueError("peers must be at least one")


@settings
class SelfDeep:
    """The student's deepest layers teach its shallower ones, through exits that go when the training ends (BYOT)."""

    # By trial: the best of three for small networks on Fashion-MNIST.
    usual: ClassVar[Usual] = Usual(3.0, 0.3)

    kind: Annotated[Literal["deep"], pydantic.Field(description="Name in recipes.")] = "deep"
    exits: Annotated[
        tuple[str, ...],
        pydantic.Field(description="Names or globs of layers that get an exit. Empty: the last of each spatial size."),
    ] = ()
    hint: Annotated[
        float, pydantic.Field(description="Weight of the difference of an exit's features from the deepest.", ge=0)
    ] = 0.0


Names = Literal["offline", "born_again", "average", "online", "deep"]
AnyTeacher = Offline | BornAgain | AverageTeacher | Online | SelfDeep
Teacher = Annotated[
    AnyTeacher,
    pydantic.Discriminator("kind"),
    pydantic.BeforeValidator(by_kind, json_schema_input_type=Names | AnyTeacher),
]


def named_teacher(name: str, dense: nn.Module, teachers: Mapping[str, nn.Module]) -> nn.Module:
    """A teacher by its name. Raises: PlanError for a name that the task does not have."""
    if name in teachers:
        return teachers[name]
    if name != DENSE:
        raise PlanError(f"no teacher {name!r} in Task.teachers; {nearest(name, [*teachers, DENSE])}")
    return dense


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a teacher that is never trained, in eval mode whatever mode it came in."""
    made = duplicate(model).to(device).requires_grad_(False)
    return made if is_exported(made) else made.eval()  # an exported program has one mode, and refuses to be told


def fresh(model: nn.Module) -> nn.Module:
    """A copy of a model with weights drawn anew, as its layers draw them when they are made.

    Raises:
        PlanError: A layer does not know how.
    """
    made = copy.deepcopy(model).requires_grad_(True)
    reset(made)
    return made


def reset(model: nn.Module) -> None:
    """Draw the weights of a model anew, in place; layers that are frozen stay as they are. Raises: PlanError."""
    check_fresh(model)
    with torch.no_grad():
        for module in model.modules():
            drawing, own = drawer(module), list(module.parameters(recurse=False))
            if drawing is not None and (not own or any(parameter.requires_grad for parameter in own)):
                drawing()


def check_fresh(model: nn.Module) -> None:
    """Raise `PlanError` where a layer with parameters of its own does not know how to draw them anew."""
    for name, module in model.named_modules():
        if drawer(module) is None and next(module.parameters(recurse=False), None) is not None:
            raise PlanError(
                f"layer {name!r} ({type(module).__name__}) has parameters and no reset_parameters(), so it cannot "
                "start from fresh weights; give its class one, or choose a teacher or peers that are there already"
            )


def drawer(module: nn.Module) -> Any:
    """What draws a layer's own parameters, or None."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
