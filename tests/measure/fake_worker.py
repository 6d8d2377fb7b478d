"""A worker that makes its durations up: a script without a line of ours, so that the parent's side is tested alone.

Reads the protocol as documented, and writes to FOLDER one line a life and a turn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--ms", type=float, default=1.0, help="one call")
    parser.add_argument("--noise", type=float, default=0.0, help="relative, of each call")
    parser.add_argument("--luck", type=float, default=0.0, help="relative, of each life of the process")
    parser.add_argument("--drift", type=float, default=0.0, help="relative, by turn, common to all workers")
    options = parser.parse_args()
    lives, turns = options.folder / f"lives-{options.name}", options.folder / "turns"
    with lives.open("a") as file:
        file.write("life\n")
    generator = random.Random(f"{options.name}{lives.stat().st_size}")
    base = options.ms * (1 + generator.gauss(0, options.luck))
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        with turns.open("a") as file:
            file.write(f"{options.name}\n")
        now = base * (1 + options.drift * len(turns.read_text().split()))
        durations = [round(now * (1 + generator.gauss(0, options.noise)) * 1e6) for _ in range(request["calls"])]
        sys.stdout.write(json.dumps({"ns": durations}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
