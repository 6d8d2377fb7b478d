"""What else a teacher knows, as settings: losses on features and relations, each with its weight and its layers.

Each is a value and a function: of a layer's output in the student and in the teacher, in the caller's own loop as
in `Distill`. Adapters, which make shapes agree, are `adapters`'s.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import Tensor

from pared.distill.contrastive import contrastive_loss
from pared.distill.hints import attention_loss, hint_loss
from pared.distill.relations import angle_loss, distance_loss, flow_loss, similarity_loss
from pared.step import settings

Weight = Annotated[float, pydantic.Field(description="What the loss is multiplied by before it is added.", gt=0)]
Layers = Annotated[
    tuple[tuple[str, str], ...],
    pydantic.Field(
        description="(student's, teacher's) names or globs of layers whose outputs are compared. Empty: matched "
        "automatically, and listed in the plan."
    ),
]


@settings
class Hint:
    """Features as they are: mean squared difference, through an adapter where shapes differ (FitNets).

    Example:
        >>> import torch
        >>> Hint()(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(2.)
    """

    deepest: ClassVar[bool] = False
    channels: ClassVar[bool] = True
    places: ClassVar[bool] = True

    kind: Annotated[Literal["hint"], pydantic.Field(description="Name in recipes.")] = "hint"
    weight: Weight = 1.0
    layers: Layers = ()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar, without the weight."""
        return hint_loss(student, teacher)


@settings
class Attention:
    """Where layers look: squared distance of their attention maps (attention transfer). Any number of channels.

    Example:
        >>> import torch
        >>> Attention()(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[2.0, 0.0]]]]))
        tensor(2.)
    """

    deepest: ClassVar[bool] = False
    channels: ClassVar[bool] = False
    places: ClassVar[bool] = True

    kind: Annotated[Literal["attention"], pydantic.Field(description="Name in recipes.")] = "attention"
    weight: Weight = 10.0
    layers: Layers = ()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar, without the weight."""
        return attention_loss(student, teacher)


@settings
class Contrastive:
    """Which sample it is: the student's embedding must be nearest to the teacher's of the same sample (CRD).

    Both go through a linear layer of their own, trained with the student. Samples with the same label are not told
    apart, where the target is class indices.
    """

    deepest: ClassVar[bool] = True
    channels: ClassVar[bool] = False
    places: ClassVar[bool] = False

    kind: Annotated[Literal["contrastive"], pydantic.Field(description="Name in recipes.")] = "contrastive"
    weight: Weight = 0.8
    layers: Layers = ()
    temperature: Annotated[float, pydantic.Field(description="What similarities are divided by.", gt=0)] = 0.1
    dimension: Annotated[int, pydantic.Field(description="Length of the embeddings that are compared.", ge=2)] = 128
    queue: Annotated[
        int, pydantic.Field(description="How many of the teacher's last embeddings serve as further others.", ge=0)
    ] = 2048

    def __call__(
        self, student: Tensor, teacher: Tensor, others: Tensor | None = None, allowed: Tensor | None = None
    ) -> Tensor:
        """A scalar, without the weight; arguments as in `contrastive.contrastive_loss`."""
        return contrastive_loss(student, teacher, others, temperature=self.temperature, allowed=allowed)


@settings
class Flow:
    """How one layer leads to the next: mean squared difference of the Gram matrices between two layers (FSP).

    Each layer that is matched makes a pair with the one after it.
    """

    deepest: ClassVar[bool] = False
    channels: ClassVar[bool] = True
    places: ClassVar[bool] = True

    kind: Annotated[Literal["flow"], pydantic.Field(description="Name in recipes.")] = "flow"
    weight: Weight = 1.0
    layers: Layers = ()

    def __call__(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        """A scalar, without the weight, from two layers of each."""
        return flow_loss(student, teacher)


@settings
class Relational:
    """How samples lie to one another: their distances, and the angles between three of them (RKD).

    Example:
        >>> import torch
        >>> Relational(angle=0)(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor(0.)
    """

    deepest: ClassVar[bool] = True
    channels: ClassVar[bool] = False
    places: ClassVar[bool] = False

    kind: Annotated[Literal["relational"], pydantic.Field(description="Name in recipes.")] = "relational"
    weight: Weight = 1.0
    layers: Layers = ()
    distance: Annotated[float, pydantic.Field(description="Weight of distances.", ge=0)] = 25.0
    angle: Annotated[float, pydantic.Field(description="Weight of angles.", ge=0)] = 50.0

    def __post_init__(self) -> None:
        if self.distance == self.angle == 0:
            raise ValueError("distance and angle are both 0, which leaves nothing to learn; give one a weight")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar, without the weight."""
        parts = [(self.distance, distance_loss), (self.angle, angle_loss)]
        losses = [weight * loss(student, teacher) for weight, loss in parts if weight]
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]


@settings
class Similarity:
    """Which samples a layer holds for alike: mean squared difference of their inner products (similarity-preserving).

    Example:
        >>> import torch
        >>> Similarity()(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.3000)
    """

    deepest: ClassVar[bool] = True
    channels: ClassVar[bool] = False
    places: ClassVar[bool] = False

    kind: Annotated[Literal["similarity"], pydantic.Field(description="Name in recipes.")] = "similarity"
    weight: Weight = 3000.0
    layers: Layers = ()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar, without the weight."""
        return similarity_loss(student, teacher)


def by_kind(value: Any) -> Any:
    """Let a recipe say `hint` for `{kind: hint}`, and give lists for tuples, which strict reading refuses here."""
    if isinstance(value, str):
        return {"kind": value}
    return {name: as_tuples(item) for name, item in value.items()} if isinstance(value, dict) else value


def as_tuples(value: Any) -> Any:
    """The same with lists as tuples, at any depth."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


Names = Literal["hint", "attention", "contrastive", "flow", "relational", "similarity"]
AnyKnowledge = Hint | Attention | Contrastive | Flow | Relational | Similarity
Knowledge = Annotated[
    AnyKnowledge,
    pydantic.Discriminator("kind"),
    pydantic.BeforeValidator(by_kind, json_schema_input_type=Names | AnyKnowledge),
]
