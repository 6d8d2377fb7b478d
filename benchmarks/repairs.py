"""What each repair and rounding of `QuantizeStatic` gives EfficientNet-Lite0, alone and together: SQNR and seconds.

    python benchmarks/repairs.py IMAGES [--quick]

IMAGES is a parquet file of 500 ImageNet photographs, as for `efficientnet_lite0.py`. Calibrated on its first 128,
judged in ONNX Runtime on the other 372. Migration asks for layer norms: `minilm.py` has the files of a transformer. No
rival: what is compared is the default with its alternatives.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0 import CALIBRATION, make_pared, prepared
from harness import RESULTS, Results

from pared.errors import ParedError
from pared.measure.environment import usable_cores
from pared.measure.fidelity import Comparison
from pared.targets.sessions import open_session

FOLD, FAST = "fold_batch_norms", "correct_bias"
FULL = {"kind": "correct_bias", "method": "full"}
DEFAULT, FOLDED = "fast correction (the default)", "batch norms folded"
NEAREST = (FOLDED, DEFAULT, "full correction", "equalization", "equalization, fast correction")
SETTINGS: dict[str, dict[str, Any]] = {
    FOLDED: {"repairs": [FOLD]},
    DEFAULT: {"repairs": [FOLD, FAST]},
    "full correction": {"repairs": [FOLD, FULL]},
    "equalization": {"repairs": [FOLD, "equalize"]},
    "equalization, fast correction": {"repairs": [FOLD, "equalize", FAST]},
    "AdaRound": {"repairs": [FOLD], "weights": {"rounding": "adaround"}},
    "AdaRound, fast correction": {"repairs": [FOLD, FAST], "weights": {"rounding": "adaround"}},
    "stochastic rounding, fast correction": {"repairs": [FOLD, FAST], "weights": {"rounding": "stochastic"}},
    "4-bit weights, fast correction": {"repairs": [FOLD, FAST], "weights": {"bits": 4}},
    "4-bit weights, AdaRound, fast correction": {
        "repairs": [FOLD, FAST],
        "weights": {"bits": 4, "rounding": "adaround"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer images, no JSON")
    options = parser.parse_args()
    from network import efficientnet_lite0

    calibration = 16 if options.quick else CALIBRATION
    x, labels = prepared(options.images)
    judged, wanted = x[CALIBRATION:], labels[CALIBRATION:]
    judged, wanted = (judged[:32], wanted[:32]) if options.quick else (judged, wanted)
    model = efficientnet_lite0()
    with torch.no_grad():
        reference = torch.cat([model(batch) for batch in torch.from_numpy(judged).split(16)]).numpy()
    with tempfile.TemporaryDirectory() as name:
        results = Results("repairs", folder=Path(name) if options.quick else RESULTS)
        for what, settings in SETTINGS.items():
            if results.done(settings=what) is not None:
                continue
            file, start = Path(name) / "model.onnx", time.perf_counter()
            make_pared(model, x[:calibration], file, **settings)
            seconds = time.perf_counter() - start
            session = open_session("onnxruntime", file, threads=usable_cores())
            outputs = np.concatenate([session.run([judged[i : i + 16]])[0] for i in range(0, len(judged), 16)])
            comparison = Comparison()
            comparison.update(reference, outputs)
            found = comparison.result()
            figures = {"sqnr_db": found.sqnr_db, "agreement": found.agreement, "seconds": seconds}
            results.add({"settings": what, **figures, "top1": float((outputs.argmax(1) == wanted).mean())})
        found_db = {row["settings"]: row["sqnr_db"] for row in results.rows}
        results.claim(3, "the default repairs over folding alone, dB", found_db[DEFAULT] - found_db[FOLDED], ">=", 0.0)
        others = {name: db for name, db in found_db.items() if name in NEAREST and name != DEFAULT}
        best = max(others, key=lambda name: others[name])
        what = f"the default repairs over the best other ones with rounding to nearest ({best}), dB"
        results.claim(3, what, found_db[DEFAULT] - found_db[best], ">=", 0.0)


if __name__ == "__main__":
    try:
        main()
    except ParedError as error:
        raise SystemExit(f"{error}") from None
