"""A process that holds one exported file open and runs it when told: `python -m pared.targets.worker TARGET FILE ...`.

Torch is not imported here, so that the process weighs what the runtime weighs, and starts quickly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pared.errors import ParedError
from pared.measure.worker import private_streams, serve
from pared.targets.sessions import open_session


def worker_command(target: str, file: Path, *, threads: int, inputs_file: Path, trust: bool = False) -> list[str]:
    """The arguments that start a worker for a file, as `measure.latency` and `measure.memory` take them.

    `-P` keeps the current folder off the import path: measuring a file runs no code that lies beside it. The worker
    runs this very pared, also where the caller put it on `sys.path` by hand.
    """
    home = str(Path(__file__).parents[2])
    start = f"import runpy, sys; sys.path.append({home!r}); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    return [
        *(sys.executable, "-P", "-c", start, "pared.targets.worker", target, str(file)),
        *("--threads", str(threads), "--inputs", str(inputs_file)),
        *(["--trust"] if trust else []),
    ]


def write_inputs(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write the inputs of one call, in the file's order, for a worker to read."""
    np.savez(path, *arrays, allow_pickle=False)


def read_inputs(path: Path) -> list[np.ndarray]:
    """What `write_inputs` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{index}"] for index in range(len(stored.files))]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the pipe closes. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pared.targets.worker", description=main.__doc__)
    parser.add_argument("target")
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--trust", action="store_true")
    options = parser.parse_args(argv)
    requests, replies = private_streams()
    try:
        session = open_session(options.target, options.file, threads=options.threads, trust=options.trust)
        inputs = read_inputs(options.inputs)
        serve(lambda: session.run(inputs), requests, replies)
    except ParedError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
