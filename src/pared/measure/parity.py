"""The gate that an exported file must pass: agree with the PyTorch model of the same stage."""

from __future__ import annotations

from collections.abc import Callable

from pared.errors import ParityError
from pared.report.data import Agreement

# A float export runs the same arithmetic in another order. One float32 operation rounds by 2^-24 relative (144 dB);
# networks of some hundred layers lose 20 to 50 dB of that to accumulation and fused kernels. A wrong axis, weight or
# padding leaves less than 40 dB. 60 dB, an RMS error of 0.1 %, lies between the two.
FLOAT_FLOOR_DB = 60.0
# An integer output that is a quantum off in one value of six, its root mean square being 40 quanta of 255, is at 40 dB.
# Runtimes round ties and sums in their own way: that much is faithful, however little quantization itself costs.
QUANTUM_FLOOR_DB = 40.0
# Repairs take back what quantization shifts, not what the last bit flips: the flips may be twice the power of the cost.
SLACK_DB = 3.0
UNKNOWN = "compare the outputs of single layers to find the operator that the runtime computes differently"


def check_parity(
    agreement: Agreement,
    *,
    floor_db: float = FLOAT_FLOOR_DB,
    where: str,
    parted: Callable[[], str] = lambda: "",
) -> None:
    """Raise `ParityError` where a file is further from its own PyTorch model than rounding explains.

    Args:
        agreement: The file's outputs against the model's.
        floor_db: Least SQNR in dB. An integer file needs a lower one than a float file: where a value lies on the
            border of two quanta, a difference in the last bit becomes a whole quantum.
        where: The stage, for the message.
        parted: Asked only then: a clause that names the layer where the two part, or "" where none is to be found.
    """
    if agreement.sqnr_db is None or agreement.sqnr_db >= floor_db:
        return
    same = "" if agreement.agreement is None else f", same class on {agreement.agreement:.1%} of samples"
    message = (
        f"{where}: the exported file and its PyTorch model disagree: SQNR {agreement.sqnr_db:.1f} dB where at least "
        f"{floor_db:.1f} dB is expected (largest difference {agreement.max_abs:.3g}{same}); "
        "the file is not what was measured in PyTorch, so the run stops here; "
    )
    try:
        clause = parted()
    except Exception as error:  # whatever a runtime raises for a part of a model: the whole is wrong all the same
        raise ParityError(message + UNKNOWN) from error
    raise ParityError(message + (clause or UNKNOWN))
