"""How long it takes until pared can be used: `import pared` over `import torch`, and `pared --help`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import numpy as np
from harness import Results

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, pared": [sys.executable, "-c", "import torch, pared"],
    "import pared": [sys.executable, "-c", "import pared"],
    "pared --help": [sys.executable, "-m", "pared", "--help"],
}
ROUNDS = 15


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (4000, len(values))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    results = Results("startup", fresh=True)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)  # fills the disk cache
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    for name, values in times.items():
        low, high = interval_of_median(values)
        results.add({"what": name, "median_s": statistics.median(values), "low_s": low, "high_s": high})
    over = [both - torch for both, torch in zip(times["import torch, pared"], times["import torch"], strict=True)]
    results.claim(2, "import pared over import torch, seconds", statistics.median(over), "<=", 0.3)
    results.claim(2, "pared --help, seconds", statistics.median(times["pared --help"]), "<=", 0.5)


if __name__ == "__main__":
    main()
