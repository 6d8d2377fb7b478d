"""Choose the 12,000 images of Fashion-MNIST that ship with the package, and write them into it.

Run as `python scripts/choose_fashion_mnist.py [folder of the four official files]`, with pared importable. The choice
is balanced by class and depends on nothing but the images; `pared.data.fashion_mnist` says how.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pared.data.fashion_mnist import FILE, FOLDER, choose, pack
from pared.errors import DataError

OUT = Path(__file__).resolve().parents[1] / "src" / "pared" / "data" / FILE


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else FOLDER
    try:
        content = pack(choose(folder))
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    OUT.write_bytes(content)
    print(f"{OUT.relative_to(OUT.parents[3])}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
