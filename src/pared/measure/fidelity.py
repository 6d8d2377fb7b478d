"""How close two sets of outputs are, by streaming: constant memory, whatever the number of samples.

Parity (a file against its own PyTorch model) and fidelity (against the baseline) are both taken with `Comparison`.
Cosine similarity is not offered: an output twice too large has cosine 1.
"""

from __future__ import annotations

import math

import numpy as np

from pared.errors import MeasureError
from pared.report.data import Agreement

# The signal of a reference that is zero everywhere: a difference from it is a very low ratio, not minus infinity.
TINY = float(np.finfo(np.float64).tiny)


class Comparison:
    """Counts pairs of outputs in, one batch at a time.

    Example:
        >>> comparison = Comparison()
        >>> comparison.update(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]))
        >>> comparison.result()
        Agreement(sqnr_db=20.0, max_abs=0.5, agreement=1.0)
    """

    def __init__(self) -> None:
        self.values = 0
        self.signal = 0.0
        self.noise = 0.0
        self.max_abs = 0.0
        self.rows = 0
        self.same_class = 0
        self.class_scores = True

    def update(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Count one batch in.

        Args:
            reference: What the outputs should be; any shape, finite.
            candidate: What they are; the same shape.

        Raises:
            MeasureError: The shapes differ, or either holds NaN or infinity.
        """
        if reference.shape != candidate.shape:
            raise MeasureError(
                f"outputs to compare have shapes {reference.shape} and {candidate.shape}; "
                "they must come from the same inputs"
            )
        for name, array in (("reference", reference), ("compared", candidate)):
            bad = int(np.count_nonzero(~np.isfinite(array)))
            if bad:
                raise MeasureError(
                    f"the {name} output holds NaN or infinity in {bad} of {array.size} values; "
                    "look for overflow or a division by zero in the model"
                )
        expected, found = reference.astype(np.float64), candidate.astype(np.float64)
        difference = np.abs(expected - found)
        self.values += expected.size
        self.signal += float(np.square(expected).sum())
        self.noise += float(np.square(difference).sum())
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))
        floating = np.issubdtype(reference.dtype, np.floating)
        if floating and reference.ndim == 2 and reference.shape[1] >= 2:
            self.rows += len(reference)
            self.same_class += int(np.count_nonzero(reference.argmax(axis=1) == candidate.argmax(axis=1)))
        else:
            self.class_scores = False

    def result(self) -> Agreement:
        """The figures over everything counted.

        Returns:
            `sqnr_db` = 10 log10(sum(reference^2) / sum((reference - candidate)^2)), None where nothing differs;
            `max_abs`, the largest difference; `agreement`, the fraction of rows with the same largest column, None
            where the outputs are not class scores (floating, two dimensions, at least two columns).

        Raises:
            MeasureError: Nothing was counted.
        """
        if self.values == 0:
            raise MeasureError("no outputs to compare; give at least one batch of data")
        return Agreement(
            sqnr_db=10 * math.log10(max(self.signal, TINY) / self.noise) if self.noise > 0 else None,
            max_abs=self.max_abs,
            agreement=self.same_class / self.rows if self.class_scores else None,
        )
