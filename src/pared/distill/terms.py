"""Feature and relation losses as they run in a training: adapters that make shapes agree, and the queue of others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pared.distill.hints import resize
from pared.distill.knowledge import AnyKnowledge, Attention, Contrastive, Flow, Similarity
from pared.distill.matching import Pair
from pared.errors import PlanError

Features = Mapping[str, Tensor]
NO_LABEL, EMPTY = -1, -2


class Adapter(nn.Module):
    """Makes two layers' outputs comparable; its weights train with the student and go when the training ends.

    Args:
        pair: The layers, with the shapes of their outputs.
        channels: Whether channels must agree: a linear map of the student's, at each place, where they do not.
        places: Whether there must be places: sizes are made the teacher's, by averages or interpolation. Without, the
            mean over all places stands for both.

    Raises:
        PlanError: The shapes cannot be made to agree.
    """

    def __init__(self, pair: Pair, *, channels: bool, places: bool) -> None:
        super().__init__()
        ours, theirs = pair.student_shape, pair.teacher_shape
        self.pooled = not places or len(ours) != len(theirs)
        if len(ours) != len(theirs) and places and not channels:
            raise PlanError(
                f"layers {pair.student!r} {ours} and {pair.teacher!r} {theirs}: attention maps need places in both; "
                "name other layers"
            )
        if max(len(ours), len(theirs)) > 3:
            raise PlanError(f"layers {pair.student!r} {ours} and {pair.teacher!r} {theirs}: more than three dimensions")
        wide, wanted = width(ours), width(theirs)
        spatial = len(ours) == 3 and not self.pooled
        self.project: nn.Module = nn.Identity()
        if channels and wide != wanted:
            self.project = nn.Conv2d(wide, wanted, 1) if spatial else nn.Linear(wide, wanted)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both, in one shape as far as it was asked for."""
        if self.pooled:
            return self.project(pool(student)), pool(teacher)
        student = self.project(student)
        size = tuple(teacher.shape[2:]) if teacher.ndim == 4 else tuple(teacher.shape[1:2])
        return (resize(student, size) if teacher.ndim > 2 else student), teacher


def width(shape: tuple[int, ...]) -> int:
    """Channels of an output after the batch: (channels, height, width), (positions, channels) or (channels,)."""
    return shape[0] if len(shape) == 3 else shape[-1]


def pool(features: Tensor) -> Tensor:
    """The mean over all places, shape (samples, channels)."""
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 2 else features


class Term(nn.Module):
    """One kind of knowledge over its pairs of layers: the mean of the pairs' losses, times its weight."""

    def __init__(self, knowledge: AnyKnowledge, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.knowledge, self.pairs = knowledge, tuple(pairs)
        kind = type(knowledge)
        if isinstance(knowledge, Attention):
            flat = [pair for pair in pairs if min(len(pair.student_shape), len(pair.teacher_shape)) < 2]
            for pair in flat:
                raise PlanError(
                    f"layers {pair.student!r} and {pair.teacher!r} give vectors, which have no places to look at; "
                    "name layers with places, or use 'hint'"
                )
        self.adapters = nn.ModuleList(Adapter(pair, channels=kind.channels, places=kind.places) for pair in pairs)

    def forward(self, student: Features, teacher: Features, target: object) -> Tensor:
        """A scalar, with the weight."""
        losses = [self.compare(*both) for both in self.adapted(student, teacher)]
        return self.knowledge.weight * torch.stack(losses).mean()

    def adapted(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Each pair's outputs, made comparable."""
        return [
            adapter(full(student[pair.student]), full(teacher[pair.teacher]))
            for pair, adapter in zip(self.pairs, self.adapters, strict=True)
        ]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        found: Tensor = self.knowledge(student, teacher)  # type: ignore[arg-type]
        return found


class WholeTerm(Term):
    """Samples compared by all values of a layer's output, places included; shapes need not agree."""

    def adapted(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        return [(full(student[pair.student]), full(teacher[pair.teacher])) for pair in self.pairs]


class FlowTerm(Term):
    """The flows between each layer of the list and the next one."""

    def __init__(self, knowledge: Flow, pairs: Sequence[Pair]) -> None:
        super().__init__(knowledge, pairs)
        if len(pairs) < 2:
            found = ", ".join(f"({pair.student!r}, {pair.teacher!r})" for pair in pairs)
            raise PlanError(f"flow needs at least two layers to flow between, found {found}; name them with layers=")
        ranks = {len(shape) for pair in pairs for shape in (pair.student_shape, pair.teacher_shape)}
        if ranks not in ({3}, {1}):
            found = ", ".join(f"{pair.student!r} {pair.student_shape}" for pair in pairs)
            raise PlanError(f"flow needs images or vectors in all its layers, found {found}; name others")

    def forward(self, student: Features, teacher: Features, target: object) -> Tensor:
        found = self.adapted(student, teacher)
        losses = []
        for (ours, theirs), (our_next, their_next) in itertools.pairwise(found):
            one, other = aligned(ours, our_next), aligned(theirs, their_next)
            losses.append(self.knowledge(one, other))  # type: ignore[arg-type]
        return self.knowledge.weight * torch.stack(losses).mean()


def aligned(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers of one network at the smaller of their sizes."""
    if first.ndim != 4:
        return first, second
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    return resize(first, size), resize(second, size)


class ContrastiveTerm(Term):
    """Embeddings of both networks, and a queue of the teacher's last ones with their labels."""

    queue: Tensor
    labels: Tensor

    def __init__(self, knowledge: Contrastive, pairs: Sequence[Pair]) -> None:
        super().__init__(knowledge, pairs)
        self.settings = knowledge
        self.heads = nn.ModuleList(
            nn.ModuleList([nn.Linear(width(shape), knowledge.dimension) for shape in shapes])
            for shapes in ((pair.student_shape, pair.teacher_shape) for pair in pairs)
        )
        self.register_buffer("queue", torch.zeros(len(pairs), knowledge.queue, knowledge.dimension))
        self.register_buffer("labels", torch.full((knowledge.queue,), EMPTY))

    def forward(self, student: Features, teacher: Features, target: object) -> Tensor:
        losses, embeddings = [], []
        count = len(next(iter(student.values())))
        labels = self.labels_of(target, count)
        candidates = torch.cat([labels, self.labels])
        allowed = (candidates != EMPTY) & ((candidates != labels[:, None]) | (candidates == NO_LABEL))
        for i, (ours, theirs) in enumerate(self.adapted(student, teacher)):
            one, other = (head(x) for head, x in zip(self.heads[i], (ours, theirs), strict=True))  # type: ignore[call-overload]
            losses.append(self.settings(one, other, self.queue[i], allowed))
            embeddings.append(other.detach())
        size = self.settings.queue
        self.queue = torch.cat([torch.stack(embeddings), self.queue], 1)[:, :size]
        self.labels = candidates[:size]
        return self.settings.weight * torch.stack(losses).mean()

    def labels_of(self, target: object, count: int) -> Tensor:
        """The class of each sample, where the target says it."""
        whole = isinstance(target, Tensor) and target.shape == (count,) and not target.is_floating_point()
        if whole and isinstance(target, Tensor):
            return target.long()
        return torch.full((count,), NO_LABEL, device=self.labels.device)


def full(features: Tensor) -> Tensor:
    """Features in at least 32 bits: sums of squares leave float16's range."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def make_term(knowledge: AnyKnowledge, pairs: Sequence[Pair]) -> Term:
    """The running form of a kind of knowledge. Raises: PlanError where its layers do not suit it."""
    if isinstance(knowledge, Contrastive):
        return ContrastiveTerm(knowledge, pairs)
    if isinstance(knowledge, Flow):
        return FlowTerm(knowledge, pairs)
    return (WholeTerm if isinstance(knowledge, Similarity) else Term)(knowledge, pairs)
