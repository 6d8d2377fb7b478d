"""What `make demo` takes and gives once pared is installed: seconds, and the figures of its own report."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Results


def main() -> None:
    results = Results("demo", fresh=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pared", "demo"], check=True, cwd=folder)
        seconds = time.perf_counter() - start
        report = json.loads((Path(folder) / "runs/demo/report.json").read_text(encoding="utf8"))
    final = report["final"]
    accuracy, before = final["metrics"]["accuracy"], final["baseline_metrics"]["accuracy"]
    results.add(
        {
            "seconds": seconds,
            "accuracy": accuracy,
            "baseline_accuracy": before,
            "speedup": final["speedup"],
            "size_bytes": final["size_bytes"],
            "baseline_size_bytes": final["baseline_size_bytes"],
            "parity": final["parity"],
            "fidelity": final["fidelity"],
        }
    )
    results.claim(2, "demo after installation, seconds", seconds, "<=", 180.0)
    results.claim(2, "demo: accuracy lost on test, float to int8", before - accuracy, "<=", 0.005)
    results.claim(2, "demo: speed-up, low end (above 1 is the verdict faster)", final["speedup"]["low"], ">=", 1.0)
    results.claim(2, "demo: float file over int8 file", final["baseline_size_bytes"] / final["size_bytes"], ">=", 3.5)


if __name__ == "__main__":
    main()
