"""`python -m pared`: the same as the command `pared`."""

import sys

from pared.cli import main

if __name__ == "__main__":
    sys.exit(main())
