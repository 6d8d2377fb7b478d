"""What a teacher says, as a target: divergences between a student's and a teacher's outputs.

Tensors in, one number out. `ResponseLoss` picks a formula by name, for the caller's own loop as for `Distill`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from pared.distill.decoupled import decoupled_divergence
from pared.errors import DataError
from pared.step import settings

Kind = Literal["kl", "decoupled", "mse", "bernoulli"]
Temperature = Annotated[
    float, pydantic.Field(description="What both outputs are divided by before they become probabilities.", gt=0)
]
Beta = Annotated[
    float,
    pydantic.Field(description="Response decoupled: weight of the classes that are not the target's, 1 for it.", ge=0),
]


def soft_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of a student's softened classes from a teacher's, times the temperature squared.

    The square keeps the gradient's size when the temperature changes (section 2.1).

    Args:
        student: Logits, shape (samples, classes).
        teacher: Logits of the same shape; no gradient flows into them unless they want one.
        temperature: Above 0; 1 leaves the probabilities as they are.

    Returns:
        Sum over classes, one value a sample, shape (samples,); at least 0 but for rounding, 0 where both agree.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2. Deviation: the divergence instead of the cross
        entropy, which differs by the teacher's entropy and has the same gradient.

    Example:
        >>> soft_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.4438])
    """
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * temperature**2


def bernoulli_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Divergence of independent yes-or-no labels, a teacher's probabilities as soft labels, times temperature squared.

    Args:
        student: Logits of any shape, one for each label.
        teacher: Logits of the same shape.
        temperature: Above 0.

    Returns:
        Mean over all labels, a scalar; 0 where both agree.

    Source: arXiv:1503.02531 for each label as a distribution over two classes. It is binary cross entropy with soft
        labels, less the teacher's entropy, which has no gradient.

    Example:
        >>> bernoulli_divergence(torch.tensor([[0.0]]), torch.tensor([[2.0]]), temperature=1.0)
        tensor(0.3278)
    """
    p = torch.sigmoid(teacher / temperature)
    entropy = F.binary_cross_entropy_with_logits(teacher / temperature, p)
    return (F.binary_cross_entropy_with_logits(student / temperature, p) - entropy) * temperature**2


@settings
class ResponseLoss:
    """The loss of a student's outputs against a teacher's: the mean over samples, and over positions where there are.

    A value, and a function of (student, teacher), or of (student, teacher, target).

    Example:
        >>> ResponseLoss(temperature=2)(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(0.4438)
    """

    kind: Annotated[
        Kind,
        pydantic.Field(
            description="kl: classes softened by the temperature. decoupled: the same in two parts, needs labels. mse: "
            "regression. bernoulli: several labels at once."
        ),
    ] = "kl"
    temperature: Temperature = 4.0
    beta: Beta = 8.0

    def __call__(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, ignore_index: int = -100
    ) -> Tensor:
        """A scalar; 0 where both agree.

        Args:
            student: Raw outputs. Classes are dimension 1, as in `nn.CrossEntropyLoss`: (samples, classes) or (samples,
                classes, positions...). They are the last one where `target` has the shape of all dimensions before it.
            teacher: The same shape.
            target: Class indices, for `decoupled`, and to leave out positions that hold `ignore_index`.
            ignore_index: The class index of positions that do not count.

        Raises:
            DataError: Shapes differ, or `decoupled` has no class indices.
        """
        if student.shape != teacher.shape:
            raise DataError(
                f"the student's outputs are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
                "both must have the same classes"
            )
        student = student.float() if student.dtype in (torch.float16, torch.bfloat16) else student
        teacher = teacher.to(student.dtype)
        if self.kind == "mse":
            return F.mse_loss(student, teacher)
        if self.kind == "bernoulli":
            return bernoulli_divergence(student, teacher, temperature=self.temperature)
        labels = class_indices(student, target)
        student, teacher = rows(student, labels), rows(teacher, labels)
        labels = None if labels is None else labels.reshape(-1)
        keep = None if labels is None else labels != ignore_index
        if self.kind == "kl":
            each = soft_divergence(student, teacher, temperature=self.temperature)
        elif labels is None or keep is None:
            raise DataError(
                "decoupled distillation needs class indices as labels; give batches as (inputs, labels), or "
                "response='kl', which needs none"
            )
        else:
            each = decoupled_divergence(
                student, teacher, labels.where(keep, 0), temperature=self.temperature, beta=self.beta
            )
        # Masked, not indexed: the number of rows that count would have to come from the GPU first.
        return each.mean() if keep is None else (each * keep).sum() / keep.sum().clamp(min=1)


def class_indices(outputs: Tensor, target: object) -> Tensor | None:
    """The target, where it is class indices of these outputs."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool or outputs.ndim < 2:
        return None
    fits = target.shape in {outputs.shape[:1] + outputs.shape[2:], outputs.shape[:-1]}
    return target if fits else None


def rows(outputs: Tensor, labels: Tensor | None) -> Tensor:
    """Outputs with one row for each thing that is classified, shape (rows, classes), in the order of the labels."""
    if outputs.ndim == 1:
        return outputs[None]
    last = labels is not None and labels.shape != outputs.shape[:1] + outputs.shape[2:]
    return (outputs if last else outputs.movedim(1, -1)).reshape(-1, outputs.shape[-1 if last else 1])
